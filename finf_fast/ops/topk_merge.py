"""The running list of the K largest scores of each query, while scores arrive block by block."""

from __future__ import annotations

import torch
from torch import Tensor

from finf_fast import reference
from finf_fast.ops import dispatch
from finf_fast.ops.border import CODES, check_dtype, check_same_device, check_shape, multiprocessors, place, rows
from finf_fast.ops.register import register

__all__ = ["topk_merge", "topk_merge_"]


def topk_merge(values: Tensor, indices: Tensor, scores: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """The K largest of a running list and a new block; column j of the block is sample ``start + j``.

    A list is sorted by score, largest first; of equal scores (0 and -0 are equal) the smaller index comes first, so
    any cut into blocks gives the same list. A NaN score is left out. A place not yet filled is score -inf, index -1,
    and comes after a sample whose score really is -inf. Start from ``values`` all -inf and ``indices`` all -1.

    Args:
        values: (Q, K) the running list, sorted as above; float32 or float64.
        indices: (Q, K) int64, the samples of those scores.
        scores: (Q, S) the new block, of the dtype of `values`. Rows may lie any distance apart; columns that are not
            neighbours in memory are copied.
        start: index of the block's first column, 0 or more; start + S fits int64.

    Returns:
        values (Q, K) and indices (Q, K), new and contiguous.

    Raises:
        TypeError: a dtype not named above.
        ValueError: shapes or devices do not fit, `start` is out of range, or (CPU) the running list is not sorted or
            holds NaN. On a GPU nothing waits to look, and such a list gives an unsorted one.
    """
    return _topk_merge(values, indices, scores, start)


def topk_merge_(values: Tensor, indices: Tensor, scores: Tensor, start: int) -> None:
    """`topk_merge` in place: `values` and `indices`, both contiguous, become the merged list."""
    _topk_merge_(values, indices, scores, start)


def _allocate(values, indices, scores, start):
    _check(values, indices, scores, start)
    return values.new_empty(values.shape), indices.new_empty(indices.shape)


def _check_in_place(values, indices, scores, start):
    _check(values, indices, scores, start)
    for name, x in (("values", values), ("indices", indices)):
        if not x.is_contiguous():
            raise ValueError(f"{name}: wanted contiguous, to be written in place, got strides {x.stride()}")


def _check(values: Tensor, indices: Tensor, scores: Tensor, start: int) -> None:
    check_dtype("scores", scores, torch.float32, torch.float64)
    check_dtype("values", values, scores.dtype)
    check_dtype("indices", indices, torch.int64)
    check_shape("scores", scores, "Q,S", None, None)
    check_shape("values", values, "Q,K", scores.shape[0], None)
    check_shape("indices", indices, "Q,K", *values.shape)
    check_same_device(scores=scores, values=values, indices=indices)
    if start < 0:
        raise ValueError(f"start: wanted 0 or more, got {start}")
    most = torch.iinfo(torch.int64).max
    if start > most - scores.shape[1]:
        raise ValueError(f"start: wanted at most {most - scores.shape[1]}, for int64 to hold the index, got {start}")


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _run(values, indices, scores, start):
    _FACES[dispatch.choose("topk_merge", scores)](values, indices, rows(scores), start)


def _run_reference(values, indices, scores, start):
    merged, samples = reference.topk_merge(values, indices, scores, start)
    values.copy_(merged)
    indices.copy_(samples)


def _run_cpp(values, indices, scores, start):
    (Q, S), K = scores.shape, values.shape[1]
    dispatch.compiled().topk_merge(
        *(values.data_ptr(), indices.data_ptr()),
        *(scores.data_ptr(), CODES[scores.dtype], scores.stride(0)),
        *(start, Q, K, S, torch.get_num_threads()),
    )


def _run_cuda(values, indices, scores, start):
    (Q, S), K = scores.shape, values.shape[1]
    kernels = dispatch.compiled_cuda()
    splits, size = kernels.topk_merge_splits(multiprocessors(scores), Q, K, S, CODES[scores.dtype])
    parts = scores.new_empty(size, dtype=torch.uint8)
    kernels.topk_merge(
        *place(scores),
        *(values.data_ptr(), indices.data_ptr()),
        *(scores.data_ptr(), CODES[scores.dtype], scores.stride(0)),
        *(start, Q, K, S, splits, parts.data_ptr()),
    )


_FACES = {"cpp": _run_cpp, "cuda": _run_cuda, "reference": _run_reference}


@register("topk_merge", "(Tensor values, Tensor indices, Tensor scores, int start) -> (Tensor, Tensor)", _allocate)
def _topk_merge(values, indices, scores, start):
    _check(values, indices, scores, start)
    values, indices = _copy(values), _copy(indices)
    _run(values, indices, scores, start)
    return values, indices


@register("topk_merge_", "(Tensor(a!) values, Tensor(b!) indices, Tensor scores, int start) -> ()", _check_in_place)
def _topk_merge_(values, indices, scores, start):
    _check_in_place(values, indices, scores, start)
    _run(values, indices, scores, start)
