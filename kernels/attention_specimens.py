"""The kernels behind attention_delta as a test compiles them without a GPU."""

from __future__ import annotations

import itertools

import torch

from finf_fast.kernels.attention_delta import (
    TILES,
    Tile,
    change_kernel,
    large_change_kernel,
    registers,
    value_kernel,
)
from finf_fast.kernels.configurations import Specimen, settings_for


def specimens(architecture: int) -> list[Specimen]:
    """Every tile with all that moves: plain scores, and masked and capped ones."""
    tiles = settings_for(TILES, architecture)
    cases = itertools.product(
        (value_kernel, change_kernel, large_change_kernel),
        (("bf16", torch.bfloat16), ("fp32", torch.float32)),
        (64, 128, 256, 512),
        (False, True),
    )
    return [
        _specimen(kernel, kind, width, tiles.of(dtype, width, busy), busy, architecture)
        for kernel, (kind, dtype), width, busy in cases
    ]


def _specimen(kernel, kind: str, width: int, tile: Tile, busy: bool, architecture: int) -> Specimen:
    strides = [name for name in kernel.arg_names if name.islower() and "_" in name]
    sizes = [*strides, "QUERIES", "HEADS", "GROUP", "T", "TK", "E", "EV"]
    signature = dict.fromkeys("QKV", f"*{kind}") | dict.fromkeys(sizes, "i32") | {"OUT": f"*{kind}", "scale": "fp32"}
    signature |= dict.fromkeys(["Y", "TOP", "TOTAL", "LARGE"], "*fp32") | {"LEADER": "*i32"}
    constexprs = dict.fromkeys(["CAUSAL", "Q_MOVES", "K_MOVES", "V_MOVES"], True)
    constexprs |= {"BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N, "WIDTH": width, "WIDTH_V": width}
    if busy:
        signature |= {"MASK": "*fp32", "cap": "fp32"}
    else:
        constexprs |= {"MASK": None, "cap": None}
    unit = "HGMMA" if architecture == 90 and tile.BLOCK_M >= 64 else "HMMA"
    return Specimen(
        f"{kernel.fn.__name__} {kind} {width} {'masked and capped' if busy else 'plain'}",
        kernel,
        {name: kind for name, kind in signature.items() if name in kernel.arg_names},
        {name: value for name, value in constexprs.items() if name in kernel.arg_names},
        tile.num_warps,
        tile.num_stages,
        instructions=(unit,) if kind == "bf16" else (),
        options=registers(architecture, torch.float32 if kind == "fp32" else torch.bfloat16, width, tile),
    )
