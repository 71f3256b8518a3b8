"""Stored integers to the int64 that a model reads, where the batch is to be: an eighth to half of the bytes travel."""

from __future__ import annotations

import torch
from torch import Tensor

from finf_fast import reference
from finf_fast.ops import dispatch
from finf_fast.ops.border import check_dtype, place
from finf_fast.ops.register import register

__all__ = ["STORED", "decode_tokens"]

# How finf_fast._cuda is told the type of what is stored (finf::Stored).
STORED = {torch.uint8: 0, torch.int8: 1, torch.uint16: 2, torch.int16: 3, torch.uint32: 4, torch.int32: 5}


def decode_tokens(raw: Tensor) -> Tensor:
    """Every number as int64: what the loops that read a corpus make of it on a CPU.

    Args:
        raw: uint8, int8, uint16, int16, uint32 or int32; (B, L) with rows without gaps, whatever lies between them, or
            of any shape without gaps.

    Returns:
        raw's shape, int64, contiguous.

    Raises:
        TypeError: a dtype not named above.
        ValueError: gaps in a row.
    """
    return _decode_tokens(raw)


def _allocate(raw):
    check_dtype("raw", raw, *STORED)
    if not raw.is_contiguous() and (raw.dim() != 2 or raw.stride(1) != 1):
        raise ValueError(f"raw: wanted rows without gaps, got {tuple(raw.shape)} with strides {raw.stride()}")
    return raw.new_empty(raw.shape, dtype=torch.int64)


def _run_reference(raw):
    return reference.decode_tokens(raw)


def _run_cuda(raw):
    out = _allocate(raw)
    # Without gaps it is one long row: its 16-byte borders are all at whole steps from the first.
    rows = (1, raw.numel(), 0) if raw.is_contiguous() else (*raw.shape, raw.stride(0))
    dispatch.compiled_cuda().decode_tokens(*place(raw), raw.data_ptr(), STORED[raw.dtype], out.data_ptr(), *rows)
    return out


_FACES = {"cuda": _run_cuda, "reference": _run_reference}


@register("decode_tokens", "(Tensor raw) -> Tensor", _allocate)
def _decode_tokens(raw):
    _allocate(raw)
    return _FACES[dispatch.choose("decode_tokens", raw)](raw)
