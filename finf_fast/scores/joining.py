"""Shards of one sweep put together: what must agree, what becomes of the manifest, how the rows move."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from finf_fast.scores import manifest as manifests

# Bytes moved at a time: large enough to run at disk speed, small beside any machine's memory.
COPY_BYTES = 1 << 24

WHOLE_RUN = ("identity", "dtype", "directions", "names")
WHOLE_SHAPE = ("queries", "background", "corpus_samples", "tokens")


class Target(Protocol):
    def write(self, name: str, row: int, data: np.ndarray) -> None: ...


def join(shards: list[dict[str, Any]], where: list[str]) -> dict[str, Any]:
    """The manifest of shards in order of their first sample, which becomes one of a single run.

    Each shard's own plan and record stay under ``record["merged"]``, since the joined plan describes none of them.

    Raises:
        ManifestMismatch: shards of different sweeps.
        ValueError: none, a gap or an overlap; names the two shards.
    """
    if not shards:
        raise ValueError("parts: wanted at least one shard, got none")
    for shard, place in zip(shards[1:], where[1:], strict=True):
        check_same_run(shards[0], shard, f"{place}, to be merged with {where[0]},")
    check_contiguous([shard["shape"] for shard in shards], where)
    first = shards[0]
    start, stop = first["shape"]["start"], shards[-1]["shape"]["stop"]
    reason = f"merged from {len(shards)} shards"
    plan = replace(manifests.plan_of(first), start=start, stop=stop, halvings=(), reason=reason)
    kept = ("shape", "plan", "created", "record")
    return {
        **first,
        "plan": manifests.as_json("plan", plan.to_json()),
        "shape": {**first["shape"], "samples": stop - start, "start": start, "stop": stop},
        "record": {"merged": [{key: shard[key] for key in kept} for shard in shards]},
    }


def check_same_run(first: dict[str, Any], other: dict[str, Any], place: str) -> None:
    def whole(shard: dict[str, Any]) -> dict[str, Any]:
        return {**shard, "shape": {key: shard["shape"][key] for key in WHOLE_SHAPE}}

    manifests.compare(whole(first), whole(other), place, (*WHOLE_RUN, "shape"))


def check_contiguous(shapes: list[dict[str, Any]], where: list[str]) -> None:
    for (left, left_place), (right, right_place) in pairwise(zip(shapes, where, strict=True)):
        if right["start"] != left["stop"]:
            fault = "a gap" if right["start"] > left["stop"] else "an overlap"
            raise ValueError(
                f"parts: wanted shards that follow each other, got {fault}: {left_place} ends before sample "
                f"{left['stop']}, {right_place} begins with sample {right['start']}"
            )


def copy(parts: Iterable[dict[str, np.ndarray]], target: Target) -> None:
    """Writes the rows of all parts one after the other, a few MiB at a time."""
    row = 0
    for arrays in parts:
        for name, array in arrays.items():
            rows = max(1, COPY_BYTES * len(array) // array.nbytes)
            for start in range(0, len(array), rows):
                target.write(name, row + start, array[start : start + rows])
        row += len(arrays["base"])
