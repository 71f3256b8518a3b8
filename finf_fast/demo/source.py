"""The text demo's data: the standard library's own source, with passages planted in it, as a nanoGPT token file."""

from __future__ import annotations

import keyword
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["Planted", "plant", "renamed", "source_files", "write_tokens"]

# Other people's packages; tests and programs that some distributions leave out; tables of characters, one manual.
PACKAGES, OPTIONAL = {"site-packages", "dist-packages"}, {"test", "tests", "idlelib", "lib2to3", "turtledemo"}
LEFT_OUT = {*PACKAGES, *OPTIONAL, "encodings", "pydoc_data", "__pycache__"}
SMALLEST = 2000  # bytes; shorter files are mostly re-exports
NAME = re.compile(r"[A-Za-z_][A-Za-z_0-9]{2,}")
KEPT = {*keyword.kwlist, "self", "cls"}  # renaming these would not be renaming
CHANGED = (0.10, 0.20)  # share of a near duplicate's bytes that differ
VARIED = 25  # different bytes that a passage needs: a run of dashes is no passage
PROBE = 32  # bytes that a passage may not share with the training text, or it would have older copies


@dataclass(frozen=True)
class Planted:
    """Training text cut in windows, with an exact copy and a near duplicate of every query among them.

    Attributes:
        tokens: (S, L) uint16, a byte each.
        queries: (Q, L) int64.
        exact, near: (Q,) windows that hold the copy and the near duplicate.
        changed: (Q,) share of bytes in which the near duplicate differs.
    """

    tokens: np.ndarray
    queries: np.ndarray
    exact: tuple[int, ...]
    near: tuple[int, ...]
    changed: tuple[float, ...]


def source_files() -> list[Path]:
    """Source files of the standard library, in an order that does not depend on the machine.

    Raises:
        FileNotFoundError: this Python came without them.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [path for path in root.rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts)]
    found = sorted(path for path in found if path.stat().st_size >= SMALLEST)
    if not found:
        raise FileNotFoundError(f"the standard library's source, .py files under {root}, is not there")
    return found


def plant(seed: int, windows: int, length: int, queries: int) -> Planted:
    """Shuffles the source files by ``seed``, holds some out for the queries, and plants these among the others.

    Args:
        windows: S, planted ones included.
        length: L, bytes of a window.
        queries: Q.

    Raises:
        ValueError: the source is too short for so many windows.
    """
    chance, files = random.Random(seed), source_files()
    chance.shuffle(files)
    own = windows - 2 * queries
    train, used = _gather(files, own * length)
    if len(train) < own * length:
        raise ValueError(
            f"windows: wanted at most {len(train) // length + 2 * queries} of {length} bytes, got {windows}"
        )
    chosen = _choose(files[used:], train, length, queries, chance)
    rows = [train[n * length : (n + 1) * length] for n in range(own)]
    rows += [passage for passage, _ in chosen] + [near for _, near in chosen]
    order = list(range(windows))
    chance.shuffle(order)
    place = {row: n for n, row in enumerate(order)}
    return Planted(
        np.frombuffer(b"".join(rows[row] for row in order), np.uint8).reshape(windows, length).astype(np.uint16),
        np.frombuffer(b"".join(p for p, _ in chosen), np.uint8).reshape(queries, length).astype(np.int64),
        tuple(place[own + q] for q in range(queries)),
        tuple(place[own + queries + q] for q in range(queries)),
        tuple(_differing(passage, near) for passage, near in chosen),
    )


def write_tokens(path: Path, tokens: np.ndarray) -> Path:
    """nanoGPT's layout: little-endian uint16, one stream, no header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tokens.astype("<u2").tofile(path)
    return path


def renamed(passage: bytes, names: list[str], chance: random.Random) -> bytes:
    """The passage with some of its identifiers replaced by others of the same length, until a tenth of it has changed.

    Args:
        passage: ASCII source text.
        names: identifiers to take from.
    """
    text, fresh = passage.decode("ascii"), {}
    own = list(dict.fromkeys(NAME.findall(text)))
    chance.shuffle(own)
    for name in (name for name in own if name not in KEPT):
        others = [other for other in names if len(other) == len(name) and other not in own]
        if others:
            fresh[name] = chance.choice(others)
        changed = NAME.sub(lambda found: fresh.get(found[0], found[0]), text).encode("ascii")
        if _differing(passage, changed) > CHANGED[1]:
            del fresh[name]
        elif _differing(passage, changed) >= CHANGED[0]:
            return changed
    return passage


def _gather(files: list[Path], size: int) -> tuple[bytes, int]:
    """At least ``size`` bytes of whole files, where there are so many, and the number of files taken."""
    parts, total = [], 0
    for path in files:
        if total >= size:
            break
        parts.append(path.read_bytes())
        total += len(parts[-1])
    return b"".join(parts), len(parts)


def _choose(
    files: list[Path], train: bytes, length: int, count: int, chance: random.Random
) -> list[tuple[bytes, bytes]]:
    """(passage, near duplicate), one from each of the first ``count`` files that have one."""
    chosen: list[tuple[bytes, bytes]] = []
    for path in files:
        if len(chosen) == count:
            break
        chosen += _first_fit(path.read_bytes(), train, length, chance)
    if len(chosen) < count:
        raise ValueError(f"queries: wanted {count} passages that the training text does not hold, found {len(chosen)}")
    return chosen


def _first_fit(text: bytes, train: bytes, length: int, chance: random.Random) -> list[tuple[bytes, bytes]]:
    """A window of the text that is fit to be planted, with its near duplicate; none if there is none."""
    names = sorted({name for name in NAME.findall(text.decode("ascii", "ignore")) if name not in KEPT})
    starts = list(range(0, len(text) - length + 1, length))
    chance.shuffle(starts)
    for passage in (text[start : start + length] for start in starts):
        if passage.isascii() and len(set(passage)) >= VARIED and not any(part in train for part in _parts(passage)):
            near = renamed(passage, names, chance)
            if near != passage:
                return [(passage, near)]
    return []


def _parts(passage: bytes) -> Iterator[bytes]:
    return (passage[n : n + PROBE] for n in range(0, len(passage), PROBE))


def _differing(one: bytes, other: bytes) -> float:
    return sum(a != b for a, b in zip(one, other, strict=True)) / len(one)
