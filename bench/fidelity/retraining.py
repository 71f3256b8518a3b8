"""Scores against retraining: half subsets (the linear datamodeling score), and one sample left out.

Park et al., "TRAK", ICML 2023, arXiv 2303.14186, section 2: how well the sum of scores over a random half of the
training set ranks the losses of models trained on such halves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fidelity import ensemble, judging, problems
from fidelity.data import Images, digits
from fidelity.ways import Asked, Scored, all_ways

__all__ = ["AT_ONCE", "RECIPE", "asked_of", "cached", "rows", "write_problems"]

RECIPE = ensemble.Recipe()
TRAIN, QUERIES, SUBSETS, SEEDS = 1000, 100, 100, (1, 2)
LEFT_OUT, LEFT_SEEDS = 100, (1, 2, 3, 4, 5)
LEFT_AWAY = {"conv net": ("exact step (cg)",)}  # half a minute a query there
AT_ONCE = 100  # models in a stack


def rows(cache: Path, quick: bool) -> Iterator[dict[str, object]]:
    """A row for each net and way: LDS and leave-one-out, with their intervals."""
    images = digits(TRAIN)
    for net, make in list(problems.NETS.items())[: 1 if quick else None]:
        members, halves = _halves(cache, net, make, images, 10 if quick else SUBSETS)
        left, effects = _left_out(cache, net, make, images, 10 if quick else LEFT_OUT)
        asked = asked_of(make, images)
        ways = all_ways(asked, LEFT_AWAY.get(net, ()))
        ways |= {name: Scored(raw, raw, seconds) for name, raw, seconds in problems.answers(cache, net, asked.model)}
        for way, scored in ways.items():
            # Helpful samples lower the loss of models that have them, and raise it where they are left out.
            lds = judging.correlations(judging.sums_over_subsets(scored.raw, members), -halves)
            loo = judging.correlations(scored.raw[:, left], effects)
            found = {"lds": judging.Estimate.of(lds), "loo": judging.Estimate.of(loo)}
            yield {"task": "retraining", "data": "digits", "net": net, "way": way, **found, "seconds": scored.seconds}


def _halves(cache: Path, net: str, make: Callable, images: Images, subsets: int) -> tuple[np.ndarray, np.ndarray]:
    """(M, n) random halves, and (Q, M) each query's mean loss over the seeds of models trained on them."""
    generator = torch.Generator().manual_seed(1)
    members = torch.stack([torch.randperm(TRAIN, generator=generator)[: TRAIN // 2] for _ in range(subsets)])

    def train() -> Tensor:
        found = [_losses(make, images, members, [1000 * seed + m for m in range(subsets)]) for seed in SEEDS]
        return torch.stack(found).double().mean(0)

    return members.numpy(), cached(cache, f"halves {net} {subsets}", train).T.numpy()


def _left_out(cache: Path, net: str, make: Callable, images: Images, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(M,) samples, and (Q, M) by how much each query's loss is higher where one is left out."""
    left = torch.randperm(TRAIN, generator=torch.Generator().manual_seed(2))[:count]
    without = torch.cat([torch.tensor([-1]), left])[:, None]
    members = torch.arange(TRAIN).expand(len(without), TRAIN)

    def train() -> Tensor:
        found = [_losses(make, images, members, [seed] * len(without), without) for seed in LEFT_SEEDS]
        return torch.stack(found).double().mean(0)

    losses = cached(cache, f"left out {net} {count}", train)
    return left.numpy(), (losses[1:] - losses[:1]).T.numpy()


def _losses(make: Callable, images: Images, members: Tensor, seeds: list[int], without: Tensor | None = None) -> Tensor:
    """(M, Q) losses of the queries under models trained on their members."""
    found = []
    for first in range(0, len(members), AT_ONCE):
        part = slice(first, first + AT_ONCE)
        own = None if without is None else without[part]
        weights = ensemble.train(make, images.x, images.y, members[part], seeds[part], RECIPE, own)
        found.append(ensemble.losses(make, weights, images.held_x[:QUERIES], images.held_y[:QUERIES]))
    return torch.cat(found)


def write_problems(cache: Path) -> None:
    """For peers: the models that are judged, with their data."""
    for net, make in problems.NETS.items():
        asked = asked_of(make, digits(TRAIN))
        problems.write(cache, net, asked.model, asked.x, asked.y, asked.queries, asked.labels)


def asked_of(make: Callable, images: Images) -> Asked:
    """A model trained on all samples, and the queries."""
    members = torch.arange(TRAIN)[None]
    model = ensemble.unstack(make, ensemble.train(make, images.x, images.y, members, [7], RECIPE), 0)
    return Asked(model, images.x, images.y, images.held_x[:QUERIES], images.held_y[:QUERIES])


def cached(cache: Path, name: str, make: Callable[[], Tensor]) -> Tensor:
    """What was trained once is not trained again."""
    path = cache / f"{name.replace(' ', '-')}.pt"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(make(), path)
    return torch.load(path, weights_only=True)
