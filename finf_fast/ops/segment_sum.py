"""Tokens to samples: the sum of each run of neighbouring columns, always added in the same order."""

from __future__ import annotations

import torch
from torch import Tensor

from finf_fast import reference
from finf_fast.ops import dispatch
from finf_fast.ops.border import (
    CODES,
    FLOATS,
    check_dtype,
    check_rows,
    check_same_device,
    check_shape,
    place,
    result_dtype,
    rows,
)
from finf_fast.ops.register import register

__all__ = ["segment_sum", "segment_sum_out"]


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Sum of ``values[q, offsets[s] : offsets[s + 1]]`` for every query q and sample s.

    Added in float64 in a fixed order and rounded once: the same input gives the same bits with any number of threads.
    A NaN stays in its own segment; an empty segment gives 0; columns before the first or after the last offset are
    left out.

    Args:
        values: (Q, N) float32, float64, bfloat16 or float16. Rows may lie any distance apart; columns that are not
            neighbours in memory are copied.
        offsets: (S + 1,) int64, not decreasing, from 0 or more to N or less.

    Returns:
        (Q, S), contiguous: float64 for float64, else float32.

    Raises:
        TypeError: a dtype not named above.
        ValueError: shapes or devices do not fit; (CPU) offsets that decrease or leave [0, N]. On a GPU nothing waits
            to look, and such offsets are undefined behaviour.
    """
    return _segment_sum(values, offsets)


def segment_sum_out(values: Tensor, offsets: Tensor, out: Tensor) -> None:
    """`segment_sum` written into `out` (Q, S), of the dtype that `segment_sum` would return, its rows without gaps."""
    _segment_sum_out(values, offsets, out)


def _allocate(values, offsets):
    _check(values, offsets)
    return values.new_empty((values.shape[0], offsets.shape[0] - 1), dtype=result_dtype(values))


def _check_out(values, offsets, out):
    _check(values, offsets)
    check_shape("out", out, "Q,S", values.shape[0], offsets.shape[0] - 1)
    check_dtype("out", out, result_dtype(values))
    check_rows("out", out)
    check_same_device(values=values, out=out)


def _check(values: Tensor, offsets: Tensor) -> None:
    check_dtype("values", values, *FLOATS)
    check_dtype("offsets", offsets, torch.int64)
    check_shape("values", values, "Q,N", None, None)
    check_shape("offsets", offsets, "S+1", None)
    if offsets.shape[0] == 0:
        raise ValueError("offsets: wanted S + 1 >= 1 numbers, got none")
    check_same_device(values=values, offsets=offsets)


def _run(values, offsets, out):
    _FACES[dispatch.choose("segment_sum", values)](rows(values), offsets.contiguous(), out)


def _run_reference(values, offsets, out):
    out.copy_(reference.segment_sum(values, offsets))


def _run_cpp(values, offsets, out):
    (Q, N), S = values.shape, offsets.shape[0] - 1
    dispatch.compiled().segment_sum(
        *(values.data_ptr(), CODES[values.dtype], values.stride(0)),
        offsets.data_ptr(),
        *(out.data_ptr(), out.stride(0)),
        *(Q, N, S, torch.get_num_threads()),
    )


def _run_cuda(values, offsets, out):
    (Q, N), S = values.shape, offsets.shape[0] - 1
    dispatch.compiled_cuda().segment_sum(
        *place(values),
        *(values.data_ptr(), CODES[values.dtype], values.stride(0)),
        offsets.data_ptr(),
        *(out.data_ptr(), out.stride(0)),
        *(Q, N, S),
    )


_FACES = {"cpp": _run_cpp, "cuda": _run_cuda, "reference": _run_reference}


@register("segment_sum", "(Tensor values, Tensor offsets) -> Tensor", _allocate)
def _segment_sum(values, offsets):
    out = _allocate(values, offsets)
    _run(values, offsets, out)
    return out


@register("segment_sum_out", "(Tensor values, Tensor offsets, Tensor(a!) out) -> ()", _check_out)
def _segment_sum_out(values, offsets, out):
    _check_out(values, offsets, out)
    _run(values, offsets, out)
