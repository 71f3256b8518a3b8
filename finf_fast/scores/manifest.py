"""The manifest: one JSON file that says what a result folder holds, and refuses to let it be taken for another.

Keys: ``format``, ``version``, ``identity`` (versions, fingerprints, settings: given by the line, compared key by
key), ``plan``, ``shape`` (samples, queries and how many of them are background, start, stop, corpus_samples, tokens),
``dtype``, ``directions``, ``names``, ``created``, ``ready`` (false while the arrays are being made) and ``record`` (how
the run went; before its end at most ``so_far``, what it counted).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from finf_fast.records import DamagedFile, ManifestMismatch, Plan
from finf_fast.scores.files import replace_text

NAME = "manifest.json"
FORMAT = "finf_fast.scores"
VERSION = 2
DIRECTIONS = ("ascent", "descent")
ARRAYS = ("base", "delta", "token_base", "token_delta")

# The plan is not compared: a resumed run takes the folder's own. Its range is, through "shape".
COMPARED = ("format", "version", "identity", "shape", "dtype", "directions", "names")
KEYS = (*COMPARED, "plan", "created", "ready", "record")
SHAPE_KEYS = ("samples", "queries", "background", "start", "stop", "corpus_samples", "tokens")


def make(
    identity: dict[str, Any],
    plan: Plan,
    queries: int,
    dtype: np.dtype,
    *,
    tokens: int | None = None,
    directions: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    corpus_samples: int | None = None,
    background: int = 0,
) -> dict[str, Any]:
    """A manifest for a run that has not begun. Every argument is checked; see ``open_store`` for their meaning."""
    check_counts(plan, queries, tokens, corpus_samples, background)
    return {
        "format": FORMAT,
        "version": VERSION,
        "identity": as_json("identity", identity),
        "plan": as_json("plan", plan.to_json()),
        "shape": {
            "samples": plan.samples,
            "queries": queries,
            "background": background,
            "start": plan.start,
            "stop": plan.stop,
            "corpus_samples": plan.stop if corpus_samples is None else corpus_samples,
            "tokens": tokens,
        },
        "dtype": check_dtype(dtype).name,
        "directions": check_directions(directions, queries),
        "names": check_names(names, queries),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "ready": False,
        "record": {},
    }


def check_counts(plan: Plan, queries: int, tokens: int | None, corpus_samples: int | None, background: int = 0) -> None:
    if queries < 1:
        raise ValueError(f"queries: wanted at least 1, got {queries}")
    if not 0 <= background < queries:
        raise ValueError(f"background: wanted 0 to {queries - 1} of {queries} queries, got {background}")
    if plan.start < 0 or plan.samples < 1 or plan.block < 1:
        raise ValueError(f"plan: wanted 0 <= start < stop and block >= 1, got {plan}")
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens: wanted None or at least 1, got {tokens}")
    if corpus_samples is not None and corpus_samples < plan.stop:
        raise ValueError(f"corpus_samples: wanted at least the plan's stop {plan.stop}, got {corpus_samples}")


def check_dtype(dtype: Any) -> np.dtype:
    dtype = np.dtype(dtype)
    if dtype not in (np.float32, np.float64):
        raise TypeError(f"dtype: wanted float32 or float64, got {dtype}")
    return dtype


def check_directions(directions: Sequence[str] | None, queries: int) -> list[str]:
    directions = ["ascent"] * queries if directions is None else list(directions)
    if len(directions) != queries or not set(directions) <= set(DIRECTIONS):
        raise ValueError(f"directions: wanted {queries} of {DIRECTIONS}, got {directions}")
    return directions


def check_names(names: Sequence[str] | None, queries: int) -> list[str]:
    names = [f"q{query}" for query in range(queries)] if names is None else list(names)
    if len(names) != queries or len(set(names)) != queries or not all(isinstance(name, str) for name in names):
        raise ValueError(f"names: wanted {queries} different strings, got {names}")
    return names


def as_json(argument: str, value: Any) -> Any:
    """``value`` as it will come back from disk: tuples become lists, so that a comparison sees like with like."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as err:
        raise TypeError(f"{argument}: wanted values that JSON can hold, got {value!r} ({err})") from err


def write(folder: Path, manifest: dict[str, Any]) -> None:
    replace_text(folder / NAME, json.dumps(manifest, indent=1) + "\n")


def read(folder: Path) -> dict[str, Any]:
    """The folder's manifest, its structure checked.

    Raises:
        FileNotFoundError: there is none.
        DamagedFile: not JSON, not ours, a key missing, or numbers that contradict each other.
    """
    path = folder / NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as err:
        raise DamagedFile(f"{path}: not a whole JSON file ({err})") from err
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DamagedFile(f'{path}: wanted "format": "{FORMAT}", got another kind of file')
    if manifest.get("version") != VERSION:
        raise DamagedFile(f"{path}: wanted version {VERSION}, got {manifest.get('version')}")
    check_consistent(path, manifest)
    return manifest


def check_consistent(path: Path, manifest: dict[str, Any]) -> None:
    try:
        missing = [key for key in KEYS if key not in manifest]
        missing += [f"shape.{key}" for key in SHAPE_KEYS if key not in manifest["shape"]]
        if missing:
            raise ValueError(f"without {', '.join(missing)}")
        plan, shape = plan_of(manifest), manifest["shape"]
        check_counts(plan, shape["queries"], shape["tokens"], shape["corpus_samples"], shape["background"])
        if (plan.start, plan.stop, plan.samples) != (shape["start"], shape["stop"], shape["samples"]):
            raise ValueError(f"plan {plan} and shape {shape} disagree")
        check_dtype(manifest["dtype"])
        check_directions(manifest["directions"], shape["queries"])
        check_names(manifest["names"], shape["queries"])
    except (KeyError, TypeError, ValueError) as err:
        raise DamagedFile(f"{path}: {type(err).__name__}: {err}") from err


def plan_of(manifest: dict[str, Any]) -> Plan:
    return Plan.from_json(manifest["plan"])


def arrays_of(manifest: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of each array on disk, all of the manifest's dtype."""
    samples, queries, tokens = (manifest["shape"][key] for key in ("samples", "queries", "tokens"))
    shapes = {"base": (samples,), "delta": (samples, queries)}
    if tokens is not None:
        shapes |= {"token_base": (samples, tokens), "token_delta": (samples, tokens, queries)}
    return shapes


def compare(wanted: dict[str, Any], found: dict[str, Any], where: str, keys: Sequence[str] = COMPARED) -> None:
    """Raises ``ManifestMismatch`` that lists every key in which two manifests describe different scores."""
    lines = [line for key in keys for line in differences(key, wanted[key], found[key])]
    if lines:
        raise ManifestMismatch(f"{where} holds scores of another run:\n  " + "\n  ".join(lines))


def differences(key: str, wanted: Any, found: Any) -> Iterator[str]:
    """One line for each nested key that differs. Compared as JSON text, where NaN equals NaN."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for name in sorted({*wanted, *found}):
            yield from differences(f"{key}.{name}", wanted.get(name, "nothing"), found.get(name, "nothing"))
    elif json.dumps(wanted) != json.dumps(found):
        yield f"{key}: wanted {wanted!r}, found {found!r}"
