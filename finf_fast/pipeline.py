"""THE LINE: disk → staging → device → model → loss → scores, each sample read once for all queries."""

from __future__ import annotations

import copy
import inspect
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finf_fast import identity
from finf_fast import loss as losses
from finf_fast.corpus import Corpus, Undecoded, evenly, open_corpus
from finf_fast.engines import ENGINES, Settled, choose_engine
from finf_fast.loss import Loss
from finf_fast.planning import Probe, free_bytes, make_plan
from finf_fast.progress import Progress
from finf_fast.ragged import width
from finf_fast.records import Plan
from finf_fast.scores import Scores, earlier, open_store
from finf_fast.scoring import Scorer
from finf_fast.skeleton import place_of, require_model, vocabulary
from finf_fast.staging import PADDED, ROOM, stage
from finf_fast.steps import updates_for
from finf_fast.transfer import crossing_to, decodes, rows, to_device
from finf_fast.update import Update

LOOKED_UP = 1 << 16  # lengths at a time: half a MiB


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
    background: Sequence[Update] = (),
    per_token: bool = False,
    nonfinite: str = "raise",
    progress: bool | Callable[[int, int], None] | None = None,
    resume: bool = True,
) -> Scores:
    """Loss of every training sample, and its change under each update, in one pass over the corpus.

    ``base[i] = L(z_i; θ)`` and ``delta[q, i] = L(z_i; θ'_q) − L(z_i; θ)``: mirrored influence, Ko et al., "The Mirrored
    Influence Hypothesis", CVPR 2024, arXiv 2402.08922. Samples are scored in eval mode; the model is not modified.

    Args:
        model: any ``torch.nn.Module``; what torch.compile wrapped runs as it is written. One of Hugging Face runs with
            ``use_cache=False``, as in training: where it keeps apart the texts of a row by ``position_ids`` that
            restart, as Llama and GPT-2 do where there is no ``attention_mask``, it does so here.
        updates: Q updates, from :func:`finf_fast.mirror` or :meth:`Update.between`.
        corpus: what :func:`finf_fast.open_corpus` gives or takes: S samples.
        loss: a name, a :class:`finf_fast.loss.Loss`, or ``(model, batch) -> (B,) losses``.
        device: where to compute; the model's own by default.
        dtype: of the forwards: torch.bfloat16 (not by pairs), float32 or float64; by default the model's own, half
            precision becoming float32 where the net has kinks (ReLU, max-pooling, routing) or runs by pairs.
        out: result folder; an interrupted run of the same sweep is resumed from it, cut and scored as it began however
            much memory is free by then. None keeps scores in memory.
        engine: ``"delta"`` carries (value, exact change) through one forward for all queries; ``"pair"`` runs 1 + Q
            plain forwards and subtracts; ``"auto"`` is delta wherever it applies; ``scores.plan`` says which and why.
            ``"dot"`` gives the change to first order only, gradient of the loss times change of the weights, by one
            backward pass over activations: the cheapest for many queries and tiny steps, never chosen by ``"auto"``.
        batch_size: samples per forward; chosen by memory if not given, and halved when memory runs out.
        shard: ``(i, n)`` scores the i-th of n contiguous slices; :meth:`Scores.merge` joins them.
        background: more updates, which :meth:`Scores.normalized` compares with and nothing else shows; each costs as
            much as one of ``updates``.
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
    asked = _checked(model, updates, engine, nonfinite)
    updates = [*asked, *_checked(model, background, engine, nonfinite, "background")]
    corpus = corpus if isinstance(corpus, Corpus) else open_corpus(corpus)
    loss = _per_token(losses.resolve(loss), per_token)
    per_token = loss.per_token
    start, stop = _slice(len(corpus), shard)
    _require_dtype(dtype)
    device = place_of(model, device)
    sample = to_device(_longest(corpus, start, stop), device)
    settings = {"device": device, "dtype": dtype, "engine": engine, "keep": free_bytes(device) // 4}
    with torch.autocast(device.type, enabled=False):
        chosen = choose_engine(model, updates, loss, sample=sample, settled=_settled(out), **settings)
    runner, found = chosen.engine, chosen.found
    found = _with_room(found, corpus, start, stop, width(sample, loss)) if per_token else found
    store = open_store(
        out,
        identity.of(model, updates, corpus, loss, {**runner.settings(), "nonfinite": nonfinite}),
        make_plan(found, start, stop, device, batch_size, chosen.reason, runner.rows, width(sample, loss), runner.room),
        queries=len(updates),
        dtype=str(runner.score_dtype).removeprefix("torch."),
        tokens=found.tokens if per_token else None,
        directions=[update.direction for update in updates],
        names=identity.names_of(updates),
        corpus_samples=len(corpus),
        background=len(updates) - len(asked),
        resume=resume,
    )
    with (
        torch.autocast(device.type, enabled=False),  # around the call it would round what the plan calls float32
        store,
        identity.threads(store.plan.threads),
        Progress(store.plan.samples, "sweep", progress) as bar,
        crossing_to(device) as crossing,
    ):
        bar.advance(store.scored)
        stored = _stored(corpus, device, loss)
        scorer = Scorer(runner, corpus, store, found, vocabulary(model), nonfinite, bar.advance, crossing, stored)
        read = corpus if stored is None else stored.corpus
        with closing(stage(read, store.plan, store.missing(), send=crossing.send, room=ROOM)) as blocks:
            for block in scorer.clock.waiting(blocks):
                scorer.write(block)
                del block  # with its memory on the device, before the next is awaited
        return store.finish({**scorer.record(), "mirror": identity.shared_record(updates)})


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
    background: int = 0,
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
            A method that wants ``factors`` and is given none has them fitted on this corpus first, by
            :func:`finf_fast.fit_factors` with its defaults. ``damping="auto"`` tries five, and takes the one under
            which 128 training samples, asked for as queries, stand out best among 512.
        background: how many training samples, evenly drawn by ``seed``, are asked beside the queries, for
            :meth:`Scores.normalized` to compare with where queries are few; each costs as much as a query.
        progress: of the sweep; True, False and None hold for the mirror steps too.
        settings: the remaining keyword arguments of :func:`sweep`.

    Returns:
        :class:`Scores`, one row of ``delta`` a query. ``scores.record["mirror"]`` holds what the steps have in common;
        of methods that find their own step size also ``linear_regime``, the whole step against its half on up to 8
        queries and 64 samples, whose finite changes are carried for ``engine="dot"`` too: ``departure`` from a straight
        line (0 to 1) and ``rank_agreement``.
    """
    how = {"lr": lr, "direction": direction, "steps": steps, "params": params, "mode": mode, "seed": seed}
    given = {key: value for key, value in how.items() if value is not None}
    given |= {"groups": groups, "loss": loss, "method": method, "device": settings.get("device")}
    unknown = settings.keys() - (inspect.signature(sweep).parameters.keys() - {"background"})
    if unknown:
        hint = "what a method takes goes into options={...}"
        raise TypeError(f"forward_inf: unknown argument {', '.join(sorted(unknown))}; {hint}")
    _require_dtype(settings.get("dtype"))  # before the steps, which take longer than a look
    corpus = corpus if isinstance(corpus, Corpus) else open_corpus(corpus)
    shown = None if callable(progress) else progress
    drawn = _background(corpus, background, seed or 0, losses.resolve(loss)) if background else None
    updates, others = updates_for(model, corpus, queries, given, options or {}, sweep, settings, shown, drawn)
    return sweep(model, updates, corpus, background=others, loss=loss, progress=progress, **settings)


