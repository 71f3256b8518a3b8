"""The 1 + Q sets of weights of the pair engine: made of one base and Q changes, folded and laid out for use."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from finf_fast import fold
from finf_fast.lowrank import LowRank, dense
from finf_fast.skeleton import Skeleton
from finf_fast.update import Update


class WeightSets:
    """Base weights, and each query's, as dicts from slot name to tensor, ready for :meth:`Skeleton.put`.

    Every query's set covers the union of what any query changes, so that putting one undoes the one before.

    Args:
        body: the skeleton; the norms of ``folds`` are taken out of it.
        updates: Q updates.
        folds: norms to fold, from :func:`fold.find`.
        keep: bytes that the Q sets may take; beyond it each is made anew whenever it is asked for.
    """

    def __init__(self, body: Skeleton, updates: Sequence[Update], folds: Sequence[fold.Fold], keep: int):
        self._updates, self._folds = updates, {f"{pair.layer}.weight": pair for pair in folds}
        self._source = body.base(body.slots)
        fold.install(body, folds)
        self.base = self._ready(self._source, body.slots)
        self._touched = {name for update in updates for name in self._affected(update)} & body.slots.keys()
        self.kept = sum(self.base[name].nbytes for name in self._touched) * len(updates) <= keep
        self._room: dict[str, Tensor] = {}
        self._sets = [self._make(update) for update in updates] if self.kept else None

    def __len__(self) -> int:
        return len(self._updates)

    def __getitem__(self, q: int) -> Mapping[str, Tensor]:
        return self._sets[q] if self._sets is not None else self._make(self._updates[q])

    def _make(self, update: Update) -> Mapping[str, Tensor]:
        changed = {name: self._after(name, change) for name, change in update.params.items()}
        changed |= {name: value.to(self._source[name]) for name, value in update.buffers.items()}
        mine = self._ready(ChainMap(changed, self._source), self._affected(update) & self._touched)
        return {name: mine.get(name, self.base[name]) for name in self._touched}

    def _after(self, name: str, change: Tensor | LowRank) -> Tensor:
        """θ + Δ of one tensor; in a buffer of its own that the next query uses again, unless the sets are kept.

        Factors are multiplied out first: θ as the start of their sum would round once for every rank.
        """
        before = self._source[name]
        room = None if self.kept else self._room.setdefault(name, torch.empty_like(before))
        return torch.add(before, dense(change, before), out=room)

    def _affected(self, update: Update) -> set[str]:
        """Slots that this update changes, a folded layer's weight and bias included."""
        names = {*update.params, *update.buffers}
        for pair in self._folds.values():
            if names & set(pair.sources):
                names |= {f"{pair.layer}.weight", f"{pair.layer}.bias"}
        return names

    def _ready(self, tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of these slots with norms folded in and convolution kernels channels-last."""
        ready = {}
        for name in names:
            pair = self._folds.get(name)
            if pair is not None:
                ready[name], ready[f"{pair.layer}.bias"] = pair.fold(tensors)
            elif name not in ready and name in tensors:
                ready[name] = tensors[name]
        return {name: fold.laid_out(tensor) for name, tensor in ready.items()}
