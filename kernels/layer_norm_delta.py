"""Layer norm of a stack (value, changes): the shared loops, centred."""

from __future__ import annotations

from torch import Tensor

from finf_fast.kernels.normalize import normalize


def layer_norm_delta(x, residual, weight, bias, dweight, dbias, y: Tensor, total: Tensor | None, eps: float) -> None:
    """Fill `y` (1+Q, N, D) and, with a residual, their sum `total`. As `finf_fast.ops.layer_norm_delta`."""
    normalize(x, residual, (weight, bias, dweight, dbias), y, total, eps, centred=True)
