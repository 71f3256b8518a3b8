"""Which of an operation's GPU faces is faster, where both can run: looked up among measurements, never guessed.

The measurements are `finf_fast.ops.measured_rows`, written by ``bench/measured_faces.py`` out of what the GPU suite
timed. A case that has none near it runs on the face that stands first in `finf_fast.ops.dispatch`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finf_fast.ops.measured_rows import ROWS

__all__ = ["Case", "case_of", "fastest", "summary"]

# Powers of two between a case and a measurement that still speaks for it: its neighbours'.
NEAR = 1


@dataclass(frozen=True)
class Case:
    """What the speed of linear_cross_entropy_delta depends on: sizes are powers of two, rounded up."""

    form: str  # "input", "low rank" or "dense": what changes
    dtype: str
    T: int  # rows
    D: int
    V: int
    Q: int

    def apart(self, other: Case) -> int | None:
        """Steps to another case; None where it says nothing about this one."""
        steps = [abs(getattr(self, letter) - getattr(other, letter)) for letter in "TDVQ"]
        same = (self.form, self.dtype) == (other.form, other.dtype)
        return sum(steps) if same and max(steps) <= NEAR else None


def case_of(form: str, dtype: str, **sizes: int) -> Case:
    """The case of these sizes T, D, V, Q."""
    return Case(form, dtype, **{letter: max(size - 1, 0).bit_length() for letter, size in sizes.items()})


def fastest(op: str, architecture: int, case: Case, rows: Sequence[Mapping[str, Any]] = ROWS) -> str | None:
    """Name of the face that was fastest in the nearest case measured on this architecture; None without one."""
    near = []
    for row in rows:
        if (row["op"], row["architecture"]) == (op, architecture):
            steps = case.apart(case_of(row["form"], row["dtype"], **{letter: row[letter] for letter in "TDVQ"}))
            near += [] if steps is None else [(steps, row["ms"])]
    if not near:
        return None
    _, ms = min(near, key=lambda found: found[0])
    return min(ms, key=ms.get)


def summary(architecture: int | None = None, rows: Sequence[Mapping[str, Any]] = ROWS) -> str:
    """A line on what has been measured; on one architecture, or on any."""
    seen = [row for row in rows if architecture in (None, row["architecture"])]
    if not seen:
        return "not measured on this device yet" if architecture else "not measured on any device yet"
    devices = sorted({f"{row['device']} (sm_{row['architecture']})" for row in seen})
    return f"measured on {', '.join(devices)}: {len(seen)} cases"
