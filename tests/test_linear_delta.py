"""linear_delta on every face and dtype: each form of change at every size, edges, layouts, errors, compilers, teeth."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

import checks
from checks import LONG, exact
from finf_fast import reference
from finf_fast.ops import linear_delta

dtype = checks.face_fixture("linear_delta")

# ||e|| / ||true|| of the changes: each is rounded two or three times, to 8 bits (1/512 at most), to 11, to 24, to 53.
BOUNDS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
STEPS = (10, 1, 1e-2, 1e-4, 1e-6, 1e-9)
FORMS = ("none", "dense", "low rank", "bias", "dense and bias", "low rank and bias")


@dataclass(frozen=True)
class Layer:
    stack: Tensor
    W: Tensor
    bias: Tensor | None = None
    dW: Tensor | None = None
    dW_factors: tuple[Tensor, Tensor] | None = None
    db: Tensor | None = None

    @property
    def changes(self) -> dict:
        return {"dW": self.dW, "dW_factors": self.dW_factors, "db": self.db}

    def run(self, op=linear_delta) -> Tensor:
        return op(self.stack, self.W, self.bias, **self.changes)

    @property
    def dense(self) -> Tensor | None:
        """The weight's change in float64, whatever its form."""
        if self.dW_factors is None:
            return None if self.dW is None else self.dW.double()
        U, V = self.dW_factors
        return U.double() @ V.double().mT


def make_layer(form="low rank", *, step=1e-2, N=9, D=24, E=17, Q=3, r=4, moved=True, dtype=torch.float32) -> Layer:
    draw = torch.Generator().manual_seed(1)

    def normal(*shape, size=1.0):
        return (size * torch.randn(*shape, generator=draw, dtype=torch.float64)).to(dtype)

    stack = torch.cat([normal(1, N, D), normal(Q, N, D, size=step)]) if moved else normal(1, N, D)
    layer = Layer(stack, normal(E, D), normal(E))
    if "dense" in form:
        layer = replace(layer, dW=normal(Q, E, D, size=step))
    if "low rank" in form:
        layer = replace(layer, dW_factors=(normal(Q, E, r, size=step), normal(Q, D, r)))
    return replace(layer, db=normal(Q, E, size=step)) if "bias" in form else layer


def truth(layer: Layer) -> np.ndarray:
    """(1+Q, N, D') by definition, the layer after less the layer before, in long double."""

    def output(x, W, b):
        return np.einsum("nd,ed->ne", x, W) + b

    x, W = exact(layer.stack), exact(layer.W)
    b = exact(layer.bias) if layer.bias is not None else LONG(0)
    dW, db = layer.dense, layer.db
    Q = max(len(x) - 1, *[len(c) for c in (dW, db) if c is not None], 0)
    before, rows = output(x[0], W, b), []
    for q in range(Q):
        x1 = x[0] + x[1 + q] if len(x) > 1 else x[0]
        W1 = W if dW is None else W + exact(dW[q])
        rows.append(output(x1, W1, b if db is None else b + exact(db[q])) - before)
    return np.stack([before, *rows])


def check(layer: Layer, op=linear_delta) -> None:
    got, true = layer.run(op), truth(layer)
    assert got.shape == true.shape and got.dtype == layer.stack.dtype
    norm = np.sqrt((true * true).sum((1, 2)))
    error = np.sqrt(((exact(got) - true) ** 2).sum((1, 2)))
    # A difference of two numbers near `before` is itself only known to the long double's last digits.
    error = np.maximum(error - 32 * np.finfo(LONG).eps * norm[0], 0)
    bound = BOUNDS[layer.stack.dtype]
    assert (error <= bound * norm).all(), f"relative error {(error / np.maximum(norm, 1e-300)).tolist()}, bound {bound}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("step", STEPS)
def test_change_keeps_its_digits_at_every_step(dtype, form, step):
    if dtype == torch.float16 and step < 1e-2:
        pytest.skip("float16 has no digits below 6e-8, and few above")
    check(make_layer(form, step=step, dtype=dtype))


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("step", [1, 1e-2])
def test_unchanged_input(dtype, form, step):
    """The same numbers as a stack whose changes are all 0."""
    layer = make_layer(form, step=step, moved=False, dtype=dtype)
    check(layer)
    still = replace(layer, stack=torch.cat([layer.stack, torch.zeros(3, 9, 24, dtype=dtype)]))
    torch.testing.assert_close(layer.run(), still.run(), rtol=2 * BOUNDS[dtype], atol=2 * BOUNDS[dtype] * step)


@pytest.mark.parametrize("bias", [True, False])
def test_nothing_changes(dtype, bias):
    layer = make_layer("none", moved=False, dtype=dtype)
    layer = layer if bias else replace(layer, bias=None)
    assert layer.run().shape == (1, 9, 17)
    check(layer)


