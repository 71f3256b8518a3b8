"""squared_error_delta on every face and dtype: accuracy at every size of change, edges, layouts, errors, teeth."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import checks
from checks import exact, relative
from finf_fast import reference
from finf_fast.ops import squared_error_delta, squared_error_delta_out
from stack_cases import same_bits, with_threads

dtype = checks.face_fixture("squared_error_delta")


def make(N=7, D=50, Q=3, *, step=1e-3, gap=1.0, dtype=torch.float32):
    """A prediction `gap` away from y, and its changes of width `step`."""
    draw = torch.Generator().manual_seed(2)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    y = normal(N, D).to(dtype)
    return (y.double() + gap * normal(N, D)).to(dtype), (step * normal(Q, N, D)).to(dtype), y


def check(op, p, dp, y) -> None:
    """Right to the sums' rounding, a row being measured by the size of what is added up in it."""
    base, delta = op(p, dp, y)
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    assert base.dtype == delta.dtype == wide and base.shape == p.shape[:1] and delta.shape == dp.shape[:2]
    gap, d = exact(p) - exact(y), exact(dp)
    before, after = (gap * gap).sum(1), ((gap + d) ** 2).sum(2)
    eps, own = torch.finfo(wide).eps, 32 * np.finfo(checks.LONG).eps * before
    size = np.abs(d * (2 * gap + d)).sum(2) + own / eps
    assert (np.abs(exact(base) - before) <= 8 * eps * before).all(), "base"
    assert (np.abs(exact(delta) - (after - before)) <= 8 * eps * size).all(), "delta"


@pytest.mark.parametrize("gap", [1, 1e-4, 0, 1e3])
@pytest.mark.parametrize("step", [10, 1, 1e-3, 1e-6, 1e-9])
def test_change_keeps_its_digits_at_every_step(dtype, step, gap):
    check(squared_error_delta, *make(step=step, gap=gap, dtype=dtype))


@pytest.mark.parametrize("step", [1e-1, 1e-4, 1e-6])
def test_relative_error(step):
    p, dp, y = make(N=64, D=200, step=step)
    delta = squared_error_delta(p, dp, y)[1]
    true = squared_error_delta(p.double(), dp.double(), y.double())[1]
    assert relative(np.abs(exact(delta) - exact(true)), exact(true), np.ones(64, bool)) < 1e-6


@pytest.mark.parametrize(
    "N, D, Q", [(1, 1, 1), (0, 5, 2), (3, 0, 2), (3, 5, 0), (2, 300_000, 2), (3000, 200, 1), (1, 2049, 4)]
)
def test_every_axis(dtype, N, D, Q):
    check(squared_error_delta, *make(N, D, Q, dtype=dtype))


@pytest.mark.parametrize("D", [15, 16, 17, 63, 64, 65, 2047, 2048, 4099])
def test_every_width(dtype, D):
    check(squared_error_delta, *make(5, D, 2, dtype=dtype))


@pytest.mark.parametrize("kinds", [*itertools.product([torch.float32, torch.bfloat16], repeat=3)])
def test_each_input_of_its_own_type(kinds):
    """All that one compiled loop takes; wide inputs hold numbers that the narrow type has too."""
    tensors = make(9, 131, 2, dtype=torch.bfloat16)
    wanted = squared_error_delta(*(x.float() for x in tensors))
    got = squared_error_delta(*(x.to(kind) for x, kind in zip(tensors, kinds, strict=True)))
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def test_same_bits_for_any_number_of_threads(dtype):
    tensors = make(500, 333, 3, dtype=dtype)
    assert same_bits(with_threads(lambda: squared_error_delta(*tensors)[1]))


def test_nan_stays_in_its_row(dtype):
    p, dp, y = make(40, 33, 2, dtype=dtype)
    p[3, 32], y[7, 0], dp[1, 20, 5] = torch.nan, torch.nan, torch.nan
    base, delta = squared_error_delta(p, dp, y)
    assert base.isnan().nonzero()[:, 0].tolist() == [3, 7]
    assert delta[0].isnan().nonzero()[:, 0].tolist() == [3, 7]
    assert delta[1].isnan().nonzero()[:, 0].tolist() == [3, 7, 20]


def test_layouts(dtype):
    p, dp, y = make(dtype=dtype)
    check(squared_error_delta, p.T.contiguous().T, dp.transpose(0, 2).contiguous().transpose(0, 2), y[:1].expand(7, 50))


def test_out_form_writes_into_views(dtype):
    p, dp, y = make(dtype=dtype)
    base, delta = squared_error_delta(p, dp, y)
    page = torch.full((4, 20), 7.0, dtype=base.dtype)
    squared_error_delta_out(p, dp, y, page[3, 4:11], page[:3, 4:11])
    assert torch.equal(page[3, 4:11], base) and torch.equal(page[:3, 4:11], delta)
    assert (page[:, :4] == 7).all() and (page[:, 11:] == 7).all()


def test_inputs_of_different_dtype():
    p, dp, y = make(dtype=torch.bfloat16)
    _, delta = squared_error_delta(p, dp.float(), y.double())
    assert delta.dtype == torch.float64
    torch.testing.assert_close(delta, squared_error_delta(p.double(), dp.double(), y.double())[1], rtol=0, atol=0)


def first_order(p, dp, y):
    return squared_error_delta(p, dp, y)[0], (2 * dp * (p - y)).sum(2)


def subtracts(p, dp, y):
    base = (p - y).square().sum(1)
    return base, (p + dp - y).square().sum(2) - base


@pytest.mark.parametrize(
    "defect, step",
    [
        (first_order, 1),
        (first_order, 1e-2),
        (subtracts, 1e-4),
        (lambda p, dp, y: reference.squared_error_delta(p, dp, y.roll(1, 0)), 1),
        (lambda p, dp, y: reference.squared_error_delta(p, dp.flip(0), y), 1e-6),
        (lambda p, dp, y: reference.squared_error_delta(p[:, 1:], dp[..., 1:], y[:, 1:]), 1e-6),
    ],
)
def test_a_broken_one_is_caught(defect, step):
    check(reference.squared_error_delta, *make(step=step))
    with pytest.raises(AssertionError, match="base|delta"):
        check(defect, *make(step=step))


def test_errors():
    p, dp, y = make()
    with pytest.raises(ValueError, match=r"y: wanted shape \(N,D\) = \(7, 50\), got \(7, 49\)"):
        squared_error_delta(p, dp, y[:, 1:])
    with pytest.raises(ValueError, match=r"dp: wanted shape \(Q,N,D\) = \(Q, 7, 50\)"):
        squared_error_delta(p, dp[0], y)
    with pytest.raises(TypeError, match="y: wanted float32 or .* got int64"):
        squared_error_delta(p, dp, y.long())
    with pytest.raises(ValueError, match="dp: wanted on cpu, where p is, got meta"):
        squared_error_delta(p, dp.to("meta"), y)
    with pytest.raises(TypeError, match="delta: wanted float32, got float64"):
        squared_error_delta_out(p, dp, y, torch.zeros(7), torch.zeros(3, 7).double())
    with pytest.raises(ValueError, match=r"base: wanted shape \(N\) = \(7\), got \(6,\)"):
        squared_error_delta_out(p, dp, y, torch.zeros(6), torch.zeros(3, 7))


def test_opcheck(dtype):
    p, dp, y = make(dtype=dtype)
    torch.library.opcheck(torch.ops.finf_fast.squared_error_delta.default, (p, dp, y))
    torch.library.opcheck(
        torch.ops.finf_fast.squared_error_delta_out.default, (p, dp, y, *squared_error_delta(p, dp, y))
    )
