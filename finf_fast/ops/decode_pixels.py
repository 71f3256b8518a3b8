"""Stored bytes to the numbers that a model reads, where the batch is to be: a quarter or half of the bytes travel."""

from __future__ import annotations

import torch
from torch import Tensor

from finf_fast import reference
from finf_fast.ops import dispatch
from finf_fast.ops.border import CODES, check_dtype, check_same_device, check_shape, place
from finf_fast.ops.register import register

__all__ = ["decode_pixels"]


def decode_pixels(raw: Tensor, table: Tensor, run: int) -> Tensor:
    """What each of 256 values becomes, looked up: scale, mean and spread are in the table, whose bits come out.

    The table is that of `finf_fast.corpus.pixels`, which makes it by the same steps as a whole picture, so the numbers
    have the bits of a batch decoded on the CPU.

    Args:
        raw: (N, ...) uint8, contiguous, in the order in which it is stored.
        table: (C, 256) float32 or bfloat16, contiguous (and, by the reference, any floating dtype).
        run: neighbouring bytes of one channel, from 1: H·W as stored NCHW, 1 as NHWC. A sample holds a multiple of
            C·run of them.

    Returns:
        raw's shape, table's dtype.

    Raises:
        TypeError: a dtype not named above.
        ValueError: shapes, sizes or devices do not fit, or there are gaps.
    """
    return _decode_pixels(raw, table, run)


def _allocate(raw, table, run):
    check_dtype("raw", raw, torch.uint8)
    check_dtype("table", table, *dispatch.TABLE["decode_pixels"]["reference"].dtypes)
    check_shape("table", table, "C,256", None, 256)
    check_same_device(raw=raw, table=table)
    if run < 1:
        raise ValueError(f"run: wanted from 1, got {run}")
    if not raw.dim() or raw[:1].numel() % (len(table) * run if len(table) else 1):
        raise ValueError(f"raw: wanted samples of a multiple of C*run = {len(table) * run}, got {tuple(raw.shape)}")
    for name, x in (("raw", raw), ("table", table)):
        if not x.is_contiguous():
            raise ValueError(f"{name}: wanted no gaps, got strides {x.stride()}")
    if not len(table):
        raise ValueError(f"table: wanted a row a channel, got shape {tuple(table.shape)}")
    return torch.empty_like(raw, dtype=table.dtype)


def _run_reference(raw, table, run):
    return reference.decode_pixels(raw, table, run)


def _run_cuda(raw, table, run):
    out = torch.empty_like(raw, dtype=table.dtype)
    dispatch.compiled_cuda().decode_pixels(
        *place(raw),
        *(raw.data_ptr(), table.data_ptr(), CODES[table.dtype], out.data_ptr()),
        *(raw.numel(), len(table), run),
    )
    return out


_FACES = {"cuda": _run_cuda, "reference": _run_reference}


@register("decode_pixels", "(Tensor raw, Tensor table, int run) -> Tensor", _allocate)
def _decode_pixels(raw, table, run):
    _allocate(raw, table, run)
    return _FACES[dispatch.choose("decode_pixels", table)](raw, table, run)
