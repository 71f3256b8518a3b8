"""Groups of samples, none to all of their labels wrong: does the mirror tell how much each group harms?

Ko et al., CVPR 2024, arXiv 2402.08922, section 3, the second experiment: what leaving a group out does to the mean loss
of the held-out images, against what a step on those images does to the group.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import finf_fast as ff
from fidelity import ensemble, judging, models
from fidelity.data import Images, digits, fashion
from fidelity.retraining import cached

__all__ = ["rows"]

GROUPS, SEEDS = 30, (1, 2, 3, 4, 5)
RECIPE = ensemble.Recipe()
WAYS = {
    "exact step (cg)": {"method": "cg"},
    "K-FAC": {"method": "kfac"},
    "EK-FAC": {"method": "ekfac"},
    "diagonal Fisher": {"method": "fisher_diag"},
    "sgd, step 1e-2": {"method": "sgd", "lr": 1e-2},
}
SLOW = {"conv net": ("exact step (cg)",), "MLP 784-64-10": ("exact step (cg)",)}  # minutes for the one query
NETS: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "digits": {
        "logistic regression": partial(models.mlp, 64, 10),
        "MLP 64-32-10": partial(models.mlp, 64, 32, 10),
        "conv net": partial(models.conv_net, 8),
    },
    "Fashion-MNIST": {"MLP 784-64-10": partial(models.mlp, 784, 64, 10)},
}


def rows(cache: Path, folder: Path, quick: bool) -> Iterator[dict[str, object]]:
    """A row for each data set, net and way: Pearson's correlation over the groups, with the truth and with the share of
    wrong labels."""
    sets = {"digits": spoiled(digits(1200))}
    found = None if quick else fashion(folder)
    sets |= {} if found is None else {"Fashion-MNIST": spoiled(found.drawn(3000, 500, 0))}
    for data, images in sets.items():
        for net, make in list(NETS[data].items())[: 1 if quick else None]:
            model, effects = _truth(cache, f"{data} {net}", make, images, SEEDS[: 1 if quick else None])
            for way, (scores, seconds) in _ways(model, images, SLOW.get(net, ())).items():
                help_of = scores.reshape(GROUPS, -1).sum(1)
                found = {
                    "with the truth": judging.pearson(help_of, effects),
                    "with wrong labels": judging.pearson(-help_of, wrong_shares()),
                }
                yield {"task": "mislabel", "data": data, "net": net, "way": way, **found, "seconds": seconds}


def wrong_shares() -> np.ndarray:
    """(G,) share of wrong labels of each group."""
    return np.linspace(0.0, 1.0, GROUPS)


def spoiled(images: Images) -> Images:
    """Groups one after the other, in each the first samples given another label, by a seed."""
    generator = torch.Generator().manual_seed(0)
    size, y = len(images.y) // GROUPS, images.y.clone()
    for group, share in enumerate(wrong_shares()):
        wrong = slice(group * size, group * size + round(share * size))
        y[wrong] = (y[wrong] + torch.randint(1, 10, y[wrong].shape, generator=generator)) % 10
    return replace(images, x=images.x[: GROUPS * size], y=y[: GROUPS * size])


def _truth(
    cache: Path, name: str, make: Callable[[], nn.Module], images: Images, seeds: tuple[int, ...]
) -> tuple[nn.Module, np.ndarray]:
    """A model trained on all groups, and (G,) by how much the held-out images' mean loss is higher without each."""
    groups = torch.arange(len(images.y)).view(GROUPS, -1)
    without = torch.cat([torch.full((1, groups.shape[1]), -1), groups])
    members = torch.arange(len(images.y)).expand(len(without), -1)

    def train() -> Tensor:
        found = []
        for seed in seeds:
            weights = ensemble.train(make, images.x, images.y, members, [seed] * len(without), RECIPE, without)
            found.append(ensemble.losses(make, weights, images.held_x, images.held_y).double().mean(1))
        return torch.stack(found).mean(0)

    losses = cached(cache, f"mislabel {name} {len(seeds)}", train)
    weights = ensemble.train(make, images.x, images.y, members[:1], [7], RECIPE)
    return ensemble.unstack(make, weights, 0), (losses[1:] - losses[0]).numpy()


def _ways(model: nn.Module, images: Images, leave: tuple[str, ...]) -> dict[str, tuple[np.ndarray, float]]:
    """Way -> (N,) by how much each training sample helps the held-out images together, and seconds."""
    found, data = {}, (images.x, images.y)
    query = {"queries": (images.held_x, images.held_y), "groups": {"held out": range(len(images.held_y))}}
    for way, settings in WAYS.items():
        if way in leave:
            continue
        since = time.perf_counter()
        scores = ff.forward_inf(model, data, **query, seed=0, progress=False, **settings).influence[0]
        found[way] = np.asarray(scores, np.float64), time.perf_counter() - since
    with torch.inference_mode():
        losses = F.cross_entropy(model(images.x), images.y, reduction="none")
    return found | {"loss alone": (-losses.double().numpy(), 0.0)}
