"""The row operations on every instruction set of this processor: each right, noise and rounding the same to the bit.

Each set runs in a process of its own, since the choice is made once; truth is the plain torch face in float64.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from checks import forced
from finf_fast import ops
from finf_fast.ops.activation_delta import KINDS
from stack_cases import BOUNDS, draw, make_stack
from test_isa import ISAS, in_process

# Ragged, and past the 2048 that are summed at once.
WIDTHS = (37, 2085)


def cases(dtype: torch.dtype):
    """Name and call of each; a call takes a function that its tensors go through first."""
    for D in WIDTHS:
        x, r = (make_stack(2, 9, D, size=1e-2, dtype=dtype, seed=s) for s in (0, 3))
        w, dw = draw(D, dtype=dtype), draw(2, D, size=1e-2, dtype=dtype)
        yield (
            f"layer {D}",
            lambda to, x=x, w=w, dw=dw, r=r: ops.layer_norm_delta(
                to(x), to(w), to(w), dweight=to(dw), dbias=to(dw), residual=to(r)
            )[0],
        )
        yield f"rms {D}", lambda to, x=x, w=w, dw=dw: ops.rms_norm_delta(to(x), to(w), dweight=to(dw))
        yield f"group {D}", lambda to, x=x: ops.group_norm_delta(to(x).unflatten(1, (3, 3)), 3)
        yield f"error {D}", lambda to, x=x, r=r: ops.squared_error_delta(to(x)[0], to(x)[1:], to(r)[0])[1]
        for kind in KINDS:
            for step in (1, 1000):
                y = torch.cat([x[:1], x[1:] * step])
                yield f"{kind} {D} {step}", lambda to, y=y, r=r, k=kind: ops.activation_delta(to(y), k, to(r))


def everything() -> dict[str, np.ndarray]:
    """What a process with its instruction set computes."""
    found = {
        f"{dtype} {name}": call(lambda x: x).double().numpy()
        for dtype in (torch.float32, torch.bfloat16)
        for name, call in cases(dtype)
    }
    found["noise"] = ops.noise(5, torch.arange(3), 1, (1001,)).numpy()
    found["rounded"] = rounded()
    return found


def rounded() -> np.ndarray:
    """bfloat16 times 1 + 2^-7, through relu with a gate: products that end between two bfloat16, ties among them."""
    x = torch.linspace(1, 2, 129).bfloat16().repeat(2)
    x[200], x[201] = torch.nan, torch.inf
    return ops.activation_delta(x[None], "relu", torch.full((1, 258), 1 + 2**-7).bfloat16()).float().numpy()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict[str, np.ndarray]]:
    folder, found = tmp_path_factory.mktemp("isa"), {}
    for isa in ISAS:
        code = "import sys, numpy, test_isa_rows; numpy.savez(sys.argv[1], **test_isa_rows.everything())"
        done = in_process(code, isa, str(folder / f"{isa}.npz"))
        assert done.returncode == 0, done.stderr
        found[isa] = dict(np.load(folder / f"{isa}.npz"))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_set_holds_the_bounds(results, dtype):
    for name, call in cases(dtype):
        with forced("reference"):
            true = call(lambda x: x.double()).numpy()
        bound = 1e-6 if name.startswith("error") else BOUNDS[dtype]
        for isa in ISAS:
            got = results[isa][f"{dtype} {name}"]
            for q in range(len(true)):
                error = np.linalg.norm(got[q] - true[q]) / np.linalg.norm(true[q])
                assert error <= bound, f"{isa} {name} row {q}: {error:.1e}"


@pytest.mark.parametrize("name", ["noise", "rounded"])
def test_the_same_bits_on_every_set(results, name):
    for isa in ISAS[1:]:
        assert np.array_equal(results[isa][name], results[ISAS[0]][name], equal_nan=True), isa


def test_rounding_is_to_nearest_even():
    x = torch.linspace(1, 2, 129).bfloat16().repeat(2).float()
    x[200], x[201] = torch.nan, torch.inf
    wanted = (x * (1 + 2**-7)).bfloat16().float().numpy()
    assert np.array_equal(rounded()[0], wanted, equal_nan=True)
