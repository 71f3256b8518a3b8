"""The Triton twin of the loss formulas, through Triton's interpreter, against float64."""

from __future__ import annotations

import importlib
import sys

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.prove  # Triton is a large download: `make prove` installs it


@pytest.fixture(scope="module")
def numerics():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        sys.modules.pop("finf_fast.kernels.numerics", None)
        yield importlib.import_module("finf_fast.kernels.numerics")


def apply(function, *columns):
    """``function`` of float32 columns in a Triton kernel; float64 numpy back."""
    import triton
    import triton.language as tl

    @triton.jit
    def one(A, OUT, n, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
        offs = tl.arange(0, BLOCK)
        tl.store(OUT + offs, FUNCTION(tl.load(A + offs, mask=offs < n)), mask=offs < n)

    @triton.jit
    def two(A, B, OUT, n, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
        offs = tl.arange(0, BLOCK)
        mask = offs < n
        tl.store(OUT + offs, FUNCTION(tl.load(A + offs, mask=mask), tl.load(B + offs, mask=mask)), mask=mask)

    @triton.jit
    def three(A, B, C, OUT, n, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
        offs = tl.arange(0, BLOCK)
        mask = offs < n
        a, b, c = tl.load(A + offs, mask=mask), tl.load(B + offs, mask=mask), tl.load(C + offs, mask=mask)
        tl.store(OUT + offs, FUNCTION(a, b, c), mask=mask)

    inputs = [torch.tensor(column, dtype=torch.float32) for column in columns]
    out = torch.empty_like(inputs[0])
    kernel = (one, two, three)[len(inputs) - 1]
    kernel[(1,)](*inputs, out, len(out), FUNCTION=function, BLOCK=triton.next_power_of_2(len(out)))
    return out.double().numpy()


def signed(*powers):
    sizes = np.concatenate([np.logspace(low, high, 200) for low, high in powers])
    return np.float32(np.concatenate([-sizes, sizes])).astype(np.float64)


def close(got, wanted, bound=4e-7):
    assert np.isfinite(wanted).all() and (np.abs(got - wanted) <= bound * np.abs(wanted)).all(), np.abs(
        got / wanted - 1
    ).max()


def test_expm1(numerics):
    x = signed((-30, 1.2))
    close(apply(numerics.expm1, x), np.expm1(x))
    assert apply(numerics.expm1, [-np.inf, np.nan, 0.0]).tolist()[::2] == [-1, 0]
    assert np.isnan(apply(numerics.expm1, [np.nan])).all()


def test_log1p(numerics):
    x = np.concatenate([signed((-30, -0.5)), np.float32(np.logspace(-0.5, 30, 200)).astype(np.float64)])
    close(apply(numerics.log1p, x), np.log1p(x))


def test_softplus(numerics):
    g = signed((-3, 1.9))
    close(apply(numerics.softplus, g), np.logaddexp(0, g), bound=1e-6)


def test_loss_of_a_target_that_leads_and_of_one_that_does_not(numerics):
    rest = np.float32(np.logspace(-20, 3, 100)).astype(np.float64)
    zero = np.zeros_like(rest)
    close(apply(numerics.loss_of_sums, rest, zero, zero), np.log1p(rest))
    behind = zero - 3.0
    close(apply(numerics.loss_of_sums, rest + 1, zero, behind), np.log(rest + 1 + np.exp(-3.0)) + 3.0)


def test_small_and_large_change(numerics):
    u = signed((-12, -0.4))
    close(apply(numerics.small_change, u, np.ones_like(u)), np.log1p(u))
    g0, g1 = np.linspace(-30, 30, 50), np.linspace(40, -40, 50)
    g0, g1 = np.float32(g0).astype(np.float64), np.float32(g1).astype(np.float64)
    wanted = np.logaddexp(0, g1) - np.logaddexp(0, g0)
    got = apply(numerics.large_change, g0, g1)
    assert (np.abs(got - wanted) <= 1e-6 * np.maximum(np.logaddexp(0, g1), np.logaddexp(0, g0))).all()


@pytest.mark.parametrize("c", [1.0, 30.0])
def test_softcap_and_its_change(numerics, c):
    z = signed((-3, 2.5))
    cap = np.full_like(z, c)
    close(apply(numerics.softcap, cap, z), c * np.tanh(z / c), bound=2e-6)
    z, wide = signed((-3, 1.2)), np.longdouble
    for d in (1e-9, -1e-3, 2.0, -40.0):
        moves, cap = np.full_like(z, np.float32(d)), np.full_like(z, c)
        a, e = wide(z) / c, wide(moves) / c
        true = c * np.sinh(e) / (np.cosh(a) * np.cosh(a + e))
        kept = np.abs(true) > 1e-30  # below that float32 has few digits to give
        close(apply(numerics.softcap_change, cap, z, moves)[kept], true[kept].astype(float), bound=4e-6 * (1 + 20 / c))


def test_smoothing_of_a_masked_column_is_infinite(numerics):
    got = apply(numerics.smoothing_term, [0.5, 0.5], [4.0, -np.inf])
    assert got.tolist() == [-2.0, np.inf]


def test_which_changes_are_small(numerics):
    u, s, step = [0.1, -0.4, -0.6, 0.1, np.nan], [1.0] * 5, [1.0, 1.0, 1.0, 50.0, 1.0]
    assert apply(numerics.is_small_change, u, s, step).tolist() == [1, 1, 0, 0, 0]


def test_half_tanh(numerics):
    y = signed((-30, 1.5))
    close(apply(numerics.half_tanh, y), np.tanh(y / 2))


def test_rounding_to_the_nearest(numerics):
    """The interpreter itself cuts off; numbers half way, those that round into the next power, zeros and NaN."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(X, Y, ROUNDED: tl.constexpr, n: tl.constexpr):
        tl.store(Y + tl.arange(0, n), ROUNDED(tl.load(X + tl.arange(0, n)), tl.bfloat16))

    few = torch.tensor([0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 2 - 2**-9, torch.inf, -torch.inf, torch.nan])
    x = torch.cat([few, torch.randn(1016, generator=torch.Generator().manual_seed(0))])
    y = torch.empty(1024, dtype=torch.bfloat16)
    kernel[(1,)](x, y, ROUNDED=numerics.rounded, n=1024)
    assert torch.equal(y.view(torch.int16)[:7], x.bfloat16().view(torch.int16)[:7]) and y[7].isnan()
    assert torch.equal(y[8:], x[8:].bfloat16())
