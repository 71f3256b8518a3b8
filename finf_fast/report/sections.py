"""The parts of the page that show queries: one section each, and a line in the table of all at a glance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finf_fast.report.chart import histogram
from finf_fast.report.markup import Html, join, tag
from finf_fast.report.ranking import Ranking
from finf_fast.report.samples import Viewer, is_picture, is_text

TAILS = {"helpful": ("help", "Most helpful"), "harmful": ("harm", "Most harmful")}


@dataclass(frozen=True)
class Shown:
    """What all sections share.

    Attributes:
        scores, corpus, k, scale: as in :func:`finf_fast.report.html_report`.
        viewer: how samples look.
        captions: everything that is known of some sample, a column of the table each.
        shift: tokens between a row of ``token_delta`` and the token it judges.
    """

    scores: Any
    corpus: Any
    k: int
    scale: np.ndarray | None
    viewer: Viewer
    captions: Sequence[str]
    shift: int


class QuerySection:
    """One query, its order of the samples, and the markup that shows them.

    Args:
        shown: what all sections share.
        query: its number.
        sample: the query itself.
        name: its heading.
        known: corpus index -> what is known of that sample.
    """

    def __init__(self, shown: Shown, query: int, sample: Any, name: str, known: Mapping[int, str]):
        self._shown, self._query, self._sample, self._name, self._known = shown, query, sample, name, known
        self._ranking = Ranking(shown.scores, query, shown.scale)
        self._top = {tail: self._ranking.top(shown.k, tail) for tail in TAILS}
        self._words = not is_picture(sample)
        self._shaded = is_text(sample) and shown.scores.token_delta is not None

    def html(self) -> Html:
        """The section."""
        where = [f"{text}: sample {index}, rank {self._ranking.rank(index)}" for index, text in self._known.items()]
        head = tag("header", tag("h2", self._name, tag("small", " · ".join(where)) if where else None))
        tails = join(self._tail(tail, *look) for tail, look in TAILS.items())
        kind = "words" if self._words else "images"
        parts = (head, self._asked(), tag("div", tails, class_="tails"))
        return tag("section", *parts, id=self._anchor, class_=f"box query {kind}")

    def line(self) -> Html:
        """What came first, how far it stands before the second, and where the known samples stand."""
        ranking, helpful = self._ranking, self._top["helpful"][:2]
        first = (str(helpful[0]), signed(ranking.raw(helpful[0]))) if helpful else ("none", "")
        ratio = f"{ranking.value(helpful[0]) / ranking.value(helpful[1]):.2f}" if len(helpful) > 1 else ""
        ranks = [self._rank(caption) for caption in self._shown.captions]
        name = tag("td", tag("a", self._name, href=f"#{self._anchor}"))
        cells = [tag("td", text, class_="n") for text in (*first, ratio, *ranks)]
        return tag("tr", tag("td", self._shown.viewer.show(self._sample)), name, *cells)

    @property
    def _anchor(self) -> str:
        return f"query-{self._query}"

    def _rank(self, caption: str) -> str:
        """Best place among the samples of that caption."""
        found = [self._ranking.rank(index) for index, text in self._known.items() if text == caption]
        return str(min(found)) if found else ""

    def _asked(self) -> Html:
        viewer, label = self._shown.viewer, self._shown.viewer.label(self._sample)
        marks = [self._ranking.value(index) for index in self._known or self._top["helpful"][:1]]
        chart = tag("div", tag("p", f"label {label}") if label else None, histogram(self._ranking.values, marks))
        return tag("div", tag("div", viewer.show(self._sample)), chart, class_="asked")

    def _tail(self, tail: str, kind: str, heading: str) -> Html:
        indices = self._top[tail]
        strongest = abs(self._ranking.value(indices[0])) if indices else 1.0
        cards = [self._card(index, abs(self._ranking.value(index)) / strongest) for index in indices]
        row = tag("div", join(cards), class_="row") if cards else tag("p", f"No sample was {tail}.", class_="soft")
        return tag("div", tag("h3", heading), row, class_=kind)

    def _card(self, index: int, share: float) -> Html:
        row = index - self._ranking.first
        look = self._shown.viewer.show(sample := self._shown.corpus[index], self._shades(row))
        bar = tag("div", tag("i", style=f"width: {100 * share:.0f}%"), class_="track")
        caption = self._caption(index, sample, float(self._shown.scores.base[row]))
        parts = (caption, look, bar) if self._words else (look, bar, caption)
        return tag("figure", *parts, class_="known" if index in self._known else None)

    def _caption(self, index: int, sample: Any, base: float) -> Html:
        label, known = self._shown.viewer.label(sample), self._known.get(index)
        scaled = f"{abs(self._ranking.value(index)):.1f} × spread" if self._shown.scale is not None else None
        plain = (scaled, f"sample {index}", f"label {label}" if label else None, f"loss {base:.3g}")
        return tag(
            "figcaption",
            tag("b", signed(self._ranking.raw(index))),
            *(tag("span", text) for text in plain if text),
            tag("span", known, class_="tagged") if known else None,
        )

    def _shades(self, row: int) -> np.ndarray | None:
        """(L,) each token's part of the influence, over the largest of the sample."""
        if not self._shaded:
            return None
        parts = self._shown.scores.token_delta[self._query, row].astype(np.float64)
        parts = np.roll(np.nan_to_num(parts), self._shown.shift) * self._ranking.sign
        return parts / (np.abs(parts).max() or 1.0)


def table(lines: Sequence[Html], captions: Sequence[str]) -> Html:
    """All queries at a glance."""
    heads = ("query", "", "first sample", "influence", "first / second", *(f"rank of {text}" for text in captions))
    head = tag("tr", join(tag("th", text, class_="n" if n > 1 else None) for n, text in enumerate(heads)))
    return tag("div", tag("table", tag("thead", head), tag("tbody", join(lines))), class_="box scroll")


def signed(value: float) -> str:
    """Three digits and a sign, a true minus."""
    return f"{value:+.3g}".replace("-", "−")
