"""Activation functions on a stack (value, changes), with or without a gate: one read, one write.

A program takes a block of the stack's numbers: their values once, with what all changes share, then the block of every
change in turn. Where all changes of a block are short, which is the rule, only the short form is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from finf_fast.kernels.activations import KINDS, far_change, is_near, near_change, shared, value
from finf_fast.kernels.configurations import INTERPRETER, OPTIONS, Specimen, architecture, settings_for
from finf_fast.kernels.numerics import rounded


@dataclass(frozen=True)
class Block:
    """Numbers that a program takes, and its warps."""

    BLOCK: int
    num_warps: int


# Eight numbers a thread: one load of 16 bytes in bfloat16, two in float32. More would make it likelier that a block
# holds a change too long for the short form. The interpreter's cost is by operation.
_GPU = Block(1024, 4)
STAGES = 1  # no product waits for a load
BLOCKS = {INTERPRETER: Block(8192, 1), 80: _GPU, 89: _GPU, 90: _GPU, 100: _GPU}


@triton.jit(do_not_specialize=["CHANGES"])
def _activation_delta_kernel(
    X, GATE, Y, M, CHANGES, x_q, gate_q,
    X_MOVES: tl.constexpr, GATE_MOVES: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = Y.dtype.element_ty
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < M
    h = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
    first, second = shared(h, KIND)
    f = value(h, first, second, KIND)
    g = h
    if GATE is not None:
        g = tl.load(GATE + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(Y + at, rounded(f * g, TYPE), mask=mask)
    else:
        tl.store(Y + at, rounded(f, TYPE), mask=mask)
    for _ in range(0, CHANGES):
        X += x_q
        Y += M
        if X_MOVES:
            d = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
            change = near_change(h, d, first, second, KIND)
            if KIND != "relu":
                near = is_near(h, d, KIND)
                if tl.min(near.to(tl.int32), 0) == 0:
                    change = tl.where(near, change, far_change(h, d, first, second, KIND))
            after = f + change
            if GATE is not None:
                change *= g
        else:
            after = f
            change = tl.zeros_like(f)
        if GATE_MOVES:
            GATE += gate_q
            change += after * tl.load(GATE + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(Y + at, rounded(change, TYPE), mask=mask)


def activation_delta(x: Tensor, gate: Tensor | None, y: Tensor, kind: str) -> None:
    """Fill `y` (1+Q, M), contiguous, from `x` and `gate`, (1+Q, 1, M) or leading size 1, last stride 1.

    As `finf_fast.ops.activation_delta`; float32 or bfloat16.
    """
    M = y.shape[1]
    block = settings_for(BLOCKS, architecture(x.device))
    _activation_delta_kernel[(triton.cdiv(M, block.BLOCK),)](
        *(x, gate, y, M, len(y) - 1, x.stride(0), 0 if gate is None else gate.stride(0)),
        X_MOVES=len(x) > 1,
        GATE_MOVES=gate is not None and len(gate) > 1,
        KIND=kind,
        BLOCK=block.BLOCK,
        num_warps=block.num_warps,
        num_stages=STAGES,
        **OPTIONS,
    )


def specimens(architecture: int) -> list[Specimen]:
    """Every function, plain in bfloat16 and gated in float32, which take fewest and most registers."""
    block = settings_for(BLOCKS, architecture)
    sizes = dict.fromkeys(["M", "x_q", "gate_q", "CHANGES"], "i32")
    return [
        Specimen(
            f"{kind} {'gated fp32' if gated else 'bf16'}",
            _activation_delta_kernel,
            dict.fromkeys(["X", "Y", "GATE"] if gated else ["X", "Y"], "*fp32" if gated else "*bf16") | sizes,
            {
                **({} if gated else {"GATE": None}),
                **{"X_MOVES": True, "GATE_MOVES": gated, "KIND": kind, "BLOCK": block.BLOCK},
            },
            num_warps=block.num_warps,
            num_stages=STAGES,
        )
        for kind in KINDS
        for gated in (False, True)
    ]