def test_the_bias_is_the_base_s_alone(dtype):
    layer = make_layer("none", dtype=dtype)
    assert torch.equal(layer.run()[1:], replace(layer, bias=layer.bias + 100).run()[1:])


@pytest.mark.parametrize("Q", [1, 2, 5])
@pytest.mark.parametrize(
    "N, D, E, r", [(1, 33, 9, 1), (3, 1, 9, 1), (9, 33, 1, 2), (64, 64, 64, 32), (65, 31, 130, 33)]
)
def test_every_axis(dtype, N, D, E, r, Q):
    for form in FORMS:
        check(make_layer(form, N=N, D=D, E=E, r=r, Q=Q, dtype=dtype))


@pytest.mark.parametrize("form", FORMS)
def test_empty(dtype, form):
    assert make_layer(form, N=0, dtype=dtype).run().shape == (4, 0, 17)
    assert make_layer(form, Q=0, dtype=dtype).run().shape == (1, 9, 17)
    assert make_layer(form, E=0, dtype=dtype).run().shape == (4, 9, 0)
    assert make_layer("low rank", r=0, dtype=dtype).run().shape == (4, 9, 17)


@pytest.mark.parametrize("form", FORMS)
def test_layouts(dtype, form):
    """Views with gaps and turned axes, as attention heads and Hugging Face's Conv1D leave them."""
    layer = make_layer(form, dtype=dtype)

    def turned(x):
        return None if x is None else x.transpose(0, -1).contiguous().transpose(0, -1)

    factors = layer.dW_factors and tuple(map(turned, layer.dW_factors))
    other = Layer(turned(layer.stack), turned(layer.W), layer.bias, turned(layer.dW), factors, turned(layer.db))
    check(other)
    wide = torch.cat([layer.stack, layer.stack], 2)[..., 24:]
    check(replace(layer, stack=wide))


# The compiled loops: tiles of 8 or 4 rows, strips of three vectors of 4, 8 or 16, two numbers of bfloat16 a unit; one
# under, exactly, one over, several; blocks of 512 positions.
EDGES = [(N, 6, E) for N in (1, 3, 4, 7, 8, 9, 17) for E in (5, 11, 12, 13, 24, 33, 47, 48, 49, 97)]
EDGES += [(3, D, 20) for D in (1, 2, 7, 8, 15, 16, 17, 33)] + [(n, 4, 3) for n in (511, 512, 513, 1030)]


@pytest.mark.parametrize("N, D, E", EDGES)
@pytest.mark.parametrize("turned", [False, True])
def test_edges_of_tiles_and_blocks(dtype, N, D, E, turned):
    for form in ("low rank and bias", "dense and bias"):
        layer = make_layer(form, N=N, D=D, E=E, Q=2, r=3, dtype=dtype)
        check(replace(layer, W=layer.W.T.contiguous().T) if turned else layer)


def test_panels_narrower_than_the_layer(dtype):
    """More columns, and more numbers a row, than a panel in the cache takes."""
    check(make_layer("low rank and bias", N=5, D=5000, E=60, Q=1, r=2, dtype=dtype))
    check(make_layer("low rank and bias", N=5, D=20, E=900, Q=1, r=70, dtype=dtype))


def test_a_nan_stays_in_its_row(dtype):
    layer = make_layer("low rank", N=20, dtype=dtype)
    layer.stack[1, 7, 3] = torch.nan
    out = layer.run()
    assert out[1, 7].isnan().all()
    out[1, 7] = 0
    assert out.isfinite().all()


def test_the_same_bits_for_any_number_of_threads(dtype):
    if os.environ["FINF_BACKEND"] != "cpp":
        pytest.skip("torch's products share their sums out as they like")
    layer, before = make_layer("low rank and bias", N=700, D=65, E=200, dtype=dtype), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(layer.run())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)


def test_inputs_stay_as_they_are(dtype):
    layer = make_layer("low rank and bias", dtype=dtype)
    given = [layer.stack, layer.W, layer.bias, *layer.dW_factors, layer.db]
    before = [x.clone() for x in given]
    layer.run()
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_a_model_s_parameters_as_they_come():
    """Parameters that ask for gradients, outside torch.no_grad: the same numbers, and no gradient."""
    layer = make_layer("low rank and bias")
    asking = replace(layer, W=torch.nn.Parameter(layer.W), bias=torch.nn.Parameter(layer.bias))
    assert torch.equal(asking.run().detach(), layer.run())


def test_changes_of_another_dtype(dtype):
    """A float32 update of a model in any dtype."""
    layer = make_layer("dense and bias", dtype=dtype)
    layer = replace(layer, dW=layer.dW.float(), db=layer.db.float(), bias=layer.bias.float())
    check(layer)


def test_low_rank_and_dense_agree():
    for step in (1e-1, 1e-6):
        layer = make_layer("low rank", step=step)
        dense = replace(layer, dW_factors=None, dW=layer.dense.float())
        got, wanted = layer.run()[1:], dense.run()[1:]
        assert (got - wanted).norm() <= 1e-6 * wanted.norm()


