"""Tiles of matrices whose rows lie at one distance, and products of them: the inner loops that kernels share.

A matrix is a pointer and the distance between its rows, or a tensor descriptor, and then the distance is not looked at.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile(A, stride, row, end, k, depth, ROWS: tl.constexpr, DEPTH: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """Rows from `row` on and columns from `k` on; zeros from row `end` and column `depth` on.

    A descriptor knows the end of its matrix only: rows between `end` and there come as they are.
    """
    if DESCRIPTORS:
        a = A.load([row, k])
    else:
        rows, columns = row + tl.arange(0, ROWS), k + tl.arange(0, DEPTH)
        inside = (rows < end)[:, None] & (columns < depth)[None, :]
        a = tl.load(A + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    return a


@triton.jit
def less_centre(w, CENTRE, k, depth, DEPTH: tl.constexpr):
    """Rows of W from column `k` on, freed of what all have in common."""
    if CENTRE is not None:
        columns = k + tl.arange(0, DEPTH)
        w -= tl.load(CENTRE + columns, mask=columns < depth, other=0.0)[None, :]
    return w


@triton.jit
def add_dot(a, b, acc, INTERPRETED: tl.constexpr):
    """acc + a bᵀ in float32; float32 inputs by multiply-adds, as tensor cores would shorten them."""
    if INTERPRETED:  # Triton's interpreter multiplies bfloat16 wrongly, and in silence
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, tl.trans(b), acc, input_precision="ieee")


@triton.jit
def add_product(
    acc, A, a_stride, a_row, a_end, B, b_stride, b_row, b_end, CENTRE, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """acc (ROWS, COLUMNS) + A Bᵀ over all of `depth`."""
    for k in range(0, depth, DEPTH):
        a = tile(A, a_stride, a_row, a_end, k, depth, ROWS, DEPTH, DESCRIPTORS)
        b = tile(B, b_stride, b_row, b_end, k, depth, COLUMNS, DEPTH, DESCRIPTORS)
        acc = add_dot(a, less_centre(b, CENTRE, k, depth, DEPTH), acc, INTERPRETED)
    return acc


@triton.jit
def paired_product(
    A, a_stride, D, d_stride, row, end, B, b_stride, b_row, b_end, CENTRE, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A Bᵀ and D Bᵀ (ROWS, COLUMNS), each tile of B loaded once for both."""
    value = tl.zeros((ROWS, COLUMNS), tl.float32)
    change = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, depth, DEPTH):
        a = tile(A, a_stride, row, end, k, depth, ROWS, DEPTH, DESCRIPTORS)
        d = tile(D, d_stride, row, end, k, depth, ROWS, DEPTH, DESCRIPTORS)
        b = tile(B, b_stride, b_row, b_end, k, depth, COLUMNS, DEPTH, DESCRIPTORS)
        b = less_centre(b, CENTRE, k, depth, DEPTH)
        value = add_dot(a, b, value, INTERPRETED)
        change = add_dot(d, b, change, INTERPRETED)
    return value, change
