"""Queries that share a forward and a backward pass: the pieces of the joint gradient, told apart by query.

A layer's gradient is a sum over positions, and each position is some query's own; so one pass over many queries gives
the pieces of each, and what a method multiplies them with, it multiplies once for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from finf_fast.mirrors.body import ALIKE, Body
from finf_fast.mirrors.factors import Gradient
from finf_fast.mirrors.query import Query, leaves, tree_map
from finf_fast.mirrors.watch import TURNED, Use, positions_of
from finf_fast.order import Mixed

__all__ = ["Caught", "Joint"]

Caught = tuple[float, dict[str, Gradient]]  # a query's loss, and the gradient of each parameter

# Bytes of the pieces of one pass, a small part of what a training step of the same model keeps. A long text fills it
# alone, and would gain nothing: its products are with many positions as it is.
ROOM = 1 << 26
MOST = 256  # queries a pass; by then every overhead is shared
RESULTS = 1 << 28  # bytes of all that one pass computes, about what its graph keeps
# Between a query's weight and the next one's: what takes one for the other is off by a twentieth.
APART = 1.05


class Joint:
    """Catches the gradients of queries, as many in a pass as fit and can be told apart.

    The first query of every shape goes alone: by what it leaves behind one sees how many fit. Its kind stays alone
    where a gradient comes whole (a convolution's, a penalty's), random numbers are drawn, samples change places, or
    whatever else goes wrong with several that would not with one. Every pass is checked: each query's loss is its loss
    alone, and where the queries' losses are weighted, the gradients at each one's positions are so too, which they are
    not where a position feels another query. The first is compared with its two ends alone besides.

    Args:
        body: at θ after each ``begin``.
        names: of the parameters whose gradients are wanted; a query that goes alone has the others' too.
        begin: told the number of the query that a pass begins with, before it.
    """

    def __init__(self, body: Body, names: Sequence[str], begin: Callable[[int], None]):
        self._body, self._names, self._begin = body, names, begin
        self._fitting: dict[tuple, int] = {}
        self._checked: set[tuple] = set()

    def in_turn(self, queries: Sequence[Query]) -> Iterator[list[Caught]]:
        """Of all queries in their order, those of one pass at a time."""
        at = 0
        while at < len(queries):
            found = self._together(queries, at) or [self._alone(queries, at)]
            yield found
            at += len(found)

    def _together(self, queries: Sequence[Query], at: int) -> list[Caught] | None:
        """Of the queries from ``at`` on that share a pass; None where there are no two."""
        kind = _kind(queries[at])
        some = list(takewhile(lambda q: _kind(q) == kind, queries[at : at + self._fitting.get(kind, 1)]))
        if len(some) < 2:
            return None
        try:
            found = self._pass(some, at)
            if kind not in self._checked:
                self._check(queries, at, found)
        except Exception:  # which the query that it belongs to will meet alone, by name, if it is any one's own
            self._fitting[kind] = 1
            return None
        self._checked.add(kind)
        return found

    def _alone(self, queries: Sequence[Query], at: int) -> Caught:
        self._begin(at)
        if _kind(queries[at]) in self._fitting:
            return self._body.caught(queries[at])
        drawn = _random_states(self._body.device)
        with _Results(self._body.storages()) as results:
            caught = self._body.caught(queries[at])
        still = all(map(torch.equal, drawn, _random_states(self._body.device)))
        self._fitting[_kind(queries[at])] = self._count(caught[1], results.nbytes) if still else 1
        return caught

    def _count(self, caught: dict[str, Gradient], results: int) -> int:
        """Queries a pass, when one leaves these pieces and computes so many bytes on the way."""
        mine = [caught[name] for name in self._names if name in caught]
        if any(pieces.rest is not None and len(pieces.shape) > 1 for pieces in mine):
            return 1
        left = sum(t.nbytes for pieces in mine for t in pieces.tensors)
        return max(1, min(MOST, ROOM // max(1, left), RESULTS // max(1, results)))

    def _pass(self, queries: list[Query], at: int) -> list[Caught]:
        self._begin(at)
        parts = iter([torch.cat(some) for some in zip(*(leaves(q.batch) for q in queries), strict=True)])
        whole = Query(tree_map(lambda _: next(parts), queries[0].batch), queries[0].who)
        drawn = _random_states(self._body.device)
        weights = APART ** torch.arange(len(queries), dtype=self._body.dtype, device=self._body.device)
        watched = self._body.watched(whole, self._names, weights)
        found: list[Caught] = [(loss, {}) for loss in watched.losses.tolist()]
        for use, *gradients in zip(watched.uses, watched.gradients, watched.weighted, strict=True):
            if gradients[0] is not None:
                self._share_out(use, gradients, weights, [pieces for _, pieces in found], queries[0].rows)
        if not self._body.alike(watched.losses, queries):
            raise Mixed("a loss that is another among others")
        if not all(map(torch.equal, drawn, _random_states(self._body.device))):
            raise Mixed("numbers drawn at random")
        self._begin(at)
        order = {name: n for n, name in enumerate(self._body.weights)}
        return [(loss, dict(sorted(pieces.items(), key=lambda item: order[item[0]]))) for loss, pieces in found]

    def _share_out(
        self, use: Use, gradients: list[Tensor], weights: Tensor, to: list[dict[str, Gradient]], rows: int
    ) -> None:
        """What one use of a layer says, to each query its own positions."""
        each = positions_of(use, len(to) * rows)
        if each is None or use.kind == "conv":
            raise Mixed(f"{use.weight}, whose gradient belongs to all queries")
        use.require_unwritten()
        gradient, weighted = (use.outputs(g) for g in gradients)
        if not _weighted_alike(gradient, weighted, weights):
            raise Mixed(f"{use.weight}, at whose positions another query is felt, or whose gradient is not finite")
        inputs, outputs = use.inputs().split(each * rows), gradient.split(each * rows)
        kept = [slice(None)] * len(to) if use.kept is None else use.kept.split(each * rows)
        for pieces, x, g, there in zip(to, inputs, outputs, kept, strict=True):
            mine = pieces.setdefault(use.weight, Gradient(self._body.weights[use.weight].shape))
            if use.kind == "embedding":
                mine.rows.append((x[there], g[there]))
            else:
                mine.pairs.append((x.T, g.T) if use.kind in TURNED else (g.T, x.T))
            if use.bias in self._names:
                bias = pieces.setdefault(use.bias, Gradient(self._body.weights[use.bias].shape))
                bias.rest = g.sum(0) if bias.rest is None else bias.rest + g.sum(0)

    def _check(self, queries: Sequence[Query], at: int, found: list[Caught]) -> None:
        """Raises :class:`Mixed` unless the first query and the last have what each has alone."""
        for n in (0, len(found) - 1):
            _, alone = self._alone(queries, at + n)
            for name in self._names:
                if not _same(alone.get(name), found[n][1].get(name)):
                    raise Mixed(f"{name}, whose gradient of a joint pass is not that of its queries")


def _kind(query: Query) -> tuple:
    return tuple((tensor.shape, tensor.dtype) for tensor in leaves(query.batch))


def _weighted_alike(gradient: Tensor, weighted: Tensor, weights: Tensor) -> bool:
    """Whether the rows (P, m) of each query are weighted with its own weight, and finite."""
    plain, other = (g.reshape(len(weights), -1) for g in (gradient, weighted))
    gap = (other - weights[:, None].to(plain) * plain).norm(dim=1)
    return bool((gap <= ALIKE * plain.norm(dim=1)).all())


class _Results(TorchFunctionMode):
    """Counts the bytes of the storages that calls inside it return, but for those given by address.

    Much like what a graph keeps; hooks that saw each saved tensor would switch off autograd's look for writes into it.
    """

    def __init__(self, given: set[int]):
        super().__init__()
        self._seen, self.nbytes = set(given), 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and (storage := found.untyped_storage()).data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.nbytes += storage.nbytes()
        return found


def _random_states(device: torch.device) -> list[Tensor]:
    own = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state(device)]
    return [torch.get_rng_state(), *own]


def _same(one: Gradient | None, other: Gradient | None) -> bool:
    if one is None or other is None:
        return one is other
    ids = [[ids for ids, _ in pieces.rows] for pieces in (one, other)]
    if len(one.tensors) != len(other.tensors) or not all(map(torch.equal, *ids)):
        return False
    return all(
        a.shape == b.shape and bool((a - b).norm() <= ALIKE * a.norm())
        for a, b in zip(one.tensors, other.tensors, strict=True)
    )
