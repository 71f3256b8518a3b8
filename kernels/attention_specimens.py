"""The kernels behind attention_delta as a test compiles them without a GPU."""

from __future__ import annotations

import itertools

import torch

from finf_fast.kernels.attention_delta import (
    TILES,
    change_kernel,
    large_change_kernel,
    registers,
    value_kernel,
)
from finf_fast.kernels.configurations import Specimen, settings_for

_TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_WIDTHS = (64, 128, 256, 512)
_MASKS = {None: "plain", "*fp32": "masked and capped", "*u8": "bool mask and capped"}


def specimens(architecture: int) -> list[Specimen]:
    """Every tile with all that moves: plain scores, and masked and capped ones.

    What is added is a mask at any distances; of a change also a bool one as it mostly comes, which takes more registers
    in narrow heads: its keys without gaps, its rows beginning anywhere.
    """
    cases = [
        *itertools.product((value_kernel, change_kernel, large_change_kernel), _TYPES, _WIDTHS, (None, "*fp32")),
        *itertools.product((change_kernel,), _TYPES, _WIDTHS, ("*u8",)),
    ]
    return [_specimen(*case, architecture) for case in cases]


def _specimen(kernel, kind: str, width: int, mask: str | None, architecture: int) -> Specimen:
    tile = settings_for(TILES, architecture).of(_TYPES[kind], width, mask is not None)
    strides = [name for name in kernel.arg_names if name.islower() and "_" in name]
    sizes = [*strides, "QUERIES", "HEADS", "GROUP", "T", "TK", "E", "EV"]
    signature = dict.fromkeys("QKV", f"*{kind}") | dict.fromkeys(sizes, "i32") | {"OUT": f"*{kind}", "scale": "fp32"}
    signature |= dict.fromkeys(["Y", "TOP", "TOTAL", "LARGE"], "*fp32") | {"LEADER": "*i32"}
    constexprs = dict.fromkeys(["CAUSAL", "Q_MOVES", "K_MOVES", "V_MOVES"], True)
    constexprs |= {"BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N, "WIDTH": width, "WIDTH_V": width}
    signature |= {"MASK": mask, "cap": "fp32"}
    if mask is None:
        constexprs |= {"MASK": None, "cap": None}
    if mask == "*u8":
        constexprs["m_k"] = 1
    unit = "HGMMA" if architecture == 90 and tile.BLOCK_M >= 64 else "HMMA"
    return Specimen(
        f"{kernel.fn.__name__} {kind} {width} {_MASKS[mask]}",
        kernel,
        {name: found for name, found in signature.items() if name in kernel.arg_names and name not in constexprs},
        {name: value for name, value in constexprs.items() if name in kernel.arg_names},
        tile.num_warps,
        tile.num_stages,
        unaligned=("MASK", "m_b", "m_h", "m_t") if mask == "*u8" else (),
        instructions=(unit,) if kind == "bf16" else (),
        options=registers(architecture, _TYPES[kind], width, tile),
    )
