"""Teeth: broken operations that the checkers of `checks.py` must catch, and sound ones that they must let pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from checks import best, check, check_segment_sum, check_topk, make_case, plain, shifted_target
from finf_fast import reference

CASES = {
    "ordinary": make_case(step=1e-2),
    "tiny change": make_case(step=1e-6),
    "memorised": make_case(step=1e-3, lead=20),
    "large change": shifted_target(make_case(step=30), 40),
    "smoothed": make_case(step=1e-2, lead=12, label_smoothing=0.1),
    "one row of many": make_case(N=64, step=1e-2),
    "offset": replace(make_case(step=1e-2), z=make_case().z + 1e4),
}


def shifts_target(z, dz, target, **options):
    return reference.cross_entropy_delta(z, dz, (target + 1) % z.shape[1], **options)


def drops_last_tile(z, dz, target, **options):
    return reference.cross_entropy_delta(z, dz.clone().index_fill_(2, torch.arange(984, 1000), 0), target, **options)


def drops_one_column_of_the_sum(z, dz, target, **options):
    _, delta = reference.cross_entropy_delta(z, dz, target, **options)
    cut = z.clone()
    cut[:, -1] = -torch.inf
    return reference.cross_entropy_delta(cut, dz, target, **options)[0], delta


def counts_a_column_twice(z, dz, target, **options):
    """A ragged tail that overlaps the tile before it."""
    wide, change = torch.cat([z, z[:, -1:]], 1), torch.cat([dz, dz[:, :, -1:]], 2)
    return reference.cross_entropy_delta(wide, change, target, **options)


def swaps_before_and_after(z, dz, target, **options):
    base, delta = reference.cross_entropy_delta(z, dz, target, **options)
    return base, -delta


def swaps_queries(z, dz, target, **options):
    base, delta = reference.cross_entropy_delta(z, dz, target, **options)
    return base, delta.flip(0)


def is_first_order_only(z, dz, target, **options):
    base, _ = reference.cross_entropy_delta(z, dz, target, **options)
    move = dz - dz.gather(2, target.expand(len(dz), -1)[..., None])
    return base, (z.softmax(1) * move).sum(2)


def keeps_the_change_in_bfloat16(z, dz, target, **options):
    return reference.cross_entropy_delta(z, dz.bfloat16(), target, **options)


def rounds_the_result(z, dz, target, **options):
    base, delta = reference.cross_entropy_delta(z, dz, target, **options)
    return base, delta.bfloat16().float()


def base_is_lse_minus_logit(z, dz, target, **options):
    _, delta = reference.cross_entropy_delta(z, dz, target, **options)
    return z.logsumexp(1) - z.gather(1, target[:, None])[:, 0], delta


def doubles_the_smoothing(z, dz, target, *, ignore_index, label_smoothing):
    return reference.cross_entropy_delta(z, dz, target, ignore_index=ignore_index, label_smoothing=2 * label_smoothing)


def smooths_the_base_only(z, dz, target, *, ignore_index, label_smoothing):
    base, _ = reference.cross_entropy_delta(z, dz, target, label_smoothing=label_smoothing)
    return base, reference.cross_entropy_delta(z, dz, target)[1]


def overflows_without_the_maximum(z, dz, target, **options):
    _, delta = reference.cross_entropy_delta(z, dz, target, **options)
    return -F.log_softmax(z.exp().log(), 1).gather(1, target[:, None])[:, 0], delta


def loses_one_row(z, dz, target, **options):
    base, delta = reference.cross_entropy_delta(z, dz, target, **options)
    delta[0, -1] = delta[0, -2]
    return base, delta


DEFECTS = [
    (shifts_target, CASES),
    (drops_last_tile, ["ordinary", "tiny change", "memorised", "smoothed", "one row of many", "offset"]),
    (drops_one_column_of_the_sum, ["ordinary", "tiny change", "memorised", "smoothed"]),
    (counts_a_column_twice, ["ordinary", "tiny change", "memorised", "smoothed"]),
    (swaps_before_and_after, CASES),
    (swaps_queries, CASES),
    (is_first_order_only, ["ordinary", "memorised", "large change"]),
    (keeps_the_change_in_bfloat16, CASES),
    (rounds_the_result, CASES),
    (plain, ["ordinary", "tiny change", "memorised", "smoothed", "offset"]),
    (base_is_lse_minus_logit, ["memorised"]),
    (doubles_the_smoothing, ["smoothed"]),
    (smooths_the_base_only, ["smoothed"]),
    (overflows_without_the_maximum, ["offset"]),
    (loses_one_row, ["one row of many"]),
]


@pytest.mark.parametrize("name", CASES)
def test_a_sound_operation_passes(name):
    errors = check(reference.cross_entropy_delta, CASES[name])
    assert 0 < errors["delta"] < 1e-5


@pytest.mark.parametrize("defect, name", [(defect, name) for defect, names in DEFECTS for name in names])
def test_a_broken_one_is_caught(defect, name):
    with pytest.raises(AssertionError, match=r"base:|delta:"):
        check(defect, CASES[name])


SEGMENT_DEFECTS = {
    "begins one late": lambda values, offsets: reference.segment_sum(values, (offsets + 1).clamp(max=values.shape[1])),
    "drops the last segment": lambda values, offsets: reference.segment_sum(values, offsets).index_fill_(
        1, torch.tensor([len(offsets) - 2]), 0
    ),
    "adds in float32": lambda values, offsets: (
        torch.segment_reduce(values.T.contiguous(), "sum", offsets=offsets, axis=0, initial=0.0).T
    ),
    "differences of a running sum": lambda values, offsets: F.pad(values.cumsum(1), (1, 0))[:, offsets].diff(dim=1),
    "returns the mean": lambda values, offsets: reference.segment_sum(values, offsets) / offsets.diff(),
}


@pytest.mark.parametrize("defect", SEGMENT_DEFECTS)
def test_broken_segment_sums_are_caught(defect):
    values, offsets = torch.randn(2, 3000), torch.tensor([0, 1000, 1010, 3000])
    check_segment_sum(reference.segment_sum, values, offsets)
    with pytest.raises(AssertionError, match="wrong at"):
        check_segment_sum(SEGMENT_DEFECTS[defect], values, offsets)


def takes_nan(values, indices, scores, start):
    return reference.topk_merge(values, indices, scores.nan_to_num(nan=torch.inf), start)


def forgets_the_running_list(values, indices, scores, start):
    return best(scores, start, values.shape[1])


def numbers_from_zero(values, indices, scores, start):
    return reference.topk_merge(values, indices, scores, 0)


def breaks_ties_by_the_larger_index(values, indices, scores, start):
    both, places = torch.cat([values, scores], 1), torch.cat([indices, start + torch.arange(scores.shape[1])[None]], 1)
    both, places = both.nan_to_num(nan=-torch.inf, neginf=-torch.inf).flip(1), places.flip(1)
    order = both.sort(dim=1, descending=True, stable=True)[1][:, : values.shape[1]]
    return both.gather(1, order), places.gather(1, order)


def keeps_the_smallest(values, indices, scores, start):
    kept, places = reference.topk_merge(values, indices, -scores, start)
    return kept, places


@pytest.mark.parametrize(
    "defect",
    [takes_nan, forgets_the_running_list, numbers_from_zero, breaks_ties_by_the_larger_index, keeps_the_smallest],
)
def test_broken_merges_are_caught(defect):
    scores = torch.randint(0, 4, (1, 60)).float()
    scores[0, ::7] = torch.nan
    check_topk(reference.topk_merge, scores, 8, cuts=(20, 40))
    with pytest.raises(AssertionError, match=r"indices|values"):
        check_topk(defect, scores, 8, cuts=(20, 40))
