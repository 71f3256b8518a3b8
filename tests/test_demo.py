"""The demo in small: data are what they claim, ranks are right, pages and folders are written, nothing global moves."""

from __future__ import annotations

import io
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

import finf_fast as ff
from finf_fast import demo
from finf_fast.demo import digits, settled, source, text
from finf_fast.demo.findings import Found, Result, Way, hits, ranks

SMALL = text.Size(windows=60, length=64, queries=2, epochs=1, batch=8, width=32, layers=1)


@pytest.fixture(scope="module")
def leaked(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    return digits.run(out, progress=False, passes=5)  # a third of the demo's training is enough to find the leak


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    out = tmp_path_factory.mktemp("text")
    return text.run(out, progress=False, size=SMALL)


def test_ranks_on_a_case_done_by_hand():
    values = np.array([[1.0, 5.0, 3.0, 2.0], [1.0, 1.0, 0.0, np.nan], [0.0, np.nan, 2.0, 3.0]])
    # Third among four; a tie and a NaN count against the second; a source without a value is last.
    assert ranks(values, [3, 0, 1]).tolist() == [3, 3, 4]
    assert hits(np.array([1, 1, 5, 6])) == (0.5, 0.75)


def test_each_leaked_image_sits_at_its_source_and_no_control_does():
    data = digits.leak(seed=3)
    x, _ = data.asked
    assert torch.equal(data.x[data.sources], x[: digits.LEAKED])
    assert torch.equal(data.y[data.sources], data.asked[1][: digits.LEAKED])
    assert len(set(data.sources.tolist())) == digits.LEAKED
    seen = {image.numpy().tobytes() for image in data.x}
    assert not any(image.numpy().tobytes() in seen for image in (*x[digits.LEAKED :], *data.test[0]))
    assert len(data.x) + len(data.test[0]) == 1797
    assert not torch.equal(digits.leak(seed=4).x, data.x)


def test_digits_finds_the_leak(leaked):
    assert leaked.ways[0].over_spread[0] >= 0.9
    assert [way.name for way in leaked.ways] == [name for name, *_ in digits.WAYS]
    assert np.mean([found.rank == 1 for found in leaked.found]) == leaked.ways[0].over_spread[0]


def test_digits_leaves_results_and_a_page(leaked):
    scores = ff.Scores.open(leaked.folder / "scores" / "adam-0.0001")
    assert scores.delta.shape == (digits.LEAKED + digits.CONTROLS, digits.TRAIN + digits.LEAKED)
    first = leaked.found[0]
    assert first.influence == pytest.approx(float(scores.influence[0, first.source]))
    page = leaked.page.read_text(encoding="utf-8")
    assert page.count("<section") == len(digits.SHOWN) and f"leaked copy: sample {first.source}, rank" in page


def test_the_released_way_is_scored_by_its_absolute_change(leaked):
    data = digits.leak(seed=0)
    scores = ff.Scores.open(leaked.folder / "scores" / "released")
    assert leaked.ways[-1].raw == hits(ranks(np.abs(scores.delta)[: digits.LEAKED], data.sources))


def test_how_far_leaked_and_controls_stand_apart():
    class Made:
        background = np.empty((0, 4))
        # Over spreads of √8, 1, 1 and 0 (left out) the leaked query leads by 0.41, the control by nothing.
        delta = influence = np.array([[4.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0]])

        @classmethod
        def spread(cls):
            return np.sqrt(np.square(cls.delta).mean(0))

    assert digits.apart(Made, 1) == 1.0
    Made.delta = Made.influence = Made.influence[::-1]
    assert digits.apart(Made, 1) == 0.0


def test_planted_windows_are_where_they_are_said_to_be():
    data = source.plant(5, 60, 96, 4)
    assert data.tokens.shape == (60, 96) and data.tokens.dtype == np.uint16
    assert np.array_equal(data.tokens[list(data.exact)], data.queries)
    share = (data.tokens[list(data.near)] != data.queries).mean(1)
    assert np.allclose(share, data.changed) and (share >= 0.10).all() and (share <= 0.20).all()
    others = bytes(np.delete(data.tokens, data.exact + data.near, axis=0).astype(np.uint8).ravel())
    assert not any(bytes(passage[:32].astype(np.uint8)) in others for passage in data.queries)


def test_planting_depends_on_nothing_but_the_seed():
    one, again, other = (source.plant(seed, 60, 64, 2).tokens for seed in (1, 1, 2))
    assert np.array_equal(one, again) and not np.array_equal(one, other)


def test_renaming_keeps_length_and_keywords():
    passage = b"    for item in self.things: return total + item.value * weight\n"
    names = ["spam", "eggs", "bacon", "lobster", "things", "tomato", "parrot"]
    near = source.renamed(passage, names, random.Random(0))
    assert len(near) == len(passage) and near != passage
    assert all(word in near for word in (b"for ", b" in ", b"self.", b"return "))
    assert 0.10 <= sum(a != b for a, b in zip(near, passage, strict=True)) / len(passage) <= 0.20


def test_a_passage_without_names_to_change_stays():
    assert source.renamed(b"x = 1 + 2\n", ["spam"], random.Random(0)) == b"x = 1 + 2\n"


def test_too_little_source_is_said():
    with pytest.raises(ValueError, match="windows: wanted at most"):
        source.plant(0, 10**7, 128, 2)


def test_text_is_wired_from_file_to_page(planted):
    data = source.plant(0, SMALL.windows, SMALL.length, SMALL.queries)
    assert np.array_equal(np.fromfile(planted.folder / "train.bin", "<u2"), data.tokens.ravel())
    scores = ff.Scores.open(planted.folder / "scores")
    assert scores.delta.shape == (SMALL.queries, SMALL.windows) and scores.token_delta is not None
    assert tuple(found.source for found in planted.found) == data.exact
    wanted = [(row > row[source]).sum() + 1 for row, source in zip(scores.influence, data.exact, strict=True)]
    assert [found.rank for found in planted.found] == wanted
    page = planted.page.read_text(encoding="utf-8")
    assert "exact copy" in page and "near duplicate" in page and 'class="p' in page


def test_the_byte_model_does_not_look_ahead():
    model = text.ByteModel(width=16, layers=2, window=12, heads=2).eval()
    ids = torch.randint(0, 256, (2, 12))
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 256
    before, after = model(ids), model(changed)
    assert torch.allclose(before[:, :7], after[:, :7], atol=1e-6)
    assert not torch.allclose(before[:, 7:], after[:, 7:], atol=1e-3)


def test_a_second_run_gives_the_same_and_takes_up_the_scores(planted, tmp_path):
    again = text.run(planted.folder, progress=False, size=SMALL)
    assert again.found == planted.found
    fresh = text.run(tmp_path, progress=False, size=SMALL)
    assert fresh.found == planted.found


def test_scores_of_an_earlier_demo_make_room_but_foreign_files_stay(tmp_path):
    first = text.run(tmp_path, progress=False, size=SMALL)
    other = text.run(tmp_path, progress=False, seed=1, size=SMALL)
    assert first.found != other.found
    (tmp_path / "scores" / "mine.txt").write_text("keep me")
    with pytest.raises(ff.ManifestMismatch):
        text.run(tmp_path, progress=False, seed=2, size=SMALL)
    assert (tmp_path / "scores" / "mine.txt").read_text() == "keep me"


def test_global_state_is_put_back_also_after_an_error():
    torch.manual_seed(7)
    wanted, threads = torch.rand(3), torch.get_num_threads()
    torch.manual_seed(7)
    with pytest.raises(KeyError), settled.settled(0, threads=1):
        inside = torch.rand(3)
        raise KeyError
    assert torch.equal(torch.rand(3), wanted) and torch.get_num_threads() == threads
    assert not torch.equal(inside, wanted)


def test_epochs_show_every_sample_once_a_pass():
    batches = settled.epochs(10, 2, 5)
    assert sorted(torch.cat(batches[:2]).tolist()) == list(range(10)) == sorted(torch.cat(batches[2:]).tolist())
    assert [len(rows) for rows in settled.epochs(11, 1, 5)] == [5, 5]


def test_training_tells_its_progress_and_lowers_the_loss():
    calls, layer, x = [], torch.nn.Linear(2, 1), torch.randn(40, 2)

    def loss(rows):
        return (layer(x[rows]) - x[rows, :1]).square().mean()

    with settled.settled(0, threads=1):
        before, batches = loss(torch.arange(40)).item(), settled.epochs(40, 20, 10)
        show = lambda done, total: calls.append((done, total))  # noqa: E731
        settled.train(layer, loss, batches, lr=0.05, weight_decay=0.0, title="train", progress=show)
    assert calls[-1] == (80, 80) and len(calls) == 80
    assert loss(torch.arange(40)).item() < 0.1 * before and not layer.training


def made(tmp_path, near):
    found = tuple(Found(f"query {q}", 10 + q, 1 + q, 0.5, near) for q in range(demo.LINES + 3))
    ways = (Way("ours", (0.5, 0.75), (1.0, 1.0)),)
    seconds = {"training": 61.4, "audit": 2.0}
    return Result("Made up", found, ways, ("A note.",), tmp_path, tmp_path / "page.html", seconds)


def test_render_gives_tables_as_plain_text(tmp_path):
    (title, heads, rows), (_, _, ways) = demo.render(made(tmp_path, near=7))
    assert title == "Made up, first 12 of 15 queries" and len(rows) == demo.LINES
    assert heads[-1] == "rank of near duplicate" and rows[1] == ("query 1", "sample 11", "2", "+0.5", "7")
    assert ways == [("ours", "50%", "75%", "100%", "100%")]
    (title, heads, rows), _ = demo.render(replace(made(tmp_path, None), found=made(tmp_path, None).found[:2]))
    assert title == "Made up" and heads[-1] == "its influence" and len(rows) == 2


def test_show_prints_to_the_console_it_is_given(tmp_path, monkeypatch, capsys):
    from rich.console import Console

    asked = []
    monkeypatch.setitem(demo.DEMOS, "text", lambda out, progress=None: asked.append(out) or made(tmp_path, 2))
    page = io.StringIO()
    demo.show("text", tmp_path, Console(file=page, width=100))
    assert asked == [tmp_path / "text"] and capsys.readouterr().out == ""
    assert all(part in page.getvalue() for part in ("Made up", "+0.5", "A note.", "training 61 s", "page.html"))


def test_run_hands_back_each_result_and_names_an_unknown_demo(tmp_path, monkeypatch):
    for name in demo.DEMOS:
        monkeypatch.setitem(demo.DEMOS, name, lambda out, progress=None: (out.name, progress))
    assert demo.run("all", tmp_path, progress=False) == [("digits", False), ("text", False)]
    with pytest.raises(ValueError, match="which: wanted digits, text or all, got 'mnist'"):
        demo.run("mnist", tmp_path)
