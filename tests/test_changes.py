"""Each function's change against arithmetic of 500 digits: any size of change, the tails, the corners, and teeth."""

from __future__ import annotations

import functools
import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finf_fast.reference import changes
from finf_fast.reference.changes import CHANGES, VALUES

mp = mpmath.mp.clone()
mp.dps = 500  # erfc(30) is 1e-393

SIZES = [10.0**k for k in range(1, -10, -1)]
TAILS = (-30.0, -10.0, -3.0, -0.75, -1e-3, 0.0, 1e-3, 0.5, 3.0, 10.0, 30.0)


def _sigmoid(x):
    return 1 / (1 + mp.exp(-x))


TRUE = {
    "relu": lambda x: max(x, mp.mpf(0)),
    "tanh": mp.tanh,
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: x * mp.erfc(-x / mp.sqrt(2)) / 2,
    "gelu_tanh": lambda x: x * _sigmoid(2 * mp.sqrt(2 / mp.pi) * (x + mp.mpf("0.044715") * x**3)),
    "quick_gelu": lambda x: x * _sigmoid(mp.mpf("1.702") * x),
    "exp": mp.exp,
    "expm1": mp.expm1,
    "log": mp.log,
    "log1p": lambda x: mp.log(1 + x),
    "sqrt": mp.sqrt,
    "rsqrt": lambda x: 1 / mp.sqrt(x),
    "reciprocal": lambda x: 1 / x,
    "sin": mp.sin,
    "cos": mp.cos,
    "erf": mp.erf,
    "abs": abs,
    "square": lambda x: x * x,
}
POSITIVE = {"log", "sqrt", "rsqrt", "reciprocal"}

WITH_PARAMETERS = {
    "clamp": (functools.partial(changes.clamp_change, low=-0.5, high=2.0), lambda x: min(max(x, mp.mpf(-0.5)), 2)),
    "clamp_open": (functools.partial(changes.clamp_change, low=0.25), lambda x: max(x, mp.mpf(0.25))),
    "hardtanh": (changes.hardtanh_change, lambda x: min(max(x, -mp.mpf(1)), 1)),
    "leaky_relu": (functools.partial(changes.leaky_relu_change, slope=0.125), lambda x: x if x > 0 else x / 8),
    "elu": (functools.partial(changes.elu_change, alpha=1.5), lambda x: x if x > 0 else 1.5 * mp.expm1(x)),
    "softplus": (changes.softplus_change, lambda x: mp.log(1 + mp.exp(x))),
    "softplus_beta": (functools.partial(changes.softplus_change, beta=2.0), lambda x: mp.log(1 + mp.exp(2 * x)) / 2),
    **{
        f"pow_{n}": (functools.partial(changes.pow_change, exponent=n), lambda x, n=n: x**n) for n in (0, 1, 2, 3, 4, 7)
    },
}
POSITIVE_POWERS = (-3, -1, -0.5, 0.5, 1 / 3, 1.7, -2.2)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture(params=["looks", "never looks"])
def looking(request, monkeypatch):
    """Both ways of the forms that first look how large the changes are; a GPU always takes the second."""
    if request.param == "never looks":
        monkeypatch.setattr(changes, "_largest", lambda x: math.inf)


def size_of_terms(before, after, x, b):
    """What is added up near 0, where these functions turn and their change may vanish by itself."""
    return min(abs(mp.mpf(b)), abs(before) + abs(after)) if abs(x) < 1.5 else 0


def check(change, f, h, d, bound):
    """Every element to `bound` units of rounding, but for what is below the dtype's own range."""
    got = change(h, d)
    assert got.dtype == h.dtype and got.shape == torch.broadcast_shapes(h.shape, d.shape)
    unit, tiny = torch.finfo(h.dtype).eps, 64 * torch.finfo(h.dtype).tiny
    for x, b, y in zip(h.tolist(), d.tolist(), got.tolist(), strict=True):
        before, after = f(mp.mpf(x)), f(mp.mpf(x) + mp.mpf(b))
        allowed = bound(x, b) * unit * abs(after - before) + 4 * unit * size_of_terms(before, after, x, b) + tiny
        wrong = abs(mp.mpf(y) - (after - before))
        assert wrong <= allowed, f"at h={x!r}, d={b!r}: {y!r}, wanted {mp.nstr(after - before, 10)}"


