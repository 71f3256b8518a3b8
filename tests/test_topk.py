"""Top-k: the strongest samples against a full sort in numpy, in both directions of the step and in all three tails."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from finf_fast.records import Plan
from finf_fast.scores import open_store, result
from finf_fast.topk import RunningTop

START = 1000
TAILS = ("helpful", "harmful", "both")
STRENGTH = {"helpful": lambda x: x, "harmful": lambda x: -x, "both": np.abs}


def scores_of(delta, direction="ascent", out=None):
    """delta (S,) as the scores of one query on samples START and on."""
    plan = Plan(START, START + len(delta), 100)
    with open_store(out, {}, plan, 1, delta.dtype, directions=[direction]) as writer:
        for number in writer.missing():
            rows = slice(*(row - START for row in plan.rows(number)))
            writer.write(number, delta[rows], delta[rows, None])
        return writer.finish()


def sorted_top(influence, k, tail):
    """What a full sort says: strongest first, of equals the smaller index, without NaN."""
    order = np.argsort(-STRENGTH[tail](influence), kind="stable")  # numpy sorts NaN last
    order = order[~np.isnan(influence[order])][:k]
    return order + START, influence[order]


def few_values(rng, samples):
    """Ties everywhere, also between a value and its opposite, also between 0 and -0."""
    return rng.integers(-4, 5, samples) * rng.choice([1.0, -1.0], samples)


def with_nan(rng, samples):
    values = rng.normal(size=samples)
    values[rng.random(samples) < 0.3] = np.nan
    return values


def with_infinities(rng, samples):
    values = rng.normal(size=samples)
    values[:6] = [np.inf, -np.inf, np.inf, -np.inf, np.nan, 0.0]
    return rng.permutation(values)


INPUTS = {
    "normal": lambda rng, samples: rng.normal(size=samples),
    "ties": few_values,
    "nan": with_nan,
    "infinite": with_infinities,
    "all equal": lambda rng, samples: np.ones(samples),
    "all nan": lambda rng, samples: np.full(samples, np.nan),
    "one sign": lambda rng, samples: -1 - rng.random(samples),
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("direction", ["ascent", "descent"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_top_is_the_head_of_a_full_sort(kind, tail, direction, dtype, monkeypatch):
    monkeypatch.setattr(result, "TOP_CELLS", 64)  # many chunks, the last one ragged
    delta = INPUTS[kind](np.random.default_rng(3), 777).astype(dtype)
    scores = scores_of(delta, direction)
    for k in (1, 10, 64, 100, 777, 5000):
        indices, influence = sorted_top(delta if direction == "ascent" else -delta, k, tail)
        top = scores.top(0, k, tail=tail)
        assert np.array_equal(top.indices, indices)
        assert np.array_equal(top.influence, influence)
        assert top.indices.dtype == np.int64
        assert top.influence.dtype == dtype


def test_each_query_has_its_own_direction(tmp_path):
    delta = np.random.default_rng(0).normal(size=(50, 3))
    plan = Plan(0, 50, 50)
    with open_store(tmp_path / "r", {}, plan, 3, np.float64, directions=["descent", "ascent", "descent"]) as writer:
        writer.write(0, delta[:, 0], delta)
        scores = writer.finish()
    assert [scores.top(query, 1).indices[0] for query in range(3)] == [
        np.argmin(delta[:, 0]),
        np.argmax(delta[:, 1]),
        np.argmin(delta[:, 2]),
    ]
    for query in range(3):
        top = scores.top(query, 5, "both")
        assert np.array_equal(top.influence, scores.influence[query, top.indices])


def test_order_and_cut_of_blocks_do_not_matter():
    rng = np.random.default_rng(1)
    influence = torch.from_numpy(rng.integers(-9, 10, (4, 300)).astype(np.float32))
    for tail in TAILS:
        whole = RunningTop(4, 20, tail)
        whole.add(influence, 5)
        for size in (1, 7, 150, 299):
            blocks = RunningTop(4, 20, tail)
            for first in rng.permutation(range(0, 300, size)).tolist():
                blocks.add(influence[:, first : first + size], 5 + first)
            for query in range(4):
                assert np.array_equal(blocks.result(query).indices, whole.result(query).indices)


def test_overlapping_rows_of_both_tails_are_given_once():
    running = RunningTop(1, 10, "both", torch.float64)
    running.add(torch.tensor([[3.0, -4.0, 0.0]], dtype=torch.float64), 0)
    top = running.result()
    assert top.indices.tolist() == [1, 0, 2]
    assert top.influence.tolist() == [-4.0, 3.0, 0.0]


def test_nothing_seen_gives_nothing():
    assert len(RunningTop(2, 3).result(1)) == 0


def test_memory_does_not_grow_with_the_samples(tmp_path):
    """8 MiB of scores on disk, read through one chunk of 64 Ki rows at a time."""
    delta = np.random.default_rng(0).normal(size=1 << 20)
    scores = scores_of(delta, "descent", tmp_path / "r")
    tracemalloc.start()
    top = scores.top(0, 10, tail="both")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(top.indices, sorted_top(-delta, 10, "both")[0])
    assert peak < 3 * 8 * result.TOP_CELLS < delta.nbytes / 4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"query": 1}, ValueError, "query: wanted 0 to 0, got 1"),
        ({"query": -1}, ValueError, "query: wanted 0 to 0, got -1"),
        ({"query": "q0"}, TypeError, "query: wanted a whole number, got 'q0'"),
        ({"query": 0, "k": 0}, ValueError, "k: wanted at least 1, got 0"),
        ({"query": 0, "k": 2.5}, TypeError, "k: wanted a whole number, got 2.5"),
        ({"query": 0, "tail": "top"}, ValueError, "tail: wanted one of .*, got 'top'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        scores_of(np.ones(5)).top(**arguments)


def test_no_queries_is_an_error():
    with pytest.raises(ValueError, match="queries: wanted at least 1, got 0"):
        RunningTop(0, 3)
