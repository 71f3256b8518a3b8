"""Who else computes the loss behind a linear layer: each as a pair of calls and a difference, where it is installed."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finf_fast.ops import linear_cross_entropy_delta

__all__ = ["heads", "hybrid", "versions"]

PACKAGES = ("triton", "liger-kernel", "cut-cross-entropy", "transformers")

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
    ways["hybrid"] = hybrid
    for name, load in {"liger": _liger, "cut": _cut, "linear_cross_entropy": _fused}.items():
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


def hybrid(*inputs: Tensor, **changes: Any) -> tuple[Tensor, Tensor]:
    """The rival of the fused kernel, whatever FINF_BACKEND says; it says itself where it cannot run."""
    before = os.environ.get("FINF_BACKEND", "auto")
    os.environ["FINF_BACKEND"] = "hybrid"
    try:
        return linear_cross_entropy_delta(*inputs, **changes)
    finally:
        os.environ["FINF_BACKEND"] = before
