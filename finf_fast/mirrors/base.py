"""What every method answers, and the loop they share: Δ is kept apart from θ, so it is exact however small."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finf_fast.loss import Loss
from finf_fast.lowrank import LowRank
from finf_fast.mirrors.body import Body
from finf_fast.mirrors.choose import Filter
from finf_fast.mirrors.query import Query
from finf_fast.update import DIRECTIONS


@dataclass(frozen=True)
class Step:
    """What a method made of a query.

    Attributes:
        params: name -> change Δ = θ' − θ.
        before: the query's loss before the step.
        query: the rows that were stepped on, which a method may have changed.
        notes: what the record should say beside the settings.
    """

    params: dict[str, Tensor | LowRank]
    before: float
    query: Query
    notes: dict[str, Any] = field(default_factory=dict)


class Rule(ABC):
    """One optimizer run: from a gradient to the next piece of the change. State is fresh and kept by parameter name."""

    @abstractmethod
    def piece(self, name: str, slope: Tensor) -> Tensor:
        """What to add to Δ, given the gradient of what is minimised (its shape)."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A way to make θ' from a query.

    Args:
        lr: step size, positive; None where the method finds one for itself.
        direction: ``"ascent"`` raises the query's loss, ``"descent"`` lowers it.
        steps: how many, at least 1.
        weight_decay: L2 term added to the gradient, as in ``torch.optim``.

    Raises:
        ValueError: one of them is out of its range.
    """

    name: ClassVar[str]
    modes: ClassVar[tuple[str, ...]] = ("eval", "train")  # allowed ones, the default first
    fits: ClassVar[str | None] = None  # kind of curvature factors that it wants

    lr: float | None
    direction: str = "ascent"
    steps: int = 1
    weight_decay: float = 0.0

    def __post_init__(self):
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction: wanted one of {', '.join(DIRECTIONS)}, got {self.direction!r}")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps: wanted a whole number, at least 1, got {self.steps!r}")
        if self.lr is not None or type(self).lr is not None:
            require_number("lr", self.lr, above=0.0)
        require_number("weight_decay", self.weight_decay)

    def accept(self, loss: Loss, params: Filter) -> None:  # noqa: B027 (most methods take any)
        """Raises ``ValueError`` for a loss or a choice of parameters that the method is not defined for."""

    def prepared(self, model: nn.Module, loss: Loss, device: torch.device) -> Method:
        """The method with what it needs of this model checked and at hand; before the first query."""
        return self

    def settings(self) -> dict[str, Any]:
        """All of them, ready for JSON."""
        return asdict(self)

    @abstractmethod
    def step(self, body: Body, query: Query) -> Step:
        """The change that one query makes; the body has just begun."""

    def steps_in_turn(self, body: Body, queries: Sequence[Query], begin: Callable[[int], None]) -> Iterator[Step]:
        """The change of every query, each as :meth:`step` has it; the body may be used between two of them.

        Args:
            begin: to be told the number of a query before the body is asked about it.
        """
        for number, query in enumerate(queries):
            begin(number)
            yield self.step(body, query)


@dataclass(frozen=True, kw_only=True)
class Walking(Method):
    """A method that is an optimizer: ``steps`` steps from θ, each by its rule."""

    @abstractmethod
    def rule(self) -> Rule:
        """A fresh optimizer run."""

    def step(self, body: Body, query: Query) -> Step:
        return walk(body, query, self)


def walk(body: Body, query: Query, method: Walking, first: Tensor | None = None) -> Step:
    """Δ after the method's steps.

    Args:
        first: the query's loss at θ with its graph, where the method already has it.
    """
    rule, changes, before = method.rule(), {}, None
    for number in range(method.steps):
        if number:
            body.place(changes)
        loss = first if first is not None and number == 0 else body.loss(query)
        before = loss.item() if before is None else before
        for name, gradient in body.gradients(loss, query.who).items():
            piece = rule.piece(name, _slope(gradient, body.weights[name], changes.get(name), method))
            changes[name] = changes[name] + piece if name in changes else piece
    return Step(changes, before, query)


def require_number(name: str, value: Any, above: float | None = None) -> None:
    """Raises ``ValueError`` unless ``value`` is a finite number, at least 0, or more than ``above`` where given."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (above is not None and value <= above):
        wanted = "at least 0" if above is None else f"above {above:g}"
        raise ValueError(f"{name}: wanted a finite number {wanted}, got {value!r}")


def _slope(gradient: Tensor, weight: Tensor, change: Tensor | None, method: Method) -> Tensor:
    """Gradient of what is minimised: ∓L plus the L2 term, which pulls towards 0 in both directions, as torch has it."""
    slope = -gradient if method.direction == "ascent" else gradient
    if method.weight_decay:
        slope = slope + method.weight_decay * (weight if change is None else weight + change)
    return slope
