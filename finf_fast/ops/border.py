"""The border checks that the operations share: every message names the argument, what was wanted and what was got.

They look at shapes, dtypes and devices only, never at values, so that no check waits for a device and every check also
runs on fake tensors while torch.compile traces.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "CODES",
    "check_dtype",
    "check_rows",
    "check_same_device",
    "check_shape",
    "check_softcap",
    "check_targets",
    "place",
    "result_dtype",
    "rows",
]

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# How finf_fast._C and finf_fast._cuda are told the type behind a raw pointer.
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}


def check_dtype(name: str, x: Tensor, *wanted: torch.dtype) -> None:
    """TypeError unless `x` is of one of the dtypes."""
    if x.dtype not in wanted:
        raise TypeError(f"{name}: wanted {' or '.join(_word(dtype) for dtype in wanted)}, got {_word(x.dtype)}")


def check_shape(name: str, x: Tensor, letters: str, *sizes: int | None) -> None:
    """ValueError unless `x` has these sizes (None: any); `letters` is the shape as the docstring spells it."""
    got = x.shape
    fits = len(got) == len(sizes)
    for wanted, size in zip(sizes, got):  # noqa: B905  (a generator would take twice as long)
        fits = fits and (wanted is None or wanted == size)
    if not fits:
        known = [letter if size is None else size for letter, size in zip(letters.split(","), sizes, strict=True)]
        raise ValueError(
            f"{name}: wanted shape ({letters}) = ({', '.join(map(str, known))}), got {tuple(map(int, got))}"
        )


def check_same_device(**tensors: Tensor) -> None:
    """ValueError unless all tensors lie on the device of the first."""
    (first, x), *others = tensors.items()
    for name, y in others:
        if y.device != x.device:
            raise ValueError(f"{name}: wanted on {x.device}, where {first} is, got {y.device}")


def check_rows(name: str, x: Tensor) -> None:
    """ValueError unless the numbers of a row that is to be written are neighbours in memory."""
    if x.numel() and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name}: wanted rows without gaps (last stride 1), got strides {x.stride()}")


def check_softcap(softcap: float | None) -> None:
    """ValueError unless `softcap` is None or above 0, and a normal number of float32, in which faces divide by it: one
    that rounds to 0 or to infinity there would cap nothing or give NaN."""
    least, most = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    if softcap is not None and not least <= softcap <= most:
        held = f"in float32: {least:.1e} to {most:.1e}"
        raise ValueError(f"softcap: wanted a number above 0 or None, got {softcap} ({held})")


def check_targets(target: Tensor, V: int, ignore_index: int) -> None:
    """IndexError, by row, unless every target is in [0, V) or ignored.

    Only a CPU may look without waiting: any other device is left to assert it when it gets there.
    """
    good = ((target >= 0) & (target < V)) | (target == ignore_index)
    if target.device.type != "cpu":
        torch._assert_async(good.all())
    elif not good.all():
        row = int((~good).nonzero()[0])
        got = f"got {int(target[row])} in row {row}"
        raise IndexError(f"target: wanted 0 to {V - 1} or ignore_index {ignore_index}, {got}")


def result_dtype(*inputs: Tensor) -> torch.dtype:
    """float64 if an input is, else float32: a loss is never rounded to a shorter input's type."""
    return torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32


def rows(x: Tensor) -> Tensor:
    """`x` itself if its rows have no gaps, whatever lies between rows; otherwise a contiguous copy."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def place(x: Tensor) -> tuple[int, int]:
    """Where a CUDA kernel on `x` runs, as finf_fast._cuda is told it: index of the device, address of its stream."""
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def multiprocessors(x: Tensor) -> int:
    """Of the device that a CUDA kernel on `x` runs on."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
