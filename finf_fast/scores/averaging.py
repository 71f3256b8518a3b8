"""Scores of one corpus under several models, made one by their mean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from finf_fast.scores import manifest as manifests

ROWS_BYTES = 1 << 24  # of one array of one model at a time

LOSS = ("loss", "reduction", "ignore_index", "label_smoothing")
SAME = ("dtype", "directions", "names", "shape")


def average(models: list[dict[str, Any]], where: list[str]) -> dict[str, Any]:
    """The manifest of a mean; each model's identity and record stay under ``identity["mean_of"]`` and ``record``.

    Raises:
        ManifestMismatch: other samples, names of queries, settings or mirror steps.
        ValueError: none.
    """
    if not models:
        raise ValueError("parts: wanted the scores of at least one model, got none")
    for model, place in zip(models[1:], where[1:], strict=True):
        first, other = _compared(models[0]), _compared(model)
        if None in (first["data"]["method"], other["data"]["method"]):  # not every step is a method's
            del first["data"]["method"], other["data"]["method"]
        manifests.compare(first, other, f"{place}, to be averaged with {where[0]},", (*SAME, "data"))
    return {
        **models[0],
        "identity": {"mean_of": [model["identity"] for model in models]},
        "record": {"mean_of": [model["record"] for model in models]},
    }


def blocks(models: list[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    """The mean of every array, some rows at a time, summed in float64 in the order of the models."""
    first = models[0]
    widest = max(array.nbytes // len(array) for array in first.values())
    rows = max(1, ROWS_BYTES // max(1, widest))
    for row in range(0, len(first["base"]), rows):
        yield {
            name: np.mean([model[name][row : row + rows] for model in models], axis=0, dtype=np.float64).astype(
                array.dtype
            )
            for name, array in first.items()
        }


def _compared(manifest: dict[str, Any]) -> dict[str, Any]:
    """What must agree: all but the model, its updates and the versions."""
    identity = manifest["identity"]
    while "mean_of" in identity:  # a mean of means; the models of one mean agree
        identity = identity["mean_of"][0]
    corpus = identity.get("fingerprints", {}).get("corpus")
    settings = {key: identity.get("settings", {}).get(key) for key in LOSS}
    return {**manifest, "data": {"corpus": corpus, "method": _method(manifest["record"]), **settings}}


def _method(record: dict[str, Any] | None) -> str | None:
    """The mirror step's, where the run was told one."""
    while others := (record or {}).get("mean_of"):
        record = others[0]
    return ((record or {}).get("mirror") or {}).get("method")
