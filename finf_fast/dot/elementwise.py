"""Rules of the dot engine for what is added to or multiplied with activations, element by element: norms, tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finf_fast.calls import plain
from finf_fast.dot.changes import Change
from finf_fast.dot.taps import Taps, still, wide_sum
from finf_fast.order import Mixed

__all__ = ["ELEMENTWISE"]


def _scaled(taps: Taps, input: Any, other: Any = None) -> Tensor | None:
    """x ∘ p for a changed p, whichever comes first."""
    mine, theirs = taps.find(input, other)
    if (mine is None) == (theirs is None):
        return None
    (name, change), p, x = (mine, input, other) if mine else (theirs, other, input)
    if not plain(x):
        return None
    out, kept = p.detach() * x, taps.kept(x, name)
    return _elementwise(taps, out, p.shape, name, change, lambda g: g * kept())


def _shifted(taps: Taps, input: Any, other: Any = None, *, alpha: float = 1) -> Tensor | None:
    """x + p for a changed p, whichever comes first."""
    mine, theirs = taps.find(input, other)
    if (mine is None) == (theirs is None) or alpha != 1:
        return None
    (name, change), p, x = (mine, input, other) if mine else (theirs, other, input)
    if not plain(x):
        return None
    return _elementwise(taps, p.detach() + x, p.shape, name, change, lambda g: g)


def _spread(taps: Taps, input: Tensor, *sizes: Any) -> Tensor | None:
    """``p.expand(B, ...)``: a class token, given to every sample."""
    (found,) = taps.find(input)
    sizes = tuple(sizes[0]) if sizes and isinstance(sizes[0], (tuple, list)) else sizes
    if found is None or not sizes or sizes[0] != taps.samples or len(sizes) != input.dim():
        return None
    return _elementwise(taps, input.detach().expand(*sizes), input.shape, *found, lambda g: g)


def _elementwise(
    taps: Taps,
    out: Tensor,
    shape: torch.Size,
    name: str,
    change: Change,
    pulled: Callable[[Tensor], Tensor],
) -> Tensor | None:
    """``out``, to whose every element one of the parameter has been broadcast; ``pulled`` back to before that."""
    shape = torch.Size((1,) * (out.dim() - len(shape)) + tuple(shape))
    if out.dim() == 2 and len(out) != taps.samples and len(out) % taps.samples == 0 and shape[0] == 1:
        view = (taps.samples, -1, out.shape[1])
        return taps.passed(out, (name, lambda g: change.formed(wide_sum(pulled(g).reshape(view)))))
    if taps.samples > 1 and not (out.dim() and len(out) == taps.samples and shape[0] == 1):
        raise Mixed(f"{name}, which meets values of shape {tuple(out.shape)} that are not {taps.samples} samples")
    lead = () if taps.samples == 1 else (0,)
    sums = [d for d, n in enumerate(shape) if n == 1 and out.shape[d] != 1 and d not in lead]

    def use(gradient: Tensor) -> Tensor:
        whole = pulled(gradient)
        wide = torch.promote_types(whole.dtype, torch.float32)
        whole = whole.sum(sums, keepdim=True, dtype=wide) if sums else whole
        return change.formed(whole.reshape(taps.samples, -1))

    return taps.passed(out if sums or out.is_contiguous() else out.clone(), (name, use))


def _layer_norm(
    taps: Taps, input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor | None:
    shape = tuple(normalized_shape)
    return _affine(taps, lambda: F.layer_norm(input, shape, None, None, eps), weight, bias, shape)


def _rms_norm(
    taps: Taps, input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> Tensor | None:
    shape = tuple(normalized_shape)
    return _affine(taps, lambda: F.rms_norm(input, shape, None, eps), weight, None, shape)


def _group_norm(
    taps: Taps, input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor | None:
    channels = (-1, *(1,) * (input.dim() - 2))
    return _affine(taps, lambda: F.group_norm(input, num_groups, None, None, eps), weight, bias, channels)


def _batch_norm(
    taps: Taps,
    input: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """In eval mode, where it is (x - mean) / √(var + eps), and both statistics may be what a query changes."""
    mean, var = running_mean, running_var
    if training or mean is None or not plain(input):
        return None
    alike = all(t is None or t.dtype == mean.dtype for t in (weight, bias))  # else torch's own takes no such weights
    if alike and taps.find(mean, var, weight, bias) == [None] * 4:
        return None
    channels = (-1, *(1,) * (input.dim() - 2))
    its_mean, its_var = taps.find(mean, var)
    scale = torch.rsqrt(still(var, its_var) + eps).view(channels)

    def normalised() -> Tensor:
        out = input - still(mean, its_mean).view(channels)
        if its_mean is not None:
            out = _elementwise(taps, out, scale.shape, *its_mean, torch.neg)
        x, out = out, out * scale
        if its_var is None:
            return out
        slope = -0.5 * scale.flatten()[:, None] ** 3
        kept, change = taps.kept(x, its_var[0]), replace(its_var[1], dense=its_var[1].dense * slope)
        return _elementwise(taps, out, scale.shape, its_var[0], change, lambda g: g * kept())

    out = _affine(taps, normalised, weight, bias, channels, always=True)
    return out.to(input.dtype)  # as torch's own: statistics stay in float32 where the rest is in half precision


def _affine(
    taps: Taps, normalised: Callable[[], Tensor], weight: Any, bias: Any, shape: tuple[int, ...], always: bool = False
) -> Tensor | None:
    """Normalised values times a weight plus a bias, both of this shape before broadcasting; None if neither changes."""
    mine, its_bias = taps.find(weight, bias)
    if mine is its_bias is None and not always:
        return None
    x = normalised()
    if weight is not None:
        weight = still(weight, mine).view(shape)
        out = x * weight
        if mine is not None:
            kept = taps.kept(x, mine[0])
            out = _elementwise(taps, out, weight.shape, *mine, lambda g: g * kept())
        x = out
    if bias is not None:
        bias = still(bias, its_bias).view(shape)
        x = x + bias
        x = x if its_bias is None else _elementwise(taps, x, bias.shape, *its_bias, lambda g: g)
    return x


def _same(function: Callable) -> Callable:
    """A parameter in another dtype or shape, or with a number added: what a query does to it stays the same."""

    def derived(taps: Taps, input: Any, *args: Any, **kwargs: Any) -> Tensor | None:
        (found,) = taps.find(input)
        numbers = all(not isinstance(a, Tensor) for a in (*args, *kwargs.values()))
        if found is None or not numbers:
            return None
        out = function(input.detach(), *args, **kwargs)
        if not out.is_floating_point() or (found[1].u is not None and out.shape != input.shape):
            return None
        return taps.known(out, *found)

    return derived


def _turned(taps: Taps, input: Any, *args: Any) -> Tensor | None:
    """The transpose of a changed matrix."""
    (found,) = taps.find(input)
    if found is None or args or input.dim() != 2:
        return None
    return taps.known(input.detach().t(), found[0], found[1].t(input.shape))


def _added(taps: Taps, input: Any, other: Any = None, **kwargs: Any) -> Tensor | None:
    """x + p for a changed p, or a number added to p."""
    p, number = (input, other) if isinstance(input, Tensor) else (other, input)
    if isinstance(number, (int, float)) and not kwargs:
        return _same(torch.add)(taps, p, number)
    return _shifted(taps, input, other, **kwargs)


ELEMENTWISE: Mapping[Callable, Callable] = {
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _scaled),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _added),
    Tensor.expand: _spread,
    **{f: _same(f) for f in (Tensor.float, Tensor.to, Tensor.view, Tensor.reshape, Tensor.unsqueeze)},
    **dict.fromkeys((torch.t, Tensor.t, Tensor.T.__get__, Tensor.mT.__get__), _turned),
}
