"""Rules that compare and choose: comparisons, where, masks, maxima, clamps. Queries may choose differently."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from finf_fast.delta.arithmetic import Operands, kind_of, mapped_change, numbers, shape_of, whole
from finf_fast.delta.integers import collapse
from finf_fast.delta.stack import Carried, NotCarried, Stack, align, untouched, values_of
from finf_fast.delta.structure import count_of, lift
from finf_fast.delta.table import rule
from finf_fast.reference import changes


def _comparing(name: str, *spellings: str) -> None:
    function = getattr(torch, name)

    def run(input, other, **kwargs):
        return whole(input, other, functools.partial(function, **kwargs))

    rule(name, *spellings)(run)


for _name, *_others in (
    ("lt", "less", "__lt__"),
    ("le", "less_equal", "__le__"),
    ("gt", "greater", "__gt__"),
    ("ge", "greater_equal", "__ge__"),
    ("eq", "__eq__"),
    ("ne", "not_equal", "__ne__"),
    ("logical_and",),
    ("logical_or",),
    ("logical_xor",),
    ("bitwise_and", "__and__", "__rand__"),
    ("bitwise_or", "__or__", "__ror__"),
    ("bitwise_xor", "__xor__", "__rxor__"),
    ("isclose",),
):
    _comparing(_name, *_others)


def _asking(name: str, *spellings: str) -> None:
    function = getattr(torch, name)
    rule(name, *spellings)(lambda input: collapse(function(values_of(input))))


for _name, *_others in (
    ("isnan",),
    ("isinf",),
    ("isfinite",),
    ("logical_not",),
    ("bitwise_not", "__invert__"),
    ("isposinf",),
    ("isneginf",),
):
    _asking(_name, *_others)


@rule("where")
def where(condition, input=None, other=None):
    if input is None:
        raise NotCarried("where() of a changed condition: a shape that depends on values")
    kind = kind_of(input, other)
    if not numbers(kind):
        return _where_values(condition, input, other)
    if not isinstance(input, Carried) and not isinstance(other, Carried):
        input = Stack(lift(_tensor(input, kind, condition), count_of(condition)))
    o = Operands(input, other, kind, condition)
    zero = torch.zeros((), dtype=kind, device=condition.device)
    da, db = zero if o.da is None else o.da, zero if o.db is None else o.db
    a, b = _tensor(o.a, kind, condition), _tensor(o.b, kind, condition)
    if not isinstance(condition, Carried):
        return o.result(torch.where(condition, a, b), torch.where(condition, da, db))
    before = align(condition.stacked, len(o.shape))[:1]
    after = align(condition.stacked, len(o.shape))[1:]
    stay = torch.where(after, da, db)
    filled = (before & (o.da is None)) | (~before & (o.db is None))
    _require_room((before != after) & filled, torch.where(before, a, b), torch.where(after, a + da, b + db))
    a, b = a.double(), b.double()  # three terms of which any two may cancel
    moved = torch.where(after, a - b + da, b - a + db).to(kind)  # the choice itself changed
    a, b = a.to(kind), b.to(kind)
    return o.result(torch.where(before[0], a, b), torch.where(before == after, stay, moved))


def _require_room(flipped: Tensor, old: Tensor, new: Tensor) -> None:
    """Where a query chooses otherwise than a constant, the change must leave room: -1e9 + (1e9 + z) is no z.

    Refused is what would leave less than four digits; of bfloat16's two and a half, less than the first.
    """
    ratio = max(64.0, 1e-4 / torch.finfo(new.dtype).eps)
    large = (old.abs() > 64) & (old.abs() > ratio * new.abs()) & (new != 0)
    if bool((flipped & (large | ~old.isfinite()) & new.isfinite()).any()):
        raise NotCarried("a mask of huge or infinite numbers that a query turns off")


@rule(Tensor.where)
def where_of(input, condition, other):
    return where(condition, input, other)


def _where_values(condition, input, other):
    with untouched():
        dims = len(shape_of(condition, input, other))
    sides = [align(values_of(v), dims) if isinstance(v, Carried) else v for v in (condition, input, other)]
    return collapse(torch.where(*sides))


def _tensor(x: Any, kind: torch.dtype, like: Tensor) -> Tensor:
    return x.to(kind) if isinstance(x, Tensor) else torch.tensor(x, dtype=kind, device=like.device)


@rule("masked_fill")
def masked_fill(input, mask, value):
    if isinstance(mask, Carried) or not isinstance(input, Carried) or isinstance(value, Carried):
        return where(mask, value, input)
    s = align(input.stacked, mask.dim())
    if not s.is_floating_point():
        return Stack(s.masked_fill(mask, value))
    out = s.masked_fill(mask, 0)
    out[0] = s[0].masked_fill(mask, value)
    return Stack(out)


@rule("maximum", "max_of_two")
def maximum(input, other):
    return _larger(input, other, torch.ge)


@rule("minimum", "min_of_two")
def minimum(input, other):
    return _larger(input, other, torch.le)


def _larger(x: Any, y: Any, beats: Any) -> Any:
    wins = whole(x, y, beats)
    return where(wins, x, y)


@rule("clamp_min")
def clamp_min(input, min):
    return clamp(input, min=min)


@rule("clamp_max")
def clamp_max(input, max):
    return clamp(input, max=max)


@rule("clamp", "clip")
def clamp(input, min=None, max=None):
    if not input.is_floating_point():
        return collapse(torch.clamp(values_of(input), min, max))
    if isinstance(min, Tensor) or isinstance(max, Tensor):
        input = input if min is None else maximum(input, min)
        return input if max is None else minimum(input, max)
    low = -torch.inf if min is None else min
    high = torch.inf if max is None else max
    return mapped_change(input, lambda h: h.clamp(low, high), lambda h, d: changes.clamp_change(h, d, low, high))


@rule("fill")
def fill(input, value):
    count = count_of(input, value)
    room = torch.empty((count, *input.shape), dtype=input.dtype, device=input.device)
    return Stack(room.copy_(align(lift(value, count, room), input.dim())))


@rule("zero")
def zero(input):
    return Stack(torch.zeros_like(input.stacked))
