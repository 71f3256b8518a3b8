"""Scores made comparable: each kind against its formula, whole against block by block, and the queries in between."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import finf_fast as ff
from finf_fast.records import ManifestMismatch, Plan
from finf_fast.scores import Scores, comparing, open_store

S, Q = 23, 9


def stored(base, delta, *, background=0, directions=None, identity=None, out=None, **more):
    """Scores of base (S,) and delta (Q', S)."""
    queries, samples = delta.shape
    plan = Plan(0, samples, 5)
    names = [f"n{q}" for q in range(queries)]
    found = {"names": names, "directions": directions, "background": background, **more}
    with open_store(out, identity or {}, plan, queries, delta.dtype, **found) as store:
        for block in store.missing():
            first, last = plan.rows(block)
            store.write(block, base[first:last], delta.T[first:last])
        return store.finish({})


def drawn(seed=0, dtype=np.float64, queries=Q):
    draw = np.random.default_rng(seed)
    return draw.random(S).astype(dtype) + 1, draw.standard_normal((queries, S)).astype(dtype)


SIGNS = np.array([1, -1, 1, 1, -1, 1, 1, 1, -1])
DIRECTIONS = ["ascent" if sign > 0 else "descent" for sign in SIGNS]


@pytest.fixture
def scores():
    return stored(*drawn(), directions=DIRECTIONS)


def test_each_kind_is_its_formula(scores):
    base, delta = drawn()
    influence, own = delta * SIGNS[:, None], np.abs(drawn(1)[0])
    wanted = {
        "rms": influence / np.sqrt((influence**2).mean(0)),
        "zscore": (influence - influence.mean(0)) / influence.std(0),
        "relatif": influence / np.sqrt(own),
        "ratio": SIGNS[:, None] * ((base + delta) - base) / ((base + delta) + base),
        "absolute": np.abs(delta),
    }
    assert set(wanted) == set(comparing.KINDS)
    for kind, value in wanted.items():
        found = scores.normalized(kind, self_influence=own if kind == "relatif" else None)
        np.testing.assert_allclose(found, value, rtol=1e-12)
        assert found.shape == (Q, S)


@pytest.mark.parametrize("cells", [1, 40, 1 << 20])
@pytest.mark.parametrize("kind", ["rms", "zscore", "ratio"])
def test_block_by_block_is_the_whole(scores, tmp_path, monkeypatch, kind, cells):
    whole = scores.normalized(kind)
    monkeypatch.setattr(comparing, "CELLS", cells)
    assert np.array_equal(scores.normalized(kind), whole)
    assert np.array_equal(scores.normalized(kind, out=tmp_path / "x.npy"), whole)
    assert np.array_equal(np.load(tmp_path / "x.npy").T, whole)
    np.testing.assert_array_equal(scores.spread(), np.sqrt(np.square(scores.delta).mean(0)))


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(1e-9, 1e9), sample=st.integers(0, S - 1), seed=st.integers(0, 99))
def test_a_sample_that_answers_louder_to_all_stands_where_it_stood(scale, sample, seed):
    base, delta = drawn(seed)
    before = stored(base, delta).normalized("rms")
    delta[:, sample] *= scale
    np.testing.assert_allclose(stored(base, delta).normalized("rms"), before, rtol=1e-9)


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(Q)), kind=st.sampled_from(["rms", "zscore", "ratio"]), seed=st.integers(0, 99))
def test_the_order_of_queries_and_samples_says_nothing(order, kind, seed):
    base, delta = drawn(seed)
    rows, turned = np.random.default_rng(seed).permutation(S), [DIRECTIONS[q] for q in order]
    found = stored(base[rows], delta[order][:, rows], directions=turned).normalized(kind)
    wanted = stored(base, delta, directions=DIRECTIONS).normalized(kind)[order][:, rows]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-3, 3), seed=st.integers(0, 99))
def test_what_a_sample_answers_to_all_alike_is_no_part_of_its_zscore(scale, shift, seed):
    base, delta = drawn(seed)
    wanted = stored(base, delta).normalized("zscore")
    delta[:, 4] = delta[:, 4] * scale + shift
    np.testing.assert_allclose(stored(base, delta).normalized("zscore"), wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-9, -7.7])
def test_the_same_answer_to_all_has_no_zscore(dtype, value):
    base, delta = drawn(dtype=dtype)
    delta[:, 2] = value
    found = stored(base, delta).normalized("zscore")
    assert np.isnan(found[:, 2]).all() and not np.isnan(np.delete(found, 2, 1)).any()


@pytest.mark.filterwarnings("error")
def test_an_infinite_loss_leaves_the_other_queries_their_scores():
    base, delta = drawn()
    delta[2, 7], base[9], delta[:, 9] = np.inf, np.inf, np.nan
    scores = stored(base, delta)
    rest = np.delete(delta[:, 7], 2)
    found = scores.normalized("rms")
    np.testing.assert_allclose(np.delete(found[:, 7], 2), rest / np.sqrt((rest**2).mean()))
    assert found[2, 7] == np.inf and np.isnan(found[:, 9]).all()
    assert np.isfinite(np.delete(scores.normalized("zscore")[:, 7], 2)).all()
    assert np.isnan(scores.normalized("ratio")[:, 9]).all()


