"""The mirror steps of ``forward_inf``: what their method needs of the corpus is found there first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from finf_fast import identity, regime
from finf_fast.corpus import Corpus, open_corpus
from finf_fast.fitting import fit_factors
from finf_fast.mirrors import METHODS, mirrors_of
from finf_fast.progress import Progress
from finf_fast.scores import Scores
from finf_fast.update import Update

__all__ = ["updates_for"]

GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # dampings tried: from where noise is amplified to where all curvature is gone
PLANTED, POOL = 128, 512  # samples that are asked for as queries, and those that they must be found among
LOST = 1e-3  # a sample's score over its spread, below which it counts as not found


def updates_for(
    model: nn.Module,
    corpus: Corpus,
    queries: Any,
    how: Mapping[str, Any],
    options: Mapping[str, Any],
    sweep: Callable[..., Scores],
    settings: Mapping[str, Any],
    progress: bool | None,
    background: np.ndarray | None = None,
) -> tuple[list[Update], list[Update]]:
    """An update a query, and one a background sample.

    Args:
        how: the keyword arguments of :func:`finf_fast.mirrors.mirrors_of` but the method's options.
        options: of the method; ``factors`` are fitted where they are wanted and not there, ``damping="auto"`` is found.
        sweep: :func:`finf_fast.sweep`.
        settings: its keyword arguments.
        progress: True, False or None, as there.
        background: (B,) samples of the corpus that are asked as well; None for none.
    """
    kept = {key: settings[key] for key in ("device", "dtype", "engine", "batch_size") if key in settings}

    def scored(updates: Sequence[Update], samples: Any, **other: Any) -> Scores:
        return sweep(model, updates, samples, loss=how["loss"], progress=False, nonfinite="keep", **{**kept, **other})

    options = _with_factors(model, corpus, how, dict(options), progress)
    told: dict[str, Any] = {}
    if options.get("damping") == "auto":
        options["damping"], told["damping_tried"] = _damping(model, corpus, {**how, **options}, scored)
    with Progress(0, "mirror steps", progress) as bar:
        updates = mirrors_of(model, queries, on_done=bar.reach, **how, **options)
    if "expected_rms" in updates[0].record:  # the method found its own length
        told["linear_regime"] = _regime(updates, corpus, partial(scored, **_finite(kept)))
    others: list[Update] = []
    if background is not None:
        own = {f"background {sample}": [row] for row, sample in enumerate(background.tolist())}
        with Progress(0, "background steps", progress) as bar:
            others = mirrors_of(model, corpus.take(background), on_done=bar.reach, **{**how, "groups": own}, **options)
    return [replace(update, record={**update.record, **told}) for update in updates], others


def _with_factors(
    model: nn.Module, corpus: Corpus, how: Mapping[str, Any], options: dict[str, Any], progress: bool | None
) -> dict[str, Any]:
    """The method's options; with factors of its kind where it wants them and has none."""
    method = METHODS.get(how["method"])
    if method is None or method.fits is None or options.get("factors") is not None:
        return options
    shared = {key: how[key] for key in ("loss", "device", "params", "seed") if key in how}
    return {**options, "factors": fit_factors(model, corpus, kind=method.fits, progress=progress, **shared)}


def _damping(
    model: nn.Module, corpus: Corpus, how: Mapping[str, Any], scored: Callable[..., Scores]
) -> tuple[float, dict[str, float]]:
    """The damping under which training samples, asked for as queries, stand out best; what all that were tried gave.

    Scores are compared over their root mean square over the queries, and judged by how far a query's own sample leads
    the next: the mean of log(own / best other). On digits that follows the share of leaked images found; the rank of
    the own sample, 1 for nearly all of them, does not.
    """
    if METHODS[how["method"]].fits is None:
        raise ValueError(f"damping: method={how['method']!r} has none to find")
    pool = corpus.take(regime.evenly(len(corpus), POOL))
    samples = open_corpus(pool)
    places = regime.evenly(len(samples), PLANTED)
    how = {**how, "groups": [[place] for place in places], "direction": "ascent"}
    found = {}
    for damping in GRID:
        updates = mirrors_of(model, pool, **{**how, "damping": damping})
        found[damping] = _lead(scored(updates, samples).influence, places)
    chosen = max(found, key=lambda damping: (found[damping], damping))
    return chosen, {f"{damping:g}": lead for damping, lead in found.items()}


def _lead(influence: np.ndarray, places: Sequence[int]) -> float:
    """Mean of log(own / best other) of scores (K, S), the k-th query's own sample being the places[k]-th."""
    influence = np.asarray(influence, dtype=np.float64)
    spread = np.sqrt((influence**2).mean(0))
    compared = influence / np.where(spread > 0, spread, 1.0)
    each = np.arange(len(places)), list(places)
    own = compared[each].copy()
    compared[each] = -np.inf
    return float(np.mean(np.log(np.maximum(own, LOST) / np.maximum(compared.max(1), LOST))))


def _finite(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What to change in a sweep's settings for changes of finite steps, since to first order everything is linear."""
    if settings.get("engine") != "dot":
        return {}
    half = settings.get("dtype") is torch.bfloat16  # which pairs, if it comes to them, do not have
    return {"engine": "auto", **({"dtype": None} if half else {})}


def _regime(updates: Sequence[Update], corpus: Corpus, scored: Callable[..., Scores]) -> dict[str, Any]:
    few = [updates[q] for q in regime.evenly(len(updates), regime.QUERIES)]
    samples = open_corpus(corpus.take(regime.evenly(len(corpus), regime.SAMPLES)))
    return regime.compared(scored(regime.with_halves(few), samples).delta, identity.names_of(few))
