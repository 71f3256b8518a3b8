"""activation_delta: every face, dtype, function and size of change against long double, with and without a gate."""

from __future__ import annotations

import importlib
import os

import mpmath
import numpy as np
import pytest
import torch

from checks import face_fixture
from finf_fast.ops import activation_delta
from finf_fast.ops.activation_delta import KINDS
from finf_fast.reference.changes import CHANGES, VALUES
from stack_cases import (
    BOUNDS,
    LONG,
    SIZES,
    apart,
    at,
    check,
    draw,
    exact,
    make_stack,
    relative,
    same_bits,
    sizes,
    with_threads,
)

dtype = face_fixture("activation_delta")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    with mpmath.workdps(30):
        phi = [LONG(str(mpmath.erfc(-mpmath.mpf(str(v)) / mpmath.sqrt(2)) / 2)) for v in x.ravel()]
    return x * np.array(phi, LONG).reshape(x.shape)


TRUE = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": gelu,
    "gelu_tanh": lambda x: x * sigmoid(2 * np.sqrt(2 / LONG(np.pi)) * (x + LONG("0.044715") * x**3)),
    "silu": lambda x: x * sigmoid(x),
    "tanh": np.tanh,
    "sigmoid": sigmoid,
    "quick_gelu": lambda x: x * sigmoid(LONG("1.702") * x),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_every_function_and_size(dtype, kind, size):
    if size not in sizes(dtype):
        pytest.skip("float16 cannot hold it")
    stack = make_stack(2, 4, 37, size=size, dtype=dtype, base=2.0)
    check(activation_delta(stack, kind), lambda q: TRUE[kind](at(stack, q)), 2, dtype, size)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("moves", ["both", "stack", "gate", "none"])
def test_gates(dtype, kind, moves):
    a = make_stack(3 if moves in ("both", "stack") else 0, 5, 33, size=1e-1, dtype=dtype)
    g = make_stack(3 if moves in ("both", "gate") else 0, 5, 33, size=1e-1, dtype=dtype, seed=5)
    Q = 0 if moves == "none" else 3
    check(activation_delta(a, kind, g), lambda q: TRUE[kind](at(a, q)) * at(g, q), Q, dtype)


def test_pieces_meet(dtype, monkeypatch):
    """Under one piece, exactly one, several, ragged."""
    page = importlib.import_module("finf_fast.reference.activation_delta")
    stack = make_stack(2, 3, 50, size=1e-2, dtype=dtype)
    whole = activation_delta(stack, "gelu_tanh")
    for piece in (1, 3 * 7, 3 * 50, 3 * 75, 3 * 150):
        monkeypatch.setattr(page, "_PIECE", piece)
        torch.testing.assert_close(activation_delta(stack, "gelu_tanh"), whole)


