"""The demo: leaked images and planted passages, from training to report, in a few minutes on two cores.

Everything here goes through the public names of ``finf_fast``, as a user's own program would.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from finf_fast.demo import digits, text
from finf_fast.demo.findings import Found, Result, Way
from finf_fast.demo.settled import Show

__all__ = ["Found", "Result", "Way", "render", "run", "show"]

DEMOS = {"digits": digits.run, "text": text.run}
LINES = 12  # queries in a printed table; the page and the scores hold the rest


def run(which: str = "all", out: str | os.PathLike[str] = "runs/demo", progress: Show = None) -> list[Result]:
    """Runs one demo or all of them; each writes its folder ``out/<name>``.

    Args:
        which: ``"digits"``, ``"text"`` or ``"all"``.
        out: folder for results and pages; an interrupted sweep is resumed from it.
        progress: as in :func:`finf_fast.sweep`.

    Raises:
        ValueError: no such demo.
        ImportError: scikit-learn is not installed (digits).
        FileNotFoundError: this Python came without its source text (text).
    """
    return [DEMOS[name](Path(out) / name, progress) for name in _names(which)]


def render(result: Result) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """What to print of a result: tables of (title, heads, rows)."""
    return [_found_table(result), _ways_table(result)]


def show(which: str, out: str | os.PathLike[str], console: Any) -> None:
    """Runs the demos and prints each result, as soon as it is there, to a ``rich.console.Console``."""
    from rich.table import Table

    for name in _names(which):
        result = DEMOS[name](Path(out) / name)
        for title, heads, rows in render(result):
            table = Table(*heads, title=title, title_justify="left")
            for row in rows:
                table.add_row(*row)
            console.print(table)
        for line in (*result.notes, _times(result)):
            console.print(line, highlight=False)
        console.print(f"page: {result.page}\n", highlight=False, soft_wrap=True)


def _names(which: str) -> list[str]:
    if which != "all" and which not in DEMOS:
        raise ValueError(f"which: wanted {', '.join(DEMOS)} or all, got {which!r}")
    return list(DEMOS) if which == "all" else [which]


def _found_table(result: Result) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    near = any(found.near is not None for found in result.found)
    heads = ("query", "true source", "its rank", "its influence", *(("rank of near duplicate",) if near else ()))
    rows = [
        (f.query, f"sample {f.source}", str(f.rank), f"{f.influence:+.3g}", *((str(f.near),) if near else ()))
        for f in result.found[:LINES]
    ]
    first = f", first {LINES} of {len(result.found)} queries" if len(result.found) > LINES else ""
    return f"{result.title}{first}", heads, rows


def _ways_table(result: Result) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    heads = ("step", "top-1", "top-5", "top-1 over spread", "top-5 over spread")
    rows = [(way.name, *(f"{share:.0%}" for share in (*way.raw, *way.over_spread))) for way in result.ways]
    return "True source found", heads, rows


def _times(result: Result) -> str:
    return ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in result.seconds.items())
