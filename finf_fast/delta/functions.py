"""Rules of functions of one number: an exact change from `finf_fast.reference.changes`, or the op that fuses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finf_fast import ops
from finf_fast.delta.arithmetic import mapped_change, mul, put_in_place, wide
from finf_fast.delta.integers import collapse
from finf_fast.delta.stack import Stack, values_of
from finf_fast.delta.structure import behind, cast
from finf_fast.delta.table import rule
from finf_fast.reference import changes

NOTHING = 1e-3  # of a vector's length, below which what is left of it is taken from the vector, not from the change


def activation(kind: str) -> Callable[..., Stack]:
    """The rule of an activation that `finf_fast.ops.activation_delta` knows."""

    def run(input: Any, inplace: bool = False) -> Any:
        y = in_memory_order(lambda s: ops.activation_delta(s, kind), input.stacked)
        return put_in_place(input, Stack(y), inplace)

    return run


def in_memory_order(function: Callable[[Tensor], Tensor], s: Tensor) -> Tensor:
    """An elementwise function of a stack, which keeps its layout where it has no gaps: images stay channels-last."""
    order = sorted(range(s.dim()), key=lambda d: -s.stride(d))
    turned = s.permute(order)
    if order[0] != 0 or not turned.is_contiguous():
        return function(s)
    return function(turned).permute([order.index(d) for d in range(s.dim())])


for _kind in ("relu", "silu", "tanh", "sigmoid"):
    rule(_kind)(activation(_kind))


@rule("gelu")
def gelu(input, approximate="none"):
    return activation("gelu_tanh" if approximate == "tanh" else "gelu")(input)


def _simple(name: str) -> Callable[..., Stack]:
    function, change = getattr(torch, name), getattr(changes, f"{name}_change")
    return rule(name)(lambda input: mapped_change(input, function, change))


exp, log, sqrt, rsqrt, sin, cos = map(_simple, ("exp", "log", "sqrt", "rsqrt", "sin", "cos"))
for _name in ("expm1", "log1p", "erf", "square", "abs"):
    _simple(_name)
rule("__abs__", "absolute")(lambda input: mapped_change(input, torch.abs, changes.abs_change))


@rule("softplus")
def softplus(input, beta=1.0, threshold=20.0):
    def change(h: Tensor, d: Tensor) -> Tensor:
        smooth = changes.softplus_change(h, d, beta)
        return smooth if threshold == 20 else _above_threshold(smooth, h, d, beta, threshold)

    return mapped_change(input, lambda h: F.softplus(h, beta, threshold), change)


def _above_threshold(smooth: Tensor, h: Tensor, d: Tensor, beta: float, threshold: float) -> Tensor:
    """softplus' change where torch takes x for it past a threshold, a step down by softplus(-x), 2e-9 at 20."""
    after = h.double() + d.double()  # which side of the step, not to be decided by rounding
    was, over = h.double() * beta > threshold, after * beta > threshold
    left, missed = F.logsigmoid(beta * h) / beta, F.logsigmoid(beta * after).to(h.dtype) / beta
    crossed = smooth + torch.where(over, missed, 0) - torch.where(was, left, 0)
    return torch.where(was & over, d, crossed)


@rule("logsigmoid")
def logsigmoid(input):
    """log sigmoid(x) = -softplus(-x)."""
    return mapped_change(input, F.logsigmoid, lambda h, d: -changes.softplus_change(-h, -d))


@rule("leaky_relu")
def leaky_relu(input, negative_slope=0.01, inplace=False):
    found = mapped_change(
        input, lambda h: F.leaky_relu(h, negative_slope), lambda h, d: changes.leaky_relu_change(h, d, negative_slope)
    )
    return put_in_place(input, found, inplace)


@rule("elu")
def elu(input, alpha=1.0, inplace=False):
    found = mapped_change(input, lambda h: F.elu(h, alpha), lambda h, d: changes.elu_change(h, d, alpha))
    return put_in_place(input, found, inplace)


@rule("hardtanh")
def hardtanh(input, min_val=-1.0, max_val=1.0, inplace=False):
    found = mapped_change(
        input, lambda h: h.clamp(min_val, max_val), lambda h, d: changes.clamp_change(h, d, min_val, max_val)
    )
    return put_in_place(input, found, inplace)


@rule("relu6")
def relu6(input, inplace=False):
    return hardtanh(input, 0.0, 6.0, inplace)


@rule("hardsigmoid")
def hardsigmoid(input, inplace=False):
    found = mapped_change(input, F.hardsigmoid, lambda h, d: changes.clamp_change(h / 6 + 0.5, d / 6, 0.0, 1.0))
    return put_in_place(input, found, inplace)


@rule("hardswish")
def hardswish(input, inplace=False):
    return put_in_place(input, mul(input, hardsigmoid(input)), inplace)


@rule("mish")
def mish(input, inplace=False):
    kind = input.dtype
    x = cast(input, torch.promote_types(kind, torch.float32))  # the two steps between are not rounded to half
    return put_in_place(input, cast(mul(x, activation("tanh")(softplus(x))), kind), inplace)


@rule("glu")
def glu(input, dim=-1):
    half = input.size(dim) // 2
    return mul(input.narrow(dim, 0, half), activation("sigmoid")(input.narrow(dim, half, half)))


def _step(name: str) -> None:
    """A function of whole steps: where no query crosses one, nothing changes, and a crossing is a step exactly."""
    function = getattr(torch, name)

    def run(input, **kwargs):
        v = function(values_of(input), **kwargs)
        if not input.stacked.is_floating_point():
            return collapse(v)
        v[1:] -= v[:1].clone()
        return Stack(v.to(input.stacked.dtype))

    rule(name)(run)


