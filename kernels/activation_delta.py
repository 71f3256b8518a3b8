"""Activation functions on a stack (value, changes), with or without a gate: one read, one write.

A program takes a block of the stack's numbers: their values once, with what all changes share, then the block of every
change in turn. Where all changes of a block are short, which is the rule, only the short form is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from finf_fast.kernels.activations import far_change, is_near, near_change, shared, value
from finf_fast.kernels.numerics import rounded


@dataclass(frozen=True)
class Block:
    """Numbers that a program takes, and its warps."""

    BLOCK: int
    num_warps: int


@triton.jit
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
    for q in range(0, CHANGES):
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
    block = _block()
    _activation_delta_kernel[(triton.cdiv(M, block.BLOCK),)](
        *(x, gate, y, M, len(y) - 1, x.stride(0), 0 if gate is None else gate.stride(0)),
        X_MOVES=len(x) > 1,
        GATE_MOVES=gate is not None and len(gate) > 1,
        KIND=kind,
        BLOCK=block.BLOCK,
        num_warps=block.num_warps,
    )


def _block() -> Block:
    return Block(1024, 4)
