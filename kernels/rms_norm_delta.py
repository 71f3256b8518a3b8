"""RMS norm of a stack (value, changes): the shared loops, without centring and bias."""

from __future__ import annotations

from torch import Tensor

from finf_fast.kernels.normalize import normalize


def rms_norm_delta(x, residual, weight, dweight, y: Tensor, total: Tensor | None, eps: float) -> None:
    """Fill `y` (1+Q, N, D) and, with a residual, their sum `total`. As `finf_fast.ops.rms_norm_delta`."""
    normalize(x, residual, (weight, None, dweight, None), y, total, eps, centred=False)
