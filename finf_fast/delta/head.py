"""The result of a linear layer, formed when it is first looked at; a head's logits never are.

The last linear layer of a model is the one whose result the model hands back untouched, so nobody need say which it is:
every result waits until something reads it, and what the loss is given is what nothing has read. A soft cap,
``tanh(z / c) * c`` as Gemma spells it, is recognised on the way and waits too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from finf_fast import ops
from finf_fast.delta import arithmetic, functions
from finf_fast.delta.arithmetic import logical
from finf_fast.delta.stack import Carried, Changed, Group, Stack
from finf_fast.delta.structure import cast
from finf_fast.delta.table import current, rule
from finf_fast.loss import Head
from finf_fast.reference import product
from finf_fast.runs import picked, runs


class Linear(Stack):
    """A stack that is x · weightᵀ + bias, not yet computed.

    Attributes:
        x: (1 + Q, N, D) input rows, or (1, N, D) where the input has not changed.
        weight, bias: Changed, or plain tensors.
        rows: logical shape of the result but for its last dimension.
        steps: what has been done to it since: () or a beginning of ("div", c), ("tanh",), ("mul", c).
    """

    @staticmethod
    def __new__(cls, x: Tensor, weight: Any, bias: Any, rows: torch.Size, queries: int, steps: tuple = ()):
        shape = (*rows, weight.shape[0])
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=x.dtype, device=x.device, requires_grad=False)
        self.x, self.weight, self.bias, self.rows, self.queries = x, weight, bias, rows, queries
        self.steps, self._formed = steps, None
        return self

    @property
    def formed(self) -> bool:
        return self._formed is not None

    def form(self) -> Tensor:
        """Computes the result, once."""
        if self._formed is None:
            self._formed = self._finished(formed(self.x, self.weight, self.bias, self.queries))
            self.x = None
        return self._formed

    def wide(self) -> Tensor:
        """The same in float32 from half-precision parts: logits near -100 have no digits left in bfloat16."""
        kind = torch.promote_types(self.x.dtype, torch.float32)
        return self._finished(formed(self.x.to(kind), _wide(self.weight, kind), _wide(self.bias, kind), self.queries))

    def in_type(self, dtype: torch.dtype) -> Tensor:
        """In another type; a router's logits, asked for in float32, are made in float32, where hardly any two tie."""
        wider = not self.formed and torch.promote_types(self.x.dtype, dtype) != self.x.dtype
        return self.wide().to(dtype) if wider else self.form().to(dtype)

    def then(self, *step: Any) -> Linear | None:
        """This and one more step of a soft cap, still waiting; None where the step is none."""
        steps = (*self.steps, step)
        if self.formed or not _begins_a_cap(steps):
            return None
        found = Linear(self.x, self.weight, self.bias, self.rows, self.queries, steps)
        current().wait(found)
        return found

    @property
    def softcap(self) -> float | None:
        return self.steps[0][1] if len(self.steps) == 3 else None

    def _finished(self, y: Tensor) -> Tensor:
        """In its logical shape, with the steps done."""
        stack = Stack(y.unflatten(1, self.rows) if len(self.rows) != 1 else y)
        for name, *how in self.steps:
            stack = STEPS[name](stack, *how)
        return stack.stacked

    @property
    def stacked(self) -> Tensor:
        return self.form()

    def head(self) -> Head:
        """What the loss needs to do without the result: every query in one of the forms."""
        groups = self.weight.groups if isinstance(self.weight, Changed) else ()
        spoken = {q for group in groups for q in group.queries}
        silent = tuple(q for q in range(self.queries) if q not in spoken)
        changes = [(g.queries, g.dense, None if g.u is None else (g.u, g.v)) for g in groups]
        if silent:
            changes.append((silent, None, None))
        dx = self.x[1:] if len(self.x) > 1 else None
        db = self.bias.stacked[1:] if isinstance(self.bias, Carried) else None
        W, bias = logical_of(self.weight), logical_of(self.bias)
        return Head(self.x[0], tuple(self.rows), dx, W, bias, db, tuple(changes), self.queries, self.softcap)