def test_a_mixture_of_forms_is_the_caller_s(dtype):
    layer = make_layer("dense", dtype=dtype)
    with pytest.raises(ValueError, match="dW_factors: wanted None where dW is given"):
        replace(layer, dW_factors=make_layer(dtype=dtype).dW_factors).run()


# Teeth.
def subtracts(stack, W, bias=None, *, dW=None, dW_factors=None, db=None):
    """Two layers at working precision, subtracted."""
    U, V = dW_factors
    before = stack[0] @ W.T + bias
    return torch.cat([before[None], (stack[0] + stack[1:]) @ (W + U @ V.mT).mT + (bias + db)[:, None] - before])


def is_first_order_only(stack, W, bias=None, *, dW_factors=None, **changes):
    y = reference.linear_delta(stack, W, bias, **changes)
    y[1:] += stack[0] @ dW_factors[1] @ dW_factors[0].mT
    return y


def adds_the_bias_to_all(stack, W, bias=None, **changes):
    y = reference.linear_delta(stack, W, bias, **changes)
    y[1:] += bias
    return y


def swaps_queries(stack, W, bias=None, *, dW_factors=None, **changes):
    return reference.linear_delta(stack, W, bias, dW_factors=tuple(f.flip(0) for f in dW_factors), **changes)


def forgets_the_bias_change(stack, W, bias=None, *, db=None, **changes):
    return reference.linear_delta(stack, W, bias, **changes)


@pytest.mark.parametrize(
    "defect, step",
    [
        (subtracts, 1e-4),
        (is_first_order_only, 1),
        (adds_the_bias_to_all, 1),
        (swaps_queries, 1e-6),
        (forgets_the_bias_change, 1e-6),
    ],
)
def test_a_broken_one_is_caught(defect, step):
    layer = make_layer("low rank and bias", step=step)
    check(layer, reference.linear_delta)
    with pytest.raises(AssertionError, match="relative error"):
        check(layer, defect)


# Errors.
@pytest.mark.parametrize(
    "message, given",
    [
        (r"stack: wanted shape \(1\+Q,N,D\)", {"stack": torch.zeros(4, 5)}),
        (r"stack: wanted the value and its changes", {"stack": torch.zeros(0, 4, 5)}),
        (r"W: wanted shape \(D',D\) = \(D', 5\), got \(7, 6\)", {"W": torch.zeros(7, 6)}),
        (r"bias: wanted shape \(D'\) = \(7\), got \(6,\)", {"bias": torch.zeros(6)}),
        (r"dW: wanted Q = 2 queries, as stack has, got 3", {"dW": torch.zeros(3, 7, 5)}),
        (r"dW: wanted shape \(Q,D',D\) = \(2, 7, 5\), got \(2, 5, 7\)", {"dW": torch.zeros(2, 5, 7)}),
        (r"db: wanted shape \(Q,D'\) = \(2, 7\), got \(2, 5\)", {"db": torch.zeros(2, 5)}),
        (
            r"dW_factors V: wanted shape \(Q,D,r\) = \(2, 5, 3\), got \(2, 5, 4\)",
            {"dW_factors": (torch.zeros(2, 7, 3), torch.zeros(2, 5, 4))},
        ),
        (r"dW_factors: wanted two tensors \(U, V\), got 1", {"dW_factors": (torch.zeros(2, 7, 3),)}),
        (r"W: wanted on cpu, where stack is, got meta", {"W": torch.zeros(7, 5, device="meta")}),
    ],
)
def test_values_refused(message, given):
    with pytest.raises(ValueError, match=message):
        linear_delta(**{"stack": torch.zeros(3, 4, 5), "W": torch.zeros(7, 5), **given})


def test_dtypes_refused():
    stack, W = torch.zeros(3, 4, 5), torch.zeros(7, 5)
    with pytest.raises(TypeError, match="W: wanted float32, got bfloat16"):
        linear_delta(stack, W.bfloat16())
    with pytest.raises(TypeError, match="stack: wanted float32 or .* got int64"):
        linear_delta(stack.long(), W)
    with pytest.raises(TypeError, match="db: wanted float32 or .* got int64"):
        linear_delta(stack, W, db=torch.zeros(2, 7).long())


# torch's own machinery.
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("moved", [True, False])
def test_opcheck(dtype, form, moved):
    layer = make_layer(form, moved=moved, dtype=dtype)
    factors = layer.dW_factors or (None, None)
    arguments = (layer.stack, layer.W, layer.bias, layer.dW, *factors, layer.db)
    torch.library.opcheck(torch.ops.finf_fast.linear_delta.default, arguments)


def test_compiles_without_a_break():
    layer = make_layer("low rank and bias")

    def program(stack):
        return linear_delta(2 * stack, layer.W, layer.bias, **layer.changes) + 1

    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(layer.stack), program(layer.stack))
