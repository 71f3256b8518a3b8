"""The data-leakage protocol that the method's authors published, with its answer to a query already learnt by heart.

Ko et al., "The Mirrored Influence Hypothesis", CVPR 2024, arXiv 2402.08922; the CIFAR-100 notebook of the release.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from finf_fast.loss import CrossEntropy, Custom, Loss
from finf_fast.loss.base import LABEL_KEYS
from finf_fast.mirrors.adam import Adam
from finf_fast.mirrors.base import Step, walk
from finf_fast.mirrors.body import Body
from finf_fast.mirrors.choose import Filter, describe
from finf_fast.mirrors.query import Query, tree_map

LEARNT = 0.01  # cross-entropy below which the notebook does not trust the gradient
ENOUGH = 0.02  # and what a moved query must reach (it tests half of each: its loss is divided by the length of [x, y])
RADIUS = 3.0  # first distance of the moved query, in normalised pixels
GROWTH = 1.1  # from one try to the next


@dataclass(frozen=True, kw_only=True)
class Released(Adam):
    """One gradient-ascent step of a fresh Adam (``lr`` 5e-3) in train mode, on the query taken twice.

    A query whose loss in that forward is below 0.01 is learnt by heart, and its gradient says little: the step is made
    on ``x + r·u`` instead, u a random unit direction over all of x, drawn anew for every try, r = 3 and 1.1 times more
    from try to try until the loss is at least 0.02. Every try starts from the model as given, so the running statistics
    that travel with the update have moved with exactly one forward: the one whose gradient is the step's. In a query of
    several rows each row has its own u, and the loss is their mean.

    The release scores with ``|delta|``, in eval mode with the moved statistics, and tunes only ``lr``.

    Args:
        tries: give up after that many moved queries.

    Raises:
        ValueError: a setting that the protocol fixes has another value.
    """

    name: ClassVar[str] = "released"
    modes: ClassVar[tuple[str, ...]] = ("train",)
    tries: int = 100  # the last one stands 3 · 1.1^99, 4e4, away: nothing is left of the query there

    def __post_init__(self):
        super().__post_init__()
        for name in ("direction", "steps", "weight_decay", "betas", "eps"):
            fixed = type(self).__dataclass_fields__[name].default
            if getattr(self, name) != fixed:
                raise ValueError(f"{name}: method='released' wants {fixed!r}, got {getattr(self, name)!r}")
        if not isinstance(self.tries, int) or self.tries < 1:
            raise ValueError(f"tries: wanted a whole number, at least 1, got {self.tries!r}")

    def accept(self, loss: Loss, params: Filter) -> None:
        if not isinstance(loss, (CrossEntropy, Custom)):
            raise ValueError(f"loss: method='released' wants a cross-entropy, got {loss.name!r}")
        if params is not None:
            raise ValueError(f"params: method='released' steps every parameter that trains, got {describe(params)}")

    def step(self, body: Body, query: Query) -> Step:
        twice = _twice(query)
        loss = body.loss(twice)
        notes: dict[str, Any] = {"fallback": False}
        if loss.item() < LEARNT:
            notes = {"fallback": True, "loss_unmoved": loss.item()}
            twice, loss, found = self._move(body, query)
            notes |= found
        return replace(walk(body, twice, self, loss), notes=notes)

    def _move(self, body: Body, query: Query) -> tuple[Query, Tensor, dict[str, Any]]:
        """The query moved until its loss is large enough, taken twice; that loss; radius and number of tries."""
        radius = RADIUS
        for number in range(1, self.tries + 1):
            body.begin()
            twice = _twice(_moved(query, radius))
            loss = body.loss(twice)
            if loss.item() >= ENOUGH:
                return twice, loss, {"radius": radius, "tries": number}
            radius *= GROWTH
        raise ValueError(
            f"{query.who}: wanted a loss of at least {ENOUGH} on a moved query, got {loss.item():.3g} after "
            f"{self.tries} tries, at radius {radius / GROWTH:.3g}"
        )


def _twice(query: Query) -> Query:
    return replace(query, batch=tree_map(lambda t: torch.cat([t, t]), query.batch))


def _moved(query: Query, radius: float) -> Query:
    """The query with every row of its one floating-point input moved by ``radius`` in a random direction."""
    batch = query.batch
    if isinstance(batch, Mapping):
        inputs = [key for key in batch if key not in LABEL_KEYS]
    elif isinstance(batch, tuple):
        inputs = list(range(max(1, len(batch) - 1)))  # the last of several is the target
    else:
        return replace(query, batch=_moved(replace(query, batch=(batch,)), radius).batch[0])
    floating = [key for key in inputs if batch[key].is_floating_point()]
    if len(floating) != 1:
        raise ValueError(
            f"{query.who}: its loss is below {LEARNT}, where method='released' moves the input; wanted one that is "
            f"floating-point, got {[str(batch[key].dtype) for key in inputs]}; method='adam' steps on it as it is"
        )
    (key,) = floating
    parts = dict(batch) if isinstance(batch, Mapping) else list(batch)
    parts[key] = batch[key] + radius * _directions(batch[key])
    return replace(query, batch=parts if isinstance(batch, Mapping) else tuple(parts))


def _directions(x: Tensor) -> Tensor:
    """A random direction of Euclidean length 1 for each row of ``x``, drawn on the CPU: the same on any device."""
    drawn = torch.randn(x.shape).to(x)
    return drawn / drawn.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))
