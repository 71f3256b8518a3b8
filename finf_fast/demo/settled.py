"""Training and scoring that come out the same every time: seeds and threads fixed inside, put back after."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import finf_fast as ff
from finf_fast.progress import Progress

Show = bool | Callable[[int, int], None] | None

OF_A_RESULT = {"manifest.json", "base.npy", "delta.npy", "token_base.npy", "token_delta.npy", "done", "lock"}


@contextlib.contextmanager
def settled(seed: int, threads: int) -> Iterator[None]:
    """Random numbers from ``seed``, and so many threads, since another count may round another way.

    torch's global state is as before when all is over.
    """
    before = torch.get_num_threads()
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def train(
    model: nn.Module,
    loss: Callable[[Tensor], Tensor],
    batches: Sequence[Tensor],
    *,
    lr: float,
    weight_decay: float,
    clip: float = float("inf"),
    title: str,
    progress: Show = None,
) -> nn.Module:
    """One AdamW step a batch of sample numbers, the rate rising and falling once; returns the model in eval mode.

    Args:
        loss: numbers of samples (B,) -> mean loss, ().
        batches: what each step sees, in order: the length of the training is counted in steps, never in seconds.
        clip: largest norm of a gradient.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(batches))
    with Progress(len(batches), title, progress) as bar, torch.enable_grad():
        for rows in batches:
            optimizer.zero_grad()
            loss(rows).backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            schedule.step()
            bar.advance(1)
    return model.eval()


def epochs(samples: int, count: int, size: int) -> list[Tensor]:
    """``count`` shuffled passes over all samples in batches of ``size``; what is left over in a pass sits it out."""
    passes = [torch.randperm(samples).split(size) for _ in range(count)]
    return [rows for batches in passes for rows in batches if len(rows) == size]


def score(model: nn.Module, corpus: ff.Corpus, queries: Any, out: Path, **settings: Any) -> ff.Scores:
    """``ff.forward_inf`` into ``out``; scores that an earlier demo of other data or versions left there make room.

    By pairs of forwards: the demos' steps are large enough for float32 to subtract, and their changes, on layers this
    narrow, are dense, where carrying costs 1 + 2Q products instead of 1 + Q.
    """
    settings = {"engine": "pair", **settings}
    try:
        return ff.forward_inf(model, corpus, queries, out=out, **settings)
    except ff.ManifestMismatch:
        if {path.name for path in out.iterdir()} - OF_A_RESULT:
            raise
    shutil.rmtree(out)
    return ff.forward_inf(model, corpus, queries, out=out, **settings)