def conditioning(name, x, b):
    """Units of rounding that an element may be off by: an exponent of size E carries E units into e^E."""
    E = max(abs(x), abs(x + b))
    if name in ("gelu", "erf"):
        E = E * E
    if name == "gelu_tanh":
        E = 1.6 * (E + 0.0447 * E**3)
    return 16 + 4 * E


def grid(name, size, dtype):
    """Values in the tails, each with a change up and one down, drawn so that they are no round numbers."""
    draw = torch.Generator().manual_seed(int(1e9 * size) % 97)
    h = torch.tensor(TAILS, dtype=torch.float64).repeat(2)
    h = h * (1 + 0.01 * torch.rand(len(h), generator=draw, dtype=torch.float64))
    d = size * (0.5 + torch.rand(len(h), generator=draw, dtype=torch.float64))
    d[len(TAILS) :] *= -1
    if name in POSITIVE:
        h, d = h.abs() + 1e-2, torch.where(d < 0, d / (1 + d.abs()) * 1e-2, d)
    if name == "log1p":
        h, d = h.abs() - 0.9, torch.where(d < 0, d / (1 + d.abs()) * 0.09, d)
    return h.to(dtype), d.to(dtype)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("size", SIZES)
def test_every_size_of_change(name, size, dtype, looking):
    h, d = grid(name, size, dtype)
    check(CHANGES[name], TRUE[name], h, d, lambda x, b: conditioning(name, x, b))


@pytest.mark.parametrize("name", WITH_PARAMETERS)
@pytest.mark.parametrize("size", SIZES)
def test_functions_with_parameters(name, size, dtype, looking):
    change, f = WITH_PARAMETERS[name]
    h, d = grid(name, size, dtype)
    check(change, f, h, d, lambda x, b: 2 * conditioning(name, x, b))


@pytest.mark.parametrize("exponent", POSITIVE_POWERS)
@pytest.mark.parametrize("size", SIZES)
def test_powers_of_positive_numbers(exponent, size, dtype):
    h, d = grid("log", size, dtype)
    change = functools.partial(changes.pow_change, exponent=exponent)
    check(change, lambda x: x ** mp.mpf(exponent), h, d, lambda x, b: 64)


@pytest.mark.parametrize("name", [*CHANGES, *WITH_PARAMETERS])
def test_no_change_is_exactly_zero(name, dtype, looking):
    change = CHANGES.get(name) or WITH_PARAMETERS[name][0]
    h = torch.tensor([*TAILS, 88.0, -104.0, 1e4, -1e4], dtype=dtype)
    got = change(h, torch.zeros_like(h))
    assert torch.equal(got[torch.isfinite(got)], torch.zeros_like(got[torch.isfinite(got)]))
    assert torch.isfinite(got).all() or name in {"log", "log1p", "sqrt", "rsqrt"}


@pytest.mark.parametrize("name", ["exp", "expm1", "sigmoid", "tanh", "relu", "erf", "elu", "clamp"])
def test_a_value_at_minus_infinity_stays(name, dtype, looking):
    change = CHANGES.get(name) or WITH_PARAMETERS[name][0]
    h = torch.full((4,), -torch.inf, dtype=dtype)
    got = change(h, torch.tensor([0.0, 1e-6, -3.0, 200.0], dtype=dtype))
    assert torch.equal(got, torch.zeros_like(got))


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "silu", "gelu", "gelu_tanh", "quick_gelu", "erf", "relu", "exp"])
def test_leaps_across_the_range_are_finite(name, dtype, looking):
    h = torch.tensor([-300.0, 300.0, -90.0, 40.0, 0.0, -200.0], dtype=dtype)
    d = torch.tensor([300.5, -600.0, 89.0, -1000.0, 80.0, 200.0], dtype=dtype)
    if name == "exp":  # leave out what exp itself cannot hold
        h, d = h[[0, 2, 4, 5]], d[[0, 2, 4, 5]]
    check(CHANGES[name], TRUE[name], h, d, lambda x, b: 16 * (16 + abs(x) + abs(b)))


