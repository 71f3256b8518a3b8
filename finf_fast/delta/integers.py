"""Integers and booleans that came out of a stack: 1 + Q values, one each for the base and every query.

Where all of them agree the tensor is plain again, and the model may branch on it, index with it and ask for its length.
Where they differ, the rules that can follow each query do, and anything else raises `NotCarried`: taking the base's
branch for all queries would be wrong without a sign of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finf_fast.delta.stack import Carried, NotCarried, Stack, values_of
from finf_fast.delta.table import rule, words


def collapse(values: Tensor) -> Tensor | Stack:
    """(1 + Q, …) values as a plain tensor if all agree, else as a stack."""
    if len(values) == 1 or bool((values[1:] == values[:1]).all()):
        return values[0]
    return Stack(values)


def agreed(x: Any, what: str) -> Tensor:
    """The plain tensor that base and queries agree on.

    Raises:
        NotCarried: they do not.
    """
    if not isinstance(x, Carried):
        return x
    s = x.stacked
    same = not bool(s[1:].any()) if s.is_floating_point() else bool((s[1:] == s[:1]).all())
    if not same:
        raise NotCarried(f"{what} of a tensor that differs between the base and the queries")
    return s[0]


def _read(name: str) -> None:
    def run(x, *args, **kwargs):
        return getattr(agreed(x, name), name)(*args, **kwargs)

    rule(name)(run)


for _name in words(
    "__bool__ __int__ __float__ __index__ __complex__ item tolist numpy __array__ nonzero __contains__ "
    "__dlpack__ data_ptr untyped_storage storage"
):
    _read(_name)


def _read_all(name: str) -> None:
    function = getattr(torch, name)

    def run(*args, **kwargs):
        return function(*(agreed(x, name) for x in args), **kwargs)

    rule(name)(run)


for _name in words("equal allclose is_nonzero unique unique_consecutive argwhere bincount histc"):
    _read_all(_name)


def _random(name: str) -> None:
    def run(*args, **kwargs):
        raise NotCarried(f"{name} draws random numbers from a changed tensor")

    rule(name)(run)


for _name in words("bernoulli multinomial normal rand_like randn_like randint_like poisson uniform_ normal_ random_"):
    _random(_name)


def _quantifier(name: str) -> None:
    function = getattr(torch, name)

    def run(input, dim=None, keepdim=False):
        v = values_of(input)
        dims = tuple(range(v.dim() - 1)) if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
        place = [d + 1 if d >= 0 else d for d in dims] if v.dim() > 1 else []
        return collapse(function(v.bool(), place, keepdim=keepdim) if place else v.bool())

    rule(name)(run)


for _name in ("any", "all"):
    _quantifier(_name)
