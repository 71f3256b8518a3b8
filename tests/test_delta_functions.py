"""Rules of functions of one number, of softmax and its like, in the tails and on infinite values too; compositions."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from delta_cases import BOUNDS, IS, WORLDS, C, Q, S, World, case, check, of_stack
from finf_fast.delta.stack import Stack
from finf_fast.delta.table import State, fresh

X, TAME, POSITIVE = S((3, 4)), S((3, 4), tame=1.0), S((3, 4), near=2.0)

# Names of functions of one number, under which of torch's names they go, and what they are given.
UNARY = {
    "relu": (X, torch.relu, Tensor.relu, F.relu, torch.relu_, Tensor.relu_, lambda x: F.relu(x, inplace=True)),
    "silu": (X, F.silu, lambda x: F.silu(x, inplace=True), torch._C._nn.silu, torch._C._nn.silu_),
    "tanh": (X, torch.tanh, Tensor.tanh, F.tanh, torch.tanh_, Tensor.tanh_),
    "sigmoid": (X, torch.sigmoid, Tensor.sigmoid, F.sigmoid, torch.sigmoid_, Tensor.sigmoid_, torch.special.expit),
    "gelu": (X, F.gelu, lambda x: F.gelu(x, approximate="tanh"), lambda x: torch._C._nn.gelu_(x)),
    "exp": (TAME, torch.exp, Tensor.exp, torch.exp_, Tensor.exp_),
    "expm1": (TAME, torch.expm1, Tensor.expm1, torch.special.expm1, torch.expm1_, Tensor.expm1_),
    "log": (POSITIVE, torch.log, Tensor.log, torch.log_, Tensor.log_),
    "log1p": (POSITIVE, torch.log1p, Tensor.log1p, torch.special.log1p, torch.log1p_, Tensor.log1p_),
    "sqrt": (POSITIVE, torch.sqrt, Tensor.sqrt, torch.sqrt_, Tensor.sqrt_),
    "rsqrt": (POSITIVE, torch.rsqrt, Tensor.rsqrt, torch.rsqrt_, Tensor.rsqrt_),
    "reciprocal": (POSITIVE, torch.reciprocal, Tensor.reciprocal, torch.reciprocal_, Tensor.reciprocal_),
    "sin": (TAME, torch.sin, Tensor.sin, torch.sin_, Tensor.sin_),
    "cos": (TAME, torch.cos, Tensor.cos, torch.cos_, Tensor.cos_),
    "erf": (X, torch.erf, Tensor.erf, torch.special.erf, torch.erf_, Tensor.erf_),
    "square": (X, torch.square, Tensor.square, torch.square_, Tensor.square_),
    "abs": (X, torch.abs, Tensor.abs, abs, torch.absolute, Tensor.absolute, torch.abs_, Tensor.abs_, Tensor.absolute_),
    "neg": (X, torch.neg_, torch.negative_, Tensor.neg_, Tensor.negative_, Tensor.__neg__),
    "softplus": (X, F.softplus, lambda x: F.softplus(x, beta=2.0)),
    "logsigmoid": (
        X,
        F.logsigmoid,
    ),
    "leaky_relu": (
        X,
        F.leaky_relu,
        lambda x: F.leaky_relu(x, 0.2, inplace=True),
        F.leaky_relu_,
        torch._C._nn.leaky_relu,
    ),
    "elu": (X, F.elu, lambda x: F.elu(x, alpha=0.5, inplace=True), F.elu_, torch._C._nn.elu),
    "hardtanh": (X, F.hardtanh, lambda x: F.hardtanh(x, -0.5, 0.75, inplace=True), F.hardtanh_, torch._C._nn.hardtanh),
    "relu6": (X, F.relu6, lambda x: F.relu6(x, inplace=True), torch._C._nn.relu6_, torch._C._nn.relu6),
    "hardsigmoid": (
        X,
        F.hardsigmoid,
        lambda x: F.hardsigmoid(x, inplace=True),
        torch._C._nn.hardsigmoid_,
        torch._C._nn.hardsigmoid,
    ),
    "hardswish": (
        X,
        F.hardswish,
        lambda x: F.hardswish(x, inplace=True),
        torch._C._nn.hardswish_,
        torch._C._nn.hardswish,
    ),
    "mish": (X, F.mish, lambda x: F.mish(x, inplace=True), torch._C._nn.mish_, torch._C._nn.mish),
    "without a rule": (X, lambda x: F.selu(x, inplace=True), F.softsign, torch.atan, torch.special.i0e),
    "sign": (X, torch.sign, Tensor.sign, torch.sgn, Tensor.sgn, Tensor.sign_, Tensor.sgn_),
    "floor": (X, torch.floor, Tensor.floor, torch.floor_, Tensor.floor_),
    "ceil": (X, torch.ceil, Tensor.ceil, torch.ceil_, Tensor.ceil_),
    "round": (X, torch.round, Tensor.round, torch.special.round, torch.round_, Tensor.round_),
    "trunc": (X, torch.trunc, Tensor.trunc, torch.trunc_, Tensor.trunc_),
    "inputs of low form": (C((3, 4), form="mixed"), torch.tanh, F.gelu, torch.square, torch.abs),
    "0-d": (S(()), torch.tanh, F.gelu, F.silu, torch.abs, F.softplus, F.elu),
    "empty": (S((0, 4)), torch.tanh, F.gelu, F.silu, torch.abs, F.softplus, F.elu),
}


def _read_back(f):
    """Also what the argument is afterwards, which only an in-place function changes."""

    def run(x):
        y = f(x)
        return (y, x) if isinstance(x, Stack) or type(x) is Tensor else y

    return run


CASES = [
    case(f"{name} {i}", f if "low form" in name else _read_back(f), spec, slack=10 if name == "without a rule" else 1)
    for name, (spec, *functions) in UNARY.items()
    for i, f in enumerate(functions)
]
CASES += [
    case("round decimals", lambda x: (torch.round(x, decimals=1), x.ceil().to(torch.int64)), X),
    case("steps of integers", lambda i: (i.sign(), i.abs()), IS((3, 4), 5)),
    case("glu", lambda x: (F.glu(x), F.glu(x, dim=0), F.glu(x, 1), torch._C._nn.glu(x, 0)), S((4, 6))),
    case(
        "softplus with a threshold",
        lambda x: (F.softplus(x, 1.0, 0.5), F.softplus(x, beta=2, threshold=-1), F.softplus(x, threshold=50)),
        X,
    ),
    case("softmax", lambda x: (torch.softmax(x, -1), x.softmax(0), F.softmax(x, dim=1), torch.softmax(x, dim=-2)), X),
    case("softmax special", lambda x: (torch.special.softmax(x, 1), torch._softmax(x, 1, False)), X),
    case("softmax of scores", lambda x: F.softmax(x, -1), S((2, 2, 3, 5))),
    case("softmax over nothing said", lambda x: F.softmax(x), S((4,))),
    case("softmax 0-d", lambda x: (x.softmax(0), x.log_softmax(-1), x.logsumexp(0)), S(())),
    case("softmax empty", lambda x: (x.softmax(-1), x.log_softmax(-1)), S((0, 4))),
    case("log_softmax", lambda x: (torch.log_softmax(x, -1), x.log_softmax(0), F.log_softmax(x, dim=1)), X),
    case("log_softmax special", lambda x: (torch.special.log_softmax(x, 1), torch._log_softmax(x, 1, False)), X),
    case(
        "logsumexp",
        lambda x: (torch.logsumexp(x, -1), x.logsumexp(0, keepdim=True), torch.logsumexp(x, (0, 1))),
        X,
        sums=True,
    ),
    case(
        "logsumexp special",
        lambda x: (torch.special.logsumexp(x, 1), torch.logsumexp(x, dim=[0], keepdim=True)),
        X,
        sums=True,
    ),
    case("normalize", lambda x: (F.normalize(x), F.normalize(x, dim=-1), F.normalize(x, 2.0, 0)), X),
    case("normalize otherwise", lambda x: F.normalize(x, p=1.0, dim=-1), X, slack=10),
    case("normalize and clamp", lambda x: F.normalize(x, dim=-1, eps=0.5), X),
]


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
@pytest.mark.parametrize("one", CASES, ids=lambda c: c.name)
@settings(max_examples=8, deadline=None)
@given(st.data())
def test_a_rule_is_the_change_in_float64(one, data):
    one.check(data.draw(WORLDS))


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_vector_of_which_a_step_leaves_nothing(dtype, p):
    """Its length as value plus change is rounding alone, and the least it may be is lost in it."""
    before = torch.tensor([[-1.0, 1.0, 1.0, 0.0], [0.0, 2.0, 0.0, 1.0], [3.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    changes = torch.stack([-before, -before.roll(1, 0), torch.full_like(before, -1.0)])
    check(lambda x: F.normalize(x, p), [of_stack(torch.cat([before[None], changes]).to(dtype))], dtype)


TAILS = torch.tensor([-30.0, -10.0, -3.0, -0.5, 0.0, 0.5, 3.0, 10.0, 30.0], dtype=torch.float64)
SMOOTH = (
    "relu",
    "silu",
    "tanh",
    "sigmoid",
    "gelu",
    "erf",
    "softplus",
    "logsigmoid",
    "elu",
    "leaky_relu",
    "hardswish",
    "mish",
)


def gelu_with_its_tail(x):
    """Truth by erfc: torch's own gelu, 1 + erf, is 0 from -8.3 down."""
    return F.gelu(x) if isinstance(x, Stack) else x * torch.special.erfc(-x * 0.5**0.5) / 2


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
def test_each_tail_by_itself(name, size, dtype):
    f = gelu_with_its_tail if name == "gelu" else UNARY[name][1]
    for h in TAILS:
        stacked = torch.cat([h.view(1, 1), size * torch.tensor([[1.0], [-1.0], [0.3]], dtype=torch.float64)])
        check(f, [of_stack(stacked.to(dtype))], dtype)


