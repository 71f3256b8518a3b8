"""Who else computes the loss behind a linear layer: each as a pair of calls and a difference, where it is installed."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from finf_fast.ops import cross_entropy_delta, dispatch

__all__ = ["heads", "versions"]

PACKAGES = ("triton", "liger-kernel", "cut-cross-entropy", "transformers")
# Bytes of logits and of their changes that the hybrid holds at a time.
CHUNK = 1 << 29

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def versions() -> dict[str, str]:
    """Version of each package that is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def heads(dry: bool, compiled: bool) -> tuple[dict[str, Callable], dict[str, str]]:
    """Name to (x, dx, W, target) -> (base, delta) of one change, and name to why it is not there."""
    ways, missing = {"eager": _pair(_eager)}, {}
    if compiled:
        ways["compiled"] = torch.compile(_pair(_eager), dynamic=False, backend="eager" if dry else "inductor")
    for name, load in {"liger": _liger, "cut": _cut, "linear_cross_entropy": _fused, "hybrid": _hybrid}.items():
        try:
            ways[name] = load()
        except (ImportError, AttributeError, RuntimeError) as error:
            missing[name] = f"not there: {error}"
    return ways, missing


def _pair(loss: Loss) -> Callable:
    def pair(x, dx, W, target):
        base = loss(x, W, target)
        return base, loss(x + dx[0], W, target) - base

    return pair


def _eager(x: Tensor, W: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, W), target, reduction="none")


def _liger() -> Callable:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as loss

    def first(x, W, target):
        found = loss(x, W, target, reduction="none")
        return found[0] if isinstance(found, tuple) else found

    return _pair(first)


def _cut() -> Callable:
    from cut_cross_entropy import linear_cross_entropy as loss

    return _pair(lambda x, W, target: loss(x, W, target, reduction="none"))


def _fused() -> Callable:
    loss = F.linear_cross_entropy
    return _pair(lambda x, W, target: loss(x, W, target, reduction="none"))


def _hybrid() -> Callable:
    """Logits and changes by chunks of rows, float32 out of one product each, then the paired row kernel."""
    if not torch.cuda.is_available():
        raise RuntimeError("a product of bfloat16 with a float32 result runs on a GPU only")
    if "cuda" not in dispatch.TABLE["cross_entropy_delta"]:
        raise RuntimeError("cross_entropy_delta has no face for a GPU")

    def hybrid(x, dx, W, target):
        rows = max(1, CHUNK // (8 * len(W)))
        return [
            one(x[at : at + rows], dx[0, at : at + rows], W, target[at : at + rows]) for at in range(0, len(x), rows)
        ]

    def one(x, dx, target, W):
        z, d = (torch.mm(part, W.mT, out_dtype=torch.float32) for part in (x, dx))
        return cross_entropy_delta(z, d[None], target)

    return hybrid