# Vectors hold up to 16 numbers, blocks 1024, tasks 2^17 with all changes: one short, exact, one more, several.
@pytest.mark.parametrize("M", [1, 15, 16, 17, 63, 64, 65, 1023, 1024, 1025, 2 * 1024 + 5, 48 * 1024 + 3])
@pytest.mark.parametrize("gated", [False, True])
def test_every_width(dtype, M, gated):
    stack, gate = (make_stack(2, M, size=1e-2, dtype=dtype, seed=s) for s in (0, 5))
    out = activation_delta(stack, "silu", gate if gated else None)
    check(out, lambda q: TRUE["silu"](at(stack, q)) * (at(gate, q) if gated else 1), 2, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_depends_on_nothing_but_its_place(dtype, kind):
    """Not on whether a neighbour's change is large, nor on threads."""
    if os.environ["FINF_BACKEND"] == "reference":
        pytest.skip("plain torch chooses a formula for a whole piece at a time")
    stack = make_stack(2, 90_000, size=1e-2, dtype=dtype)
    calm = activation_delta(stack, kind)
    stack[1, ::7] *= 1000
    stirred = with_threads(lambda: activation_delta(stack, kind))
    kept = torch.arange(90_000) % 7 != 0
    assert same_bits(stirred) and torch.equal(stirred[0][:, kept], calm[:, kept])


FAR = [-30.0, -9.0, -3.0, -1.2785, -0.7518, -0.1, 0.0, 1e-3, 0.5, 2.0, 6.0, 12.0]


@pytest.mark.parametrize("kind", KINDS)
def test_each_number_by_itself(dtype, kind):
    """In the tails, through the minima, across 0, over every size of change: right to what its own terms round to."""
    if dtype not in (torch.float32, torch.float64):
        pytest.skip("the result's own rounding hides it")
    ways = (1, -1, 1.37, -1.37, 1.5, 2, -2, 2.5, 3, -3, 4, -4, 5, 6, -6, 8, -8)
    steps = [s * 10.0**-k for k in range(10) for s in ways] + [20.0, -20.0, 60.0, -60.0]
    h, d = torch.tensor(FAR, dtype=dtype), torch.tensor(steps, dtype=dtype)
    stack = torch.cat([h[None], d[:, None].expand(-1, len(FAR))])
    out = activation_delta(stack, kind)
    for q in range(len(steps)):
        x0, x1 = at(stack, None), at(stack, q)
        true = TRUE[kind](x1) - TRUE[kind](x0)
        # What the exponent brings along, x^2 / 2 or (gelu_tanh) x^3 / 14 with some roundings: in truth, which is a
        # difference in 64 bits, and in the result; and the two terms of a product, d s and x1 (s1 - s0). The plain
        # difference of two values in a tail has twice that.
        size = np.maximum(np.abs(x0), np.abs(x1))
        doubt = (64 + size**3) * np.finfo(LONG).eps * (np.abs(TRUE[kind](x1)) + np.abs(TRUE[kind](x0)))
        terms = np.abs(true) * (8 + size**2 / 2 + (size**3 / 10 if kind == "gelu_tanh" else 0))
        gate = np.abs(exact(d)[q] * slope_scale(kind, x0, x1))
        error = np.abs(exact(out[1 + q]) - true)
        tiny = float(torch.finfo(dtype).tiny)
        allowed = 2 * torch.finfo(dtype).eps * (terms + 8 * gate) + doubt + tiny
        assert (error <= allowed).all(), f"change {steps[q]}: at {h[torch.from_numpy(error > allowed)].tolist()}"


def slope_scale(kind, x0, x1):
    """What the terms of x gate(x)'s change add up to, over its argument's: at most the gate at its larger end."""
    if kind in ("relu", "tanh", "sigmoid"):
        return np.zeros_like(x0)
    top = np.maximum(x0, x1)
    return np.where(top > 0, 1, np.abs(TRUE[kind](top)) * (1 + np.abs(top)))


@pytest.mark.parametrize("kind", KINDS)
def test_infinities_and_nan(dtype, kind):
    """A NaN stays where it is; a value at infinity gives the limit where torch's own function does."""
    stack = torch.zeros(2, 40, dtype=dtype)
    stack[0, 3], stack[1, 20], stack[0, 25], stack[0, 30] = torch.nan, torch.nan, torch.inf, -torch.inf
    out = activation_delta(stack, kind)
    value = VALUES[kind](stack[0].double())
    assert out[:, 3].isnan().all() and out[1, 20].isnan() and out[0, 20] == value[20]
    if kind in ("relu", "tanh", "sigmoid"):
        assert out[0, 25] == value[25] and out[0, 30] == value[30] and out[1, [25, 30]].eq(0).all()
    others = [i for i in range(40) if i not in (3, 20, 25, 30)]
    assert out[1, others].eq(0).all() and torch.equal(out[0, others].double(), value[others])


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "silu", "quick_gelu"])
def test_a_change_without_end(dtype, kind):
    """From wherever in the tail: the value at infinity."""
    h = torch.tensor([-200.0, -15.0, -1.0, 2.0])
    out = activation_delta(torch.stack([h, torch.full_like(h, torch.inf)]).to(dtype), kind)
    assert out[1].eq(torch.inf).all()


def test_bfloat16_is_rounded_to_the_nearest_even(dtype):
    """Every product of two significands: exact in float32, some of them halfway between two bfloat16."""
    if dtype != torch.bfloat16:
        pytest.skip("of bfloat16")
    x = torch.arange(128, 256, dtype=torch.float32).repeat_interleave(129)[: 128 * 129]
    gate = torch.arange(128, 257, dtype=torch.float32).repeat(128) * 2.0**-40
    gate[::3].neg_()
    true = (x * gate).to(torch.bfloat16)
    assert (true.double() != x.double() * gate.double()).any()
    got = activation_delta(x.to(dtype)[None, None], "relu", gate.to(dtype)[None, None])
    assert got[0, 0].tolist() == true.tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [False, True])
def test_bfloat16_costs_its_rounding_and_no_more(dtype, kind, gated):
    """Every value of 2^-9 to 12 and either sign, changes short and long: half a last place, and a hundredth of that."""
    if dtype != torch.bfloat16 or os.environ["FINF_BACKEND"] == "reference":
        pytest.skip("of bfloat16; the value is torch's own function in the reference")
    size = torch.arange(0x3B00, 0x4140, dtype=torch.int16).view(dtype)
    h = torch.cat([size, -size])
    steps = torch.tensor([2.0**-k * by for k in (12, 8, 5, 3, 1) for by in (1.0, -1.375)]).to(dtype)
    gate = torch.ones(1, len(h), dtype=dtype) if gated else None
    out = activation_delta(torch.cat([h[None], steps[:, None].expand(-1, len(h))]), kind, gate)
    x = exact(h)
    for got, true, terms in [
        (out[0], TRUE[kind](x), 0),
        *((out[1 + q], TRUE[kind](x + d) - TRUE[kind](x), np.abs(d * slope_scale(kind, x, x + d)))
          for q, d in enumerate(exact(steps))),
    ]:  # fmt: skip
        half = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(true), LONG(1e-37)).astype(np.float64))) - 8)
        doubt = 64 * np.finfo(LONG).eps * (1 + np.abs(x) ** 3) * (np.abs(TRUE[kind](x)) + 1e-30)
        assert (np.abs(exact(got) - true) <= half + 2e-5 * (np.abs(true) + terms) + doubt + 1e-37).all()


