"""Natural-gradient steps: the query's gradient times an inverse curvature, as long as the change that is wanted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finf_fast.loss import Loss
from finf_fast.lowrank import LowRank, require_rank
from finf_fast.mirrors.base import Method, Step, require_number
from finf_fast.mirrors.body import Body, require_finite
from finf_fast.mirrors.curvature import Block, Factors
from finf_fast.mirrors.factors import Gradient
from finf_fast.mirrors.joint import Joint
from finf_fast.mirrors.query import Query
from finf_fast.records import NonFiniteLoss

# Of the training samples' mean loss: far above what carried arithmetic rounds away, and twice the half step is the step
# to a percent on nets trained for their task. On nets of twenty steps, whose curvature says little, it can be far from
# that; `linear_regime` in the record tells.
SIZE = 1e-3
Change = Tensor | LowRank


@dataclass(frozen=True)
class Direction:
    """What a query's gradient became.

    Attributes:
        params: name -> change for ``lr`` 1, in the direction of ascent.
        shares: name -> share of its squared norm that a compression discarded.
        notes: for the record.
    """

    params: dict[str, Change]
    shares: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Preconditioned(Method):
    """A step d = C⁻¹ g of a query's gradient g.

    Its length is set by ``size``: lr is size · scale / √(dᵀ C d). Since C is the mean of the training samples' g gᵀ,
    their losses then change by size · scale in root mean square, to first order and as far as C is their curvature
    (half its square is the Kullback-Leibler divergence of the model's answers). No query's own loss enters: one that
    the model has learnt by heart moves it as far as any other, and the scores of different queries compare. C by blocks
    forgets that layers move together: on deep nets the change is some times as large. ``lr`` scales d by hand.

    Args:
        size: as above; the scale is the training samples' mean loss where factors were fitted, else 1.
        rank: the most columns of a change that is kept as factors; None for dense changes.
    """

    hidden: ClassVar[tuple[str, ...]] = ()  # settings that are too large for a record
    modes: ClassVar[tuple[str, ...]] = ("eval",)

    lr: float | None = None
    size: float = SIZE
    rank: int | None = None

    def __post_init__(self):
        super().__post_init__()
        require_number("size", self.size, above=0.0)
        for name in ("steps", "weight_decay"):
            fixed = type(self).__dataclass_fields__[name].default
            if getattr(self, name) != fixed:
                raise ValueError(f"{name}: method={self.name!r} wants {fixed!r}, got {getattr(self, name)!r}")
        if self.rank is not None:
            require_rank(self.rank)

    def settings(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self.hidden}

    def direction_of(self, body: Body, caught: dict[str, Gradient]) -> Direction:
        """C⁻¹ g, from the pieces of g."""
        return self.directions_of(body, [caught])[0]

    def directions_of(self, body: Body, caught: Sequence[dict[str, Gradient]]) -> list[Direction]:
        """Of several queries; a method has this or :meth:`direction_of`."""
        return [self.direction_of(body, pieces) for pieces in caught]

    def step(self, body: Body, query: Query) -> Step:
        before, caught = body.caught(query)
        return self._step(query, before, caught, self.direction_of(body, caught))

    def _step(self, query: Query, before: float, caught: dict[str, Gradient], found: Direction) -> Step:
        require_finite(found.params, "step", query.who)
        slope = math.fsum(caught[name].dot(change) for name, change in found.params.items())
        lr = self._rate(slope, _length(slope), query)
        signed = lr if self.direction == "ascent" else -lr
        params = {name: _scaled(change, signed) for name, change in found.params.items()}
        notes = {
            "lr": lr,
            "predicted_change": signed * slope,
            "expected_rms": lr * _length(slope),
            **_compression(params, found.shares),
            **found.notes,
        }
        return Step(params, before, query, notes)

    def _rate(self, slope: float, length: float, query: Query) -> float:
        if self.lr is not None:
            return self.lr
        if not self.scale() > 0.0:
            raise ValueError(f"size: wanted training samples with a loss to be a share of, got {self.scale()}; give lr")
        if not length > 0.0:
            raise NonFiniteLoss(
                f"{query.who}: wanted a gradient to step on, got one whose length is {length:.3g} (slope {slope:.3g}); "
                "where the loss has rounded to 0, a model in float64 may still have one"
            )
        return self.size * self.scale() / length

    def scale(self) -> float:
        """What ``size`` is a share of, in units of the loss."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Fitted(Preconditioned):
    """A step with the factors of :func:`finf_fast.fit_factors`.

    Args:
        factors: fitted on this model; :func:`finf_fast.forward_inf` fits them itself.
        damping: added to the curvature, in units of its mean eigenvalue, block by block.
    """

    hidden: ClassVar[tuple[str, ...]] = ("factors",)
    joint: ClassVar[bool] = False  # whether the weights with factors are all it needs the gradients of

    factors: Factors | None = None
    damping: float = 1e-3

    def __post_init__(self):
        super().__post_init__()
        require_number("damping", self.damping, above=0.0)
        if self.factors is None:
            raise ValueError(
                f"factors: method={self.name!r} wants those of finf_fast.fit_factors(model, corpus, "
                f"kind={self.name!r}), got none; finf_fast.forward_inf fits them by itself"
            )
        if not isinstance(self.factors, Factors):
            raise TypeError(f"factors: wanted finf_fast.Factors, got {type(self.factors).__name__}")
        if self.factors.kind not in self.kinds():
            raise ValueError(
                f"factors: method={self.name!r} wants kind {' or '.join(map(repr, self.kinds()))}, got "
                f"{self.factors.kind!r}"
            )

    @classmethod
    def kinds(cls) -> tuple[str, ...]:
        """Kinds of factors that will do."""
        return (cls.name,)

    def prepared(self, model: nn.Module, loss: Loss, device: torch.device) -> Method:
        self.factors.check(model)
        return self

    def scale(self) -> float:
        return self.factors.record["mean_loss"]

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "factors": dict(self.factors.record)}

    def steps_in_turn(self, body: Body, queries: Sequence[Query], begin: Callable[[int], None]) -> Iterator[Step]:
        if not self.joint:
            yield from super().steps_in_turn(body, queries, begin)
            return
        names = [*self.factors.blocks, *(block.bias for block in self.factors.blocks.values())]
        waiting = iter(queries)
        for some in Joint(body, [name for name in names if name in body.weights], begin).in_turn(queries):
            directions = self.directions_of(body, [caught for _, caught in some])
            for (before, caught), found in zip(some, directions, strict=True):
                yield self._step(next(waiting), before, caught, found)

    def blocks(self, caught: Mapping[str, Gradient]) -> Iterator[tuple[str, Block, Tensor | None]]:
        """Name and block of every weight that moves, with the gradient of its bias where that moves too."""
        names = [name for name in self.factors.blocks if name in caught]
        if not names:
            raise ValueError("factors: wanted those of a parameter that moves, got none among " + ", ".join(caught))
        for name in names:
            block = self.factors.blocks[name]
            bias = caught.get(block.bias)
            yield name, block, None if bias is None else bias.total()

    def left(self, body: Body) -> dict[str, Any]:
        """For the record: which parameters have no factor, and so stay still."""
        return {"left_still": [name for name in body.weights if name in self.factors.left]}


def _length(slope: float) -> float:
    """√(dᵀ C d), which of C d = g is √⟨g, d⟩."""
    return math.sqrt(max(slope, 0.0))


def _scaled(change: Change, factor: float) -> Change:
    return change.scaled(factor) if isinstance(change, LowRank) else change * factor


def _compression(params: Mapping[str, Change], shares: Mapping[str, float]) -> dict[str, Any]:
    return {
        "low_rank_tensors": sum(isinstance(change, LowRank) for change in params.values()),
        "change_bytes": sum(change.nbytes for change in params.values()),
        "discarded": max(shares.values(), default=0.0),
        "discarded_by_tensor": {name: share for name, share in shares.items() if share > 0},
    }
