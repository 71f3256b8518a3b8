"""segment_sum on every face and dtype: sums right to one rounding, segments of every length, layouts, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import checks
from checks import check_segment_sum
from finf_fast.ops import segment_sum, segment_sum_out
from journey import cpu_looks

dtype = checks.face_fixture("segment_sum")


def cuts(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


# The compiled loop adds eight at a time: segments of 0, 1, one short, exact, one more, many. A task is 65536 values.
@pytest.mark.parametrize("Q", [0, 1, 3])
@pytest.mark.parametrize(
    "lengths", [[], [0], [1], [0, 0, 5, 0], [7, 8, 9, 15, 16, 17], [1] * 130, [1000, 1, 4096], [70_000, 3, 70_000]]
)
def test_every_length(dtype, Q, lengths):
    offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int64)
    check_segment_sum(segment_sum, torch.randn(Q, int(offsets[-1])).to(dtype), offsets)


def test_what_follows_a_segment_changes_no_bit(dtype):
    """The compiled loop reads past a short segment where there is something to read."""
    for length in range(18):
        values = torch.randn(2, length).to(dtype)
        values[1] = -0.0
        last = segment_sum(values, cuts(0, length))
        followed = segment_sum(torch.cat([values, torch.full((2, 20), torch.nan).to(dtype)], 1), cuts(0, length))
        assert torch.equal(last, followed) and torch.equal(last.signbit(), followed.signbit()), length


def test_columns_outside_the_offsets_are_left_out(dtype):
    values = torch.randn(2, 50).to(dtype)
    values[:, :3] = values[:, 40:] = torch.nan
    check_segment_sum(segment_sum, values, cuts(3, 10, 10, 40))


def test_large_terms_that_cancel_leave_the_small_ones(dtype):
    """A float32 accumulator would return 0 here."""
    values = torch.tensor([[1.0, 2.0**30, 1.0, -(2.0**30)] * 10]).to(torch.float32)
    values = values.to(dtype) if dtype != torch.float16 else (values.clamp(-(2**15), 2**15)).to(dtype)
    assert segment_sum(values, cuts(0, 40)).item() == 20


def test_nan_and_inf_stay_in_their_segment(dtype):
    values = torch.ones(1, 30).to(dtype)
    values[0, 12], values[0, 25] = torch.nan, torch.inf
    out = segment_sum(values, cuts(0, 10, 20, 24, 30))[0]
    assert out[0] == 10 and out[1].isnan() and out[2] == 4 and out[3] == torch.inf


def test_layouts_and_out_form(dtype):
    values, offsets = torch.randn(3, 40).to(dtype), cuts(0, 9, 20, 33)
    wanted = segment_sum(values, offsets)
    wide = torch.cat([values, values], 1)[:, :40]
    assert torch.equal(segment_sum(wide, offsets), wanted)
    assert torch.equal(segment_sum(values.T.contiguous().T, offsets), wanted)
    assert torch.equal(segment_sum(values, offsets.repeat_interleave(2)[::2]), wanted)
    page = torch.full((4, 9), 7.0, dtype=wanted.dtype)
    segment_sum_out(values, offsets, page[1:, 2:5])
    assert torch.equal(page[1:, 2:5], wanted) and int((page == 7).sum()) == 36 - 9


def test_same_bits_for_any_number_of_threads(dtype):
    values, offsets = torch.randn(2, 200_000).to(dtype), torch.arange(0, 200_001, 1000)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(segment_sum(values, offsets))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@cpu_looks
@pytest.mark.parametrize("offsets", [(0, 5, 4, 8), (-1, 5), (0, 11)])
def test_offsets_that_do_not_fit(dtype, offsets):
    with pytest.raises(ValueError, match=r"offsets.*wanted"):
        segment_sum(torch.zeros(1, 10).to(dtype), cuts(*offsets))


def test_errors():
    values = torch.zeros(2, 10)
    with pytest.raises(ValueError, match=r"values: wanted shape \(Q,N\) = \(Q, N\), got \(10,\)"):
        segment_sum(values[0], cuts(0, 10))
    with pytest.raises(ValueError, match=r"offsets: wanted S \+ 1 >= 1 numbers, got none"):
        segment_sum(values, cuts())
    with pytest.raises(TypeError, match="offsets: wanted int64, got int32"):
        segment_sum(values, cuts(0, 10).int())
    with pytest.raises(TypeError, match=r"values: wanted float32 or .* got int64"):
        segment_sum(values.long(), cuts(0, 10))
    with pytest.raises(ValueError, match=r"out: wanted shape \(Q,S\) = \(2, 1\), got \(2, 2\)"):
        segment_sum_out(values, cuts(0, 10), torch.zeros(2, 2))
    with pytest.raises(TypeError, match="out: wanted float32, got float64"):
        segment_sum_out(values, cuts(0, 10), torch.zeros(2, 1, dtype=torch.float64))


def test_opcheck_and_fakes(dtype):
    values, offsets = torch.randn(2, 20).to(dtype), cuts(0, 4, 20)
    out = segment_sum(values, offsets)
    torch.library.opcheck(torch.ops.finf_fast.segment_sum.default, (values, offsets))
    torch.library.opcheck(torch.ops.finf_fast.segment_sum_out.default, (values, offsets, out))
    assert segment_sum(values.to("meta"), offsets.to("meta")).shape == (2, 2)


def test_compiles_without_a_break():
    def centred(values, offsets):
        return segment_sum(values - values.mean(), offsets) * 2

    values, offsets = torch.randn(2, 20), cuts(0, 4, 20)
    compiled = torch.compile(centred, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(values, offsets), centred(values, offsets))


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), max_size=12), seed=st.integers(0, 2**32 - 1), spread=st.integers(0, 20))
def test_any_segments(dtype, lengths, seed, spread):
    """Terms over `spread` powers of ten, both signs."""
    numbers = np.random.default_rng(seed)
    offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int64)
    values = numbers.standard_normal((2, int(offsets[-1]))) * 10 ** numbers.uniform(-spread / 2, 0, int(offsets[-1]))
    check_segment_sum(segment_sum, torch.from_numpy(values).to(dtype), offsets)
