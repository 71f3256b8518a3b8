"""Random numbers as a function of (seed, sample, draw): before and after share them, any shard can redraw them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from finf_fast import reference
from finf_fast.ops import dispatch
from finf_fast.ops.border import check_dtype, check_shape, place
from finf_fast.ops.register import register

__all__ = ["noise", "uniform_integers"]


def noise(seed: int, samples: Tensor, draw: int, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers for each sample, whose bits depend on nothing but seed, sample, draw and position.

    Four numbers at a time come from one block of Philox4x32-10, whose key is the seed and whose counter is
    (position / 4, draw, sample), by Box and Muller's transformation in whole numbers: every face, instruction set,
    batch and number of threads gives the same bits. The largest size is 6.66, which normal numbers pass once in 4e10.

    Args:
        seed: from 0, below 2^63.
        samples: (S,) int64, what each sample is known by; any value.
        draw: number of the draw, from 0, below 2^32: independent noise for the same sample.
        shape: of one sample's noise, any number of sizes; at most 2^33 numbers.

    Returns:
        (S, *shape) float32, contiguous, on the device of `samples`.

    Raises:
        TypeError: samples are not int64.
        ValueError: samples are not one row, or a number is out of its range.

    Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    return _noise(samples, seed, draw, list(shape))


def uniform_integers(seed: int, samples: Tensor, draw: int, high: int) -> Tensor:
    """One whole number in [0, high) for each sample, such as a time step, as reproducible as `noise` and independent of
    it.

    It is the first 64 bits of a block of its own, as a fraction, times `high`: no number is likelier than another by
    more than one part in 2^64 / high.

    Args:
        seed, samples, draw: as for `noise`.
        high: from 1, below 2^31.

    Returns:
        (S,) int64 on the device of `samples`; in plain torch on every device.
    """
    _check(samples, seed, draw)
    if not 1 <= high < 1 << 31:
        raise ValueError(f"high: wanted from 1, below 2^31, got {high}")
    return reference.uniform_integers(seed, samples, draw, high)


def _check(samples: Tensor, seed: int, draw: int) -> None:
    check_dtype("samples", samples, torch.int64)
    check_shape("samples", samples, "S", None)
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed: wanted from 0, below 2^63, got {seed}")
    if not 0 <= draw < 1 << 32:
        raise ValueError(f"draw: wanted from 0, below 2^32, got {draw}")


def _allocate(samples, seed, draw, shape):
    _check(samples, seed, draw)
    if any(size < 0 for size in shape) or math.prod(shape) > 1 << 33:
        raise ValueError(f"shape: wanted sizes from 0, at most 2^33 numbers, got {tuple(shape)}")
    return samples.new_empty((len(samples), *shape), dtype=torch.float32)


def _run_reference(samples, seed, draw, shape):
    return reference.noise(seed, samples, draw, shape)


def _run_cpp(samples, seed, draw, shape):
    out, samples = _allocate(samples, seed, draw, shape), samples.contiguous()
    dispatch.compiled().noise(
        *(seed, samples.data_ptr(), draw, out.data_ptr()),
        *(len(samples), math.prod(shape), torch.get_num_threads()),
    )
    return out


def _run_cuda(samples, seed, draw, shape):
    out, samples = _allocate(samples, seed, draw, shape), samples.contiguous()
    dispatch.compiled_cuda().noise(
        *place(samples),
        *(seed, samples.data_ptr(), draw, out.data_ptr()),
        *(len(samples), math.prod(shape)),
    )
    return out


_FACES = {"cpp": _run_cpp, "cuda": _run_cuda, "reference": _run_reference}


@register("noise", "(Tensor samples, int seed, int draw, SymInt[] shape) -> Tensor", _allocate)
def _noise(samples, seed, draw, shape):
    _allocate(samples, seed, draw, shape)
    return _FACES[dispatch.choose("noise", samples)](samples, seed, draw, shape)
