"""The page shows the right samples in the right tail, as what they are, and nothing in it can reach outside."""

from __future__ import annotations

import base64
import re
import struct
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from finf_fast.records import Plan
from finf_fast.report import Ranking, html_report, spread
from finf_fast.report.chart import histogram
from finf_fast.report.markup import Html, tag
from finf_fast.report.pixels import as_picture, data_uri, png
from finf_fast.report.samples import Viewer
from finf_fast.scores import open_store

NASTY = "<script>alert('x')</script> & \"quoted\""
SAMPLES, QUERIES = 9, 2


def made(delta, directions=("ascent", "descent"), start=0, loss="cross_entropy", tokens=None, **settings):
    """Scores in memory with this delta (S, Q); base is 0, 1, 2, ..."""
    delta = np.asarray(delta, dtype=np.float64)
    plan = Plan(start, start + len(delta), len(delta), reason="a test")
    identity = {"settings": {"loss": loss, "engine": "pair", **settings}, "versions": {"finf_fast": "0"}}
    length = None if tokens is None else tokens.shape[1]
    with open_store(None, identity, plan, delta.shape[1], np.float64, length, directions=directions) as store:
        extra = () if tokens is None else (np.zeros(tokens.shape[:2]), tokens)
        store.write(0, np.arange(len(delta), dtype=np.float64), delta, *extra)
        return store.finish({"seconds": 3.2})


def ladder():
    """Query 0 (ascent): sample i has influence i - 4. Query 1 (descent): 4 - i."""
    rising = np.arange(SAMPLES) - 4.0
    return made(np.stack([rising, rising], 1))


def images(count=SAMPLES):
    return [(torch.full((1, 8, 8), i / 10), torch.tensor(i % 3)) for i in range(count)]


def page(tmp_path, scores, corpus, queries, **options):
    options = {"title": "A test", **options}
    return html_report(tmp_path / "page.html", scores, corpus, queries, **options).read_text(encoding="utf-8")


def sections(text):
    """The markup of each query's section, and in it the sample numbers of both tails."""
    bodies = re.findall(r"<section.*?</section>", text, re.S)
    tails = [body.split("Most harmful") for body in bodies]
    return [[[int(n) for n in re.findall(r"<span>sample (\d+)</span>", tail)] for tail in pair] for pair in tails]


class Balance(HTMLParser):
    """Every element that opens must close, in order."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses = [], []

    def handle_starttag(self, name, attributes):
        self.addresses += [value for key, value in attributes if key in ("src", "href", "action", "data")]
        if name not in ("img", "meta", "br"):
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name


def decoded(data):
    """Pixels of an 8-bit PNG with filter 0, read by hand, checksums and all."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place, chunks = 8, {}
    while place < len(data):
        (size,) = struct.unpack(">I", data[place : place + 4])
        kind, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + size]
        assert struct.unpack(">I", data[place + 8 + size : place + 12 + size]) == (zlib.crc32(kind + body),)
        chunks[kind], place = body, place + 12 + size
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert depth == 8 and chunks[b"IEND"] == b""
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    assert (lines[:, 0] == 0).all()
    return lines[:, 1:].reshape((height, width) if colour == 0 else (height, width, 3))


def test_both_tails_in_order_whatever_the_direction(tmp_path):
    found = sections(page(tmp_path, ladder(), images(), images(QUERIES), k=2))
    assert found == [[[8, 7], [0, 1]], [[0, 1], [8, 7]]]


def test_a_tail_holds_only_samples_that_truly_helped_or_harmed(tmp_path):
    text = page(tmp_path, made([[0.0], [2.0], [np.nan], [1.0]], ["ascent"]), images(4), images(1), k=4)
    assert sections(text) == [[[1, 3], []]]
    assert "No sample was harmful." in text


def test_everything_given_is_escaped(tmp_path):
    corpus = [f"{NASTY} {i}" for i in range(SAMPLES)]
    known = [{8: NASTY}, {}]
    text = page(
        tmp_path, ladder(), corpus, [NASTY, NASTY], title=NASTY, names=[NASTY, "b"], sources=known, notes=NASTY,
        about={NASTY: NASTY},
    )  # fmt: skip
    assert "<script" not in text and "&lt;script&gt;" in text
    balance = Balance()
    balance.feed(text)
    assert balance.open == []


