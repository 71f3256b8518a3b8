"""A small picture of one query: how the influence of all samples is spread, and where the marked ones stand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from finf_fast.report.markup import Html, join, tag

WIDTH, HEIGHT = 260, 64  # CSS pixels: as wide as the column under a query
BINS = 65  # 4 pixels each; odd, so that one bin is centred on zero


def histogram(values: np.ndarray, marks: Sequence[float] = ()) -> Html:
    """Counts over the range of the values, zero in the middle; on a log scale, for one in a million must be seen.

    Args:
        values: (S,) what is counted; NaN is left out.
        marks: values that get a tick from below.
    """
    finite = values[np.isfinite(values)]
    reach = float(np.abs(finite).max(initial=0.0)) or 1.0
    counts, edges = np.histogram(finite, BINS, (-reach, reach))
    tall = np.log1p(counts) / np.log1p(max(1, counts.max()))
    bars = [_bar(n, float(h), float(edges[n] + edges[n + 1])) for n, h in enumerate(tall) if h > 0]
    ticks = [_tick(WIDTH * (mark / reach + 1) / 2) for mark in marks if np.isfinite(mark)]
    axis = tag("line", x1=0, y1=HEIGHT - 8, x2=WIDTH, y2=HEIGHT - 8, class_="axis")
    label = f"influence of {len(finite)} samples, from {finite.min(initial=0):.3g} to {finite.max(initial=0):.3g}"
    return tag(
        "svg",
        tag("title", label),
        join([*bars, axis, *ticks]),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        class_="chart",
        role="img",
    )


def _bar(n: int, share: float, centre: float) -> Html:
    step, room = WIDTH / BINS, HEIGHT - 12
    tall = max(1.5, share * room)  # a bin with a single sample stays visible
    kind = "zero" if abs(centre) < 1e-12 else "help" if centre > 0 else "harm"
    x, y = f"{n * step + 0.5:.1f}", f"{HEIGHT - 8 - tall:.1f}"
    return tag("rect", x=x, y=y, width=f"{step - 1:.1f}", height=f"{tall:.1f}", class_=kind)


def _tick(x: float) -> Html:
    x = min(max(x, 4.0), WIDTH - 4.0)
    return tag("path", d=f"M{x:.1f} {HEIGHT - 7}l-4 7h8z", class_="mark")
