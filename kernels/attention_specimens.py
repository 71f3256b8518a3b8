"""The kernels behind attention_delta as a test compiles them without a GPU."""

from __future__ import annotations

import itertools

import torch

from finf_fast.kernels.attention_delta import change_kernel, large_change_kernel, value_kernel
from finf_fast.kernels.attention_tiles import TILES, registers
from finf_fast.kernels.configurations import Specimen, settings_for

_TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_WIDTHS = (64, 128, 256, 512)
_NAMES = {None: "plain", "*fp32": "masked and capped", "*u8": "bool mask and capped"}


def specimens(architecture: int) -> list[Specimen]:
    """Every tile with all that moves: plain scores, and masked and capped ones, of texts behind each other.

    What is added is a mask at any distances. A change, which takes the most registers, comes without texts too, and
    with a bool mask as it mostly is, which takes more in narrow heads: keys without gaps, rows beginning anywhere.
    """
    cases = [
        *itertools.product((value_kernel, change_kernel, large_change_kernel), _TYPES, _WIDTHS, (None,), (False,)),
        *itertools.product((value_kernel, change_kernel, large_change_kernel), _TYPES, _WIDTHS, ("*fp32",), (True,)),
        *itertools.product((change_kernel,), _TYPES, _WIDTHS, ("*fp32", "*u8"), (False,)),
    ]
    return [_specimen(*case, architecture) for case in cases]


def _specimen(kernel, kind: str, width: int, mask: str | None, texts: bool, architecture: int) -> Specimen:
    tile = settings_for(TILES, architecture).of(_TYPES[kind], width, mask is not None)
    strides = [name for name in kernel.arg_names if name.islower() and "_" in name]
    sizes = [*strides, "QUERIES", "HEADS", "GROUP", "T", "TK", "E", "EV"]
    signature = dict.fromkeys("QKV", f"*{kind}") | dict.fromkeys(sizes, "i32") | {"OUT": f"*{kind}", "scale": "fp32"}
    signature |= dict.fromkeys(["Y", "TOP", "TOTAL", "LARGE"], "*fp32") | {"LEADER": "*i32"}
    constexprs = dict.fromkeys(["CAUSAL", "Q_MOVES", "K_MOVES", "V_MOVES"], True)
    constexprs |= {"BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N, "WIDTH": width, "WIDTH_V": width}
    signature |= {"MASK": mask, "cap": "fp32", "FIRST": "*i32", "END": "*i32"}
    if mask is None:
        constexprs |= {"MASK": None, "cap": None}
    if not texts:
        constexprs |= {"FIRST": None, "END": None}
    if mask == "*u8":
        constexprs["m_k"] = 1
    unit = "HGMMA" if architecture == 90 and tile.BLOCK_M >= 64 else "HMMA"
    return Specimen(
        f"{kernel.fn.__name__} {kind} {width} {_NAMES[mask]}{', texts' if texts else ''}",
        kernel,
        {name: found for name, found in signature.items() if name in kernel.arg_names and name not in constexprs},
        {name: value for name, value in constexprs.items() if name in kernel.arg_names},
        tile.num_warps,
        tile.num_stages,
        unaligned=("MASK", "m_b", "m_h", "m_t") if mask == "*u8" else (),
        instructions=(unit,) if kind == "bf16" else (),
        options=registers(architecture, _TYPES[kind], width, tile),
    )
