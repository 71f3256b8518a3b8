"""Ways of scoring training samples for queries: finf_fast's mirror steps, and the trivial ones they have to beat.

Each gives (Q, N): positive says that training on the sample lowered the query's loss.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

import finf_fast as ff

__all__ = ["OURS", "TRIVIAL", "Asked", "Scored", "all_ways"]


@dataclass(frozen=True)
class Asked:
    """A trained model, what it was trained on, and the queries: x (N, ...), y (N,) each."""

    model: nn.Module
    x: Tensor
    y: Tensor
    queries: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Scored:
    """Scores (Q, N) as they come, and over their root mean square over the queries; seconds it took."""

    raw: np.ndarray
    rms: np.ndarray
    seconds: float


# Every method as it comes, but the plain step, whose size its users choose.
OURS: dict[str, Mapping[str, object]] = {
    "sgd, step 1e-2": {"method": "sgd", "lr": 1e-2},
    "released protocol, |Δ|": {"method": "released"},
    "diagonal Fisher": {"method": "fisher_diag"},
    "K-FAC": {"method": "kfac"},
    "EK-FAC": {"method": "ekfac"},
    "exact step (cg)": {"method": "cg"},
}


def ours(asked: Asked, settings: Mapping[str, object]) -> np.ndarray:
    scores = ff.forward_inf(
        asked.model, (asked.x, asked.y), (asked.queries, asked.labels), seed=0, progress=False, **settings
    )
    return np.abs(scores.delta) if settings["method"] == "released" else scores.influence


def loss_alone(asked: Asked) -> np.ndarray:
    """The same for every query: what the model still does not know."""
    with torch.inference_mode():
        losses = nn.functional.cross_entropy(asked.model(asked.x), asked.y, reduction="none")
    return losses.numpy()[None].repeat(len(asked.queries), 0)


def nearest_input(asked: Asked) -> np.ndarray:
    return -torch.cdist(asked.queries.flatten(1), asked.x.flatten(1)).numpy()


def nearest_features(asked: Asked) -> np.ndarray:
    """By what the last layer reads."""
    last = [module for module in asked.model.modules() if isinstance(module, nn.Linear)][-1]
    seen: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        asked.model(asked.queries)
        asked.model(asked.x)
    handle.remove()
    return -torch.cdist(*seen).numpy()


def at_random(asked: Asked) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((len(asked.queries), len(asked.x)))


TRIVIAL: dict[str, Callable[[Asked], np.ndarray]] = {
    "loss alone": loss_alone,
    "nearest in the input": nearest_input,
    "nearest in the features": nearest_features,
    "random": at_random,
}


def all_ways(asked: Asked, leave: tuple[str, ...] = ()) -> dict[str, Scored]:
    """Every way but those left out, timed once."""
    found = {}
    for name in (*OURS, *TRIVIAL):
        if name in leave:
            continue
        since = time.perf_counter()
        raw = np.asarray(TRIVIAL[name](asked) if name in TRIVIAL else ours(asked, OURS[name]), np.float64)
        scale = np.sqrt(np.square(raw).mean(0))
        rms = np.divide(raw, scale, out=np.full(raw.shape, np.nan), where=scale > 0)
        found[name] = Scored(raw, raw if name in TRIVIAL else rms, time.perf_counter() - since)
    return found
