"""Group norm of a stack (value, changes): the shared loops over the groups, one parameter for a channel's space."""

from __future__ import annotations

from torch import Tensor

from finf_fast.kernels.normalize import normalize


def group_norm_delta(x, weight, bias, dweight, dbias, y: Tensor, eps: float, *, groups: int, space: int) -> None:
    """Fill `y` from `x`, both (1+Q, B groups, C / groups * space). As `finf_fast.ops.group_norm_delta`."""
    normalize(x, None, (weight, bias, dweight, dbias), y, None, eps, centred=True, groups=groups, run=space)