def _background(corpus: Corpus, count: int, seed: int, loss: Loss) -> np.ndarray:
    """(count,) samples that have a target, evenly drawn; where some have none, from four times as many."""
    for tried in (count, min(len(corpus), 4 * count)):
        drawn = evenly(len(corpus), tried, seed, "background")
        empty = loss.without_target(corpus.take(drawn))
        kept = drawn if empty is None else drawn[~empty.numpy()]
        if len(kept) >= count:
            return kept[evenly(len(kept), count, seed)]
    raise ValueError(f"background: wanted {count} samples with a target, got {len(kept)} of {tried} that were drawn")


def _checked(
    model: nn.Module, updates: Sequence[Update], engine: str, nonfinite: str, name: str = "updates"
) -> list[Update]:
    require_model(model)
    updates = [updates] if isinstance(updates, Update) else list(updates)
    if not updates and name == "updates":
        raise ValueError("updates: wanted at least one, got none (Q = 0)")
    for update in updates:
        if not isinstance(update, Update):
            raise TypeError(f"{name}: wanted finf_fast.Update, got {type(update).__name__}")
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
    stop = min(start + 64, stop)
    counts = corpus.lengths(start, stop)
    if counts is None or len(counts) * int(counts.max()) <= PADDED:
        return rows(corpus.read(start, stop), 0, 1)
    return rows(corpus.take([start, start + int(counts.argmax())]), 0, 1)  # 64 as long as a book would fill the memory


