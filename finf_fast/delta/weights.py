"""What the updates do to each tensor of the model, packed so that a rule can take all queries of one form at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finf_fast import fold
from finf_fast.delta.stack import Changed, Group, Stack
from finf_fast.lowrank import LowRank
from finf_fast.runs import picked
from finf_fast.skeleton import Skeleton
from finf_fast.update import Update

__all__ = ["weight_sets"]

# A channel that its norm has all but turned off, beside the strongest, grows from nothing and not by a share of itself.
DEAD = 1e-6


def weight_sets(
    body: Skeleton, model: nn.Module, updates: Sequence[Update], dtype: torch.dtype, chunk: int
) -> tuple[list[dict[str, Any]], int]:
    """What to put into the body for each chunk of queries, and how many batch norms went into convolutions.

    Every set covers what any of them changes, so that putting one undoes the one before.
    """
    folds = fold.find(body)
    parts = [updates[at : at + chunk] for at in range(0, len(updates), chunk)]
    sets = [_set(body, model, part, folds, dtype) for part in parts]
    fold.install(body, folds)
    names = {name for one in sets for name in one} & body.slots.keys()
    base = {name: body.slots[name].tensor for name in names}
    return [{name: one.get(name, base[name]) for name in names} for one in sets], len(folds)


def _set(
    body: Skeleton, model: nn.Module, updates: Sequence[Update], folds: Sequence[fold.Fold], dtype: torch.dtype
) -> dict[str, Any]:
    """Slot -> changed tensor, and the folded weight and bias of every pair.

    Folded in the engine's type, in float32 at least, from the model's own tensors, and rounded once.
    """
    names = {name for update in updates for name in (*update.params, *update.buffers)} & body.slots.keys()
    found: dict[str, Any] = {name: _packed(name, body.slots[name].tensor, updates) for name in names}
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for pair in folds:
        tensors = {}
        for name in pair.sources:
            if name in own:
                place = body.slots[name].tensor.device
                exact = torch.promote_types(torch.promote_types(own[name].dtype, torch.float32), dtype)
                wide = own[name].detach().to(place, exact)
                tensors[name] = _packed(name, wide, updates) if name in names else wide
        weight, bias = _folded(pair, tensors)
        found |= {f"{pair.layer}.weight": _rounded(weight, dtype), f"{pair.layer}.bias": _rounded(bias, dtype)}
    return found


def _folded(pair: fold.Fold, tensors: Mapping[str, Any]) -> tuple[Any, Any]:
    """Weight and bias of a convolution with its norm inside; factors stay factors."""
    weight = tensors[pair.sources[0]]
    scale, bias = pair.affine(tensors)
    s, ds = (scale.stacked[0], scale.stacked[1:]) if isinstance(scale, Stack) else (scale, None)
    if ds is None and not isinstance(weight, Changed):
        return pair.fold(tensors)
    if ds is not None and bool((s.abs() <= DEAD * s.abs().max()).any()):
        return pair.fold(tensors)
    weight = weight if isinstance(weight, Changed) else Changed(weight, [], len(ds))
    silent = tuple(set(range(weight.queries)).difference(*(group.queries for group in weight.groups)))
    groups = [*weight.groups, _nothing(silent, weight.base)] if silent and ds is not None else weight.groups
    folded = [_scaled(group, weight.base, s, None if ds is None else picked(ds, group.queries)) for group in groups]
    return Changed(weight.base * _spread(s, weight.base), folded, weight.queries), bias


def _scaled(group: Group, base: Tensor, s: Tensor, ds: Tensor | None) -> Group:
    """The change of s W, all queries of one form: s1 (W + u vᵀ) - s W is (ds / s) of the rows of s W, and (s1 u) vᵀ."""
    after = s.expand(len(group.queries), -1) if ds is None else s + ds
    if group.dense is None:
        return Group(group.queries, None, after[..., None] * group.u, group.v, None if ds is None else ds / s)
    dense = group.dense * _spread(after, base)
    return Group(group.queries, dense if ds is None else dense + base * _spread(ds, base))


def _nothing(queries: tuple[int, ...], base: Tensor) -> Group:
    """No change, as factors."""
    u, v = (base.new_zeros(len(queries), size, 0) for size in (len(base), base[0].numel()))
    return Group(queries, None, u, v)


def _spread(rows: Tensor, kernel: Tensor) -> Tensor:
    """(…, rows) made to multiply (…, rows, *columns)."""
    return rows.view(*rows.shape, *(1,) * (kernel.dim() - 1))


def _packed(name: str, base: Tensor, updates: Sequence[Update]) -> Changed:
    """A tensor with what each of the updates does to it."""
    changes = {q: change for q, update in enumerate(updates) if (change := _change(update, name, base)) is not None}
    changed = Changed(base, _groups(changes, base), len(updates))
    changed._is_param = isinstance(base, nn.Parameter)  # what isinstance(_, nn.Parameter) asks
    return changed


def _rounded(tensor: Any, dtype: torch.dtype) -> Any:
    """In the engine's type, 2-D kernels channels-last."""
    if isinstance(tensor, Changed):
        rounded = tensor.to_kind(dtype)
        groups = [g if g.dense is None else Group(g.queries, _rows_laid_out(g.dense)) for g in rounded.groups]
        return Changed(fold.laid_out(rounded.base), groups, tensor.queries)
    if isinstance(tensor, Stack):
        return Stack(_rows_laid_out(tensor.stacked.to(dtype)))
    return fold.laid_out(tensor.to(dtype))


def _rows_laid_out(stacked: Tensor) -> Tensor:
    """The same of each row of a stack of 2-D kernels."""
    return stacked.movedim(2, -1).contiguous().movedim(-1, 2) if stacked.dim() == 5 else stacked


def _change(update: Update, name: str, base: Tensor) -> Tensor | LowRank | None:
    """The change of one tensor, of a buffer as the difference from its new value."""
    if name in update.params:
        return update.params[name]
    if name not in update.buffers:
        return None
    value = update.buffers[name]
    return value.double().to(base.device) - base.double() if base.is_floating_point() else value


def _groups(changes: Mapping[int, Tensor | LowRank], base: Tensor) -> list[Group]:
    dense = {q: c for q, c in changes.items() if not isinstance(c, LowRank)}
    low = {q: c for q, c in changes.items() if isinstance(c, LowRank)}
    groups = []
    if dense:
        groups.append(Group(tuple(dense), torch.stack([c.to(base.device, base.dtype) for c in dense.values()])))
    if low:
        rank = max(c.rank for c in low.values())
        sides = (
            [_padded(side, rank, base) for side in (c.u for c in low.values())],
            [_padded(side, rank, base) for side in (c.v for c in low.values())],
        )
        groups.append(Group(tuple(low), None, *map(torch.stack, sides)))
    return groups


def _padded(factor: Tensor, rank: int, like: Tensor) -> Tensor:
    """A factor with zero columns up to the common rank."""
    out = like.new_zeros((factor.shape[0], rank))
    out[:, : factor.shape[1]] = factor
    return out
