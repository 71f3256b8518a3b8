"""THE LINE: disk → staging → device → model → loss → scores, each sample read once for all queries."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn

from finf_fast import identity
from finf_fast import loss as losses
from finf_fast.corpus import Corpus, open_corpus
from finf_fast.engines import ENGINES, choose_engine
from finf_fast.loss import Loss
from finf_fast.mirrors import mirrors_of
from finf_fast.planning import free_bytes, make_plan
from finf_fast.progress import Progress
from finf_fast.ragged import width
from finf_fast.scores import Scores, open_store
from finf_fast.scoring import Scorer
from finf_fast.skeleton import vocabulary
from finf_fast.staging import stage
from finf_fast.transfer import rows, to_device
from finf_fast.update import Update


def sweep(
    model: nn.Module,
    updates: Sequence[Update],
    corpus: Any,
    *,
    loss: str | Loss | Callable[[Any, Any], Tensor] = "cross_entropy",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    out: str | os.PathLike[str] | None = None,
    engine: str = "auto",
    batch_size: int | None = None,
    shard: tuple[int, int] | None = None,
    per_token: bool = False,
    nonfinite: str = "raise",
    progress: bool | Callable[[int, int], None] | None = None,
    resume: bool = True,
) -> Scores:
    """Loss of every training sample, and its change under each update, in one pass over the corpus.

    ``base[i] = L(z_i; θ)`` and ``delta[q, i] = L(z_i; θ'_q) − L(z_i; θ)``: mirrored influence, Ko et al., "The Mirrored
    Influence Hypothesis", CVPR 2024, arXiv 2402.08922. Samples are scored in eval mode; the model is not modified.

    Args:
        model: any ``torch.nn.Module``.
        updates: Q updates, from :func:`finf_fast.mirror` or :meth:`Update.between`.
        corpus: what :func:`finf_fast.open_corpus` gives or takes: S samples.
        loss: a name, a :class:`finf_fast.loss.Loss`, or ``(model, batch) -> (B,) losses``.
        device: where to compute; the model's own by default.
        dtype: of the forwards: torch.bfloat16 (delta engine only), float32 or float64; by default the model's own, half
            precision becoming float32 where the net has kinks (ReLU, max-pooling, routing) or runs by pairs.
        out: result folder; an interrupted run of the same sweep is resumed from it. None keeps scores in memory.
        engine: ``"delta"`` carries (value, exact change) through one forward for all queries; ``"pair"`` runs 1 + Q
            plain forwards and subtracts; ``"auto"`` is delta wherever it applies; ``scores.plan`` says which and why.
        batch_size: samples per forward; chosen by memory if not given, and halved when memory runs out.
        shard: ``(i, n)`` scores the i-th of n contiguous slices; :meth:`Scores.merge` joins them.
        per_token: keep each token's loss and change too (``scores.token_base``, ``scores.token_delta``).
        nonfinite: ``"raise"`` at a NaN or infinite loss, naming the sample, or ``"keep"`` it in the scores.
        progress: True, False, a callable ``(done, total)``, or None: a bar at a terminal when it lasts over two
        seconds. resume: False refuses a folder that already holds scores.

    Returns:
        :class:`Scores` with ``base`` (S,) and ``delta`` (Q, S), float64 where the forwards are, else float32.

    Raises:
        ValueError, TypeError: an argument is not as above; a sample's label or token id is out of range (BadSample);
            a loss is not finite (NonFiniteLoss); the folder holds another run (ManifestMismatch).
        NotCarried: ``engine="delta"`` and the model does what a stack cannot follow.
    """
    updates = _checked(model, updates, engine, nonfinite)
    corpus = corpus if isinstance(corpus, Corpus) else open_corpus(corpus)
    loss = _per_token(losses.resolve(loss), per_token)
    per_token = loss.per_token
    start, stop = _slice(len(corpus), shard)
    device = _place(model, device)
    sample = to_device(_longest(corpus, start, stop), device)
    settings = {"device": device, "dtype": dtype, "engine": engine, "keep": free_bytes(device) // 4}
    chosen = choose_engine(model, updates, loss, sample=sample, **settings)
    runner, found = chosen.engine, chosen.found
    store = open_store(
        out,
        identity.of(model, updates, corpus, loss, {**runner.settings(), "nonfinite": nonfinite}),
        make_plan(found, start, stop, device, batch_size, chosen.reason, runner.rows, width(sample, loss)),
        queries=len(updates),
        dtype=str(runner.score_dtype).removeprefix("torch."),
        tokens=found.tokens if per_token else None,
        directions=[update.direction for update in updates],
        names=identity.names_of(updates),
        corpus_samples=len(corpus),
        resume=resume,
    )
    with store, identity.threads(store.plan.threads), Progress(store.plan.samples, "sweep", progress) as bar:
        bar.advance(store.scored)
        scorer = Scorer(runner, corpus, store, found, vocabulary(model), nonfinite, bar.advance)
        with closing(stage(corpus, store.plan, store.missing())) as blocks:
            for block in scorer.clock.waiting(blocks):
                scorer.write(block)
        return store.finish(scorer.record())


def forward_inf(
    model: nn.Module,
    corpus: Any,
    queries: Any,
    *,
    groups: Sequence[Sequence[int]] | Mapping[str, Sequence[int]] | None = None,
    loss: str | Loss | Callable[[Any, Any], Tensor] = "cross_entropy",
    method: str = "sgd",
    lr: float | None = None,
    direction: str | None = None,
    steps: int = 1,
    params: Any = None,
    mode: str | None = None,
    seed: int | None = None,
    options: Mapping[str, Any] | None = None,
    progress: bool | Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Scores:
    """Mirror steps on every query and the sweep over the corpus, in one call.

    Args:
        model, corpus, loss: as in :func:`sweep`.
        queries: a batch; each row is one query, unless ``groups`` says which rows belong together.
        groups: lists of rows, or name -> rows; a group's loss is the mean of its rows'.
        method, lr, direction, steps, params, mode, seed: as in :func:`finf_fast.mirror`.
        options: of the method, by name (``weight_decay``, ``betas``, ``tries``, ...), as in :func:`finf_fast.mirror`.
        progress: of the sweep; True, False and None hold for the mirror steps too.
        settings: the remaining keyword arguments of :func:`sweep`.

    Returns:
        :class:`Scores`, one row of ``delta`` a query.
    """
    how = {"lr": lr, "direction": direction, "steps": steps, "params": params, "mode": mode, "seed": seed}
    given = {key: value for key, value in how.items() if value is not None}
    given |= {"groups": groups, "loss": loss, "method": method, "device": settings.get("device")}
    unknown = settings.keys() - inspect.signature(sweep).parameters.keys()
    if unknown:
        raise TypeError(f"forward_inf: unknown argument {', '.join(sorted(unknown))}")
    corpus = corpus if isinstance(corpus, Corpus) else open_corpus(corpus)
    with Progress(0, "mirror steps", None if callable(progress) else progress) as bar:
        updates = mirrors_of(model, queries, on_done=bar.reach, **given, **(options or {}))
    return sweep(model, updates, corpus, loss=loss, progress=progress, **settings)


def _checked(model: nn.Module, updates: Sequence[Update], engine: str, nonfinite: str) -> list[Update]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: wanted a torch.nn.Module, got {type(model).__name__}")
    if next(model.parameters(), None) is None:
        raise ValueError("model: wanted at least one parameter, got a model without any")
    updates = [updates] if isinstance(updates, Update) else list(updates)
    if not updates:
        raise ValueError("updates: wanted at least one, got none (Q = 0)")
    for update in updates:
        if not isinstance(update, Update):
            raise TypeError(f"updates: wanted finf_fast.Update, got {type(update).__name__}")
        update.check(model)
    if engine not in ENGINES:
        raise ValueError(f"engine: wanted one of {', '.join(ENGINES)}, got {engine!r}")
    if nonfinite not in ("raise", "keep"):
        raise ValueError(f"nonfinite: wanted 'raise' or 'keep', got {nonfinite!r}")
    return updates


def _per_token(loss: Loss, wanted: bool) -> Loss:
    if not wanted:
        return loss
    if not isinstance(loss, losses.CrossEntropy):
        raise ValueError(f"per_token: wanted a cross-entropy loss, got {loss.name!r}")
    loss = copy.copy(loss)
    loss.per_token = True
    return loss


def _longest(corpus: Corpus, start: int, stop: int) -> Any:
    """A batch of one for the probe: the first sample, padded as the longest of the first 64 asks for."""
    return rows(corpus.read(start, min(start + 64, stop)), 0, 1)


def _slice(samples: int, shard: tuple[int, int] | None) -> tuple[int, int]:
    """First and one past last sample of the i-th of n slices, equal but for one sample."""
    if shard is None:
        return 0, samples
    i, n = shard
    if not (n >= 1 and 0 <= i < n):
        raise ValueError(f"shard: wanted (i, n) with 0 <= i < n, got {shard}")
    start, stop = samples * i // n, samples * (i + 1) // n
    if start == stop:
        raise ValueError(f"shard: wanted at most {samples} slices, one a sample, got {n}")
    return start, stop


def _place(model: nn.Module, device: str | torch.device | None) -> torch.device:
    """Device of the forwards: the model's own unless asked for."""
    place = torch.device(device if device is not None else next(model.parameters()).device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: wanted one this torch can reach, got {place} without CUDA")
    return place
