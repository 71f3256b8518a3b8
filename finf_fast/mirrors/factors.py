"""The gradient of a linear map as two thin factors, taken while it passes by: the dense one is never formed.

Where y = x Wᵀ, the gradient of W is gᵀ x with g the gradient of y. So W is handed to the map without its graph, its
input x is remembered, and g is asked for instead. Seen are ``torch.nn.functional.linear`` and ``embedding`` and the
``torch.addmm(bias, x, weight)`` of Hugging Face's Conv1D, where their weight *is* a parameter to step. Whatever else is
done with such a parameter (a transpose, a penalty on it, ``nn.MultiheadAttention``, which calls its products out of
sight, a checkpointed layer) reaches it through autograd as ever, and the two are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from finf_fast import ops
from finf_fast.calls import by_place, ordinary, plain, takes
from finf_fast.lowrank import LowRank, compress, compress_rows


@dataclass
class Gradient:
    """The gradient of one parameter, in the pieces that were caught.

    Attributes:
        shape: of the parameter.
        rest: what came through autograd, dense; None if nothing did.
        pairs: (u, v), shapes (rows, T) and (cols, T), each standing for u vᵀ.
        rows: (ids, values), shapes (n,) and (n, cols), of an embedding; ids may repeat.
    """

    shape: torch.Size
    rest: Tensor | None = None
    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def tensors(self) -> list[Tensor]:
        """All of it that may hold NaN or infinity."""
        found = [tensor for pair in self.pairs for tensor in pair] + [values for _, values in self.rows]
        return found if self.rest is None else [*found, self.rest]

    def whole(self, rank: int) -> tuple[Tensor | LowRank, float]:
        """The gradient, and the share of its squared norm that a compression to ``rank`` discarded.

        Dense where something came through autograd, and where factors cost no less in a forward: r (rows + cols)
        against rows · cols, so from r = min(rows, cols) / 2 on.
        """
        if not self.pairs and not self.rows:
            return self.rest, 0.0
        ids, values = self._merged()
        columns = sum(u.shape[1] for u, _ in self.pairs) + len(ids)
        if self.rest is not None or 2 * min(columns, rank) >= min(self.shape):
            return self._dense(ids, values), 0.0
        if not self.pairs and columns > rank:
            return compress_rows(ids, values, self.shape[0], rank)
        u, v = (list(side) for side in zip(*self.pairs, strict=True)) if self.pairs else ([], [])
        if len(ids):
            places = values.new_zeros(self.shape[0], len(ids))
            places[ids, torch.arange(len(ids), device=ids.device)] = 1
            u, v = [*u, places], [*v, values.T]
        if not u:  # an embedding that was asked for nothing
            return LowRank(values.new_zeros(self.shape[0], 0), values.T), 0.0
        return compress(torch.cat(u, 1), torch.cat(v, 1), rank)

    def total(self) -> Tensor:
        """The gradient, dense."""
        return self._dense(*self._merged()) if self.pairs or self.rows else self.rest

    def dot(self, change: Tensor | LowRank) -> float:
        """Σ gradient ∘ change, added up in float64; of factors nothing dense is formed."""
        low = isinstance(change, LowRank)
        found = 0.0
        if self.rest is not None:
            found += (self.rest.double() * (change.dense() if low else change).double()).sum().item()
        for u, v in self.pairs:
            through = (change.u.T @ u).double() * (change.v.T @ v).double() if low else (change @ v * u).double()
            found += through.sum().item()
        for ids, values in self.rows:
            across = change.u[ids] @ change.v.T if low else change[ids]
            found += (values * across).double().sum().item()
        return found

    def _merged(self) -> tuple[Tensor, Tensor]:
        """Distinct ids, and for each the sum of its rows, always added in the same order."""
        if not self.rows:
            like = self.pairs[0][1]
            return torch.zeros(0, dtype=torch.long, device=like.device), like.new_zeros(0, self.shape[1])
        ids, values = (torch.cat(side) for side in zip(*self.rows, strict=True))
        ids, order = torch.sort(ids, stable=True)
        ids, counts = torch.unique_consecutive(ids, return_counts=True)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return ids, ops.segment_sum(values[order].T, offsets).T

    def _dense(self, ids: Tensor, values: Tensor) -> Tensor:
        """The sum of all pieces, in the one matrix that the result needs."""
        pairs = list(self.pairs)
        if self.rest is not None:
            total = self.rest.clone()  # autograd may have given the same tensor to another parameter
        elif pairs:
            u, v = pairs.pop(0)
            total = u @ v.T
        else:
            total = values.new_zeros(self.shape)
        for u, v in pairs:
            total.addmm_(u, v.T)
        return total.index_add_(0, ids, values)  # no id comes twice


@dataclass(frozen=True)
class _Use:
    """One call of a linear map, waiting for the gradient of its output.

    Attributes:
        name: of the parameter that was its weight.
        input: (T, D) rows, or (T,) ids.
        version: how often ``input`` had been written into.
        edge: where the gradient of the output passes; later writes into the output do not move it.
        add: puts the caught (input, gradient) into a :class:`Gradient`.
    """

    name: str
    input: Tensor
    version: int
    edge: GradientEdge
    add: Callable[[Gradient, Tensor, Tensor], None]


class Capture(TorchFunctionMode):
    """Inside this mode the linear maps of ``leaves`` leave their inputs behind for :meth:`gradients`.

    Args:
        leaves: name -> parameter with ``requires_grad``.
    """

    def __init__(self, leaves: Mapping[str, Tensor]):
        super().__init__()
        self._leaves = leaves
        self._names = {id(leaf): name for name, leaf in leaves.items() if leaf.dim() == 2}
        self._uses: list[_Use] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        catch = _MAPS.get(func)
        args, kwargs = by_place(func, args, kwargs) if catch is not None and kwargs else (args, kwargs)
        caught = catch is not None and ordinary() and takes(catch, (self, *args), kwargs)
        found = catch(self, *args, **kwargs) if caught else None
        return func(*args, **kwargs) if found is None else found

    def gradients(self, loss: Tensor) -> dict[str, Gradient]:
        """Name -> gradient of ``loss`` for every parameter it depends on.

        Raises:
            RuntimeError: the input of a linear map was written into after its use.
        """
        if not loss.requires_grad:
            return {}
        edges = [use.edge for use in self._uses]
        found = torch.autograd.grad(loss, [*edges, *self._leaves.values()], allow_unused=True)
        caught: dict[str, Gradient] = {}
        for name, rest in zip(self._leaves, found[len(edges) :], strict=True):
            if rest is not None:
                rest = rest if rest.layout is torch.strided else rest.to_dense()
                caught[name] = Gradient(rest.shape, rest)
        for use, g in zip(self._uses, found, strict=False):
            if g is not None:
                _require_unwritten(use)
                use.add(caught.setdefault(use.name, Gradient(self._leaves[use.name].shape)), use.input, g)
        return {name: caught[name] for name in self._leaves if name in caught}

    def name_of(self, weight: Any) -> str | None:
        return self._names.get(id(weight))

    def passed(
        self, name: str, input: Tensor, output: Tensor, add: Callable[[Gradient, Tensor, Tensor], None]
    ) -> Tensor:
        """``output`` with a place where its gradient can be read, noted with what it takes to make one of the weight.

        Args:
            output: no view: a write into a view reroutes the graph past the place.
        """
        if not output.requires_grad:  # neither input nor bias is stepped; a leaf could not be written into
            output = output.requires_grad_().clone()
        input = input.detach()
        self._uses.append(_Use(name, input, input._version, get_gradient_edge(output), add))
        return output


def _linear(capture: Capture, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    name = capture.name_of(weight)
    if name is None or not plain(input):
        return None
    x = input.reshape(-1, input.shape[-1])
    out = capture.passed(name, x, F.linear(x, weight.detach(), bias), lambda to, x, g: to.pairs.append((g.T, x.T)))
    return out.view(*input.shape[:-1], weight.shape[0])


def _addmm(capture: Capture, bias: Tensor, input: Tensor, weight: Any = None, **scales: Any) -> Tensor | None:
    name = capture.name_of(weight)
    if name is None or scales or not plain(input):
        return None
    out = torch.addmm(bias, input, weight.detach())
    return capture.passed(name, input, out, lambda to, x, g: to.pairs.append((x.T, g.T)))


def _embedding(
    capture: Capture,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    name = capture.name_of(weight)
    if name is None or scale_grad_by_freq or not plain(input):
        return None
    out = F.embedding(input, weight.detach(), padding_idx, max_norm, norm_type)

    def add(to: Gradient, ids: Tensor, g: Tensor) -> None:
        ids, g = ids.reshape(-1).long(), g.reshape(-1, g.shape[-1])
        kept = slice(None) if padding_idx is None else ids != padding_idx % weight.shape[0]
        to.rows.append((ids[kept], g[kept]))

    return capture.passed(name, input, out, add)


_MAPS: dict[Callable, Callable] = {F.linear: _linear, torch.addmm: _addmm, F.embedding: _embedding}


def _require_unwritten(use: _Use) -> None:
    """What autograd itself would say, had it been left to remember the input."""
    if use.input._version != use.version:
        raise RuntimeError(
            f"{use.name}: the input of this layer was written in place after its use, so the gradient of its weight "
            "cannot be computed"
        )