def _stored(corpus: Corpus, device: torch.device, loss: Loss) -> Undecoded | None:
    """What is read block by block, to be decoded on the device; None where it is decoded as it is read."""
    # Asked first, for of many files the corpus as stored is as many copies.
    found = corpus.undecoded() if any(decodes(device, kind) for kind in ("pixels", "tokens")) else None
    if found is None:
        return None
    # A check that looks at pixels has to see them as the model does: these two look at labels alone.
    blind = type(loss).check in (Loss.check, losses.CrossEntropy.check)
    checked = blind if found.kind == "pixels" else losses.is_served(loss)
    return found if checked and decodes(device, found.kind) else None


def _settled(out: str | os.PathLike[str] | None) -> Settled | None:
    """What memory decided for the sweep that a folder holds."""
    manifest = earlier(out)
    if manifest is None:
        return None
    settings = manifest["identity"].get("settings", {})  # another writer's folder may have none, and is refused later
    plan = Plan.from_json(manifest["plan"])
    return Settled(settings.get("engine", ""), settings.get("dtype", ""), plan.stack, plan.room)


def _with_room(found: Probe, corpus: Corpus, start: int, stop: int, seen: int) -> Probe:
    """With tokens enough for the longest text, where the corpus knows; ``seen`` is how long the sample was."""
    longest = 0
    for first in range(start, stop, LOOKED_UP):
        counts = corpus.lengths(first, min(first + LOOKED_UP, stop))
        if counts is None or not seen:
            return found
        longest = max(longest, int(counts.max()))
    return replace(found, tokens=found.tokens + max(0, longest - seen))


def _slice(samples: int, shard: tuple[int, int] | None) -> tuple[int, int]:
    """First and one past last sample of the i-th of n slices, equal but for one sample."""
    if shard is None:
        return 0, samples
    try:
        i, n = map(operator.index, shard)
    except (TypeError, ValueError):
        raise TypeError(f"shard: wanted two whole numbers (i, n), got {shard!r}") from None
    if not (n >= 1 and 0 <= i < n):
        raise ValueError(f"shard: wanted (i, n) with 0 <= i < n, got {shard}")
    start, stop = samples * i // n, samples * (i + 1) // n
    if start == stop:
        raise ValueError(f"shard: wanted at most {samples} slices, one a sample, got {n}")
    return start, stop


def _require_dtype(dtype: Any) -> None:
    """Said before an engine is tried, for the next one would hide it."""
    if dtype not in (None, torch.bfloat16, torch.float32, torch.float64):
        wanted = "torch.bfloat16, torch.float32, torch.float64 or None"
        raise (ValueError if isinstance(dtype, torch.dtype) else TypeError)(f"dtype: wanted {wanted}, got {dtype!r}")
