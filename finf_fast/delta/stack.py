"""The stack: a tensor that carries its base value and every query's exact change of it.

`Stack` looks like the base tensor (its shape, dtype, device) to the model that computes with it, and holds one tensor
(1 + Q, …) inside. What is a floating-point number is stored as (value, changes); what is an integer or a boolean, as
1 + Q values, for there "change" has no meaning: a route, a mask, an index that may differ from query to query.

`Changed` is a parameter or buffer with its change in the form the update came in, dense or low rank, so that a linear
layer can use the factors; anything else that reads it sees a stack.

Both are wrapper subclasses without storage: an operation that slips past the rules finds nothing to compute with and
raises, so it cannot be silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finf_fast.runs import runs

__all__ = ["Carried", "Changed", "Group", "NotCarried", "Stack", "align", "lift", "stacked_of", "values_of"]

untouched = torch._C.DisableTorchFunctionSubclass


class NotCarried(RuntimeError):
    """The model does something that a stack cannot follow: a Python branch on a value that differs between queries, a
    shape that depends on values, a random draw."""


class Carried(Tensor):
    """What `Stack` and `Changed` share: they reach the rules, and nothing below them."""

    # Set by finf_fast.delta.table, which knows the rules; a stack itself knows none.
    handler: Callable[..., Any]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return Carried.handler(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotCarried(f"{func} reached a stack below the rules")


class Stack(Carried):
    """``stacked`` (1 + Q, …) with the logical shape of ``stacked[0]``.

    Args:
        stacked: base first, then each query's change (floating point) or each query's value (integer, boolean).
    """

    stacked: Tensor

    @staticmethod
    def __new__(cls, stacked: Tensor):
        self = _wrapper(cls, stacked.shape[1:], stacked.stride()[1:], stacked.dtype, stacked.device)
        self.stacked = stacked
        return self

    def in_type(self, dtype: torch.dtype) -> Tensor:
        """The stacked tensor in another floating-point type."""
        return self.stacked.to(dtype)

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"Stack({tuple(self.stacked.shape[1:])}, {self.stacked.dtype}, Q={len(self.stacked) - 1})"


@dataclass(frozen=True)
class Group:
    """Queries whose change of one tensor has one form.

    Attributes:
        queries: which of the Q.
        dense: (len(queries), *shape) change; None where it is low rank.
        u, v: factors (len(queries), rows, r) and (len(queries), columns, r); the change is ``u[i] @ v[i].T``, where
            the tensor has more dimensions with all but the first as columns.
        scale: (len(queries), rows), beside factors: the change has ``scale[i]`` times the rows of the tensor as well,
            as of a kernel with a changed batch norm inside.
    """

    queries: tuple[int, ...]
    dense: Tensor | None = None
    u: Tensor | None = None
    v: Tensor | None = None
    scale: Tensor | None = None

    def transposed(self) -> Group:
        """Of a matrix; only kernels, which are none, have a scale."""
        if self.dense is not None:
            return Group(self.queries, self.dense.mT)
        return Group(self.queries, None, self.v, self.u)

    def to_kind(self, kind: torch.dtype) -> Group:
        tensors = (self.dense, self.u, self.v, self.scale)
        return Group(self.queries, *(None if x is None else x.to(kind) for x in tensors))

    def full(self, base: Tensor) -> Tensor:
        """(len(queries), *shape) dense, ``base`` being the tensor that changes."""
        if self.dense is not None:
            return self.dense
        whole = (self.u @ self.v.mT).view(len(self.queries), *base.shape)
        if self.scale is None:
            return whole
        return whole + self.scale.view(*self.scale.shape, *(1,) * (base.dim() - 1)) * base


class Changed(Carried):
    """A tensor of the model and what the updates do to it.

    Args:
        base: its value.
        groups: its changes; a query in no group leaves it as it is.
        queries: Q.
    """

    base: Tensor
    groups: tuple[Group, ...]

    @staticmethod
    def __new__(cls, base: Tensor, groups: Sequence[Group], queries: int):
        self = _wrapper(cls, base.shape, base.stride(), base.dtype, base.device)
        self.base, self.groups, self.queries, self._stacked = base, tuple(groups), queries, None
        return self

    @property
    def stacked(self) -> Tensor:
        """(1 + Q, *shape), made at the first use by something that is no linear layer, then kept."""
        if self._stacked is None:
            whole = not self.base.is_floating_point()  # integers are values, so a query that has none has the base's
            stacked = (
                self.base.repeat(1 + self.queries, *(1,) * self.base.dim())
                if whole
                else lift(self.base, 1 + self.queries)
            )
            for group in self.groups:
                change = group.full(self.base)
                for mine, queries in runs(group.queries):
                    stacked[1:][queries] = change[mine]
            self._stacked = stacked
        return self._stacked

    def in_type(self, dtype: torch.dtype) -> Tensor:
        """The stacked tensor in another floating-point type."""
        return self.stacked.to(dtype)

    def to_kind(self, kind: torch.dtype) -> Changed:
        """The same in another floating-point type, factors kept."""
        return Changed(self.base.to(kind), [group.to_kind(kind) for group in self.groups], self.queries)

    def transposed(self) -> Changed:
        """The same of a matrix' transpose, factors kept."""
        return Changed(self.base.mT, [group.transposed() for group in self.groups], self.queries)

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"Changed({tuple(self.base.shape)}, {self.base.dtype}, {len(self.groups)} forms, Q={self.queries})"


