"""Rules of arithmetic: sums, products, quotients, powers, comparisons, choices, each as an exact finite change.

Half-precision stacks are multiplied in float32 and rounded once, so that a rule costs one rounding and not one a term.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finf_fast.delta.integers import collapse
from finf_fast.delta.stack import Carried, Stack, align, untouched, values_of
from finf_fast.delta.structure import cast, count_of
from finf_fast.delta.table import assign, current, rule, unruled
from finf_fast.reference import changes


def wide(x: Any) -> Any:
    """Half precision as float32, anything else as it is."""
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x


def logical(x: Any) -> Any:
    """A plain tensor that promotes types as the carried one does, or the plain thing itself."""
    return x.stacked[0] if isinstance(x, Carried) else x


def kind_of(*xs: Any) -> torch.dtype:
    """dtype of an operation on these, as torch promotes them."""
    xs = [logical(x) for x in xs]
    kind = torch.result_type(xs[0], xs[1]) if len(xs) > 1 else xs[0].dtype
    for x in xs[2:]:
        kind = torch.promote_types(kind, x.dtype) if isinstance(x, Tensor) and x.dim() else kind
    return kind


def shape_of(*xs: Any) -> torch.Size:
    """Logical shape of an elementwise operation on these."""
    return torch.broadcast_shapes(*(x.shape for x in xs if isinstance(x, Tensor)))


class Operands:
    """Two operands of an elementwise rule, made to broadcast: values ``a``, ``b`` and changes ``da``, ``db`` or None.

    Integers that are carried become numbers with changes when the result is a number.
    """

    def __init__(self, x: Any, y: Any, kind: torch.dtype, *others: Any):
        with untouched():
            self.shape = shape_of(x, y, *others)
        self.kind, self.count = kind, count_of(x, y)
        self.a, self.da = self._split(x)
        self.b, self.db = self._split(y)

    def _split(self, x: Any) -> tuple[Any, Tensor | None]:
        if not isinstance(x, Carried):
            return wide(x), None
        stacked = x.stacked if x.stacked.is_floating_point() else cast(x, self.kind).stacked
        stacked = align(stacked, len(self.shape))
        return stacked[0], stacked[1:]

    def room(self) -> Tensor:
        """An uninitialised stacked tensor for the result, laid out as a change of its shape."""
        changes = [d for d in (self.da, self.db) if d is not None]
        like = next((d for d in changes if d.shape[1:] == self.shape), None)
        if like is None or like.is_contiguous():
            return torch.empty((self.count, *self.shape), dtype=self.kind, device=changes[0].device)
        row = torch.empty_like(like[0]).stride()
        return torch.empty_strided(
            (self.count, *self.shape), (self.shape.numel(), *row), dtype=self.kind, device=like.device
        )

    def result(self, value: Tensor, change: Tensor) -> Stack:
        out = self.room()
        out[0] = value
        out[1:] = change
        return Stack(out)


def each(x: Any, y: Any, function: Any) -> Tensor:
    """(1 + Q, …) results of an operation on each of the 1 + Q values; numbers are met in float64."""
    kind = kind_of(x, y)
    with untouched():
        dims = len(shape_of(x, y))

    def values(v: Any) -> Any:
        if isinstance(v, Carried):
            return align(values_of(v), dims)
        # What is plain is first rounded to the type in which torch compares: 0.1 in float32 is not 0.1.
        return torch.as_tensor(v, dtype=kind).double() if numbers(kind) else v

    return function(values(x), values(y))


def whole(x: Any, y: Any, function: Any) -> Any:
    """An operation whose results are integers or booleans, on each of the 1 + Q values."""
    both = isinstance(x, Stack) and isinstance(y, Stack) and x.is_floating_point() and y.is_floating_point()
    if both and (current().chosen(x) or current().chosen(y)):
        return collapse(each(x, y, lambda a, b: function(_met(a, b, x.dtype, y.dtype), b)))
    return collapse(each(x, y, function))


def _met(a: Tensor, b: Tensor, *kinds: torch.dtype) -> Tensor:
    """a, with b's value where a query made the two meet, up to the rounding of their changes, that were apart.

    A number that a choice took from elsewhere (the k-th largest) stands as another base and a rounded change, and is
    still that number: ``z < z.topk(k).values[-1:]`` must not lose the k-th itself.
    """
    eps = max(torch.finfo(kind).eps for kind in kinds)
    gap, rounding = (a - b).abs(), eps * ((a - a[:1]).abs() + (b - b[:1]).abs())
    meet = (gap <= rounding) & (gap[:1] > 4 * rounding)
    return torch.where(meet, b, a)


def numbers(kind: torch.dtype) -> bool:
    return kind.is_floating_point


@rule("add", "__add__", "__radd__")
def add(input, other, *, alpha=1):
    kind = kind_of(input, other)
    if not numbers(kind):
        return whole(input, other, lambda a, b: torch.add(a, b, alpha=alpha))
    both = isinstance(input, Stack) and isinstance(other, Stack)
    if both and input.stacked.shape == other.stacked.shape and input.stacked.dtype == other.stacked.dtype == kind:
        return Stack(torch.add(input.stacked, other.stacked, alpha=alpha))
    o = Operands(input, other, kind)
    out = o.room()
    out[0] = torch.add(o.a, o.b, alpha=alpha) if isinstance(o.a, Tensor) else o.a + alpha * o.b
    if o.da is None:
        out[1:] = o.db if alpha == 1 else alpha * o.db
    elif o.db is None:
        out[1:] = o.da
    else:
        torch.add(wide(o.da), wide(o.db), alpha=alpha, out=out[1:]) if kind is torch.float64 else out[1:].copy_(
            torch.add(o.da, o.db, alpha=alpha)
        )
    return Stack(out)


@rule("sub", "subtract", "__sub__")
def sub(input, other, *, alpha=1):
    if not isinstance(input, Tensor):
        return add(neg(other), input) if alpha == 1 else add(mul(other, -alpha), input)
    return add(input, other, alpha=-alpha)


@rule("rsub", "__rsub__")
def rsub(input, other, *, alpha=1):
    return sub(other, input, alpha=alpha)


@rule("neg", "negative", "__neg__")
def neg(input):
    return Stack(-input.stacked)


@rule("pos", "positive", "__pos__")
def positive(input):
    return input


@rule("mul", "multiply", "__mul__", "__rmul__")
def mul(input, other):
    kind = kind_of(input, other)
    if not numbers(kind):
        return whole(input, other, torch.mul)
    if not (isinstance(input, Carried) and isinstance(other, Carried)):
        x, c = (input, other) if isinstance(input, Carried) else (other, input)
        return _scaled(x, c, kind)
    o = Operands(input, other, kind)
    a, b, da, db = map(wide, (o.a, o.b, o.da, o.db))
    return o.result(a * b, torch.addcmul(da * b, a + da, db))


def _scaled(x: Carried, c: Any, kind: torch.dtype) -> Stack:
    """A stack times something that no query changes: linear, so one product for all rows."""
    s = x.stacked if x.stacked.is_floating_point() else cast(x, kind).stacked
    if isinstance(c, Tensor):
        s = align(s, c.dim())
        if s.dtype != kind or (c.dim() and c.dtype != kind):
            return Stack((wide(s) * wide(c)).to(kind))
    out = s * c
    return Stack(out if out.dtype == kind else out.to(kind))


@rule("div", "divide", "true_divide", "__truediv__")
def div(input, other, *, rounding_mode=None):
    if rounding_mode is not None:
        return whole_division(input, other, rounding_mode)
    kind = kind_of(input, other)
    kind = kind if numbers(kind) else torch.get_default_dtype()
    if not isinstance(other, Carried):
        s = input.stacked if input.stacked.is_floating_point() else cast(input, kind).stacked
        s = align(s, other.dim()) if isinstance(other, Tensor) else s
        return Stack((wide(s) / wide(other)).to(kind))
    o = Operands(input, other, kind)
    a, b, da, db = map(wide, (o.a, o.b, o.da, o.db))
    y = a / b
    change = -y * db if da is None else torch.addcmul(da, y, db, value=-1)
    return o.result(y, change / (b + db))


@rule("__rtruediv__", "__rdiv__")
def rdiv(input, other):
    return div(other, input)


def whole_division(input, other, rounding_mode):
    """Division that rounds gives whole numbers: the difference of two of them is exact."""
    found = each(input, other, lambda a, b: torch.div(a, b, rounding_mode=rounding_mode))
    kind = kind_of(input, other)
    return _differences(found, kind) if numbers(kind) else collapse(found)


def _differences(values: Tensor, kind: torch.dtype) -> Stack:
    """A stack of 1 + Q values whose differences lose nothing."""
    values[1:] -= values[:1].clone()
    return Stack(values.to(kind))


@rule("floor_divide", "__floordiv__")
def floor_divide(input, other):
    return whole_division(input, other, "floor")


def _remainder(function: Any) -> Any:
    def run(input, other):
        kind = kind_of(input, other)
        if not numbers(kind):
            return whole(input, other, function)
        if isinstance(other, Carried):
            return unruled(function, input, other)
        x, other = cast(input, kind), torch.as_tensor(other, dtype=kind).double()
        steps = (each(x, other, torch.sub) - each(x, other, function)).div(other).round()
        steps[1:] -= steps[:1].clone()
        found = _differences(each(x, other, function), torch.float64)
        found.stacked[1:] = align(x.stacked, len(found.shape))[1:].double() - steps[1:] * other
        return Stack(found.stacked.to(kind))

    return run


rule("remainder", "__mod__")(_remainder(torch.remainder))
rule("fmod")(_remainder(torch.fmod))


@rule("reciprocal")
def reciprocal(input):
    return mapped_change(input, torch.reciprocal, changes.reciprocal_change)


def mapped_change(x: Carried, function: Any, change: Any) -> Any:
    """A function of one number: its value of the base, its exact change of the rest."""
    s = x.stacked
    if not s.is_floating_point():
        values = function(s)
        if not values.is_floating_point():
            return collapse(values)
        s = cast(x, values.dtype).stacked
    out = torch.empty_like(s)
    out[0] = function(s[0])
    out[1:] = change(wide(s[0]), wide(s[1:]))
    return Stack(out)


@rule("pow", "__pow__")
def power(input, exponent):
    if isinstance(exponent, Tensor) and not isinstance(exponent, Carried) and exponent.dim() == 0:
        exponent = exponent.item()
    if isinstance(exponent, Tensor):
        return unruled(torch.pow, input, exponent) if isinstance(input, Tensor) else rpower(exponent, input)
    if not input.stacked.is_floating_point() and isinstance(exponent, int):
        return collapse(values_of(input) ** exponent)
    return mapped_change(input, lambda h: h**exponent, lambda h, d: changes.pow_change(h, d, exponent))


@rule("__rpow__")
def rpower(input, other):
    """number ** x = exp(x log number)."""
    if isinstance(other, Tensor) or other <= 0 or not input.is_floating_point():
        return unruled(torch.pow, other, input)
    from finf_fast.delta.functions import exp

    return exp(mul(input, float(torch.log(torch.tensor(other, dtype=torch.float64)))))


@rule("float_power")
def float_power(input, exponent):
    return power(*(cast(x, torch.float64) if isinstance(x, Carried) else x for x in (input, exponent)))


@rule("addcmul")
def addcmul(input, tensor1, tensor2, *, value=1):
    return _plus(input, _times(_times(tensor1, tensor2), value))


@rule("addcdiv")
def addcdiv(input, tensor1, tensor2, *, value=1):
    carried = isinstance(tensor1, Carried) or isinstance(tensor2, Carried)
    return _plus(input, _times(div(tensor1, tensor2) if carried else tensor1 / tensor2, value))


@rule("lerp")
def lerp(input, end, weight):
    return _plus(input, _times(weight, _minus(end, input)))


def _times(x: Any, y: Any) -> Any:
    return mul(x, y) if isinstance(x, Carried) or isinstance(y, Carried) else x * y


def _plus(x: Any, y: Any) -> Any:
    return add(x, y) if isinstance(x, Carried) or isinstance(y, Carried) else x + y


def _minus(x: Any, y: Any) -> Any:
    return sub(x, y) if isinstance(x, Carried) or isinstance(y, Carried) else x - y


def put_in_place(x: Any, result: Any, inplace: bool) -> Any:
    """The result, written into x where the model asked for that."""
    return assign(x, result) if inplace else result
