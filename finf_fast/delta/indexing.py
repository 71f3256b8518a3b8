"""Rules that look up and write by index. An index that differs between queries picks each query's own entry."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finf_fast.delta.brackets import as_index, splits
from finf_fast.delta.integers import agreed, collapse
from finf_fast.delta.products import slice_of
from finf_fast.delta.reductions import moved, picked
from finf_fast.delta.stack import Carried, Changed, NotCarried, Stack, align, lift
from finf_fast.delta.structure import behind, count_of, expand
from finf_fast.delta.table import rule, unruled


@rule("__getitem__")
def getitem(x, index):
    one_matrix = isinstance(x, Changed) and isinstance(index, int) and x.base.dim() == 3
    if one_matrix and all(group.dense is not None for group in x.groups):
        return slice_of(x, index)
    index = as_index(index)
    if any(isinstance(i, Carried) and i.dtype is torch.bool for i in index):
        index = tuple(agreed(i, "indexing by a mask") if isinstance(i, Carried) else i for i in index)
    if any(isinstance(i, Carried) for i in index):
        return _by_stacks(x, index)
    s = x.stacked
    if splits(index):  # ask torch without the stack's own dimension
        return Stack(torch.stack([row[index] for row in s]))
    return Stack(s[(slice(None), *index)])


def _by_stacks(x: Any, index: tuple) -> Any:
    """x[index] where an index differs between queries."""
    count = count_of(x, *index)
    rows = [tuple(i.stacked[j] if isinstance(i, Carried) else i for i in index) for j in range(count)]
    if not isinstance(x, Carried):
        x = Stack(lift(x, count))
    s = x.stacked
    if not s.is_floating_point():
        return collapse(torch.stack([s[j][rows[j]] for j in range(count)]))
    value = s[0][rows[0]]
    after = (moved(value, s[0][rows[j]], s[j][rows[j]]).to(s.dtype) for j in range(1, count))
    return Stack(torch.stack([value, *after]))


def by_rows(stacked: Tensor, indices: Any) -> Stack:
    """Rows of a stacked table (1 + Q, rows, D) at each query's own indices."""
    return getitem(Stack(stacked), indices)


@rule("index_select")
def index_select(input, dim, index):
    if isinstance(index, Carried) or not isinstance(input, Carried):
        return getitem(input, (*(slice(None),) * (dim % input.dim()), index))
    return Stack(input.stacked.index_select(behind(dim), index))


@rule("masked_select")
def masked_select(input, mask):
    mask = agreed(mask, "masked_select")
    if not isinstance(input, Carried):
        return torch.masked_select(input, mask)
    shape = torch.broadcast_shapes(input.shape, mask.shape)
    return getitem(expand(input, shape), mask.expand(shape))


@rule("take_along_dim")
def take_along_dim(input, indices, dim=None):
    if dim is None:
        return gather(input.reshape(-1), 0, indices.reshape(-1))
    input_shape, index_shape = list(input.shape), list(indices.shape)
    input_shape[dim] = index_shape[dim] = 1
    common = list(torch.broadcast_shapes(input_shape, index_shape))
    wanted = [x.expand(*common[: dim % x.dim()], x.shape[dim], *common[dim % x.dim() + 1 :]) for x in (input, indices)]
    return gather(wanted[0], dim, wanted[1])


@rule("gather")
def gather(input, dim, index, *, sparse_grad=False):
    count = count_of(input, index)
    dims = input.dim()
    i = index.stacked if isinstance(index, Carried) else index.expand(count, *index.shape)
    s = lift(input, count)
    dim = dim % dims - dims
    if not s.is_floating_point():
        return collapse(s.gather(dim, i))
    if not isinstance(index, Carried):
        return Stack(s.gather(dim, i))
    return Stack(picked(s, i, dim))


def _scatter(name: str) -> None:
    function = getattr(torch, name)

    def run(input, dim, index, src=None, *, value=None, reduce=None):
        src = value if src is None else src
        if reduce is not None:
            return unruled(function, input, dim, index, src, reduce=reduce)
        count = count_of(input, index, src)
        if isinstance(index, Carried):
            return _scattered_values(function, input, dim, index, src, count)
        s, i = lift(input, count), index.expand(count, *index.shape)
        return Stack(function(s, behind(dim), i, lift(_full(src, index, input), count, s).to(s.dtype)))

    rule(name)(run)


def _full(src: Any, index: Any, like: Any) -> Any:
    shape = index.shape
    return src if isinstance(src, Tensor) else torch.full(shape, src, dtype=like.dtype, device=like.device)


def _scattered_values(function: Any, input: Any, dim: int, index: Any, src: Any, count: int) -> Any:
    """Scattered to places that differ between queries: the changes to each query's, and what the base's move there."""
    like = torch.empty(0, dtype=input.dtype, device=input.device)
    x, y = (lift(v, count, like).to(input.dtype) for v in (input, _full(src, index, input)))
    if not x.is_floating_point():
        return collapse(torch.stack([function(x[j], dim, index.stacked[j], y[j]) for j in range(count)]))
    value = function(x[0], dim, index.stacked[0], y[0])
    x, y, before = x.double(), y.double(), function(x[0].double(), dim, index.stacked[0], y[0].double())
    changes = []
    for j in range(1, count):
        moved = function(x[0], dim, index.stacked[j], y[0]) - before  # exactly 0 where the places are the base's
        changes.append((moved + function(x[j], dim, index.stacked[j], y[j])).to(value.dtype))
    return Stack(torch.stack([value, *changes]))


for _name in ("scatter", "scatter_add"):
    _scatter(_name)


@rule("index_add")
def index_add(input, dim, index, source, *, alpha=1):
    index = agreed(index, "index_add")
    count = count_of(input, source)
    s = lift(input, count)
    return Stack(s.index_add(behind(dim), index, lift(source, count, s).to(s.dtype), alpha=alpha))


@rule("index_copy")
def index_copy(input, dim, index, source):
    index, count = agreed(index, "index_copy"), count_of(input, source)
    s = lift(input, count)
    return Stack(s.index_copy(behind(dim), index, lift(source, count, s).to(s.dtype)))


@rule("masked_scatter")
def masked_scatter(input, mask, source):
    mask, count = agreed(mask, "masked_scatter"), count_of(input, source)
    s = lift(input, count)
    parts = lift(source, count, s)
    return Stack(torch.stack([row.masked_scatter(mask, part) for row, part in zip(s, parts, strict=True)]))


@rule("one_hot")
def one_hot(tensor, num_classes=-1):
    if num_classes < 0:
        raise NotCarried("one_hot without num_classes: a shape that depends on values")
    return collapse(F.one_hot(tensor.stacked, num_classes))


__all__ = ["align", "by_rows", "getitem"]
