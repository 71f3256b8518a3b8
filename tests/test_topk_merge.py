"""topk_merge on every face and dtype, against a full sort: ties, NaN, infinities, empty places, any cut into blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import checks
from checks import check_topk, empty_list
from finf_fast.ops import topk_merge, topk_merge_
from journey import cpu_looks
from stack_cases import with_threads

dtype = checks.face_fixture("topk_merge")
NAN, INF = float("nan"), float("inf")


def scores_of(dtype, *rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=dtype)


# The compiled loop looks at 64 scores at a time and sorts 256 candidates at once: on either side of each.
@pytest.mark.parametrize("K", [1, 3, 64, 300])
@pytest.mark.parametrize("S", [0, 1, 63, 64, 65, 1000])
def test_every_size(dtype, S, K):
    check_topk(topk_merge, torch.randn(2, S).to(dtype), K, start=5)


@pytest.mark.parametrize("Q", [0, 1, 3])
def test_every_number_of_queries(dtype, Q):
    check_topk(topk_merge, torch.randn(Q, 50).to(dtype), 4, cuts=(7, 20))


@pytest.mark.parametrize("K", [1, 100])
def test_scores_that_blocks_of_a_gpu_share(dtype, K):
    scores = torch.randint(-50, 50, (2, 70_000)).to(dtype)
    scores[0, ::5] = NAN
    check_topk(topk_merge, scores, K, cuts=(30_001,))


@pytest.mark.parametrize("Q", [1, 2, 3])
@pytest.mark.parametrize("K", [1, 100, 2000])
def test_threads_that_share_a_query(dtype, Q, K):
    """Fewer queries than threads: each takes a stretch, of which some hold nothing that enters the list."""
    scores = torch.randint(-500, 500, (Q, 70_001)).to(dtype)
    scores[:, 10_000:30_000], scores[:, ::7] = -INF, NAN
    with_threads(lambda: check_topk(topk_merge, scores, K, cuts=(3, 40_000), start=7))


def test_equals_that_come_later_with_smaller_indices(dtype):
    """A list full of zeros against blocks of zeros: whole glances, and stretches of a query, hold the better."""
    values, indices = topk_merge(*empty_list(1, 3, dtype), torch.zeros(1, 65_536, dtype=dtype), 65_536)
    late = torch.full((1, 65_536), -1.0, dtype=dtype)
    late[:, 40_000:] = 0

    def check():
        assert topk_merge(values, indices, torch.zeros_like(late), 0)[1].tolist() == [[0, 1, 2]]
        assert topk_merge(values, indices, late, 0)[1].tolist() == [[40_000, 40_001, 40_002]]

    with_threads(check)


@pytest.mark.parametrize("way", [1, -1])
def test_scores_that_rise_or_fall(dtype, way):
    """Rising scores replace the whole list again and again; falling ones never enter it."""
    rising = way * torch.arange(2000).to(dtype)[None]
    check_topk(topk_merge, rising, 10, cuts=(1, 65, 700))


def test_ties_go_to_the_smaller_index(dtype):
    check_topk(topk_merge, torch.randint(0, 3, (2, 500)).to(dtype), 20, cuts=(100, 101))
    check_topk(topk_merge, scores_of(dtype, [0.0, -0.0, 0.0, -0.0, 0.0]), 3, cuts=(2,))


@pytest.mark.parametrize("order", [1, -1])
def test_blocks_in_any_order(dtype, order):
    scores = torch.randint(0, 5, (1, 200)).to(dtype)
    values, indices = empty_list(1, 30, dtype)
    for a in range(0, 200, 50)[::order]:
        values, indices = topk_merge(values, indices, scores[:, a : a + 50], a)
    wanted = checks.best(scores, 0, 30)
    assert torch.equal(values, wanted[0]) and torch.equal(indices, wanted[1])


def test_nan_is_left_out_and_minus_infinity_is_a_score(dtype):
    check_topk(topk_merge, scores_of(dtype, [NAN, 1.0, -INF, NAN, INF], [NAN] * 5, [-INF] * 5), 4, cuts=(1, 3))


def test_places_left_empty(dtype):
    values, indices = topk_merge(*empty_list(1, 5, dtype), scores_of(dtype, [2.0, -INF]), 7)
    assert values.tolist() == [[2.0, -INF, -INF, -INF, -INF]] and indices.tolist() == [[7, 8, -1, -1, -1]]


def test_index_past_32_bits(dtype):
    _, indices = topk_merge(*empty_list(1, 2, dtype), scores_of(dtype, [1.0, 3.0]), 2**40)
    assert indices.tolist() == [[2**40 + 1, 2**40]]


def test_no_places(dtype):
    values, indices = topk_merge(*empty_list(2, 0, dtype), torch.randn(2, 5).to(dtype), 0)
    assert values.shape == indices.shape == (2, 0)


def test_new_tensors_and_in_place(dtype):
    values, indices = empty_list(2, 3, dtype)
    scores = torch.randn(2, 10).to(dtype)
    wanted = topk_merge(values, indices, scores, 0)
    assert (values == -INF).all() and (indices == -1).all()
    topk_merge_(values, indices, scores, 0)
    assert torch.equal(values, wanted[0]) and torch.equal(indices, wanted[1])


def test_layouts(dtype):
    scores = torch.randn(3, 40).to(dtype)
    wanted = topk_merge(*empty_list(3, 6, dtype), scores, 0)
    for other in (torch.cat([scores, scores], 1)[:, :40], scores.T.contiguous().T):
        got = topk_merge(*empty_list(3, 6, dtype), other, 0)
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    turned = [x.T.contiguous().T for x in wanted]
    got = topk_merge(*turned, scores + 1, 40)
    assert torch.equal(got[0], topk_merge(*wanted, scores + 1, 40)[0]) and got[0].is_contiguous()


@cpu_looks
@pytest.mark.parametrize(
    "values, indices", [([1.0, 2.0], [0, 1]), ([NAN, 1.0], [0, 1]), ([1.0, 1.0], [3, 2]), ([-INF, -INF], [-1, 4])]
)
def test_running_list_out_of_order(dtype, values, indices):
    with pytest.raises(
        ValueError, match="values: wanted each row sorted, best first, without NaN, got row 0 out of order"
    ):
        topk_merge(scores_of(dtype, values), torch.tensor([indices]), scores_of(dtype, [5.0]), 9)


def test_errors():
    values, indices = empty_list(2, 3, torch.float32)
    scores = torch.zeros(2, 10)
    with pytest.raises(TypeError, match="scores: wanted float32 or float64, got bfloat16"):
        topk_merge(values, indices, scores.bfloat16(), 0)
    with pytest.raises(TypeError, match="values: wanted float32, got float64"):
        topk_merge(values.double(), indices, scores, 0)
    with pytest.raises(TypeError, match="indices: wanted int64, got int32"):
        topk_merge(values, indices.int(), scores, 0)
    with pytest.raises(ValueError, match=r"values: wanted shape \(Q,K\) = \(2, K\), got \(1, 3\)"):
        topk_merge(values[:1], indices, scores, 0)
    with pytest.raises(ValueError, match="start: wanted 0 or more, got -1"):
        topk_merge(values, indices, scores, -1)
    with pytest.raises(ValueError, match=f"start: wanted at most {2**63 - 11}, for int64 .*, got {2**63 - 10}"):
        topk_merge(values, indices, scores, 2**63 - 10)
    with pytest.raises(ValueError, match="indices: wanted contiguous"):
        topk_merge_(values, indices.T.contiguous().T, scores, 0)


def test_opcheck_and_fakes(dtype):
    scores = torch.randn(2, 20).to(dtype)
    torch.library.opcheck(torch.ops.finf_fast.topk_merge.default, (*empty_list(2, 3, dtype), scores, 4))
    torch.library.opcheck(torch.ops.finf_fast.topk_merge_.default, (*empty_list(2, 3, dtype), scores, 4))
    values, indices = topk_merge(*(x.to("meta") for x in (*empty_list(2, 3, dtype), scores)), 0)
    assert values.shape == indices.shape == (2, 3)


def test_compiles_without_a_break():
    def both(values, indices, scores):
        values, indices = topk_merge(values, indices, scores * 2, 0)
        topk_merge_(values, indices, scores, 10)
        return values + 1, indices

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    scores = torch.randn(2, 10)
    got, wanted = (run(*empty_list(2, 4, torch.float32), scores) for run in (compiled, both))
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


@st.composite
def blocks(draw):
    Q, S = draw(st.integers(1, 3)), draw(st.integers(0, 150))
    numbers = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = numbers.integers(0, draw(st.sampled_from([2, 10, 10_000])), (Q, S)).astype(np.float64)
    scores[numbers.random((Q, S)) < draw(st.sampled_from([0, 0.2]))] = draw(st.sampled_from([NAN, -INF, INF]))
    cuts = tuple(sorted(draw(st.lists(st.integers(0, S), max_size=4))))
    return torch.from_numpy(scores), draw(st.integers(1, 20)), cuts


@settings(max_examples=60, deadline=None)
@given(case=blocks())
def test_any_cut_gives_the_list_of_a_full_sort(dtype, case):
    scores, K, cuts = case
    check_topk(topk_merge, scores.to(dtype), K, cuts)
