"""group_norm_delta: every face, dtype and size of change against long double; space of any dimension, teeth."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from checks import face_fixture
from finf_fast.ops import group_norm_delta
from stack_cases import SIZES, apart, at, check, draw, make_stack, moved, same_bits, sizes, with_threads

dtype = face_fixture("group_norm_delta")


def true_norm(x, groups, weight, bias, eps=1e-5):
    rows = x.reshape(x.shape[0], groups, -1)
    c = rows - rows.mean(-1, keepdims=True)
    n = (c / np.sqrt((c * c).mean(-1, keepdims=True) + eps)).reshape(x.shape)
    ones = (1, -1, *[1] * (x.ndim - 2))
    n = n if weight is None else n * weight.reshape(ones)
    return n if bias is None else n + bias.reshape(ones)


def params(C, Q, size, dtype):
    values = [draw(C, dtype=dtype, seed=s) for s in (1, 2)]
    return *values, *[draw(Q, C, size=size, dtype=dtype, seed=s) for s in (3, 4)]


@pytest.mark.parametrize("size", SIZES)
def test_every_size_of_change(dtype, size):
    if size not in sizes(dtype):
        pytest.skip("float16 cannot hold it")
    stack = make_stack(2, 3, 12, 4, 5, size=size, dtype=dtype)
    w, b, dw, db = params(12, 2, size, dtype)
    out = group_norm_delta(stack, 3, w, b, dweight=dw, dbias=db)
    check(out, lambda q: true_norm(at(stack, q), 3, moved(w, dw, q), moved(b, db, q)), 2, dtype, size)


@pytest.mark.parametrize("space", [(), (7,), (3, 4), (2, 3, 2)])
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_space_of_any_dimension(dtype, space, groups):
    if groups == 8 and not space:
        pytest.skip("a group of one number is 0 and does not change")
    stack = make_stack(2, 2, 8, *space, size=0.1, dtype=dtype)
    out = group_norm_delta(stack, groups, eps=1e-2)
    check(out, lambda q: true_norm(at(stack, q), groups, None, None, 1e-2), 2, dtype)


# Space that one parameter covers: around the vectors' widths; with it groups past the 2048 that are summed at once.
@pytest.mark.parametrize("S", [1, 3, 15, 16, 17, 49, 64, 65, 800])
@pytest.mark.parametrize("changed", [False, True])
def test_every_width(dtype, S, changed):
    stack = make_stack(2, 3, 6, S, size=0.1, dtype=dtype)
    w, b, dw, db = params(6, 2, 0.1, dtype)
    dw, db = (dw, db) if changed else (None, None)
    out = group_norm_delta(stack, 2, w, b, dweight=dw, dbias=db, eps=0.5)
    check(out, lambda q: true_norm(at(stack, q), 2, moved(w, dw, q), moved(b, db, q), 0.5), 2, dtype)


def test_same_bits_for_any_number_of_threads(dtype):
    stack = make_stack(2, 40, 12, 7, 7, size=0.1, dtype=dtype)
    w, b, dw, db = params(12, 2, 0.1, dtype)
    assert same_bits(with_threads(lambda: group_norm_delta(stack, 3, w, b, dweight=dw, dbias=db)))


def test_only_the_parameters_move(dtype):
    stack = make_stack(0, 2, 8, 5, size=1.0, dtype=dtype)
    w, b, dw, db = params(8, 2, 0.1, dtype)
    out = group_norm_delta(stack, 2, w, b, dweight=dw, dbias=db)
    check(out, lambda q: true_norm(at(stack, q), 2, moved(w, dw, q), moved(b, db, q)), 2, dtype)
    out = group_norm_delta(stack, 2, w, b, dbias=db)
    check(out, lambda q: true_norm(at(stack, q), 2, moved(w, None, q), moved(b, db, q)), 2, dtype)
    assert group_norm_delta(stack, 2, w, b).shape == (1, 2, 8, 5)


def test_pieces_meet(dtype, monkeypatch):
    stack = make_stack(2, 5, 4, 3, size=0.1, dtype=dtype)
    whole = group_norm_delta(stack, 2)
    for piece in (1, 2 * 36, 5 * 36):
        monkeypatch.setattr(importlib.import_module("finf_fast.reference.group_norm_delta"), "PIECE", piece)
        torch.testing.assert_close(group_norm_delta(stack, 2), whole)


def test_no_change_is_exactly_zero(dtype):
    stack = make_stack(2, 3, 6, 5, size=0.0, dtype=dtype)
    assert not group_norm_delta(stack, 3, *params(6, 2, 1, dtype)[:2])[1:].any()


def test_layouts_and_empties(dtype):
    stack = make_stack(2, 3, 6, 4, size=0.1, dtype=dtype)
    w, b, dw, db = params(6, 2, 0.1, dtype)
    whole = group_norm_delta(stack, 2, w, b, dweight=dw, dbias=db)
    spread = group_norm_delta(apart(stack), 2, apart(w), apart(b), dweight=apart(dw), dbias=apart(db))
    torch.testing.assert_close(spread, whole)
    assert group_norm_delta(stack[:, :0], 2, w).shape == (3, 0, 6, 4)
    assert group_norm_delta(stack[..., :0], 2, w).shape == (3, 3, 6, 0)


def test_opcheck(dtype):
    stack = make_stack(2, 3, 6, 4, size=0.1, dtype=dtype)
    torch.library.opcheck(torch.ops.finf_fast.group_norm_delta.default, (stack, 2, *params(6, 2, 0.1, dtype), 1e-5))


def test_errors():
    x = torch.zeros(3, 2, 6, 4)
    with pytest.raises(ValueError, match="groups: wanted a divisor of the 6 channels, got 4"):
        group_norm_delta(x, 4)
    with pytest.raises(ValueError, match=r"weight: wanted shape \(C\) = \(6\), got \(4,\)"):
        group_norm_delta(x, 2, torch.zeros(4))
    with pytest.raises(ValueError, match="dbias: wanted Q = 2 queries, as stack has, got 3"):
        group_norm_delta(x, 2, dbias=torch.zeros(3, 6))
    with pytest.raises(ValueError, match=r"stack: wanted \(1\+Q, B, C, ...\)"):
        group_norm_delta(x[0, 0], 2)


# Teeth.
def test_other_groups_are_caught():
    stack = make_stack(2, 3, 12, 5, size=0.1, dtype=torch.float32)
    with pytest.raises(AssertionError, match="relative error"):
        check(group_norm_delta(stack, 4), lambda q: true_norm(at(stack, q), 3, None, None), 2, torch.float32)


def test_parameters_along_space_are_caught():
    stack = make_stack(2, 3, 6, 6, size=0.1, dtype=torch.float32)
    w, b, dw, db = params(6, 2, 0.1, torch.float32)
    turned = group_norm_delta(stack, 1, w, b, dweight=dw, dbias=db).transpose(-1, -2)
    with pytest.raises(AssertionError, match="relative error"):
        check(turned, lambda q: true_norm(at(stack, q), 1, moved(w, dw, q), moved(b, db, q)), 2, torch.float32)