for _name in ("sign", "sgn", "floor", "ceil", "round", "trunc"):
    _step(_name)


@rule("softmax", "_softmax")
def softmax(input, dim=None, _stacklevel=3, dtype=None):
    if input.dim() == 0:
        return softmax(input.unsqueeze(0), 0, _stacklevel, dtype).squeeze(0)
    s, dim, kind = _scores(input, dim, _stacklevel, dtype)
    p, d = torch.softmax(wide(s[0]), dim), wide(s[1:])
    d = d - (p * d).sum(dim, keepdim=True)  # softmax does not feel a shift, and without one the two terms cancel
    e = torch.expm1(d)
    u = (p * e).sum(dim, keepdim=True)
    change = p * (e - u) / (1 + u)
    change = _far(
        change, d, dim, lambda: torch.softmax(s[:1].double() + s[1:].double(), dim) - torch.softmax(s[0].double(), dim)
    )
    return _pair(p, change, kind)


@rule("log_softmax", "_log_softmax")
def log_softmax(input, dim=None, _stacklevel=3, dtype=None):
    if input.dim() == 0:
        return log_softmax(input.unsqueeze(0), 0, _stacklevel, dtype).squeeze(0)
    s, dim, kind = _scores(input, dim, _stacklevel, dtype)
    value, d = torch.log_softmax(wide(s[0]), dim), wide(s[1:])
    p = value.exp()
    shift = (p * d).sum(dim, keepdim=True)
    d = d - shift
    change = d - torch.log1p((p * torch.expm1(d)).sum(dim, keepdim=True))
    change = _far(
        change, d, dim, lambda: d - torch.logsumexp(torch.log_softmax(s[0].double(), dim) + d, dim, keepdim=True)
    )
    return _pair(value, change, kind)


@rule("logsumexp")
def logsumexp(input, dim, keepdim=False):
    if input.dim() == 0:
        return Stack(input.stacked.clone())
    s, dims = input.stacked, (dim,) if isinstance(dim, int) else tuple(dim)
    dims = tuple(d % (s.dim() - 1) - (s.dim() - 1) for d in dims)
    value, d = torch.logsumexp(wide(s[0]), dims, keepdim=True), wide(s[1:])
    p = torch.exp(wide(s[0]) - wide(s[0]).amax(dims, keepdim=True))
    p = p / p.sum(dims, keepdim=True)  # not exp(x - value): where values are large, that one's last digit is much
    shift = (p * d).sum(dims, keepdim=True)
    d = d - shift
    change = torch.log1p((p * torch.expm1(d)).sum(dims, keepdim=True))
    change = _far(shift + change, d, dims, lambda: _grown(s[:1].double(), s[1:].double(), dims))
    out = torch.cat([value[None], change]).to(s.dtype)
    return Stack(out if keepdim else out.squeeze(dims))


FAR = 80.0  # e^88 is the end of float32


def _far(change: Tensor, d: Tensor, dim: Any, plain: Callable[[], Tensor]) -> Tensor:
    """The change by float64 and its plain difference in the rows where something grew beyond all bounds."""
    if not d.numel():
        return change
    far = d.amax(dim, keepdim=True) > FAR
    return torch.where(far, plain(), change) if bool(far.any()) else change


def _grown(h: Tensor, d: Tensor, dims: Any) -> Tensor:
    """The plain difference of two log-sum-exps."""
    return torch.logsumexp(h + d, dims, keepdim=True) - torch.logsumexp(h, dims, keepdim=True)


def _scores(input: Any, dim: int | None, level: Any, dtype: torch.dtype | None) -> tuple[Tensor, int, torch.dtype]:
    dtype = level if isinstance(level, torch.dtype) else dtype
    s = input.stacked if dtype is None or dtype.itemsize < input.dtype.itemsize else cast(input, dtype).stacked
    dims = s.dim() - 1
    if dim is None:  # torch's old habit: the channel dimension
        dim = 0 if dims in (0, 1, 3) else 1
    kind = dtype if dtype is not None else s.dtype
    return s, dim % dims - dims, kind


def _pair(value: Tensor, change: Tensor, kind: torch.dtype) -> Stack:
    out = torch.empty((1 + len(change), *value.shape), dtype=kind, device=value.device)
    out[0] = value
    out[1:] = change
    return Stack(out)


@rule("normalize")
def normalize(input, p=2.0, dim=1, eps=1e-12, out=None):
    from finf_fast.delta.reductions import vector_norm

    kind = input.dtype
    input = cast(input, torch.promote_types(kind, torch.float32))  # rounded once, at the end
    length = vector_norm(input, p, dim, keepdim=True)
    return cast(_collapsed(input / length.clamp(min=eps), input, p, dim, eps), kind)


def _collapsed(found: Stack, input: Stack, p: float, dim: int, eps: float) -> Stack:
    """Where a step leaves next to nothing of a vector, its length as value plus change has lost ``eps`` and itself."""
    stack, place = found.stacked, behind(dim)  # no look at values: a GPU would be waited for
    after = input.stacked[:1] + input.stacked[1:]
    length = after.norm(p, place, keepdim=True)
    gone = length < NOTHING * input.stacked[:1].norm(p, place, keepdim=True)
    changes = torch.where(gone, after / length.clamp(min=eps) - stack[:1], stack[1:])
    return Stack(torch.cat([stack[:1], changes]))
