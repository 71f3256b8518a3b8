"""A loss of the user's own: a callable ``(model, batch) -> loss per sample``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from finf_fast.loss.base import Loss, Result, batch_size


class Custom(Loss):
    """Wraps ``function(model, batch) -> (B,)``; its change is the difference of its two values.

    That difference is only as exact as the callable's own dtype, so a named loss is the better choice where one fits.

    Raises:
        ValueError: the callable returned something else than one loss a sample.
    """

    def __init__(self, function: Callable[[Any, Any], Tensor]):
        self._function = function
        self.name = (
            f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__name__)}"
        )

    def output(self, model: Any, batch: Any) -> Tensor:
        losses = self._function(model, batch)
        wanted = (batch_size(batch),)
        if not isinstance(losses, Tensor) or tuple(losses.shape) != wanted:
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"loss: wanted the callable to return one loss per sample, shape {wanted}, got {got}")
        return losses

    def finish(self, value: Tensor, change: Tensor, batch: Any) -> Result:
        return Result(value, change)

    def per_sample(self, model: Any, batch: Any) -> Tensor:
        return self.output(model, batch)