@pytest.mark.parametrize("name", CHANGES)
def test_nan_stays_where_it_is(name, dtype, looking):
    h = torch.tensor([0.5, torch.nan, 0.25, 0.75], dtype=dtype)
    d = torch.tensor([0.125, 0.5, torch.nan, 0.0], dtype=dtype)
    assert CHANGES[name](h, d).isnan().tolist() == [False, True, True, False]


@pytest.mark.parametrize("name", [*CHANGES, *WITH_PARAMETERS])
def test_broadcasting_both_ways_and_views(name, dtype):
    change = CHANGES.get(name) or WITH_PARAMETERS[name][0]
    draw = torch.Generator().manual_seed(0)
    h = 1 + torch.rand(5, 7, generator=draw, dtype=dtype)
    d = torch.rand(3, 7, 5, generator=draw, dtype=dtype).transpose(1, 2)
    # A vectorised loop and the odd element after it may differ by a digit.
    close = functools.partial(torch.testing.assert_close, rtol=64 * torch.finfo(dtype).eps, atol=0)
    close(change(h, d), torch.stack([change(h.clone(), each.contiguous()) for each in d]))
    one = torch.tensor(0.25, dtype=dtype)
    close(change(h, one), change(h, torch.full_like(h, 0.25)))
    close(change(one, h), change(torch.full_like(h, 0.25), h))
    assert change(h[:0], d[:, :0]).shape == (3, 0, 7)


@pytest.mark.parametrize("name", CHANGES)
def test_inputs_are_left_alone(name, dtype):
    h, d = grid(name, 0.1, dtype)
    copies = h.clone(), d.clone()
    CHANGES[name](h, d)
    assert torch.equal(h, copies[0]) and torch.equal(d, copies[1])


@pytest.mark.parametrize("name", CHANGES)
def test_names_and_values_agree(name):
    x = torch.tensor([0.3, 0.9, 2.0], dtype=torch.float64)
    true = torch.tensor([float(TRUE[name](mp.mpf(v))) for v in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(VALUES[name](x), true, rtol=1e-14, atol=0)
    assert VALUES.keys() == CHANGES.keys()


# Algebra: there and back, and one step after another.
@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(CHANGES)), h=st.floats(0.0625, 8), d=st.floats(-0.03125, 8), e=st.floats(0.0, 2))
def test_steps_add_up(name, h, d, e):
    h, d, e = (torch.tensor([round(x * 1024) / 1024], dtype=torch.float64) for x in (h, d, e))
    change = CHANGES[name]
    whole, parts = change(h, d + e), change(h, d) + change(h + d, e)
    size = change(h, d).abs() + change(h + d, e).abs()
    assert (whole - parts).abs() <= 1e-13 * size + 1e-300
    back = -change(h + d, -d)
    assert (back - change(h, d)).abs() <= 1e-13 * (size + VALUES[name](h).abs() * 1e-3) + 1e-300


# Teeth: what the check is there to catch.
@pytest.mark.parametrize("name", ["tanh", "sigmoid", "gelu_tanh", "erf", "exp", "log1p", "sqrt", "sin"])
def test_a_plain_difference_is_caught(name, dtype):
    h, d = grid(name, 1e-6, dtype)
    with pytest.raises(AssertionError, match="wanted"):
        check(
            lambda h, d: VALUES[name](h + d) - VALUES[name](h), TRUE[name], h, d, lambda x, b: conditioning(name, x, b)
        )


def test_the_textbook_form_of_tanh_is_caught(dtype):
    h = torch.tensor([10.0, -12.0], dtype=dtype)
    d = torch.tensor([1e-3, 1e-3], dtype=dtype)
    with pytest.raises(AssertionError, match="wanted"):
        check(lambda h, d: d.tanh() * (1 - h.tanh() * (h + d).tanh()), mp.tanh, h, d, lambda x, b: 1e3)
    check(changes.tanh_change, mp.tanh, h, d, lambda x, b: 64)