def test_the_page_reaches_nothing_outside(tmp_path):
    text = page(tmp_path, ladder(), images(), images(QUERIES))
    balance = Balance()
    balance.feed(text)
    assert balance.open == [] and len(balance.addresses) > 10
    assert all(address.startswith(("data:image/png;base64,", "#query-")) for address in balance.addresses)
    assert not re.search(r"https?:|//|@import|url\(|<script|<link|<iframe", re.sub(r'src="data:[^"]*"', "", text))


def test_pictures_come_back_as_they_were(tmp_path):
    text = page(tmp_path, ladder(), images(), images(QUERIES), show=[0], k=1)
    found = [decoded(base64.b64decode(uri)) for uri in re.findall(r'src="data:image/png;base64,([^"]*)"', text)]
    assert {int(pixels[0, 0]) for pixels in found} == {0, 204}  # query 0 and sample 0 are black, sample 8 is 0.8
    assert all(pixels.shape == (8, 8) and (pixels == pixels[0, 0]).all() for pixels in found)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (1, 1)])
def test_png_holds_its_pixels(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    assert np.array_equal(decoded(png(pixels)), pixels)
    assert base64.b64decode(data_uri(pixels).split(",")[1]) == png(pixels)


@pytest.mark.parametrize("shape, wanted", [((6, 5), (6, 5)), ((1, 6, 5), (6, 5)), ((3, 6, 5), (6, 5, 3))])
def test_image_like_tensors_are_pictures(shape, wanted):
    assert as_picture(torch.rand(shape)).shape == wanted
    assert as_picture(torch.randint(0, 256, shape, dtype=torch.uint8)).shape == wanted


@pytest.mark.parametrize("value", [torch.rand(7), torch.rand(2, 8, 8), torch.rand(3, 3), torch.arange(64).view(8, 8)])
def test_other_tensors_are_not(value):
    assert as_picture(value) is None


def test_normalised_pixels_are_stretched_and_plain_ones_are_not():
    plain = as_picture(torch.full((4, 4), 0.5))
    assert (plain == 128).all()
    stretched = as_picture(torch.linspace(-2, 2, 16).view(4, 4))
    assert stretched.min() == 0 and stretched.max() == 255
    assert (as_picture(torch.full((4, 4), -3.0)) == 0).all()


def ids(text):
    return torch.tensor(list(text.encode()))


def test_bytes_are_shown_as_text(tmp_path):
    corpus = [ids(f"if a < {i}: naïve()") for i in range(SAMPLES)]
    text = page(tmp_path, ladder(), corpus, corpus[:QUERIES], k=1)
    assert "if a &lt; 8: naïve()" in text


def test_other_vocabularies_are_decoded_or_shown_as_numbers():
    sample = {"input_ids": torch.tensor([3, 900]), "labels": torch.tensor([3, 900])}
    assert "3 900" in Viewer().show(sample)
    assert "three&lt;nine" in Viewer(lambda tokens: "<".join({3: "three", 900: "nine"}[t] for t in tokens)).show(sample)
    assert Viewer().label(sample) is None


def test_labels_and_their_names():
    sample = (torch.rand(1, 8, 8), torch.tensor(1))
    assert Viewer().label(sample) == "1"
    assert Viewer(classes=["cat", "dog"]).label(sample) == "dog"
    assert Viewer().label(torch.rand(1, 8, 8)) is None


def test_shades_stand_at_their_tokens_also_inside_a_character():
    shown = Viewer().show(ids("aéb"), np.array([0.0, 0.0, 1.0, -0.5]))  # é is two bytes
    assert shown == '<pre class="text">a<span class="p4">é</span><span class="n2">b</span></pre>'


@pytest.mark.parametrize("loss, marked", [("causal_lm", "c"), ("cross_entropy", "b")])
def test_token_influence_colours_the_token_that_was_judged(tmp_path, loss, marked):
    tokens = np.zeros((2, 4, 1))
    tokens[1, 1, 0] = 1.0  # row 1 of sample 1: after "ab", so for a causal model it judges "c"
    scores = made([[0.0], [1.0]], ["ascent"], loss=loss, tokens=tokens)
    text = page(tmp_path, scores, [ids("abcd")] * 2, [ids("abcd")], k=1)
    assert re.findall(r'<span class="p4">(.)</span>', text) == [marked]


def test_known_samples_are_marked_and_ranked_even_outside_the_tails(tmp_path):
    known = [{8: "leaked copy", 4: "near duplicate"}, {}]
    text = page(tmp_path, ladder(), images(), images(QUERIES), sources=known, k=2)
    assert "leaked copy: sample 8, rank 1 · near duplicate: sample 4, rank 5" in text
    assert text.count('<span class="tagged">leaked copy</span>') == 1
    assert "rank of near duplicate" in text


def test_scale_orders_by_influence_over_spread(tmp_path):
    # Sample 0 answers to both queries, loudly; 1 and 2 to one query each.
    scores = made([[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], ["ascent", "ascent"])
    assert np.allclose(spread(scores), [9, 0.5**0.5, 0.5**0.5, 0])
    text = page(tmp_path, scores, images(4), images(2), scale=spread(scores))
    assert sections(text) == [[[1, 0], []], [[2, 0], []]]
    assert "× spread" in text and "+9" in text  # the influence shown stays the raw one


def test_spread_needs_queries_to_compare():
    with pytest.raises(ValueError, match="at least 2 queries"):
        spread(made([[1.0], [2.0]], ["ascent"]))


def test_rank_counts_equals_and_knows_a_shard():
    scores = made([[1.0], [3.0], [3.0], [np.nan]], ["ascent"], start=10)
    ranking = Ranking(scores, 0)
    assert [ranking.rank(i) for i in (10, 11, 12, 13)] == [3, 2, 2, 4]
    assert ranking.top(2) == [11, 12] and ranking.raw(12) == 3.0
    with pytest.raises(ValueError, match="index: wanted 10 to 13, got 3"):
        ranking.rank(3)


def test_ranking_agrees_with_top_of_the_scores():
    scores = made(np.random.default_rng(0).normal(size=(500, 2)))
    for q in range(2):
        for tail in ("helpful", "harmful"):
            assert Ranking(scores, q).top(7, tail) == scores.top(q, 7, tail).indices.tolist()


def test_the_header_tells_what_was_run(tmp_path):
    text = page(tmp_path, ladder(), images(), images(QUERIES), about={"step": "one SGD step"}, notes=["Two", "notes"])
    for fact in ("<b>training samples</b>9", "<b>loss</b>cross_entropy", "<b>step</b>one SGD step", "<p>notes</p>"):
        assert fact in text


def test_the_chart_counts_every_sample_and_marks():
    bars = re.findall(r'class="(help|harm|zero)"', histogram(np.array([-1.0, 0.0, 1.0, np.nan]), [1.0]))
    assert sorted(bars) == ["harm", "help", "zero"]
    assert histogram(np.zeros(4)).count("<rect") == 1
    assert histogram(np.array([1.0, 2.0]), [np.nan]).count("mark") == 0


def test_markup_escapes_all_but_markup():
    assert (
        tag("p", "<", Html("<b>"), None, class_='"', hidden=True, title=None) == '<p class="&quot;" hidden>&lt;<b></p>'
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"k": 0}, "k: wanted at least 1"),
        ({"show": [2]}, "show: wanted numbers of queries, 0 to 1"),
        ({"names": ["one"]}, "names: wanted one for each of 2 queries, got 1"),
        ({"sources": [{}]}, "sources: wanted one for each of 2"),
        ({"scale": np.ones(3)}, r"scale: wanted shape \(9,\)"),
        ({"sources": [{99: "copy"}, {}]}, "index: wanted 0 to 8, got 99"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        page(tmp_path, ladder(), images(), images(QUERIES), **options)
    assert list(tmp_path.iterdir()) == []


def test_wrong_counts_are_named(tmp_path):
    with pytest.raises(ValueError, match="corpus: wanted the 9 samples"):
        page(tmp_path, ladder(), images(3), images(QUERIES))
    with pytest.raises(ValueError, match="queries: wanted one for each of 2"):
        page(tmp_path, ladder(), images(), images(1))
    with pytest.raises(TypeError, match="k: wanted a whole number"):
        page(tmp_path, ladder(), images(), images(QUERIES), k=2.5)
