"""layer_norm_delta: every face, dtype and size of change against long double; residuals, missing parameters, teeth."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from checks import face_fixture
from finf_fast.ops import layer_norm_delta
from finf_fast.reference import normalize
from stack_cases import SIZES, apart, at, check, draw, make_stack, moved, same_bits, sizes, with_threads

dtype = face_fixture("layer_norm_delta")


def true_norm(x, weight, bias, eps=1e-5):
    c = x - x.mean(-1, keepdims=True)
    n = c / np.sqrt((c * c).mean(-1, keepdims=True) + eps)
    n = n if weight is None else n * weight
    return n if bias is None else n + bias


def params(D, Q, size, dtype):
    """weight, bias, dweight, dbias; the sizes of the changes alike, so that each of them counts."""
    draws = [draw(D, dtype=dtype, seed=1), draw(D, dtype=dtype, seed=2)]
    return *draws, draw(Q, D, size=size, dtype=dtype, seed=3), draw(Q, D, size=size, dtype=dtype, seed=4)


@pytest.mark.parametrize("size", SIZES)
def test_every_size_of_change(dtype, size):
    if size not in sizes(dtype):
        pytest.skip("float16 cannot hold it")
    stack = make_stack(2, 3, 5, 48, size=size, dtype=dtype)
    w, b, dw, db = params(48, 2, size, dtype)
    out = layer_norm_delta(stack, w, b, dweight=dw, dbias=db)
    check(out, lambda q: true_norm(at(stack, q), moved(w, dw, q), moved(b, db, q)), 2, dtype, size)


@pytest.mark.parametrize("given", ["", "w", "b", "wb", "w dw", "wb dw", "wb db", "b db", "wb dw db"])
@pytest.mark.parametrize("still", [False, True])
def test_any_of_the_parameters(dtype, given, still):
    """A stack that has not changed takes its Q from the parameters' changes."""
    stack = make_stack(0 if still else 2, 7, 33, size=0.1, dtype=dtype)
    w, b, dw, db = params(33, 2, 0.1, dtype)
    words = given.split() or [""]
    w, b = (w if "w" in words[0] else None), (b if "b" in words[0] else None)
    dw, db = (dw if "dw" in words else None), (db if "db" in words else None)
    out = layer_norm_delta(stack, w, b, dweight=dw, dbias=db, eps=0.5)
    Q = 2 if not still or dw is not None or db is not None else 0
    check(out, lambda q: true_norm(at(stack, q), moved(w, dw, q), moved(b, db, q), 0.5), Q, dtype)


def test_changes_of_parameters_that_are_not_there(dtype):
    """No weight counts as 1, no bias as 0: their changes do as well."""
    stack = make_stack(2, 7, 33, size=0.1, dtype=dtype)
    _, _, dw, db = params(33, 2, 0.1, dtype)
    got = layer_norm_delta(stack, dweight=dw, dbias=db)
    ones, zeros = torch.ones(33, dtype=dtype), torch.zeros(33, dtype=dtype)
    torch.testing.assert_close(got, layer_norm_delta(stack, ones, zeros, dweight=dw, dbias=db), rtol=0, atol=0)


@pytest.mark.parametrize("first, second", [(2, 2), (2, 0), (0, 2), (0, 0)])
def test_residual_enters_before_rounding(dtype, first, second):
    a, r = (make_stack(Q, 5, 33, size=0.1, dtype=dtype, seed=s) for Q, s in ((first, 0), (second, 7)))
    w, b, dw, _ = params(33, 2, 0.1, dtype)
    normed, summed = layer_norm_delta(a, w, b, dweight=dw, residual=r)
    check(normed, lambda q: true_norm(at(a, q) + at(r, q), moved(w, dw, q), moved(b, None, q)), 2, dtype)
    check(summed, lambda q: at(a, q) + at(r, q), max(first, second), dtype)


def test_a_large_common_part(dtype):
    """Values near 100: centring leaves what float32 can tell apart, two digits fewer."""
    if dtype not in (torch.float32, torch.float64):
        pytest.skip("half types cannot hold a small spread around 100")
    stack = make_stack(2, 5, 64, size=1e-3, dtype=dtype)
    stack[0] += 100
    out = layer_norm_delta(stack)
    check(out, lambda q: true_norm(at(stack, q), None, None), 2, dtype, 1e-3)


def test_rows_without_spread_stay_finite(dtype):
    """Before or after: the variance is eps alone, and its change ends there, not below.

    Afterwards r is 300 times what it was, and with it the last digit of the centred values.
    """
    flat = torch.full((1, 4, 32), 3.0, dtype=dtype)
    d = draw(1, 4, 32, dtype=dtype)
    for stack in (torch.cat([flat, d]), torch.cat([d, -d]), torch.cat([flat, torch.zeros_like(d)])):
        out = layer_norm_delta(stack)
        assert out.isfinite().all()
        check(out[:, :2], lambda q, stack=stack: true_norm(at(stack, q)[:2], None, None), 1, dtype, slack=300)


