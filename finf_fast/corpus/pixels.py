"""From stored pixels to what a model eats: the scale, the order of the axes, and the mean and spread of the set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from finf_fast.corpus.arrays import owned

__all__ = ["Pixels"]

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

    Raises:
        ValueError, TypeError: a layout, mean or std that does not fit the array.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, mean: Any = None, std: Any = None, layout: Any = None):
        if layout is not None and LAYOUTS.get(layout) != len(shape):
            wanted = [name for name, dimensions in LAYOUTS.items() if dimensions == len(shape)] or "None"
            raise ValueError(f"layout: wanted {wanted} for an array of shape {shape}, got {layout!r}")
        self.layout = layout
        self._scaled = dtype == np.uint8
        if (mean is not None or std is not None) and not (self._scaled or dtype.kind == "f"):
            raise ValueError(f"mean, std: wanted pixels or floats to apply them to, got an array of {dtype}")
        # Applied to the stored order of axes, before the permutation, which is then a view.
        last = layout == "NHWC"
        channels = shape[-1] if last else 1 if layout == "NHW" else shape[1] if len(shape) > 1 else 1
        trailing = 0 if last or layout == "NHW" else max(0, len(shape) - 2)
        self.mean = _per_channel("mean", mean, channels)
        self.std = _per_channel("std", std, channels)
        if self.std is not None and not (self.std > 0).all():
            raise ValueError(f"std: wanted numbers above 0, got {std}")
        self._trailing = (1,) * trailing

    def __call__(self, raw: np.ndarray) -> torch.Tensor:
        """Rows as stored (B, …) to a tensor of its own memory."""
        if not self._scaled and self.mean is None and self.std is None:
            return self._ordered(owned(raw))
        # numpy, not torch: this runs beside the model's forwards and must not wake a second team of torch's threads.
        x = raw.astype(np.float32 if self._scaled else raw.dtype.newbyteorder("="))
        if self._scaled:
            x /= np.float32(255)
        if self.mean is not None:
            x -= self._broadcast(self.mean, x.dtype)
        if self.std is not None:
            x /= self._broadcast(self.std, x.dtype)
        return self._ordered(torch.from_numpy(x))

    def settings(self) -> dict[str, Any]:
        """For the fingerprint and the description."""
        mean, std = (None if v is None else v.tolist() for v in (self.mean, self.std))
        return {"mean": mean, "std": std, "layout": self.layout}

    def _broadcast(self, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return values.astype(dtype).reshape(-1, *self._trailing)

    def _ordered(self, x: torch.Tensor) -> torch.Tensor:
        if self.layout == "NHWC":
            return x.permute(0, 3, 1, 2)
        return x.unsqueeze(1) if self.layout == "NHW" else x


def _per_channel(argument: str, values: float | Sequence[float] | None, channels: int) -> np.ndarray | None:
    if values is None:
        return None
    try:
        array = np.atleast_1d(np.asarray(values, np.float64))
    except (TypeError, ValueError):
        raise TypeError(f"{argument}: wanted a number or a sequence of numbers, got {values!r}") from None
    if array.ndim != 1 or len(array) not in (1, channels) or not np.isfinite(array).all():
        raise ValueError(f"{argument}: wanted 1 or {channels} finite numbers (channels), got {values!r}")
    return array