@pytest.mark.parametrize("normalized", [None, "rms", "absolute"])
@pytest.mark.parametrize("tail", ["helpful", "harmful", "both"])
def test_tops_is_top_of_every_query(scores, monkeypatch, tail, normalized):
    monkeypatch.setattr("finf_fast.scores.result.TOP_CELLS", 40)
    together = scores.tops(6, tail, normalized=normalized)
    assert len(together) == Q
    for query, found in enumerate(together):
        alone = scores.top(query, 6, tail, normalized=normalized)
        assert found.indices.tolist() == alone.indices.tolist()
        assert found.influence.tolist() == alone.influence.tolist()


def test_a_file_is_new_whole_and_read_only(scores, tmp_path, monkeypatch):
    path = tmp_path / "x.npy"
    monkeypatch.setattr(comparing, "CELLS", 40)
    of, calls = comparing.Comparison.of, iter([True, False])

    def failing(*given):
        if not next(calls):
            raise MemoryError
        return of(*given)

    with monkeypatch.context() as broken, pytest.raises(MemoryError):
        broken.setattr(comparing.Comparison, "of", failing)
        scores.normalized(out=path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="read-only"):
        scores.normalized(out=path)[0, 0] = 1
    before = path.read_bytes()
    with pytest.raises(ValueError, match="out: wanted a new file, got .*x.npy, which is there already"):
        scores.normalized("zscore", out=path)
    assert path.read_bytes() == before


def test_top_orders_by_what_was_asked_for(scores, monkeypatch):
    monkeypatch.setattr(comparing, "CELLS", 40)
    values = scores.normalized("rms")
    for tail, key in (("helpful", values), ("harmful", -values), ("both", np.abs(values))):
        found = scores.top(4, 6, tail, normalized="rms")
        assert found.indices.tolist() == np.argsort(-key[4], kind="stable")[:6].tolist()
        np.testing.assert_array_equal(found.influence, values[4, found.indices])


def test_a_sample_without_a_score_or_a_scale_is_left_out():
    base, delta = drawn()
    base[3], delta[:, 3], delta[:, 5], delta[2, 7] = np.nan, np.nan, 0.0, np.nan
    scores = stored(base, delta)
    found = scores.normalized("rms")
    assert np.isnan(found[:, [3, 5]]).all() and np.isnan(found[2, 7])
    rest = np.delete(delta[:, 7], 2)
    np.testing.assert_allclose(np.delete(found[:, 7], 2), rest / np.sqrt((rest**2).mean()))
    assert not {3, 5} & set(scores.top(0, S, "both", normalized="rms").indices.tolist())


def test_background_is_compared_with_and_shown_nowhere(tmp_path):
    base, delta = drawn()
    scores = stored(base, delta, background=7, out=tmp_path / "run")
    assert scores.delta.shape == scores.influence.shape == (2, S) and scores.names == ("n0", "n1")
    assert np.array_equal(scores.background, delta[2:]) and scores.directions == ("ascent", "ascent")
    np.testing.assert_allclose(scores.normalized("rms"), (delta / np.sqrt((delta**2).mean(0)))[:2])
    assert scores.manifest["shape"]["background"] == 7 and "delta_n2" not in scores.to_pandas()
    with pytest.raises(ValueError, match="query: wanted 0 to 1, got 2"):
        scores.top(2)
    copy = scores.save(tmp_path / "copy")
    assert np.array_equal(copy.background, scores.background)


def test_groups_by_number_and_name(scores):
    values = scores.normalized("ratio")
    for how, join in (("sum", np.sum), ("mean", np.mean), ("max", np.max)):
        found = scores.normalized("ratio", groups={"first": [0, "n3", 5], "alone": ["n8"]}, how=how)
        np.testing.assert_allclose(found, [join(values[[0, 3, 5]], 0), values[8]])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "mean"}, "kind: wanted one of rms, zscore, relatif, ratio, absolute, got 'mean'"),
        ({"kind": "relatif"}, "self_influence: wanted for kind='relatif'"),
        ({"kind": "rms", "self_influence": np.ones(S)}, "self_influence: wanted for kind='relatif', and for no other"),
        ({"kind": "relatif", "self_influence": np.ones(4)}, r"self_influence: wanted shape \(23,\).* got \(4,\)"),
        ({"kind": "relatif", "self_influence": -np.ones(S)}, "self_influence: wanted positive numbers"),
        ({"groups": []}, "groups: wanted lists of at least one query each"),
        ({"groups": [[0], []]}, "groups: wanted lists of at least one query each"),
        ({"groups": [["n9"]]}, "groups: wanted names of queries, got 'n9'"),
        ({"groups": [[9]]}, "groups: wanted queries 0 to 8, got 9"),
        ({"groups": [[0]], "how": "median"}, "how: wanted one of sum, mean, max, got 'median'"),
    ],
)
def test_mistakes_are_named(scores, settings, words):
    with pytest.raises(ValueError, match=words):
        scores.normalized(**settings)


