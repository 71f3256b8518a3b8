"""Models and data on their way to peers, which live in an environment of their own; and their scores on the way back.

Nothing here knows finf_fast: the peers' environment has torch alone.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fidelity import models

__all__ = ["NETS", "Problem", "answer", "answers", "read", "write"]

NETS: dict[str, Callable[[], nn.Module]] = {
    "MLP 64-32-10": lambda: models.mlp(64, 32, 10),
    "conv net": lambda: models.conv_net(8, 8),
}


@dataclass(frozen=True)
class Problem:
    """A trained model, what it was trained on (N, ...), (N,), and what is asked, (Q, ...), (Q,)."""

    net: str
    model: nn.Module
    x: Tensor
    y: Tensor
    queries: Tensor
    labels: Tensor


def write(folder: Path, net: str, model: nn.Module, x: Tensor, y: Tensor, queries: Tensor, labels: Tensor) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"x": x, "y": y, "queries": queries, "labels": labels}
    torch.save({"state": model.state_dict(), **tensors}, folder / f"problem-{_word(net)}.pt")


def read(folder: Path) -> Iterator[Problem]:
    """Every problem there, its model in eval mode."""
    for net, make in NETS.items():
        path = folder / f"problem-{_word(net)}.pt"
        if path.exists():
            found = torch.load(path, weights_only=True)
            model = make().eval()
            model.load_state_dict(found.pop("state"))
            yield Problem(net, model, **found)


def answer(folder: Path, problem: Problem, way: str, score: Callable[[Problem], np.ndarray]) -> None:
    """Keeps what a peer says: scores (Q, N), positive where training on the sample lowered the query's loss."""
    mark, since = _mark(problem.model), time.perf_counter()
    raw = np.asarray(score(problem), np.float64)
    seconds, wanted = time.perf_counter() - since, (len(problem.queries), len(problem.x))
    if raw.shape != wanted:
        raise ValueError(f"{way}: wanted scores of shape {wanted}, got {raw.shape}")
    if not np.isfinite(raw).all():
        raise ValueError(f"{way}: wanted finite scores, got {np.isfinite(raw).mean():.0%} of them finite")
    np.savez(folder / f"peer-{_word(problem.net)}-{_word(way)}.npz", way=way, raw=raw, seconds=seconds, model=mark)
    print(f"{problem.net}, {way}: {seconds:.1f} s", flush=True)


def answers(folder: Path, net: str, model: nn.Module) -> Iterator[tuple[str, np.ndarray, float]]:
    """Name, scores and seconds of every peer that has judged this very model."""
    for path in sorted(folder.glob(f"peer-{_word(net)}-*.npz")):
        found = np.load(path)
        if str(found["model"]) == _mark(model):
            yield str(found["way"]), found["raw"], float(found["seconds"])


def _mark(model: nn.Module) -> str:
    content = b"".join(tensor.detach().numpy().tobytes() for tensor in model.state_dict().values())
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _word(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)
