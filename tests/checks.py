"""What the tests hold the operations to: truth, an honest baseline, and checkers that say where it was broken.

Truth is the definition of the loss written down literally in numpy's long double (on x86 64 bits of mantissa), so it
shares no formula with the code. The checkers take the operation as a callable: `test_tolerance.py` hands them broken
operations and expects every one to be caught.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import journey
from finf_fast.ops import dispatch

LONG = np.longdouble
STEPS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)

# Relative error of the change, ||e|| / ||true|| over the rows of a query, in units of the result's rounding (6e-8 for
# float32, so 1e-5 there).
BOUND = 84
# What one row may be off by, in units of what is added up there: an exponent of size 30 may carry 15 into e^it.
ROW_BOUND = 16
# Twice the baseline's error is the rule; below this many units both are rounding noise and their ratio a throw of dice.
NOISE = 8


@dataclass(frozen=True)
class Case:
    """One call of cross_entropy_delta; inputs already rounded to the dtypes under test."""

    z: Tensor
    dz: Tensor
    target: Tensor
    ignore_index: int = -100
    label_smoothing: float = 0.0

    @property
    def options(self) -> dict:
        return {"ignore_index": self.ignore_index, "label_smoothing": self.label_smoothing}

    @property
    def result(self) -> torch.dtype:
        return torch.float64 if torch.float64 in (self.z.dtype, self.dz.dtype) else torch.float32

    def run(self, op: Callable) -> tuple[Tensor, Tensor]:
        return op(self.z, self.dz, self.target, **self.options)


def make_case(N=8, V=1000, Q=2, *, step=1e-2, lead=0.0, dtype=torch.float32, change=None, seed=0, **options) -> Case:
    """Random logits of width 2 whose target leads by `lead`, and a random change of width `step`."""
    draw = torch.Generator().manual_seed(seed)
    target = torch.randint(0, V, (N,), generator=draw)
    z = 2 * torch.randn(N, V, generator=draw, dtype=torch.float64)
    z[torch.arange(N), target] += lead
    dz = step * torch.randn(Q, N, V, generator=draw, dtype=torch.float64)
    return Case(z.to(dtype), dz.to(change or dtype), target, **options)


def shifted_target(case: Case, by: float) -> Case:
    """The case with the change of each target's own logit moved by `by`: a sample learnt or forgotten at once."""
    dz = case.dz.clone()
    dz[:, torch.arange(len(case.target)), case.target] += by
    return replace(case, dz=dz)


def exact(x: Tensor) -> np.ndarray:
    """The numbers of a tensor in long double, nothing rounded."""
    return x.detach().cpu().double().numpy().astype(LONG)


def from_target(x: np.ndarray, case: Case) -> np.ndarray:
    """What each column of (..., N, V) has more than the target's column; column 0 stands in where ignored."""
    t = torch.where(case.target == case.ignore_index, 0, case.target).cpu().numpy()[:, None]
    return x - np.take_along_axis(x, np.broadcast_to(t, (*x.shape[:-1], 1)), -1)


def true_losses(gaps: np.ndarray, case: Case) -> np.ndarray:
    """Loss of each row by definition, from its logits less the target's; NaN where the target is to be ignored."""
    kept = (case.target != case.ignore_index).cpu().numpy()
    own = np.arange(gaps.shape[-1]) == case.target.cpu().numpy()[:, None]
    hard = np.log1p(np.exp(np.where(own, -np.inf, gaps)).sum(-1))
    eps = LONG(case.label_smoothing)
    return np.where(kept, hard - eps * gaps.mean(-1) if eps else hard, np.nan)