@pytest.mark.parametrize("piece", [1, 3 * 8, 3 * 8 * 2, 3 * 8 * 5])
def test_pieces_meet(dtype, monkeypatch, piece):
    stack = make_stack(2, 5, 8, size=0.1, dtype=dtype)
    whole = layer_norm_delta(stack)
    monkeypatch.setattr(importlib.import_module("finf_fast.reference.layer_norm_delta"), "PIECE", piece)
    torch.testing.assert_close(layer_norm_delta(stack), whole)
    assert normalize.PIECE > 3 * 8 * 5


# Vectors hold up to 16 numbers, four of them are worked on together, sums run over 2048: one short, exact, one more.
@pytest.mark.parametrize("D", [1, 2, 15, 16, 17, 63, 64, 65, 127, 2047, 2048, 2049, 4131])
@pytest.mark.parametrize("residual", [False, True])
def test_every_width(dtype, D, residual):
    stack, other = make_stack(2, 3, D, size=0.1, dtype=dtype), make_stack(2, 3, D, size=0.1, dtype=dtype, seed=7)
    w, b, dw, db = params(D, 2, 0.1, dtype)
    out = layer_norm_delta(stack, w, b, dweight=dw, dbias=db, residual=other if residual else None, eps=0.5)
    out = out[0] if residual else out

    def value(q):
        return at(stack, q) + at(other, q) if residual else at(stack, q)

    check(out, lambda q: true_norm(value(q), moved(w, dw, q), moved(b, db, q), 0.5), 2, dtype)


