"""Planted passages: a byte-level transformer learns the standard library's source, and the audit finds what slipped in.

Twelve passages of held-out files are planted in the training text, each once as it is and once with identifiers
renamed. After three epochs they are the queries: which training windows stand behind the model's loss on them?
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import finf_fast as ff
from finf_fast.demo.findings import Found, Result, Way, hits, ranks
from finf_fast.demo.model import ByteModel
from finf_fast.demo.settled import Show, epochs, score, settled, train
from finf_fast.demo.source import Planted, plant, write_tokens
from finf_fast.report import html_report, spread

LEARNING_RATE = 2e-3
STEP = 1e-3  # of the mirror step; chosen on seed 1 among 1e-1, 1e-2, 1e-3, while the demo runs on seed 0


@dataclass(frozen=True)
class Size:
    """How large the demo is; the defaults take two cores a minute of training and one of audit.

    Attributes:
        windows, length: S windows of L bytes to train on, planted ones included.
        queries: passages planted.
        epochs, batch: passes over the windows, windows a step.
        width, layers: of the model.
    """

    windows: int = 3000
    length: int = 128
    queries: int = 12
    epochs: int = 3
    batch: int = 16
    width: int = 128
    layers: int = 4


def trained(data: Planted, size: Size, progress: Show = None) -> nn.Module:
    """A fresh model after ``size.epochs`` over all windows, the planted ones seen like any other."""
    ids = torch.from_numpy(data.tokens.astype(np.int64))
    model = ByteModel(size.width, size.layers, size.length)

    def loss(rows: Tensor) -> Tensor:
        logits = model(ids[rows])[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), ids[rows, 1:].flatten())

    batches = epochs(len(ids), size.epochs, size.batch)
    settings = {"lr": LEARNING_RATE, "weight_decay": 0.1, "clip": 1.0}  # the last two are GPT-2's and nanoGPT's
    return train(model, loss, batches, **settings, title="train on source text", progress=progress)


def audit(model: nn.Module, corpus: ff.Corpus, data: Planted, out: Path, progress: Show = None) -> ff.Scores:
    """One SGD step up each query's loss, all windows scored for all queries in one sweep, token by token."""
    queries = torch.from_numpy(data.queries)
    return score(model, corpus, queries, out, loss="causal_lm", lr=STEP, per_token=True, progress=progress)


def run(out: Path, progress: Show = None, seed: int = 0, size: Size | None = None) -> Result:
    """Writes the token file, trains, audits and writes ``out``: data, result folder and page.

    Args:
        out: folder for everything.
        progress: as in :func:`finf_fast.sweep`.
        seed: of files, passages and training.
        size: something else than the defaults of :class:`Size`.
    """
    start, size = time.monotonic(), size or Size()
    with settled(seed, threads=2):
        data = plant(seed, size.windows, size.length, size.queries)
        corpus = ff.open_corpus(write_tokens(out / "train.bin", data.tokens), window=size.length)
        model = trained(data, size, progress)
        after_training = time.monotonic()
        scores = audit(model, corpus, data, out / "scores", progress)
    exact, near = ranks(scores.influence, data.exact), ranks(scores.influence, data.near)
    scaled = scores.influence / spread(scores)
    way = Way(f"sgd, step {STEP:g}", hits(exact), hits(ranks(scaled, data.exact)))
    notes = _notes(scores, exact, near, data)
    page = _page(out / "text.html", scores, corpus, data, notes)
    seconds = {"training": after_training - start, "audit": time.monotonic() - after_training}
    return Result("Planted passages", _found(scores, data, exact, near), (way,), notes, out, page, seconds)


def _found(scores: ff.Scores, data: Planted, exact: np.ndarray, near: np.ndarray) -> tuple[Found, ...]:
    return tuple(
        Found(f"passage {q}", source, int(exact[q]), float(scores.influence[q, source]), int(near[q]))
        for q, source in enumerate(data.exact)
    )


def _notes(scores: ff.Scores, exact: np.ndarray, near: np.ndarray, data: Planted) -> tuple[str, ...]:
    copies, others = np.array(data.exact), np.delete(np.arange(len(scores)), data.exact + data.near)
    return (
        f"The exact copy came first for {(exact == 1).sum()} of {len(exact)} passages among {len(scores):,} windows; "
        f"the near duplicate, {min(data.changed):.0%} to {max(data.changed):.0%} of its bytes changed, was among the "
        f"first five for {(near <= 5).sum()}.",
        f"The loss alone would not have told: the copies' is {np.mean(scores.base[copies]):.2f} nats a byte, that of "
        f"all other windows {np.mean(scores.base[others]):.2f}.",
    )


def _page(path: Path, scores: ff.Scores, corpus: ff.Corpus, data: Planted, notes: Sequence[str]) -> Path:
    known = [{e: "exact copy", n: "near duplicate"} for e, n in zip(data.exact, data.near, strict=True)]
    return html_report(
        path,
        scores,
        corpus,
        torch.from_numpy(data.queries),
        title="Which lines of source stand behind these passages?",
        k=3,
        names=[f"passage {q}" for q in range(len(known))],
        sources=known,
        notes=notes,
        about={"data": "Python's standard library", "step": f"one SGD step of {STEP:g}, ascent"},
    )
