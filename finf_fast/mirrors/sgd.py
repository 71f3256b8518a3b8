"""Plain gradient steps: Δ ± lr · g; for linear layers and convolutions as two thin factors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from finf_fast.lowrank import LowRank, require_rank
from finf_fast.mirrors.base import Rule, Step, Walking, walk
from finf_fast.mirrors.body import Body
from finf_fast.mirrors.query import Query


@dataclass(frozen=True, kw_only=True)
class SGD(Walking):
    """``torch.optim.SGD`` without momentum; ``lr`` 1e-2 by default.

    The change of a linear layer or an embedding, on a query of T tokens a matrix of rank T at most, is kept as
    :class:`finf_fast.LowRank` and never formed. What has more columns than ``rank``, and the kernel of a convolution
    (out, in · height · width), is compressed to the best approximation of that rank, and the record says which share
    of its squared norm that discarded. Dense stay: grouped convolutions, layers
    so small or queries so long that factors would not pay (:meth:`finf_fast.mirrors.factors.Gradient.whole`), weights
    that something else reads too, and everything where ``weight_decay`` or several ``steps`` are asked for.

    Args:
        rank: the most columns that a change keeps, at least 1; None for dense changes throughout.
    """

    name: ClassVar[str] = "sgd"
    lr: float = 1e-2
    rank: int | None = 32  # a skinny product beside a layer of width 768: 8 % of its forward, by r (D + D') / (D D')

    def __post_init__(self):
        super().__post_init__()
        if self.rank is not None:
            require_rank(self.rank)

    def rule(self) -> Rule:
        return _Rule(self.lr)

    def step(self, body: Body, query: Query) -> Step:
        reason = self._dense_because()
        if reason:
            return replace(walk(body, query, self), notes={"rank": None, "dense_because": reason})
        before, slopes, shares = body.factored(query, self.rank)
        factor = self.lr if self.direction == "ascent" else -self.lr
        params = {name: _scaled(slope, factor) for name, slope in slopes.items()}
        return Step(params, before, query, {"rank": self.rank, **_notes(params, shares)})

    def _dense_because(self) -> str:
        """Why all changes are dense; empty where they need not be."""
        if self.rank is None:
            return "rank=None"
        return "weight_decay" if self.weight_decay else "steps > 1" if self.steps > 1 else ""


class _Rule(Rule):
    def __init__(self, lr: float):
        self._lr = lr

    def piece(self, name: str, slope: Tensor) -> Tensor:
        return slope * -self._lr


def _scaled(slope: Tensor | LowRank, factor: float) -> Tensor | LowRank:
    return slope.scaled(factor) if isinstance(slope, LowRank) else slope * factor


def _notes(params: dict[str, Tensor | LowRank], shares: dict[str, float]) -> dict[str, Any]:
    return {
        "low_rank_tensors": sum(isinstance(change, LowRank) for change in params.values()),
        "discarded": max(shares.values(), default=0.0),
        "discarded_by_tensor": {name: share for name, share in shares.items() if share > 0},
    }
