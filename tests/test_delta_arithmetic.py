"""Rules of arithmetic, comparison and choice, in every spelling, against float64 truth."""

from __future__ import annotations

import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from delta_cases import BS, IS, WORLDS, B, C, I, P, S, case

X, Y, ROW, COLUMN, NUMBER = S((3, 4)), S((3, 4)), S((4,)), S((3, 1)), S(())
AWAY = S((3, 4), near=2.0)  # away from 0: what may be divided by, or raised to any power
PAIRS = {
    "stack": (X, Y),
    "row": (X, ROW),
    "outer": (COLUMN, ROW),
    "0-d": (X, NUMBER),
    "0-d first": (NUMBER, X),
    "more dimensions": (ROW, S((2, 3, 4))),
    "plain": (X, P((3, 4))),
    "plain row": (X, P((4,))),
    "plain of more dimensions": (X, P((2, 3, 4))),
    "plain 0-d": (X, P(())),
    "plain first": (P((2, 3, 4)), X),
    "changed": (X, C((4,))),
    "changed first": (C((3, 4), form="low"), X),
    "changed both": (C((3, 4), form="mixed"), C((4,))),
    "integers": (X, IS((3, 4), 5)),
    "plain integers": (X, I((4,), 5)),
    "integers first": (IS((4,), 5), X),
    "empty": (S((0, 4)), ROW),
}
BINARY = {
    "add": torch.add,
    "+": operator.add,
    "mul": torch.mul,
    "*": operator.mul,
    "sub": torch.sub,
    "-": operator.sub,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "lt": torch.lt,
    "<=": operator.le,
    "eq": torch.eq,
    ">": operator.gt,
    "ne": Tensor.ne,
    "where": lambda x, y: torch.where(x > y, x, y),
}


def _into(f):
    """The same, written into its first argument; a view keeps the model from seeing the result alone."""

    def run(x, y):
        f(x, y)
        return x

    return run


def _divisor(spec):
    """The same away from 0."""
    if isinstance(spec, S):
        return type(spec)(spec.shape, near=2.0) if not isinstance(spec, C) else C(spec.shape, near=2.0)
    return spec