def formed(x: Tensor, weight: Any, bias: Any, queries: int) -> Tensor:
    """(1 + Q, N, D') of x (1 + Q or 1, N, D), a weight and a bias, plain or changed in any mixture of forms."""
    W, b, kept = logical_of(weight), logical_of(bias), current().kept
    key, value = (None, None) if kept is None else kept.find(x[0], W, b)
    if value is not None:
        return _with_value(value, x, weight, bias, queries)
    y = _formed(x, weight, bias, queries)
    if kept is not None:
        kept.keep(key, x[0], y[0])
    return y


def _formed(x: Tensor, weight: Any, bias: Any, queries: int) -> Tensor:
    W, b, db = logical_of(weight), logical_of(bias), _change_of(bias, x)
    groups = weight.groups if isinstance(weight, Changed) else ()
    if len(groups) == 1 and len(groups[0].queries) == queries:
        (group,) = groups
        factors = None if group.u is None else (group.u, group.v)
        return ops.linear_delta(x, W, b, dW=group.dense, dW_factors=factors, db=db)
    y = ops.linear_delta(x, W, b, db=db)
    if groups:
        y = y if len(y) == 1 + queries else _widened(y, queries)
        _add_groups(y, x, groups)
    return y


def _with_value(value: Tensor, x: Tensor, weight: Any, bias: Any, queries: int) -> Tensor:
    """The same where the base's own result (N, D') is known."""
    y = _widened(value[None], queries)
    if len(x) > 1:
        y[1:] = product.linear(x[1:], logical_of(weight))
    if isinstance(weight, Changed):
        _add_groups(y, x, weight.groups)
    db = _change_of(bias, x)
    if db is not None:
        y[1:] += db[:, None]
    return y


def _add_groups(y: Tensor, x: Tensor, groups: Sequence[Group]) -> None:
    """y_q += (x0 + dx_q) dW_qᵀ of queries of several forms."""
    x1 = x[:1] + x[1:] if len(x) > 1 else None
    for group in groups:
        after = x[:1].expand(len(group.queries), *x.shape[1:]) if x1 is None else picked(x1, group.queries)
        extra = after @ group.dense.mT if group.dense is not None else (after @ group.v) @ group.u.mT
        for mine, queries in runs(group.queries):
            y[1:][queries] += extra[mine]


def _change_of(bias: Any, x: Tensor) -> Tensor | None:
    """(Q, D') change of a bias in the type of the rows, None where it has none."""
    return bias.stacked[1:].to(x.dtype) if isinstance(bias, Carried) else None


def _widened(y: Tensor, queries: int) -> Tensor:
    return torch.cat([y, y.new_zeros((queries, *y.shape[1:]))])


def logical_of(x: Any) -> Any:
    """The base of a changed tensor or a stack, or the plain thing itself."""
    return x.base if isinstance(x, Changed) else logical(x)


def _wide(parameter: Any, kind: torch.dtype) -> Any:
    """A weight or bias, and its changes, in another type."""
    if isinstance(parameter, Changed):
        return parameter.to_kind(kind)
    return None if parameter is None else cast(parameter, kind) if isinstance(parameter, Stack) else parameter.to(kind)


STEPS = {"div": arithmetic.div, "tanh": functions.activation("tanh"), "mul": arithmetic.mul}


def _begins_a_cap(steps: tuple) -> bool:
    wanted = (("div", None), ("tanh",), ("mul", None))
    if any(step[0] != want[0] for step, want in zip(steps, wanted, strict=False)) or len(steps) > 3:
        return False
    return len(steps) < 3 or steps[0][1] == steps[2][1]


@rule("div", "divide", "true_divide", "__truediv__")
def div(input, other, **kwargs):
    found = input.then("div", float(other)) if _may_wait(input, other) and not kwargs else None
    return arithmetic.div(input, other, **kwargs) if found is None else found


@rule("tanh")
def tanh(input):
    found = input.then("tanh") if isinstance(input, Linear) else None
    return STEPS["tanh"](input) if found is None else found


@rule("mul", "multiply", "__mul__", "__rmul__")
def mul(input, other):
    found = input.then("mul", float(other)) if _may_wait(input, other) else None
    return arithmetic.mul(input, other) if found is None else found


def _may_wait(input: Any, other: Any) -> bool:
    return isinstance(input, Linear) and isinstance(other, (int, float)) and other > 0