def test_no_change_is_exactly_zero(dtype):
    stack = make_stack(2, 40, size=0.0, dtype=dtype, base=8.0)
    for kind in KINDS:
        assert not activation_delta(stack, kind)[1:].any()


def test_layouts_and_empties(dtype):
    stack, gate = make_stack(2, 6, 8, size=1e-2, dtype=dtype), make_stack(2, 6, 8, size=1e-2, dtype=dtype, seed=9)
    torch.testing.assert_close(
        activation_delta(apart(stack), "silu", apart(gate)), activation_delta(stack, "silu", gate)
    )
    assert activation_delta(stack[:, :0], "gelu").shape == (3, 0, 8)
    assert activation_delta(stack[:1], "gelu").shape == (1, 6, 8)
    assert activation_delta(stack[:, 0, 0], "gelu").shape == (3,)


@pytest.mark.parametrize("gated", [False, True])
def test_opcheck(dtype, gated):
    stack = make_stack(2, 3, 5, size=1e-2, dtype=dtype)
    gate = draw(1, 3, 5, dtype=dtype) if gated else None
    torch.library.opcheck(torch.ops.finf_fast.activation_delta.default, (stack, "silu", gate))


def test_compiles_without_a_break():
    stack = make_stack(2, 3, 5, size=1e-2, dtype=torch.float32)
    compiled = torch.compile(lambda x: activation_delta(2 * x, "gelu") + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(stack), activation_delta(2 * stack, "gelu") + 1)


def test_errors():
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"kind: wanted one of relu, .* got 'mish'"):
        activation_delta(x, "mish")
    with pytest.raises(TypeError, match="stack: wanted float32 .* got int64"):
        activation_delta(x.long(), "relu")
    with pytest.raises(ValueError, match=r"stack: wanted a stack \(1\+Q, ...\)"):
        activation_delta(x[:0], "relu")
    with pytest.raises(ValueError, match=r"gate: wanted shape \(1\+Q, 4\), got \(3, 5\)"):
        activation_delta(x, "relu", torch.zeros(3, 5))
    with pytest.raises(ValueError, match="gate: wanted Q = 2 queries, as stack has, got 1"):
        activation_delta(x, "relu", torch.zeros(2, 4))
    with pytest.raises(TypeError, match="gate: wanted float32, got float64"):
        activation_delta(x, "relu", torch.zeros(3, 4).double())
    with pytest.raises(ValueError, match="gate: wanted on cpu, where stack is, got meta"):
        activation_delta(x, "relu", torch.zeros(3, 4, device="meta"))


# Teeth: broken operations that the check must catch.
def after(stack, kind):
    return torch.cat([VALUES[kind](stack[:1]), VALUES[kind](stack[:1] + stack[1:])])


def subtracted(stack, kind):
    return torch.cat([VALUES[kind](stack[:1]), VALUES[kind](stack[:1] + stack[1:]) - VALUES[kind](stack[:1])])


def derivative(stack, kind):
    h = stack[:1].clone().requires_grad_()
    slope = torch.autograd.grad(VALUES[kind](h).sum(), h)[0]
    return torch.cat([VALUES[kind](stack[:1]), slope * stack[1:]])


def shifted(stack, kind):
    return torch.cat([VALUES[kind](stack[:1]), CHANGES[kind](stack[:1], stack[1:]).roll(1, 0)])


@pytest.mark.parametrize("broken, size", [(after, 0.1), (subtracted, 1e-6), (derivative, 0.1), (shifted, 0.1)])
def test_broken_operations_are_caught(broken, size):
    stack = make_stack(2, 4, 37, size=size, dtype=torch.float32)
    with pytest.raises(AssertionError, match="relative error"):
        check(broken(stack, "silu"), lambda q: TRUE["silu"](at(stack, q)), 2, torch.float32, size)


def test_a_dropped_gate_change_is_caught():
    a, g = (
        make_stack(2, 4, 9, size=0.1, dtype=torch.float32),
        make_stack(2, 4, 9, size=0.1, dtype=torch.float32, seed=3),
    )
    out = activation_delta(a, "silu", g[:1])
    true = TRUE["silu"](at(a, 0)) * at(g, 0) - TRUE["silu"](at(a, None)) * at(g, None)
    assert relative(out[1], true) > 10 * BOUNDS[torch.float32] and exact(out[1]).shape == true.shape