CASES = [case(f"{name} {kind}", f, *pair) for name, f in BINARY.items() for kind, pair in PAIRS.items()]
CASES += [
    case(f"/ {kind}", operator.truediv, x, _divisor(y))
    for kind, (x, y) in PAIRS.items()
    if "integers" not in kind or "first" in kind
]
CASES += [
    case("numbers", lambda x: (x + 2, 2 + x, x - 2, 2 - x, x * 3, 3 * x, x / 4, -x, +x, True * x), X),
    case("number / x", lambda x: (2 / x, torch.reciprocal(x), x.reciprocal()), AWAY),
    case("alpha", lambda x, y: (torch.add(x, y, alpha=3), x.sub(y, alpha=2), torch.rsub(x, y, alpha=2)), X, Y),
    case("alpha of a plain", lambda x, y: (torch.add(x, y, alpha=3), torch.sub(y, x, alpha=2)), X, P((4,))),
    case("rsub of a number", lambda x: (torch.rsub(x, 2), torch.rsub(x, 2, alpha=3)), X),
    case("names", lambda x, y: torch.add(input=x, other=y), X, ROW),
    case("subtract", lambda x, y: (torch.subtract(x, y), x.subtract(y)), X, ROW),
    case("multiply", lambda x, y: (torch.multiply(x, y), x.multiply(y), x.mul(other=y)), X, P((4,))),
    case("divide", lambda x, y: (torch.divide(x, y), x.true_divide(y), torch.true_divide(x, y)), X, AWAY),
    case("divide method", lambda x, y: (x.divide(y), torch.div(x, other=y), x.div(y)), X, P((4,), near=2.0)),
    case("neg", lambda x: (torch.neg(x), x.negative(), torch.negative(x), torch.positive(x), x.positive()), X),
    case("+=", _into(operator.iadd), X, ROW),
    case("-=", _into(operator.isub), X, P((4,))),
    case("*=", _into(operator.imul), X, Y),
    case("/=", _into(operator.itruediv), X, AWAY),
    case("add_", _into(lambda x, y: x[1:].add_(y, alpha=2)), X, ROW),
    case("sub_", _into(lambda x, y: x.mT[0].sub_(y).subtract_(1)), X, S((3,))),
    case("mul_", _into(lambda x, y: x.mul_(y).multiply_(2)), X, ROW),
    case("div_", _into(lambda x, y: x.div_(y).divide_(2).true_divide_(3)), X, AWAY),
    case("neg_", _into(lambda x, y: (x[:, 0].neg_(), x[:, 1].negative_())), X, Y),
    case("out", lambda x, y: torch.add(x, y, out=x), X, ROW),
    case("reciprocal_", lambda x: x.reciprocal_(), AWAY),
    case("pow", lambda x: (x**2, x**3, torch.pow(x, 4), x.pow(1), x**0), S((3, 4), tame=1.0)),
    case("pow exponent", lambda x: (torch.pow(input=x, exponent=2), x.pow(exponent=3)), S((3, 4), tame=1.0)),
    case("pow of any", lambda x: (x**-1, x**-2, x**0.5, x**-0.5, x**1.7, torch.pow(x, -2.2)), AWAY),
    case("pow 0-d", lambda x: x ** torch.tensor(2.0), S((3, 4), tame=1.0)),
    case("pow of tensors", lambda x, y: (x**y, y**x, torch.pow(x, y)), AWAY, P((4,), near=1.5)),
    case("pow of stacks", lambda x, y: x**y, AWAY, S((4,), near=1.5)),
    case("rpow", lambda x: (2**x, torch.pow(2.5, x), 1.0**x), S((3, 4), tame=1.0), slack=2),
    case("pow_", lambda x: x.pow_(2), S((3, 4), tame=1.0)),
    case("**=", lambda x: operator.ipow(x, 2), S((3, 4), tame=1.0)),
    case("float_power", lambda x: (torch.float_power(x, 2), x.float_power(3)), S((3, 4), tame=1.0)),
    case("integer powers", lambda i: (i**2, i**0.5), IS((3, 4), 5)),
    case("addcmul", lambda x, y, z: (torch.addcmul(x, y, z), x.addcmul(y, z, value=2)), X, Y, ROW),
    case("addcmul plain", lambda x, y, z: (torch.addcmul(x, y, z), torch.addcmul(y, x, z)), P((3, 4)), Y, P((4,))),
    case("addcmul_", lambda x, y, z: x.addcmul_(y, z, value=-1), X, Y, P((4,))),
    case("addcdiv", lambda x, y, z: (torch.addcdiv(x, y, z), x.addcdiv(y, z, value=2)), X, Y, AWAY),
    case("addcdiv_", lambda x, y, z: x.addcdiv_(y, z), X, P((4,)), AWAY),
    case("lerp", lambda x, y: (torch.lerp(x, y, 0.25), x.lerp(y, weight=0.75)), X, Y),
    case("lerp weights", lambda x, y, w: (torch.lerp(x, y, w), torch.lerp(y, x, w)), X, P((3, 4)), S((4,), near=0.5)),
    case("lerp_", lambda x, y: x.lerp_(y, 0.25), X, Y),
    case("//", lambda x: (x // 0.25, torch.floor_divide(x, 2), x.floor_divide(2)), X),
    case("// of stacks", lambda x, y: (x // y, 3 // y, torch.div(x, y, rounding_mode="trunc")), X, AWAY),
    case("// of integers", lambda i, j: (i // 2, torch.div(i, 2, rounding_mode="floor"), i % 3), IS((4,), 9), I((), 3)),
    case("%", lambda x: (x % 0.5, torch.fmod(x, 0.5), x.remainder(0.5), x.fmod(0.5), torch.remainder(x, 0.5)), X),
    case("floor_divide_", lambda i: (i.clone().floor_divide_(2), i.remainder_(3)), IS((4,), 9)),
    case("fmod_", lambda i: i.clone().fmod_(3), IS((4,), 9)),
    case("integers", lambda i, j: (i + j, i - 1, 1 - i, i * j, -i, i * 2, i + 0.5, i / 2), IS((3, 4), 5), I((4,), 3)),
    case("compare", lambda x: (x < 0, x.le(0), torch.gt(x, 0), x >= 0.5, x.eq(0), x != 0, x > 0), X),
    case("compare names", lambda x, y: (x.less(y), torch.less_equal(x, y), x.greater(y), x.greater_equal(y)), X, ROW),
    case("compare others", lambda x, y: (torch.less(x, y), x.less_equal(y), torch.greater(x, y), x.lt(y)), X, ROW),
    case("compare more", lambda x, y: (torch.greater_equal(x, y), torch.ge(x, y), x.ge(y), x.gt(y)), X, ROW),
    case("equal or not", lambda x, y: (torch.not_equal(x, y), x.not_equal(y), torch.ne(x, y), torch.le(x, y)), X, ROW),
    case("isclose", lambda x, y: (torch.isclose(x, y), x.isclose(y, rtol=1e-1, atol=1e-3)), X, ROW),
    case(
        "logic", lambda a, b: (a & b, a | b, a ^ b, ~a, torch.logical_and(a, b), a.logical_or(b)), BS((3, 4)), B((4,))
    ),
    case(
        "logic names",
        lambda a, b: (a.logical_xor(b), torch.logical_or(a, b), a.logical_and(b), a.logical_not()),
        BS((3, 4)),
        BS((4,)),
    ),
    case(
        "logic of bits",
        lambda a, b: (torch.bitwise_and(a, b), a.bitwise_or(b), torch.bitwise_xor(a, b)),
        IS((3, 4), 8),
        I((4,), 8),
    ),
    case(
        "more bits",
        lambda a, b: (a.bitwise_and(b), torch.bitwise_or(a, b), a.bitwise_xor(b), ~a),
        IS((4,), 8),
        I((4,), 8),
    ),
    case("bits of a number", lambda a: (3 & a, 1 | a, 2 ^ a, torch.bitwise_not(a), a.bitwise_not()), IS((4,), 8)),
    case("plain & stack", lambda a, b: (b & a, b | a, b ^ a, torch.logical_not(a)), BS((3, 4)), B((4,))),
    case("logic of stacks", lambda x, y: (torch.logical_xor(x > 0, y > 0), (x > 0) * 2, (x > 0) + (y > 0)), X, ROW),
    case(
        "in place logic",
        lambda a, b: (a.clone().logical_and_(b), a.clone().logical_or_(b), a.clone().logical_xor_(b)),
        BS((3, 4)),
        BS((4,)),
    ),
    case(
        "in place bits",
        lambda a, b: (a.clone().bitwise_and_(b), a.clone().bitwise_or_(b), a.bitwise_xor_(b)),
        IS((3, 4), 8),
        I((4,), 8),
    ),
    case(
        "&=",
        lambda a, b: (operator.iand(a.clone(), b), operator.ior(a.clone(), b), operator.ixor(a, b)),
        BS((4,)),
        B((4,)),
    ),
    case("not in place", lambda a: (a.clone().logical_not_(), a.bitwise_not_()), BS((3, 4))),
    case(
        "in place comparison",
        lambda i: (i.clone().lt_(2), i.clone().le_(2), i.clone().gt_(2), i.clone().ge_(2)),
        IS((4,), 5),
    ),
    case("in place equality", lambda i: (i.clone().eq_(2), i.clone().ne_(2), i.clone().not_equal_(2)), IS((4,), 5)),
    case(
        "in place names",
        lambda i: (i.clone().less_(2), i.clone().less_equal_(2), i.clone().greater_(2), i.greater_equal_(2)),
        IS((4,), 5),
    ),
    case("comparison written into numbers", lambda x: (x.clone().lt_(0), x.clone().ge_(0.5)), X),
    case(
        "isnan",
        lambda x: (x.isnan(), torch.isinf(x), x.isfinite(), torch.isposinf(x), x.isneginf(), torch.isneginf(x)),
        X,
    ),
    case("isnan names", lambda x: (torch.isnan(x), torch.isfinite(x), x.isinf(), x.isposinf()), X),
    case("where numbers", lambda c, x: (torch.where(c, x, 0.0), torch.where(c, 1.0, x), x.where(c, 2.0)), B((3, 4)), X),
    case(
        "where stacks", lambda c, x, y: (torch.where(c, x, y), x.where(c, y), torch.where(c, y, x)), BS((3, 4)), X, ROW
    ),
    case(
        "where integers",
        lambda c, i, j: (torch.where(c, i, j), torch.where(c, 1, 0)),
        BS((3, 4)),
        IS((4,), 5),
        I((3, 1), 5),
    ),
    case("where plain", lambda c, x, y: torch.where(c, x, y), BS((2, 3, 4)), P((3, 4), tame=1.0), P((4,), tame=1.0)),
    case("where names", lambda c, x, y: torch.where(condition=c, input=x, other=y), B((2, 1, 4)), X, P((4,))),
    case("where broadcast", lambda c, x: torch.where(c, x, 0.0), B((2, 3, 4)), ROW),
    case("masked_fill", lambda x, m: (x.masked_fill(m, 2.0), torch.masked_fill(x, m, -1)), X, B((3, 4))),
    case("masked_fill row", lambda x, m: x.masked_fill(mask=m, value=2.0), X, B((4,))),
    case("masked_fill broadcast", lambda x, m: x.masked_fill(m, 2.0), ROW, B((3, 4))),
    case("masked_fill value", lambda x, m, v: (x.masked_fill(m, v), x.masked_fill_(m, 3.0)), X, B((3, 4)), P(())),
    case("masked_fill carried", lambda x, m, v: x.masked_fill(m, v), P((3, 4)), B((4,)), NUMBER),
    case("masked_fill differs", lambda x, m: (x.masked_fill(m, 2.0), x.masked_fill(m, 0)), X, BS((3, 4))),
    case("masked_fill integers", lambda i, m: i.masked_fill(m, 7), IS((3, 4), 5), B((4,))),
    case("masked_fill with inf", lambda x, m: x.masked_fill(m, -torch.inf), X, B((3, 4))),
    case("clamp", lambda x: (x.clamp(-0.5, 0.5), torch.clamp(x, min=0.25), x.clamp(max=0.5), torch.clip(x, -1, 1)), X),
    case("clamp one side", lambda x: (x.clamp_min(0.25), torch.clamp_min(x, 0.25), x.clamp_max(0.25), x.clip(0)), X),
    case("clamp_max", lambda x: torch.clamp_max(x, max=0.25), X),
    case("clamp by tensors", lambda x, y: (x.clamp(min=y), torch.clamp(x, y, x.abs()), torch.clamp_max(x, y)), X, ROW),
    case("clamp plain", lambda x, y: (x.clamp(min=y), x.clamp_min(y), x.clamp_max(y)), P((3, 4)), ROW),
    case("clamp integers", lambda i: (i.clamp(1, 3), i.clamp_max(2), i.clamp(min=2)), IS((3, 4), 6)),
    case(
        "clamp_",
        lambda x: (x.clone().clamp_(-0.5, 0.5), x.clone().clip_(0), x.clone().clamp_min_(0.25), x.clamp_max_(0.25)),
        X,
    ),
    case("fill_", _into(lambda x, y: (x[0].fill_(2.0), x[1].zero_(), x[2, 0].fill_(y))), X, NUMBER),
    case("fill", lambda x: (torch.fill(x, 2.0), torch.zeros_like(x)), X),
    case(
        "+ by name",
        lambda x, y: (x.__add__(y), x.__radd__(y), x.__sub__(y), x.__rsub__(y), x.__mul__(y), x.__rmul__(y)),
        X,
        ROW,
    ),
    case(
        "/ by name",
        lambda x, y: (x.__truediv__(y), y.__rtruediv__(x), x.__mod__(0.5), x.__pow__(2), x.__matmul__(y[0])),
        S((3, 4), tame=1.0),
        S((3, 4), near=2.0),
        slack=3,
    ),
    case(
        "< by name", lambda x, y: (x.__lt__(y), x.__le__(y), x.__gt__(y), x.__ge__(y), x.__ne__(y), x.__eq__(y)), X, ROW
    ),
    case(
        "& by name",
        lambda a, b: (a.__and__(b), a.__rand__(b), a.__ror__(b), a.__rxor__(b), torch.logical_xor(a, b)),
        BS((4,)),
        B((4,)),
    ),
    case("+= by name", lambda x, y: x.__iadd__(y).__isub__(2 * y).__imul__(2).__idiv__(4), X, P((4,))),
    case("//= by name", lambda i: (i.clone().__ifloordiv__(2), i.__imod__(3)), IS((4,), 9)),
    case("float_power_", lambda x: x.float_power_(2), S((3, 4), tame=1.0, dtype=torch.float64)),
    case(
        "clamp_ of torch",
        lambda x: (
            torch.clamp_(x.clone(), -0.5, 0.5),
            torch.clip_(x.clone(), 0),
            torch.clamp_min_(x.clone(), 0),
            torch.clamp_max_(x, 0.25),
        ),
        X,
    ),
    case("fill_ of torch", lambda x: (torch.fill_(x[0], 2.0), torch.zero_(x[1]), x), X),
    case(
        "max of two",
        lambda x, y: (torch.max(x, y), x.min(y), torch.max(x, other=y), x.maximum(y), x.minimum(y)),
        X,
        ROW,
    ),
]


@pytest.mark.parametrize("one", CASES, ids=lambda c: c.name)
@settings(max_examples=8, deadline=None)
@given(st.data())
def test_a_rule_is_the_change_in_float64(one, data):
    one.check(data.draw(WORLDS))
