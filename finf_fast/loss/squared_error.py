"""Squared error of a prediction, per sample: regression, and the noise prediction of diffusion models."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from finf_fast import ops
from finf_fast.loss.base import Draw, Loss, Result, prediction, split, target_of


class SquaredError(Loss):
    """``mean((p - y)^2)`` (or the sum) over everything but the sample dimension.

    Args:
        reduction: ``"mean"`` or ``"sum"`` over a sample's elements.
    """

    name = "squared_error"

    def __init__(self, reduction: str = "mean"):
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction: wanted 'mean' or 'sum', got {reduction!r}")
        self.reduction = reduction

    def output(self, model: Any, batch: Any) -> Tensor:
        args, kwargs, _ = split(batch)
        return prediction(model(*args, **kwargs))

    def finish(self, value: Tensor, change: Tensor, batch: Any) -> Result:
        y = self._target(value, batch)
        samples = len(value)
        D = value[0].numel() if samples else 0
        p, dp = value.reshape(samples, D), change.reshape(len(change), samples, D)
        base, delta = ops.squared_error_delta(p, dp, y.reshape(samples, D))
        return Result(base / D, delta / D) if self.reduction == "mean" else Result(base, delta)

    def judged(self, value: Tensor, batch: Any) -> Tensor:
        return self._reduce((value - self._target(value, batch)).square(), 1)

    def fisher(self, value: Tensor, batch: Any, draw: Draw | None) -> Tensor:
        if draw is None:
            return self.judged(value, batch)
        normal = draw(value.shape[1:]).to(value)  # of the likelihood whose minus logarithm this loss is
        return (value * normal).flatten(1).sum(1) * self._second(value) ** 0.5

    def gauss_newton(self, value: Tensor, batch: Any, tangent: Tensor) -> Tensor:
        return tangent * self._second(value)

    def _second(self, value: Tensor) -> float:
        """The second derivative of a sample's loss by each of its elements."""
        return 2.0 / max(1, value[0].numel()) if self.reduction == "mean" else 2.0

    def _target(self, p: Tensor, batch: Any) -> Tensor:
        y = target_of(batch, self.name)
        if [n for n in y.shape[1:] if n != 1] != [n for n in p.shape[1:] if n != 1] or y.shape[0] != p.shape[0]:
            raise ValueError(f"target: wanted the prediction's shape {tuple(p.shape)}, got {tuple(y.shape)}")
        return y.to(p.dtype).reshape(p.shape)

    def _reduce(self, values: Tensor, first: int) -> Tensor:
        flat = values.flatten(first) if values.dim() > first else values.unsqueeze(-1)
        return flat.mean(-1) if self.reduction == "mean" else flat.sum(-1)
