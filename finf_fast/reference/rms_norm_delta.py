"""RMS norm of a stack of (value, exact changes)."""

from __future__ import annotations

from finf_fast.reference.layer_norm_delta import row_norm

__all__ = ["rms_norm_delta"]


def rms_norm_delta(stack, weight, *, dweight=None, residual=None, eps=1e-6):
    """See `finf_fast.ops.rms_norm_delta`."""
    return row_norm(stack, weight, None, dweight, None, residual, eps, centred=False)