@pytest.mark.parametrize("N", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("Q", [0, 1, 5])
def test_every_number_of_rows(dtype, N, Q):
    """A task takes as many rows as hold 2^15 values or 2^17 numbers, here 32 or fewer."""
    stack = make_stack(Q, N, 1024, size=1e-2, dtype=dtype)
    out = layer_norm_delta(stack)
    check(out, lambda q: true_norm(at(stack, q), None, None), Q, dtype)
    alone = layer_norm_delta(stack[:, N - 1 :])
    torch.testing.assert_close(out[:, N - 1 :], alone, rtol=0, atol=0)


def test_same_bits_for_any_number_of_threads(dtype):
    stack, other = make_stack(2, 300, 257, size=0.1, dtype=dtype), make_stack(2, 300, 257, size=0.1, dtype=dtype)
    w, b, dw, db = params(257, 2, 0.1, dtype)
    assert same_bits(with_threads(lambda: layer_norm_delta(stack, w, b, dweight=dw, dbias=db, residual=other)[0]))


@pytest.mark.parametrize("shared, left, slack", [(100.0, 1.0, 2e3), (1.0, 1e-3, 300), (0.0, 1e-3, 300)])
def test_changes_whose_sums_would_cancel(dtype, shared, left, slack):
    """A change all but the same everywhere, and one that leaves next to nothing of the row.

    A mean of 100 is known to 4e-6, 1 part in 3000 of what differs; and a row 100 times smaller has an r as much larger.
    """
    if dtype in (torch.bfloat16, torch.float16):
        pytest.skip("half types cannot hold a small spread around a large common part")
    h, noise = draw(1, 4, 96, dtype=dtype), draw(2, 4, 96, dtype=dtype, size=1e-2, seed=1)
    stack = torch.cat([h, noise + shared - (1 - left) * h])
    check(layer_norm_delta(stack), lambda q: true_norm(at(stack, q), None, None), 2, dtype, slack=slack)


def test_a_result_past_the_cache_is_the_same(dtype):
    """Above 16 MiB the compiled face writes another way."""
    stack = make_stack(1, 6000, 704, size=0.1, dtype=dtype)
    out = layer_norm_delta(stack)
    torch.testing.assert_close(layer_norm_delta(stack[:, 1000:1500]), out[:, 1000:1500], rtol=0, atol=0)


def test_nan_stays_in_its_row(dtype):
    stack = make_stack(2, 40, 33, size=0.1, dtype=dtype)
    clean = layer_norm_delta(stack)
    stack[0, 3, 32], stack[2, 17, 0], stack[1, 20, 5] = torch.nan, torch.nan, torch.inf
    out = layer_norm_delta(stack)
    assert out[:, 3].isnan().all() and out[2, 17].isnan().all() and out[1, 20].isnan().all()
    for q, n in [(0, 3), (1, 3), (2, 3), (2, 17), (1, 20)]:
        out[q, n] = clean[q, n]
    torch.testing.assert_close(out, clean, rtol=0, atol=0)


def test_no_change_is_exactly_zero(dtype):
    stack = make_stack(2, 5, 33, size=0.0, dtype=dtype)
    assert not layer_norm_delta(stack, *params(33, 2, 1, dtype)[:2])[1:].any()


def test_layouts_and_empties(dtype):
    stack, r = make_stack(2, 4, 6, size=0.1, dtype=dtype), make_stack(2, 4, 6, size=0.1, dtype=dtype, seed=4)
    w, b, dw, db = params(6, 2, 0.1, dtype)
    whole = layer_norm_delta(stack, w, b, dweight=dw, dbias=db, residual=r)
    spread = layer_norm_delta(apart(stack), apart(w), apart(b), dweight=apart(dw), dbias=apart(db), residual=apart(r))
    torch.testing.assert_close(spread, whole)
    assert layer_norm_delta(stack[:, :0], w).shape == (3, 0, 6)
    assert layer_norm_delta(stack[:, 0]).shape == (3, 6)


@pytest.mark.parametrize("residual", [False, True])
def test_opcheck(dtype, residual):
    stack = make_stack(2, 3, 5, size=0.1, dtype=dtype)
    w, b, dw, db = params(5, 2, 0.1, dtype)
    args = (stack, w, b, dw, db, draw(1, 3, 5, dtype=dtype) if residual else None, 1e-5)
    torch.library.opcheck(torch.ops.finf_fast.layer_norm_delta.default, args)


def test_compiles_without_a_break():
    stack = make_stack(2, 3, 5, size=0.1, dtype=torch.float32)
    compiled = torch.compile(lambda x: layer_norm_delta(2 * x, residual=x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(stack), layer_norm_delta(2 * stack, residual=stack))


def test_errors():
    x, w = torch.zeros(3, 4, 5), torch.zeros(5)
    with pytest.raises(ValueError, match=r"weight: wanted shape \(D\) = \(5\), got \(4,\)"):
        layer_norm_delta(x, w[:4])
    with pytest.raises(ValueError, match=r"dbias: wanted shape \(Q,D\) = \(Q, 5\), got \(2, 4\)"):
        layer_norm_delta(x, dbias=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="dweight: wanted Q = 2 queries, as stack has, got 1"):
        layer_norm_delta(x, dweight=torch.zeros(1, 5))
    with pytest.raises(ValueError, match=r"residual: wanted shape \(1\+Q, 4, 5\), got \(3, 5, 5\)"):
        layer_norm_delta(x, residual=torch.zeros(3, 5, 5))
    with pytest.raises(TypeError, match="residual: wanted float32, got float64"):
        layer_norm_delta(x, residual=x.double())
    with pytest.raises(ValueError, match="eps: wanted a number from 0, got -1"):
        layer_norm_delta(x, eps=-1)
    with pytest.raises(ValueError, match=r"stack: wanted \(1\+Q, ..., D\)"):
        layer_norm_delta(w)


# Teeth.
def broken_twice_bias(stack, w, b, dw, db):
    out = layer_norm_delta(stack, w, b, dweight=dw, dbias=db)
    out[1:] += b
    return out


def broken_old_weight(stack, w, b, dw, db):
    return layer_norm_delta(stack, w, b, dbias=db)


def broken_weight_on_the_value_only(stack, w, b, dw, db):
    out = layer_norm_delta(stack, w, b, dbias=db)
    out[1:] += layer_norm_delta(stack[:1]) * dw[:, None]
    return out


def broken_subtraction(stack, w, b, dw, db):
    def f(x, w, b):
        return torch.nn.functional.layer_norm(x, w.shape, w, b)

    y = f(stack[0], w, b)
    return torch.stack([y, *[f(stack[0] + d, w + e, b + g) - y for d, e, g in zip(stack[1:], dw, db, strict=True)]])


BROKEN = [(broken_twice_bias, 0.1), (broken_old_weight, 0.1), (broken_weight_on_the_value_only, 0.1)]


@pytest.mark.parametrize("broken, size", [*BROKEN, (broken_subtraction, 1e-4)])
def test_broken_operations_are_caught(broken, size):
    stack = make_stack(2, 5, 33, size=size, dtype=torch.float32)
    w, b, dw, db = params(33, 2, size, torch.float32)

    def true(q):
        return true_norm(at(stack, q), moved(w, dw, q), moved(b, db, q))

    check(layer_norm_delta(stack, w, b, dweight=dw, dbias=db), true, 2, torch.float32, size)
    with pytest.raises(AssertionError, match="relative error"):
        check(broken(stack, w, b, dw, db), true, 2, torch.float32, size)
