"""rms_norm_delta: every face, dtype and size of change against long double; residuals, missing weights, teeth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from checks import face_fixture
from finf_fast.ops import layer_norm_delta, rms_norm_delta
from stack_cases import SIZES, apart, at, check, draw, make_stack, moved, same_bits, sizes, with_threads

dtype = face_fixture("rms_norm_delta")


def true_norm(x, weight, eps=1e-6):
    n = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return n if weight is None else n * weight


@pytest.mark.parametrize("size", SIZES)
def test_every_size_of_change(dtype, size):
    if size not in sizes(dtype):
        pytest.skip("float16 cannot hold it")
    stack = make_stack(2, 3, 5, 48, size=size, dtype=dtype)
    w, dw = draw(48, dtype=dtype, seed=1), draw(2, 48, size=size, dtype=dtype, seed=2)
    out = rms_norm_delta(stack, w, dweight=dw)
    check(out, lambda q: true_norm(at(stack, q), moved(w, dw, q)), 2, dtype, size)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("stacked, changed", [(2, True), (2, False), (0, True), (0, False)])
def test_any_of_the_changes(dtype, weighted, stacked, changed):
    stack = make_stack(stacked, 7, 33, size=0.1, dtype=dtype)
    w, dw = draw(33, dtype=dtype, seed=1), draw(2, 33, size=0.1, dtype=dtype, seed=2)
    w, dw = (w if weighted else None), (dw if changed else None)
    out = rms_norm_delta(stack, w, dweight=dw, eps=0.25)
    known = torch.ones(33, dtype=dtype) if w is None else w
    check(out, lambda q: true_norm(at(stack, q), moved(known, dw, q), 0.25), 2 if stacked or changed else 0, dtype)


@pytest.mark.parametrize("first, second", [(2, 2), (2, 0), (0, 2)])
def test_residual_enters_before_rounding(dtype, first, second):
    a, r = (make_stack(Q, 5, 33, size=0.1, dtype=dtype, seed=s) for Q, s in ((first, 0), (second, 7)))
    w = draw(33, dtype=dtype, seed=1)
    normed, summed = rms_norm_delta(a, w, residual=r)
    check(normed, lambda q: true_norm(at(a, q) + at(r, q), moved(w, None, q)), 2, dtype)
    check(summed, lambda q: at(a, q) + at(r, q), 2, dtype)


def test_a_row_that_vanishes(dtype):
    """After the change only eps is left under the root: r is 1000 times what it was, and the rounding with it."""
    h = draw(1, 4, 32, dtype=dtype)
    gone = torch.cat([h, -h])
    check(rms_norm_delta(gone), lambda q: true_norm(at(gone, q), None), 1, dtype, slack=1000)
    zero = torch.zeros_like(h)
    check(rms_norm_delta(torch.cat([zero, h])), lambda q: true_norm(at(torch.cat([zero, h]), q), None), 1, dtype)


@pytest.mark.parametrize("D", [1, 15, 16, 17, 64, 65, 2047, 2048, 2049])
def test_every_width(dtype, D):
    stack, w, dw = make_stack(2, 3, D, size=0.1, dtype=dtype), draw(D, dtype=dtype), draw(2, D, dtype=dtype, seed=2)
    out = rms_norm_delta(stack, w, dweight=dw, eps=0.1)
    check(out, lambda q: true_norm(at(stack, q), moved(w, dw, q), 0.1), 2, dtype)


def test_same_bits_for_any_number_of_threads(dtype):
    stack, w = make_stack(2, 300, 257, size=0.1, dtype=dtype), draw(257, dtype=dtype)
    assert same_bits(with_threads(lambda: rms_norm_delta(stack, w)))


def test_no_change_is_exactly_zero(dtype):
    assert not rms_norm_delta(make_stack(2, 5, 33, size=0.0, dtype=dtype), draw(33, dtype=dtype))[1:].any()


def test_layouts_and_empties(dtype):
    stack, w = make_stack(2, 4, 6, size=0.1, dtype=dtype), draw(6, dtype=dtype)
    torch.testing.assert_close(rms_norm_delta(apart(stack), apart(w)), rms_norm_delta(stack, w))
    assert rms_norm_delta(stack[:, :0], w).shape == (3, 0, 6)


def test_opcheck(dtype):
    stack, w = make_stack(2, 3, 5, size=0.1, dtype=dtype), draw(5, dtype=dtype)
    dw, r = draw(2, 5, dtype=dtype), draw(1, 3, 5, dtype=dtype)
    torch.library.opcheck(torch.ops.finf_fast.rms_norm_delta.default, (stack, w, dw, r, 1e-6))
    torch.library.opcheck(torch.ops.finf_fast.rms_norm_delta.default, (stack, None, None, None, 1e-6))


def test_errors():
    x = torch.zeros(3, 4, 5)
    with pytest.raises(ValueError, match=r"weight: wanted shape \(D\) = \(5\), got \(4,\)"):
        rms_norm_delta(x, torch.zeros(4))
    with pytest.raises(ValueError, match="dweight: wanted Q = 2 queries, as stack has, got 1"):
        rms_norm_delta(x, dweight=torch.zeros(1, 5))
    with pytest.raises(ValueError, match="eps: wanted a number from 0, got nan"):
        rms_norm_delta(x, eps=float("nan"))


# Teeth.
def test_centring_is_caught():
    stack = make_stack(2, 5, 33, size=0.1, dtype=torch.float32)
    with pytest.raises(AssertionError, match="relative error"):
        check(layer_norm_delta(stack, eps=1e-6), lambda q: true_norm(at(stack, q), None), 2, torch.float32)


def test_a_frozen_root_is_caught():
    """The change as if the mean square stood still."""
    stack = make_stack(2, 5, 33, size=1e-3, dtype=torch.float32)
    frozen = stack / (stack[:1].square().mean(-1, keepdim=True) + 1e-6).sqrt()
    with pytest.raises(AssertionError, match="query 0"):
        check(frozen, lambda q: true_norm(at(stack, q), None), 2, torch.float32)
