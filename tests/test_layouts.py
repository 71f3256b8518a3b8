"""What kernels read at full speed stays where it is; everything else is copied once, and ends in zeros."""

from __future__ import annotations

import pytest
import torch

from finf_fast.kernels.layouts import aligned

ROWS = torch.randn(3, 7, 32, dtype=torch.bfloat16)


@pytest.mark.parametrize("y", [ROWS, ROWS[:, 2:], ROWS[0], ROWS[:, ::3], ROWS[:1].expand(4, 7, 32), torch.zeros(0, 16)])
def test_what_lies_well_is_not_copied(y):
    assert aligned(y) is y


@pytest.mark.parametrize(
    "y",
    [
        ROWS[..., :31],
        ROWS[..., 8:24][..., 1:],
        ROWS[..., 1:17],
        ROWS[..., ::2],
        ROWS.mT,
        torch.randn(5, 3),
        ROWS[:, :, 4:20],
    ],
)
def test_what_does_not_is_copied_and_ends_in_zeros(y):
    got = aligned(y)
    width = y.shape[-1]
    assert torch.equal(got[..., :width], y) and not got[..., width:].any()
    assert got.shape[:-1] == y.shape[:-1] and got.shape[-1] == -(-width // 16) * 16
    assert aligned(got) is got


def test_a_transposed_matrix_may_stay_where_both_its_sides_fit():
    whole, ragged = torch.randn(32, 48).mT, torch.randn(32, 40).mT
    assert aligned(whole, turned=True) is whole
    assert aligned(whole) is not whole
    assert torch.equal(aligned(ragged, turned=True), ragged) and aligned(ragged, turned=True).stride(1) == 1


def test_both_sides_may_have_to_end_in_zeros():
    y = torch.randn(2, 5, 16)
    got = aligned(y, both=True)
    assert got.shape == (2, 16, 16) and torch.equal(got[:, :5], y) and not got[:, 5:].any()
    assert aligned(got, both=True) is got
