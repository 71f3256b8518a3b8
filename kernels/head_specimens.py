"""The kernels behind linear_cross_entropy_delta as a test compiles them without a GPU."""

from __future__ import annotations

from finf_fast.kernels.configurations import Specimen, has_descriptors, roomy, settings_for
from finf_fast.kernels.head_finish import finish_far_kernel, finish_kernel
from finf_fast.kernels.head_sums import sums_kernel
from finf_fast.kernels.head_targets import inner_kernel, target_kernel
from finf_fast.kernels.linear_cross_entropy_delta import (
    FINISH_ROWS,
    INNER,
    TABLE,
    TARGET_BLOCK,
    choose,
    constants,
    target_options,
)


def specimens(architecture: int) -> list[Specimen]:
    """What is launched, of each kind the one that needs most."""
    pair = {"dx": True}
    everything = dict.fromkeys(("dx", "dW", "U", "db", "bias"), True)
    capped = {"SOFTCAP": True, "SMOOTHING": True}
    walks = [
        _walk_specimen(architecture, "pair", pair, paired=True),
        _walk_specimen(architecture, "pair, dense", {"dx": True, "dW": True}, paired=True),
        _walk_specimen(architecture, "pair, low rank and biases", {**everything, "dW": False}, paired=True),
        _walk_specimen(architecture, "pair, soft cap and smoothing", pair, paired=True, SOFTCAP=True, SMOOTHING=True),
        _walk_specimen(architecture, "queries", pair),
        _walk_specimen(architecture, "queries, dense", {"dx": True, "dW": True}),
        _walk_specimen(architecture, "queries, low rank and biases", {**everything, "dW": False}),
        _walk_specimen(architecture, "queries, soft cap", {**everything, "U": False}, SOFTCAP=True),
        _walk_specimen(architecture, "pair, low rank and all", {**everything, "dW": False}, paired=True, **capped),
        _walk_specimen(architecture, "pair, dense and all", {**everything, "U": False}, paired=True, **capped),
        _walk_specimen(architecture, "queries, low rank and all", {**everything, "dW": False}, **capped),
        _walk_specimen(architecture, "queries, dense and all", {**everything, "U": False}, **capped),
        _walk_specimen(architecture, "low rank alone", {"U": True}),
        _walk_specimen(architecture, "pair again", pair, paired=True, AFTER=True),
        _walk_specimen(architecture, "queries again", pair, AFTER=True),
        _walk_specimen(architecture, "float32 pair", pair, kind="fp32", paired=True),
        _walk_specimen(architecture, "float32 queries", {**everything, "dW": False}, kind="fp32"),
        _walk_specimen(architecture, "float32 pair and all", {**everything, "dW": False}, "fp32", True, **capped),
    ]
    targets = [
        _target_specimen("targets", dict.fromkeys(("dx", "U", "db", "bias"), True)),
        _target_specimen("targets, dense alone", {"dW": True}),
        _target_specimen("float32 targets", dict.fromkeys(("dx", "U", "db", "bias"), True), "fp32"),
    ]
    inner = [_inner_specimen("inner side", "bf16"), _inner_specimen("float32 inner side", "fp32")]
    return [*walks, *targets, *inner, *_finish_specimens()]


_LONG = ("X", "DX", "W", "X1", "DW")
_STRIDES = {f"{name}_stride": "i32" for name in ("x", "dx", "w", "x1", "dw")} | {"x1_rows": "i32"}
_ORDER = dict.fromkeys(("parts", "tiles_a_part", "group"), "i32")
_SIZES = {"N": "i32", "D": "i32", "V": "i32", "Q": "i32"}