def truth(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """base (N,) and delta (Q, N); NaN where ignored."""
    gaps, moves = from_target(exact(case.z), case), from_target(exact(case.dz), case)
    base = true_losses(gaps, case)
    return base, true_losses(gaps + moves, case) - base


def plain(z: Tensor, dz: Tensor, target: Tensor, **options) -> tuple[Tensor, Tensor]:
    """The baseline: two losses in torch at the dtype of the result, subtracted."""
    dtype = torch.float64 if torch.float64 in (z.dtype, dz.dtype) else torch.float32
    z, dz = z.to(dtype), dz.to(dtype)
    base = F.cross_entropy(z, target, reduction="none", **options)
    after = [F.cross_entropy(z + d, target, reduction="none", **options) for d in dz]
    return base, torch.stack(after) - base if after else dz.new_zeros(0, len(z))


def error_of(got: Tensor, true: np.ndarray, base: np.ndarray) -> np.ndarray:
    """|got - true|, less what truth itself, a difference of two losses, may be off by: 32 of its own last digits."""
    return np.maximum(np.abs(exact(got) - true) - 32 * np.finfo(LONG).eps * np.abs(base), 0)


def relative(error: np.ndarray, true: np.ndarray, kept: np.ndarray) -> float:
    """||error|| / ||true|| over the kept rows, the worst of the leading dimensions."""
    e, scale = error[..., kept], true[..., kept]
    e, scale = np.sqrt((e * e).sum(-1)), np.sqrt((scale * scale).sum(-1))
    return float(np.max(np.where(e == 0, 0, e / np.where(scale == 0, LONG(1e-300), scale)), initial=0))


def check(op: Callable, case: Case) -> dict[str, float]:
    """Assert that `op` computes the case as well as promised; returns the relative errors of base and delta."""
    base, delta = case.run(op)
    Q, N = case.dz.shape[:2]
    assert base.shape == (N,) and delta.shape == (Q, N), f"shapes {tuple(base.shape)}, {tuple(delta.shape)}"
    assert base.dtype == delta.dtype == case.result, f"dtypes {base.dtype}, {delta.dtype}"
    kept = (case.target != case.ignore_index).cpu().numpy()
    assert not base[~kept].any() and not delta[:, ~kept].any(), "an ignored row is not 0"
    true_base, true_delta = truth(case)
    plain_base, plain_delta = case.run(plain)
    eps = torch.finfo(case.result).eps

    def compare(name: str, got: Tensor, baseline: Tensor, true: np.ndarray, size: np.ndarray) -> float:
        error = error_of(got, true, true_base)
        rival = relative(error_of(baseline, true, true_base), true, kept)
        _check_error(name, error, true, kept, rival, eps, size)
        return relative(error, true, kept)

    return {
        "base": compare("base", base, plain_base, true_base, np.abs(true_base)),
        "delta": compare("delta", delta, plain_delta, true_delta, size_of_terms(case, true_delta)),
    }


def _check_error(name, error, true, kept, rival, eps, size) -> None:
    total = relative(error, true, kept)
    assert total <= BOUND * eps, f"{name}: relative error {total:.1e}, bound {BOUND * eps:.1e}"
    assert total <= max(2 * rival, NOISE * eps), f"{name}: relative error {total:.1e}, plain torch's {rival:.1e}"
    broken = ~(error <= ROW_BOUND * eps * size) & kept
    assert not broken.any(), f"{name}: wrong at (query, row) {np.argwhere(broken)[:5].tolist()}"


def size_of_terms(case: Case, true: np.ndarray) -> np.ndarray:
    """(Q, N): the size of what is added up in a row, to which rounding is proportional however much of it cancels."""
    z, dz = exact(case.z), exact(case.dz)
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    moves = np.where(p > 0, dz, 0)
    eps = LONG(case.label_smoothing)
    d = from_target(moves, case)
    d = d - eps * d.mean(-1, keepdims=True)
    terms = (p * np.abs(np.expm1(d))).sum(-1) + eps * np.abs(moves).mean(-1)
    large = np.abs(true) > np.log(2)
    return np.abs(true) + np.where(large, 1, terms / np.minimum(1, np.exp(true)))


def check_segment_sum(op: Callable, values: Tensor, offsets: Tensor) -> None:
    """Assert sums right to one rounding, segment by segment."""
    got = op(values, offsets)
    x, cuts = exact(values), offsets.tolist()
    pairs = list(itertools.pairwise(cuts))
    shape = (len(x), len(pairs))
    true = np.array([[row[a:b].sum() for a, b in pairs] for row in x], LONG).reshape(shape)
    size = np.array([[np.abs(row[a:b]).sum() for a, b in pairs] for row in x], LONG).reshape(shape)
    assert got.shape == shape, f"shape {tuple(got.shape)}, wanted {shape}"
    length = max([b - a for a, b in pairs], default=0)
    allowed = torch.finfo(got.dtype).eps * np.abs(true) / 2 * 1.01 + length * np.finfo(np.float64).eps * size
    broken = ~(np.abs(exact(got) - true) <= allowed) & ~(np.isnan(true) & np.isnan(exact(got)))
    assert not broken.any(), f"wrong at (query, segment) {np.argwhere(broken)[:5].tolist()}"


def best(scores: Tensor, start: int, K: int) -> tuple[Tensor, Tensor]:
    """The K best of a whole score matrix by Python's sort: what any number of merges must arrive at."""
    values = torch.full((len(scores), K), -torch.inf, dtype=scores.dtype)
    indices = torch.full((len(scores), K), -1)
    for q, row in enumerate(scores.tolist()):
        ranked = sorted((-v, start + j) for j, v in enumerate(row) if not math.isnan(v))[:K]
        for place, (v, j) in enumerate(ranked):
            values[q, place], indices[q, place] = -v, j
    return values, indices


def empty_list(Q: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.full((Q, K), -torch.inf, dtype=dtype), torch.full((Q, K), -1)


def check_topk(op: Callable, scores: Tensor, K: int, cuts: tuple[int, ...] = (), start: int = 0) -> None:
    """Assert that merging the blocks between `cuts` gives exactly the list of a full sort."""
    values, indices = empty_list(len(scores), K, scores.dtype)
    edges = [0, *cuts, scores.shape[1]]
    for a, b in itertools.pairwise(edges):
        values, indices = op(values, indices, scores[:, a:b], start + a)
    wanted_values, wanted_indices = best(scores, start, K)
    assert torch.equal(indices, wanted_indices), f"indices {indices.tolist()}, wanted {wanted_indices.tolist()}"
    assert torch.equal(values, wanted_values), f"values {values.tolist()}, wanted {wanted_values.tolist()}"


def face_dtypes(op: str) -> list[tuple[str, torch.dtype]]:
    """Every (face, dtype) of the dispatch table: the axis that every test of an operation runs along.

    The faces for GPUs go alone, where they are sent by FINF_TEST_DEVICE (see `journey`), and so does Triton's
    interpreter, asked for by TRITON_INTERPRET=1: it is slow, and numpy does its work.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        kept = ("triton",)
    elif journey.destination():
        kept = journey.GPU_FACES
    else:
        kept = ("cpp", "hybrid", "reference")
    return [(face, dtype) for face, takes in dispatch.TABLE[op].items() if face in kept for dtype in takes.dtypes]


@contextlib.contextmanager
def forced(face: str) -> Iterator[None]:
    """FINF_BACKEND set to this face, and put back."""
    before = os.environ.get("FINF_BACKEND")
    os.environ["FINF_BACKEND"] = face
    try:
        yield
    finally:
        if before is None:
            del os.environ["FINF_BACKEND"]
        else:
            os.environ["FINF_BACKEND"] = before


def face_fixture(op: str) -> Callable:
    """A fixture that runs a module's tests with every face of `op` forced, one dtype it takes after another."""

    @pytest.fixture(scope="module", params=face_dtypes(op), ids=lambda pair: f"{pair[0]}-{str(pair[1])[6:]}")
    def dtype(request) -> Iterator[torch.dtype]:
        face, taken = request.param
        device = journey.destination()
        abroad = journey.sent(op, face, device) if device else contextlib.nullcontext()
        with forced(face), abroad:
            verdict = next(v for v in dispatch.faces(op) if v.face == face)
            if not verdict.available:
                pytest.skip(verdict.reason)  # test_dispatch.py fails instead, so that this cannot hide a broken build
            yield taken

    return dtype
