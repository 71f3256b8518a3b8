"""Leaked images: held-out ones slip into a training set, exact or altered; does the query find its copy?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fidelity import judging, models
from fidelity.data import Images, digits, fashion
from fidelity.ways import Asked, all_ways

__all__ = ["rows"]

LEFT_AWAY = ("exact step (cg)",)  # minutes a query on these nets


@dataclass(frozen=True)
class Net:
    make: Callable[[], nn.Module]
    epochs: int


FASHION = {
    "MLP 784-256-128-10": Net(lambda: models.mlp(784, 256, 128, 10), 40),
    "conv net": Net(lambda: models.conv_net(28), 25),
    "ResNet with batch norm": Net(models.res_net, 25),
}
DIGITS = {
    "MLP 64-256-128-10": Net(lambda: models.mlp(64, 256, 128, 10), 40),
    "conv net": Net(lambda: models.conv_net(8), 40),
}


def rows(folder: Path, seeds: int, only: str, copies: Sequence[str], quick: bool) -> Iterator[dict[str, object]]:
    """A row for each data set, kind of copy, net and way: top-1 over all queries of all seeds."""
    sets = {"digits": (digits(1200), DIGITS, 1200, 50)}
    found = fashion(folder)
    if found is None:
        print(f"Fashion-MNIST left out: {folder} has not its four IDX files")
    else:
        sets["Fashion-MNIST"] = (found, FASHION, 3000, 60)
    for data, (images, nets, train, leaked) in sets.items():
        for copy in copies:
            wanted = {net: how for net, how in nets.items() if only in net}
            for net, how in list(wanted.items())[: 1 if quick else None]:
                for row in _over_seeds(images, how, train, leaked, copy, seeds):
                    yield {"task": "leakage", "data": data, "copy": copy, "net": net, "seeds": seeds, **row}


def _over_seeds(
    images: Images, net: Net, train: int, leaked: int, copy: str, seeds: int
) -> Iterator[dict[str, object]]:
    raw, rms, seconds = {}, {}, {}
    for seed in range(seeds):
        for way, scored in _ways(images.drawn(train, leaked, seed), net, copy, seed).items():
            sources = np.arange(train, train + leaked)
            raw.setdefault(way, []).append(judging.first(scored.raw, sources))
            rms.setdefault(way, []).append(judging.first(scored.rms, sources))
            seconds[way] = seconds.get(way, 0.0) + scored.seconds / seeds
    for way in raw:
        found = {name: judging.Estimate.of(np.concatenate(kept[way])) for name, kept in (("raw", raw), ("rms", rms))}
        yield {"way": way, **found, "seconds": seconds[way]}


def _ways(drawn: Images, net: Net, copy: str, seed: int) -> dict:
    held = drawn.held_x if copy == "exact" else altered(drawn.held_x, seed)
    x, y = torch.cat([drawn.x, held]), torch.cat([drawn.y, drawn.held_y])
    model = models.trained(net.make, x, y, net.epochs, seed)
    return all_ways(Asked(model, x, y, drawn.held_x, drawn.held_y), LEFT_AWAY)


def altered(x: Tensor, seed: int) -> Tensor:
    """Each image moved by a 28th of its side in a direction of its own, with noise of a tenth of the spread of all."""
    generator = torch.Generator().manual_seed(seed)
    angles = torch.rand(len(x), generator=generator) * 2 * torch.pi
    moves = torch.stack([angles.cos(), angles.sin()], 1)[:, :, None] * (2 / 28)  # the grid's side is 2
    grid = F.affine_grid(torch.cat([torch.eye(2).expand(len(x), 2, 2), moves], 2), list(x.shape), align_corners=False)
    moved = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    return moved + 0.1 * x.std() * torch.randn(x.shape, generator=generator)