def _walk_specimen(architecture, name, given, kind="bf16", paired=False, **flags) -> Specimen:
    settings, wide = settings_for(TABLE, architecture), kind == "fp32"
    descriptors = has_descriptors(architecture) and not wide
    tiles = choose(settings, wide, paired, given.keys() != {"dx"}, "SOFTCAP" in flags, "SMOOTHING" in flags)
    types = _types(given, kind, None if wide else False)
    if descriptors:
        block = {"X": tiles.rows, "DX": tiles.rows, "X1": tiles.rows, "W": tiles.columns, "DW": tiles.columns}
        types |= {name: f"tensordesc<{kind}[{block[name]},{tiles.depth}]>" for name in _LONG if types[name]}
    types |= {"FAR": "*i8", "VALUES": "*fp32", "CHANGES": "*fp32"}
    shape = constants(tiles, settings.rank, False, paired, False, False, 1 if wide else 2, descriptors) | flags
    tensor_cores = () if wide else ("HGMMA",) if architecture == 90 else ("HMMA",) if architecture < 90 else ()
    loads = () if not descriptors else ("UTMALDG",) if architecture == 90 else ()
    # What descriptors are not used for is copied behind the products' backs in another way.
    loads += ("LDGSTS",) if given.get("U") or not descriptors else ()
    return _specimen(
        *(name, sums_kernel, types, {**_STRIDES, **_SIZES, "rank": "i32", **_ORDER, "cap": "fp32"}),
        *(shape | {"INTERPRETED": False}, tiles.num_warps, tiles.num_stages),
        instructions=tensor_cores + loads,
        options=roomy(tiles.num_warps) if wide else {},
    )


def _types(given, kind, centre) -> dict:
    """Types of the tensors of the head; None for one that is not given."""
    own, wide = f"*{kind}", "*fp32"
    types = {"X": own, "DX": given.get("dx") and own, "W": own, "CENTRE": None if centre is False else wide}
    types |= {"X1": given.get("dW") and own, "DW": given.get("dW") and own}
    types |= {"INNER": given.get("U") and own, "U": given.get("U") and own}
    types |= {"BIAS": given.get("bias") and wide, "DB": given.get("db") and wide}
    return types | {"TARGET": "*i64", "Z_T": "*fp64", "D_T": wide}


def _specimen(name, kernel, types, numbers, constants, num_warps=4, num_stages=3, **more) -> Specimen:
    absent = {argument: None for argument, kind in types.items() if not kind}
    given = {argument: kind for argument, kind in types.items() if kind}
    return Specimen(name, kernel, given | numbers, absent | constants, num_warps, num_stages, **more)


def _target_specimen(name, given, kind="bf16") -> Specimen:
    numbers = {**_STRIDES, **_SIZES, "rank": "i32", "cap": "fp32", "ignore_index": "i32"}
    constants = {"SOFTCAP": True, "HALVES": 1 if kind == "fp32" else 2, "BLOCK": TARGET_BLOCK}
    types = _types(given, kind, None if kind == "fp32" else False)
    return _specimen(name, target_kernel, types, numbers, constants, options=target_options())


def _inner_specimen(name, kind) -> Specimen:
    types = {"X": f"*{kind}", "DX": f"*{kind}", "R": "*fp32", "INNER": f"*{kind}"}
    numbers = {"x_stride": "i32", "dx_stride": "i32", "N": "i32", "D": "i32", "Q": "i32", "rank": "i32"}
    halves = 1 if kind == "fp32" else 2
    constants = {"HALVES": halves, "ROWS": INNER.rows, "DEPTH": INNER.depth, "RANK": INNER.columns}
    sizes = (INNER.num_warps, INNER.num_stages)
    return _specimen(name, inner_kernel, types, numbers, constants, *sizes, instructions=("LDGSTS",))


def _finish_specimens() -> list[Specimen]:
    sums = {"Z_T": "*fp64", "VALUES": "*fp32", "CHANGES": "*fp32", "DELTA": "*fp32", "FAR": "*i8"}
    numbers = {"delta_stride": "i32", "N": "i32", "V": "i32", "Q": "i32", "parts": "i32", "epsilon": "fp32"}
    constants = {"SMOOTHING": True, "BLOCK": FINISH_ROWS}
    first, whole = {"TARGET": "*i64", "BASE": "*fp32"}, {**numbers, "ignore_index": "i32"}
    return [
        _specimen("finish", finish_kernel, sums | first, whole, constants),
        _specimen("finish again", finish_far_kernel, sums | {"AFTERS": "*fp32"}, numbers, constants),
    ]
