"""The page: what was run, what was found, how to read it, then every query beside its strongest samples."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finf_fast.disk import naming, replacing
from finf_fast.report.markup import Html, join, tag
from finf_fast.report.samples import Decode, Viewer
from finf_fast.report.sections import QuerySection, Shown, table
from finf_fast.report.style import CSS

LEGEND = (
    "A small change of the model's weights pushed the query's loss up. A training sample whose loss rose with it had ",
    tag("b", "helped"),
    " the model on this query (positive influence); one whose loss fell had ",
    tag("b", "harmed"),
    " it (negative). Influence is the change of the sample's loss, and has this sign whichever way the step went. ",
)
SCALED = "Samples are ordered by influence over their own spread, its root mean square over all queries. "
CHART = "The small chart counts all samples by what orders them, on a log scale, zero in the middle. "
MARKS = "Triangles mark the known samples, or the first. "
SHADED = "Shades show which tokens carried the influence: green those that speak for helpful, red for harmful."


def html_report(
    path: str | os.PathLike[str],
    scores: Any,
    corpus: Any,
    queries: Any,
    *,
    title: str,
    k: int = 5,
    show: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    decode: Decode | None = None,
    scale: np.ndarray | None = None,
    sources: Sequence[Mapping[int, str]] | None = None,
    notes: str | Sequence[str] | None = None,
    about: Mapping[str, object] | None = None,
) -> Path:
    """Writes one self-contained HTML page: no script, no outside resource, readable in light and dark.

    Args:
        path: the file; its folder is made.
        scores: a :class:`finf_fast.Scores` of S samples and Q queries.
        corpus: what was scored: ``corpus[index]`` gives a sample. Pictures, (H, W), (1, H, W) or (3, H, W), and token
            ids are shown as such, anything else by its ``repr``.
        queries: Q samples alike, by ``queries[q]``: a list, or a corpus of its own.
        title: heading of the page.
        k: samples shown in each tail of a query.
        show: numbers of the queries that get a section; all by default.
        names: what to call the queries; by default ``scores.names``.
        classes: name of each class, for integer labels.
        decode: token ids -> text; by default ids below 256 are bytes.
        scale: (S,) what each sample's influence is divided by before ordering, as from :func:`spread`.
        sources: for every query, corpus index -> what is known of that sample ("exact copy"); marked and ranked.
        notes: what was found, a paragraph each.
        about: further facts of the run for the header, such as method and step size.

    Returns:
        The path written.

    Raises:
        ValueError, TypeError: an argument is not as above, or does not fit the scores.
        OSError: the file cannot be written.
    """
    numbers, names = _checked(scores, corpus, queries, k, show, names, sources)
    known = [{}] * len(queries) if sources is None else sources
    captions = list(dict.fromkeys(text for q in numbers for text in known[q].values()))
    shift = 1 if _settings(scores).get("loss") == "causal_lm" else 0  # there token t's row is judged by token t + 1
    shown = Shown(scores, corpus, k, scale, Viewer(decode, classes), captions, shift)
    lines, sections = [], []
    for q in numbers:  # one at a time: each holds a number for every sample
        section = QuerySection(shown, q, queries[q], names[q], known[q])
        lines.append(section.line())
        sections.append(section.html())
    intro = tag("div", _notes(notes), _legend(shown), class_="intro")
    parts = (_header(title, scores, about or {}), intro, table(lines, captions), join(sections), _footer(scores))
    return _write(Path(path), _document(title, tag("main", *parts)))


def _checked(
    scores: Any,
    corpus: Any,
    queries: Any,
    k: int,
    show: Sequence[int] | None,
    names: Sequence[str] | None,
    sources: Sequence[Mapping[int, str]] | None,
) -> tuple[list[int], Sequence[str]]:
    """Numbers of the queries to show and names of all."""
    count, samples = len(scores.names), scores.manifest["shape"]["corpus_samples"]
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k: wanted a whole number, got {k!r}")
    if k < 1:
        raise ValueError(f"k: wanted at least 1, got {k}")
    if len(corpus) != samples:
        raise ValueError(f"corpus: wanted the {samples} samples that were scored, got {len(corpus)}")
    for argument, value in (("queries", queries), ("names", names), ("sources", sources)):
        if value is not None and len(value) != count:
            raise ValueError(f"{argument}: wanted one for each of {count} queries, got {len(value)}")
    numbers = list(range(count)) if show is None else list(show)
    if not all(0 <= number < count for number in numbers):
        raise ValueError(f"show: wanted numbers of queries, 0 to {count - 1}, got {numbers}")
    return numbers, scores.names if names is None else names


def _settings(scores: Any) -> Mapping[str, Any]:
    return scores.manifest["identity"].get("settings", {})


def _header(title: str, scores: Any, about: Mapping[str, object]) -> Html:
    settings = _settings(scores)
    seconds = scores.record.get("seconds")
    facts = {
        "training samples": f"{len(scores):,}",
        "queries": len(scores.names),
        "loss": settings.get("loss"),
        **about,
        "scored in": f"{seconds:,.0f} s" if seconds and seconds >= 1 else None,
    }
    chips = [tag("li", tag("b", key), value) for key, value in facts.items() if value is not None]
    return tag("header", tag("h1", title), tag("ul", join(chips), class_="facts"))


def _notes(notes: str | Sequence[str] | None) -> Html | None:
    paragraphs = [notes] if isinstance(notes, str) else list(notes or ())
    return tag("div", join(tag("p", text) for text in paragraphs), class_="box notes") if paragraphs else None


def _legend(shown: Shown) -> Html:
    scaled, shaded = shown.scale is not None, shown.scores.token_delta is not None
    sentences = (*LEGEND, SCALED if scaled else None, CHART, MARKS, SHADED if shaded else None)
    return tag("div", tag("p", *sentences), class_="box legend")


def _footer(scores: Any) -> Html:
    versions = scores.manifest["identity"].get("versions", {})
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    how = _settings(scores).get("dtype", str(scores.base.dtype))
    return tag("footer", f"Scored {scores.manifest['created']} in {how} with {made}. Plan: {scores.plan}.")


def _document(title: str, body: Html) -> str:
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(CSS)),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', body), lang='en')}\n"


def _write(path: Path, text: str) -> Path:
    """The whole page or none: a reader never sees half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path, "cannot write the page"), replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")
    return path
