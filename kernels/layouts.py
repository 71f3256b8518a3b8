"""Matrices as kernels read them at full speed: whole loads of 16 bytes, which Triton makes where it knows a matrix's
address, width and the distances in it to be multiples of 16, and a number at a time where not.

A number at a time is many times slower, needs more registers than there are, and cannot be copied into shared memory
behind a product's back; one copy of a matrix costs a hundredth of a product with it.
"""

from __future__ import annotations

from torch import Tensor

MULTIPLE = 16


def aligned(y: Tensor, *, turned: bool = False, both: bool = False) -> Tensor:
    """`y` (..., R, C) itself if it lies so, otherwise a copy whose rows end in zeros up to the next multiple.

    Args:
        y: of at least two dimensions.
        turned: columns instead of rows may be without gaps, as in the transpose of a matrix.
        both: R too ends in zeros up to a multiple.
    """
    if _lies_so(y, both) or (turned and _lies_so(y.mT, True)):
        return y
    R, C = y.shape[-2:]
    out = y.new_zeros(*y.shape[:-2], _up(R) if both else R, _up(C))
    out[..., :R, :C] = y
    return out


def _lies_so(y: Tensor, both: bool) -> bool:
    sizes = y.shape[-2:] if both else y.shape[-1:]
    numbers = (*sizes, *y.stride()[:-1])
    whole = all(number % MULTIPLE == 0 for number in numbers) and y.data_ptr() % MULTIPLE == 0
    return whole and (y.stride(-1) == 1 or y.numel() == 0)


def _up(size: int) -> int:
    return -(-size // MULTIPLE) * MULTIPLE
