"""From stored pixels to what a model eats: the scale, the order of the axes, and the mean and spread of the set."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from finf_fast import ops
from finf_fast.corpus.arrays import owned
from finf_fast.corpus.delivery import Shades, Starts, as_stored, integers, shaded
from finf_fast.corpus.files import MappedArray
from finf_fast.corpus.undecoded import Undecoded

if TYPE_CHECKING:
    from finf_fast.corpus.base import Corpus

__all__ = ["Pixels", "apart"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

LAYOUTS = {"NCHW": 4, "NHWC": 4, "NHW": 3}  # name -> dimensions it must have


class Pixels:
    """Decoder of feature rows. uint8 becomes float32 in [0, 1]; floats keep their dtype; then ``(x - mean) / std``.

    Every step is rounded as torchvision's ``ToTensor`` and ``Normalize`` round it, so a model sees the bits it was
    trained on.

    Args:
        shape: (N, …) as stored.
        dtype: as stored.
        mean, std: a number, or one per channel (axis 1 of what is delivered); None for 0 and 1.
        layout: how it is stored: ``"NHWC"`` is delivered as NCHW (a view: channels-last in memory), ``"NHW"`` gets a
            channel axis (N, 1, H, W), ``"NCHW"`` and None are delivered as stored.
        deliver: of uint8 pixels, ``"float32"`` or ``"bfloat16"``, the latter rounded from the former at the end.

    Raises:
        ValueError, TypeError: a layout, mean or std that does not fit the array.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype,
        mean: Any = None,
        std: Any = None,
        layout: Any = None,
        deliver: str | None = None,
    ):
        if layout is not None and LAYOUTS.get(layout) != len(shape):
            wanted = [name for name, dimensions in LAYOUTS.items() if dimensions == len(shape)] or "None"
            raise ValueError(f"layout: wanted {wanted} for an array of shape {shape}, got {layout!r}")
        self.layout = layout
        self._scaled = dtype == np.uint8
        if deliver is not None and (deliver not in DTYPES or not self._scaled):
            wanted = f"one of {sorted(DTYPES)}" if self._scaled else "None, for only uint8 pixels are converted"
            raise ValueError(f"dtype: wanted {wanted}, got {deliver!r}")
        self._delivered = deliver or "float32"
        if (mean is not None or std is not None) and not (self._scaled or dtype.kind == "f"):
            raise ValueError(f"mean, std: wanted pixels or floats to apply them to, got an array of {dtype}")
        # Applied to the stored order of axes, before the permutation, which is then a view.
        last = layout == "NHWC"
        channels = shape[-1] if last else 1 if layout == "NHW" else shape[1] if len(shape) > 1 else 1
        trailing = 0 if last or layout == "NHW" else max(0, len(shape) - 2)
        hint = "; layout='NHWC' where the channels come last" if layout is None and len(shape) == 4 else ""
        self.mean = _per_channel("mean", mean, channels, hint)
        self.std = _per_channel("std", std, channels, hint)
        if self.std is not None and not (self.std > 0).all():
            raise ValueError(f"std: wanted numbers above 0, got {std}")
        self._trailing = (1,) * trailing
        self._integers = dtype.kind in "iu" and not self._scaled
        one = all(values is None or len(values) == 1 for values in (self.mean, self.std))
        run = math.prod(shape[1:]) if one else 1 if last else math.prod(shape[2:])
        self._shades = self._table(1 if one else channels, run)
        self._as_stored = False

    def rows(self, array: MappedArray, start: int, stop: int) -> torch.Tensor:
        """Rows ``[start, stop)`` of an array of the shape and dtype that this decoder was made for."""
        count = array.row_items
        starts = range(start * count, stop * count, count) if count else np.zeros(stop - start, np.int64)
        return self.runs(array, starts, array.shape[1:])

    def runs(self, array: MappedArray, starts: Starts, shape: tuple[int, ...]) -> torch.Tensor:
        """One row from each of the items ``starts`` on, (B, …) of a sample's stored ``shape``.

        Raises:
            DamagedFile: the file no longer holds them.
        """
        count = math.prod(shape)
        if self._as_stored:
            return as_stored(array, starts, count).view(len(starts), *shape)
        if self._scaled:
            return shaded(array, starts, self._shades, *self._order(shape))
        if self._integers:
            x = integers(array, starts, count)
        else:
            x = as_stored(array, starts, count)
            self._normalise(x.view(len(starts), *shape).numpy())
        return self._ordered(x.view(len(starts), *shape))

    def __call__(self, raw: np.ndarray) -> torch.Tensor:
        """Rows as stored (B, …) to a tensor of its own memory."""
        if self._integers:
            return self._ordered(owned(raw))
        # numpy, not torch: this runs beside the model's forwards and must not wake a second team of torch's threads.
        x = raw.astype(np.float32 if self._scaled else raw.dtype.newbyteorder("="), order="C")
        if self._scaled:
            x /= np.float32(255)
        self._normalise(x)
        decoded = self._ordered(torch.from_numpy(x))
        return decoded.to(DTYPES[self._delivered]) if self._scaled else decoded

    def undecoded(self) -> Pixels | None:
        """The same, but rows stay as stored, for :meth:`decode` to be applied later; None where they are not uint8."""
        if self._shades is None or not self._shades.run:
            return None
        other = copy.copy(self)
        other._as_stored = True
        return other

    def table(self, device: torch.device) -> torch.Tensor:
        """(C, 256) what uint8 pixels become, on a device."""
        return self._shades.table.to(device)

    def decode(self, raw: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """(B, …) uint8 rows as stored, where the table is, to the bits that :meth:`runs` makes of them on the CPU."""
        return self._ordered(ops.decode_pixels(raw, table, self._shades.run))

    def settings(self) -> dict[str, Any]:
        """For the fingerprint and the description."""
        mean, std = (None if v is None else v.tolist() for v in (self.mean, self.std))
        delivered = {} if self._delivered == "float32" else {"dtype": self._delivered}
        return {"mean": mean, "std": std, "layout": self.layout, **delivered}

    def _normalise(self, x: np.ndarray) -> None:
        """In place, in the dtype that x has."""
        if self.mean is not None:
            x -= self._broadcast(self.mean, x.dtype)
        if self.std is not None:
            x /= self._broadcast(self.std, x.dtype)

    def _table(self, channels: int, run: int) -> Shades | None:
        """What every one of 256 values becomes, by the same steps as a whole picture."""
        if not self._scaled:
            return None
        mean, std = (np.broadcast_to(1.0 * n if v is None else v, channels) for v, n in ((self.mean, 0), (self.std, 1)))
        mean, std = (np.ascontiguousarray(v, np.float32) for v in (mean, std))
        table = np.arange(256, dtype=np.float32) / np.float32(255)
        table = torch.from_numpy((table - mean[:, None]) / std[:, None]).to(DTYPES[self._delivered]).contiguous()
        return Shades(table, run, torch.from_numpy(mean), torch.from_numpy(std))

    def _broadcast(self, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return values.astype(dtype).reshape(-1, *self._trailing)

    def _order(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        """Sizes and strides of a stored sample as :meth:`_ordered` delivers it; None where it lies as it is stored."""
        if self.layout == "NHWC":
            H, W, C = shape
            return (C, H, W), (1, W * C, C)
        return (1, *shape) if self.layout == "NHW" else shape, None

    def _ordered(self, x: torch.Tensor) -> torch.Tensor:
        if self.layout == "NHWC":
            return x.permute(0, 3, 1, 2)
        return x.unsqueeze(1) if self.layout == "NHW" else x


def apart(corpus: Corpus, pixels: Pixels) -> Undecoded | None:
    """:meth:`Corpus.undecoded` of one whose batches are what its ``_pixels`` make, alone or before the labels."""
    plain = pixels.undecoded()
    if plain is None or corpus.transform is not None:
        return None
    stored = copy.copy(corpus)
    stored._pixels, table = plain, functools.cache(pixels.table)

    def decode(batch: Any) -> Any:
        raw, *others = [batch] if isinstance(batch, torch.Tensor) else batch
        decoded = pixels.decode(raw, table(raw.device))
        return (decoded, *others) if others else decoded

    return Undecoded(stored, decode, "pixels", pixels.settings())


def _per_channel(argument: str, values: float | Sequence[float] | None, channels: int, hint: str) -> np.ndarray | None:
    if values is None:
        return None
    try:
        array = np.atleast_1d(np.asarray(values, np.float64))
    except (TypeError, ValueError):
        raise TypeError(f"{argument}: wanted a number or a sequence of numbers, got {values!r}") from None
    if array.ndim != 1 or len(array) not in (1, channels) or not np.isfinite(array).all():
        raise ValueError(f"{argument}: wanted 1 or {channels} finite numbers (channels), got {values!r}{hint}")
    return array
