"""Retrained without the samples that a way names: how much more does the query lose, and is it still told right?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fidelity import ensemble, judging, problems
from fidelity.data import Images, digits
from fidelity.retraining import AT_ONCE, RECIPE, asked_of, cached
from fidelity.ways import Asked, all_ways

__all__ = ["rows"]

TRAIN, QUERIES, TAKEN, SEEDS = 1000, 25, (10, 20, 40, 80), (1, 2, 3)
NET = "MLP 64-32-10"
LEAVE = ("released protocol, |Δ|",)  # its scores have no sign


def rows(cache: Path, quick: bool) -> Iterator[dict[str, object]]:
    """A row a way: rise of a query's loss without its k most helpful samples, and share of queries told wrong then."""
    images, make = digits(TRAIN), problems.NETS[NET]
    asked = asked_of(make, images)
    asked = Asked(asked.model, asked.x, asked.y, *_told_right(asked, 3 if quick else QUERIES))
    ways, taken, seeds = all_ways(asked, LEAVE), TAKEN[: 1 if quick else None], SEEDS[: 1 if quick else None]
    before = _retrained(images, asked, torch.full((1, 1), -1), seeds)[0].mean(0)
    for way, scored in ways.items():
        order = torch.from_numpy(np.argsort(-np.nan_to_num(scored.raw, nan=-np.inf), axis=1, kind="stable").copy())
        found: dict[str, object] = {}
        for k in taken:
            after, wrong = cached(
                *(cache, f"brittleness {way} {k} {len(asked.labels)} {len(seeds)}"),
                lambda order=order, k=k: torch.stack(_own(*_retrained(images, asked, order[:, :k], seeds))),
            )
            found[f"rise, {k} gone"] = judging.Estimate.of((after - before).numpy())
            found[f"wrong, {k} gone"] = judging.Estimate.of(wrong.numpy())
        yield {"task": "brittleness", "data": "digits", "net": NET, "way": way, **found, "seconds": scored.seconds}


def _told_right(asked: Asked, count: int) -> tuple[Tensor, Tensor]:
    """The first queries that the model tells right."""
    with torch.inference_mode():
        right = (asked.model(asked.queries).argmax(1) == asked.labels).nonzero()[:count, 0]
    return asked.queries[right], asked.labels[right]


def _retrained(images: Images, asked: Asked, without: Tensor, seeds: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(M, Q) losses of the queries under models without each of M lists of samples (M, k), mean over the seeds; and how
    many of those models tell them wrong."""
    make, losses, wrong = problems.NETS[NET], [], []
    for seed in seeds:
        for part in without.split(AT_ONCE):
            members = torch.arange(TRAIN).expand(len(part), TRAIN)
            weights = ensemble.train(make, images.x, images.y, members, [seed] * len(part), RECIPE, part)
            each = [ensemble.losses(make, weights, asked.queries, torch.full_like(asked.labels, c)) for c in range(10)]
            every = torch.stack(each, 2).double()  # (M, Q, classes)
            losses.append(every.gather(2, asked.labels.expand(len(part), -1)[..., None])[..., 0])
            wrong.append((every.argmin(2) != asked.labels).double())
    return tuple(torch.cat(found).view(len(seeds), len(without), -1).mean(0) for found in (losses, wrong))


def _own(losses: Tensor, wrong: Tensor) -> list[Tensor]:
    """Of lists that belong to one query each."""
    return [losses.diagonal(), wrong.diagonal()]