def _wrapper(cls: type, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device) -> Any:
    return Tensor._make_wrapper_subclass(cls, shape, strides=strides, dtype=dtype, device=device, requires_grad=False)


def lift(x: Any, count: int, like: Tensor | None = None) -> Tensor:
    """(1 + Q, …) of anything: a stack's own, or a plain tensor or number that no query changes.

    A plain floating-point tensor gets zero changes, a plain integer the same value for all. With ``like`` the result is
    numbers with changes, or whole values, as ``like`` is.
    """
    if like is not None:
        x = _as_in(x, like)
    if isinstance(x, Carried):
        return x.stacked
    if not isinstance(x, Tensor):
        x = torch.as_tensor(x)
    if not x.is_floating_point():
        return x.expand(count, *x.shape)
    stacked = x.new_zeros((count, *x.shape))
    stacked[0] = x
    return stacked


def _as_in(x: Any, like: Tensor) -> Any:
    """x with changes where ``like`` is numbers, with 1 + Q values where it is integers."""
    if not isinstance(x, Tensor):
        return torch.as_tensor(x, dtype=like.dtype, device=like.device)
    if x.dtype.is_floating_point == like.is_floating_point():
        return x
    if not isinstance(x, Carried):
        return x.to(like.dtype)
    values = values_of(x).to(like.dtype)
    if like.is_floating_point():
        values[1:] -= values[:1].clone()
    return Stack(values)


def stacked_of(x: Any) -> Tensor | None:
    """The stacked tensor of what is carried, None of anything else."""
    return x.stacked if isinstance(x, Carried) else None


def values_of(x: Any) -> Any:
    """(1 + Q, …) values, base first, float64 where they are numbers that changed; anything else as it is."""
    if not isinstance(x, Carried):
        return x
    stacked = x.stacked
    if not stacked.is_floating_point():
        return stacked
    wide = stacked.to(torch.float64, copy=True)
    # An infinite base with no change stays what it is, and is no inf - inf.
    wide[1:] = torch.where(wide[1:] == 0, wide[:1], wide[:1] + wide[1:])
    return wide


def align(stacked: Tensor, dims: int) -> Tensor:
    """A stack of a logical shape with fewer dimensions than ``dims``, made to broadcast with one that has them all."""
    missing = dims - (stacked.dim() - 1)
    return stacked if missing <= 0 else stacked[(slice(None), *(None,) * missing)]