LINKS = {
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
    "sin": torch.sin,
    "softplus": F.softplus,
    "exp": lambda x: torch.exp(-x * x),
    "rational": lambda x: x / (1 + x.abs()),
    "root": lambda x: (x.square() + 1).sqrt() - 0.5,
    "norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "softmax": lambda x: x.softmax(-1) * 3,
    "elu": F.elu,
    "affine": lambda x: 0.5 * x - 1,
}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(sorted(LINKS)), min_size=3, max_size=5),
    st.sampled_from([1.0, 1e-3, 1e-6]),
    st.integers(0, 99),
)
def test_the_rule_of_a_composition_is_the_composition_of_the_rules(names, size, seed):
    def chained(x):
        return functools.reduce(lambda y, name: LINKS[name](y), names, x)

    draw = torch.Generator().manual_seed(seed)
    x = S((5, 6), tame=1.0).make(World(torch.float64, size, seed=seed), draw)
    found, whole = chained(x.carried()).stacked, [chained(row) for row in x.rows]
    for q in range(Q):
        true = whole[1 + q] - whole[0]
        scale = (x.rows[1 + q] - x.rows[0]).norm()  # a chain may flatten out and leave nothing of the change
        assert (found[1 + q] - true).norm() <= 1e-9 * (true.norm() + 1e-3 * scale) + 1e-13


def test_a_composition_without_a_rule_is_the_same_in_float64():
    x = of_stack(torch.randn(1 + Q, 3, 4, dtype=torch.float64))
    with fresh(State(Q)) as state:
        check(lambda y: torch.lgamma(F.gelu(y) + 2).tanh(), [x], torch.float64)
    assert state.generic == {"lgamma": 1}
