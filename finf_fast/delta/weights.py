"""What the updates do to each tensor of the model, packed so that a rule can take all queries of one form at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finf_fast import fold
from finf_fast.delta.stack import Changed, Group, Stack
from finf_fast.lowrank import LowRank
from finf_fast.skeleton import Skeleton
from finf_fast.update import Update

__all__ = ["weight_sets"]


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

    Folded in float32 at least, from the model's own tensors, and rounded once.
    """
    names = {name for update in updates for name in (*update.params, *update.buffers)} & body.slots.keys()
    found: dict[str, Any] = {name: _packed(name, body.slots[name].tensor, updates) for name in names}
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for pair in folds:
        tensors = {}
        for name in pair.sources:
            if name in own:
                place = body.slots[name].tensor.device
                wide = own[name].detach().to(place, torch.promote_types(own[name].dtype, torch.float32))
                tensors[name] = _packed(name, wide, updates) if name in names else wide
        weight, bias = pair.fold(tensors)
        found |= {f"{pair.layer}.weight": _rounded(weight, dtype), f"{pair.layer}.bias": _rounded(bias, dtype)}
    return found


def _packed(name: str, base: Tensor, updates: Sequence[Update]) -> Changed:
    """A tensor with what each of the updates does to it."""
    changes = {q: change for q, update in enumerate(updates) if (change := _change(update, name, base)) is not None}
    return Changed(base, _groups(changes, base), len(updates))


def _rounded(tensor: Any, dtype: torch.dtype) -> Any:
    """In the engine's type, kernels channels-last: what convolutions on a processor read fastest."""
    if isinstance(tensor, Stack):
        rows = torch.stack([_laid_out(row) for row in tensor.stacked.to(dtype)])
        return Stack(rows)
    return _laid_out(tensor.to(dtype))


def _laid_out(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


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
