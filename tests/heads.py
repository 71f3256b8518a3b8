"""Linear layers under a loss: cases for linear_cross_entropy_delta, their truth, and the checker.

Truth is the loss by definition in long double, from logits formed in long double out of the very same inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import checks
from checks import LONG, Case, exact, relative
from finf_fast.ops import linear_cross_entropy_delta

# ||e|| / ||true|| over the rows of a query. Half types: one rounding of d, one of W's panel, in bfloat16 at the worst.
BOUNDS = {torch.float64: 1e-13, torch.float32: 4e-6, torch.float16: 4e-6, torch.bfloat16: 6e-3}
STEPS = (1, 1e-2, 1e-4, 1e-6, 1e-9)
FORMS = ("input", "dense", "low rank", "bias", "input and dense", "input and low rank and bias")


@dataclass(frozen=True)
class Head:
    x: Tensor
    dx: Tensor | None
    W: Tensor
    target: Tensor
    bias: Tensor | None = None
    db: Tensor | None = None
    dW: Tensor | None = None
    dW_factors: tuple[Tensor, Tensor] | None = None
    softcap: float | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0

    @property
    def options(self) -> dict:
        names = ("bias", "db", "dW", "dW_factors", "softcap", "ignore_index", "label_smoothing")
        return {name: getattr(self, name) for name in names}

    @property
    def kept(self) -> np.ndarray:
        return (self.target != self.ignore_index).numpy()

    def run(self, op=linear_cross_entropy_delta) -> tuple[Tensor, Tensor]:
        return op(self.x, self.dx, self.W, self.target, **self.options)


def make_head(form="input", *, step=1e-2, lead=0.0, N=8, D=24, V=600, Q=2, r=3, dtype=torch.float32, **options) -> Head:
    """Logits of width 2 or so whose target leads by about `lead`, and changes of them of about `step`."""
    draw = torch.Generator().manual_seed(3)

    def normal(*shape, size=1.0):
        return size * torch.randn(*shape, generator=draw, dtype=torch.float64)

    W, x, target = normal(V, D), normal(N, D, size=0.4), torch.randint(0, V, (N,), generator=draw)
    x += lead * W[target] / W[target].square().sum(1, keepdim=True)
    changes = {"dx": None}
    if "input" in form:
        changes["dx"] = normal(Q, N, D, size=step / 4).to(dtype)
    if "dense" in form:
        changes["dW"] = normal(Q, V, D, size=step / 4).to(dtype)
    if "low rank" in form:
        changes["dW_factors"] = (normal(Q, V, r, size=step / 4).to(dtype), normal(Q, D, r).to(dtype))
    if "bias" in form:
        changes |= {"bias": normal(V).to(dtype), "db": normal(Q, V, size=step).to(dtype)}
    return Head(x=x.to(dtype), W=W.to(dtype), target=target, **changes, **options)


def logits(head: Head) -> tuple[np.ndarray, np.ndarray]:
    """(N, V) before and (Q, N, V) after, in long double."""
    x, W = exact(head.x), exact(head.W)
    dx = LONG(0) if head.dx is None else exact(head.dx)
    U, V = head.dW_factors or (None, None)
    dW = LONG(0) if U is None else np.einsum("qvr,qdr->qvd", exact(U), exact(V))
    dW = dW if head.dW is None else exact(head.dW)
    b = LONG(0) if head.bias is None else exact(head.bias)
    db = LONG(0) if head.db is None else exact(head.db)[:, None]
    before = np.einsum("nd,vd->nv", x, W) + b
    Q = max(len(c) for c in (dx, dW, db, W[:0]) if np.ndim(c))
    x1, W1 = np.broadcast_to(x + dx, (Q, *x.shape)), np.broadcast_to(W + dW, (Q, *W.shape))
    after = np.stack([np.einsum("nd,vd->nv", x1[q], W1[q]) for q in range(Q)]) + b + db
    c = head.softcap
    return (before, after) if c is None else (c * np.tanh(before / c), c * np.tanh(after / c))


def truth(head: Head) -> tuple[np.ndarray, np.ndarray]:
    before, after = logits(head)
    case = Case(torch.empty(0), torch.empty(0), head.target, head.ignore_index, head.label_smoothing)
    base = checks.true_losses(checks.from_target(before, case), case)
    return base, checks.true_losses(checks.from_target(after, case), case) - base


def size_of_terms(head: Head, true: np.ndarray) -> np.ndarray:
    """(Q, N) what is added up in a row, however much of it cancels: the measure of a single row's rounding."""
    before, after = logits(head)
    z, dz = (torch.from_numpy(y.astype(np.float64)) for y in (before, after - before))
    return checks.size_of_terms(Case(z, dz, head.target, label_smoothing=head.label_smoothing), true)


def check(head: Head, op=linear_cross_entropy_delta, bound=None, by_terms=False) -> None:
    """Asserts what is promised; `by_terms` where so few rows are summed that their true norm may be 0 by accident."""
    base, delta = head.run(op)
    true_base, true_delta = truth(head)
    wide = torch.float64 if head.x.dtype == torch.float64 else torch.float32
    assert base.dtype == delta.dtype == wide and base.shape == true_base.shape and delta.shape == true_delta.shape
    kept, bound = head.kept, bound or BOUNDS[head.x.dtype]
    assert not base[~kept].any() and not delta[:, ~kept].any(), "an ignored row is not 0"
    reach = np.abs(logits(head)[0]).max()
    # The base loss is as exact as logits of this dtype are: an exponent carries its own size into the rounding.
    off = np.abs(exact(base) - true_base)[kept]
    assert (off <= 8 * torch.finfo(wide).eps * (1 + reach) * true_base[kept]).all(), f"base: off by {off.max():.1e}"
    # Truth, a difference of losses of logits, knows its own digits only so far.
    error = np.maximum(np.abs(exact(delta) - true_delta) - 64 * np.finfo(LONG).eps * (1 + reach), 0)
    total = relative(error, size_of_terms(head, true_delta) if by_terms else true_delta, kept)
    assert total <= bound, f"delta: relative error {total:.1e}, bound {bound:.1e}"