@pytest.mark.parametrize("queries", [1, 7])
def test_few_queries_have_nothing_to_be_compared_with(queries):
    scores = stored(*drawn(queries=queries))
    for ask in (lambda: scores.normalized("rms"), lambda: scores.top(0, normalized="zscore")):
        with pytest.raises(ValueError, match=rf"wants at least 8, got {queries}; forward_inf\(\.\.\., background=64\)"):
            ask()
    scores.normalized("ratio")


def test_the_mean_of_several_models(tmp_path, monkeypatch):
    (base, delta), (other, change) = drawn(), drawn(1)
    about = lambda corpus, model: {"fingerprints": {"corpus": corpus, "model": model}}  # noqa: E731
    first = stored(base, delta, identity=about("c", "a"), out=tmp_path / "a")
    second = stored(other, change, identity=about("c", "b"))
    monkeypatch.setattr("finf_fast.scores.averaging.ROWS_BYTES", 200)
    found = Scores.mean([tmp_path / "a", second], out=tmp_path / "mean")
    np.testing.assert_allclose(found.base, (base + other) / 2)
    np.testing.assert_allclose(found.delta, (delta + change) / 2)
    assert [model["fingerprints"]["model"] for model in found.manifest["identity"]["mean_of"]] == ["a", "b"]
    with pytest.raises(ManifestMismatch, match="data.corpus"):
        Scores.mean([first, stored(other, change, identity=about("d", "b"))])
    with pytest.raises(ManifestMismatch, match="shape.samples"):
        Scores.mean([first, stored(other[:9], change[:, :9], identity=about("c", "b"))])
    of_means = Scores.mean([found, first])
    np.testing.assert_allclose(of_means.base, (3 * base + other) / 4)
    with pytest.raises(ManifestMismatch, match="data.corpus"):
        Scores.mean([found, Scores.mean([stored(base, delta, identity=about("d", "a"))])])
    with pytest.raises(ValueError, match="parts: wanted the scores of at least one model"):
        Scores.mean([])


def test_no_mean_of_different_mirror_steps():
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.arange(9) % 3
    runs = [ff.forward_inf(net(), (x, y), (x[:2], y[:2]), method=method) for method in ("sgd", "adam", "adam")]
    assert len(Scores.mean(runs[1:])) == 9
    with pytest.raises(ManifestMismatch, match="data.method: wanted 'sgd'.*found 'adam'"):
        Scores.mean(runs)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def test_one_query_against_training_samples(tmp_path):
    draw = np.random.default_rng(0)
    x, y = torch.tensor(draw.standard_normal((40, 6))), torch.tensor(draw.integers(0, 3, 40))
    model, one = net(), (x[7:8], y[7:8])
    scores = ff.forward_inf(model, (x, y), one, background=16, seed=3, out=tmp_path / "run")
    assert scores.names == ("query 0",) and scores.background.shape == (16, 40)
    names = scores.manifest["names"][1:]
    drawn = [int(name.removeprefix("background ")) for name in names]
    assert drawn == sorted(set(drawn)) and all(0 <= sample < 40 for sample in drawn)
    alone = ff.forward_inf(model, (x, y), (x[drawn], y[drawn]), seed=3)
    np.testing.assert_allclose(scores.background, alone.delta, rtol=1e-9, atol=1e-15)
    whole = np.concatenate([scores.delta, scores.background])
    np.testing.assert_allclose(scores.normalized("rms"), (whole / np.sqrt((whole**2).mean(0)))[:1])
    again = ff.forward_inf(model, (x, y), one, background=16, seed=3, out=tmp_path / "run")
    assert again.manifest["created"] == scores.manifest["created"]  # resumed, for it is the same sweep
    for wrong, error, words in (
        (41, ValueError, "background: wanted 1 to the corpus' 40, got 41"),
        (2.5, TypeError, "background: wanted a whole number, got 2.5"),
    ):
        with pytest.raises(error, match=words):
            ff.forward_inf(model, (x, y), one, background=wrong)


def test_background_samples_have_a_target():
    draw = np.random.default_rng(0)
    x, y = torch.tensor(draw.standard_normal((40, 6))), torch.tensor(draw.integers(0, 3, 40))
    y[::2] = -100
    scores = ff.forward_inf(net(), (x, y), (x[1:2], y[1:2]), background=9)
    drawn = [int(name.removeprefix("background ")) for name in scores.manifest["names"][1:]]
    assert len(set(drawn)) == 9 and all(sample % 2 for sample in drawn)
    with pytest.raises(ValueError, match="background: wanted 25 samples with a target, got 20 of 40"):
        ff.forward_inf(net(), (x, y), (x[1:2], y[1:2]), background=25)
