"""Rules of reductions and of what chooses: maximum, top-k, sort, max-pooling, also where the choice differs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_cases import BS, IS, WORLDS, C, S, case

X, X3, IMAGE = S((4, 5)), S((2, 3, 4)), S((2, 3, 6, 6))
SPREAD = S((4, 5), near=2.0)
COUNTS = IS((3, 4), 5)

SUMS = [
    (
        "sum",
        lambda x: (torch.sum(x), x.sum(0), x.sum(-1, True), x.sum(dim=(0, -1)), torch.sum(x, dim=[1], keepdim=True)),
    ),
    ("sum names", lambda x: (torch.sum(input=x, dim=1), x.sum(axis=0), x.sum(dim=()), torch.sum(x, ()))),
    ("mean", lambda x: (torch.mean(x), x.mean(0), x.mean(-1, keepdim=True), x.mean(dim=(0, 1)), torch.mean(x, axis=1))),
    ("cumsum", lambda x: (torch.cumsum(x, 0), x.cumsum(-1), torch.cumsum(x, dim=1), x.cumsum_(0))),
    (
        "var",
        lambda x: (torch.var(x), x.var(0), x.var(-1, unbiased=False), x.var(0, correction=0), torch.var(x, (0, 1))),
    ),
    ("var names", lambda x: (torch.var(x, unbiased=False), x.var(1, False, True), torch.var(x, dim=0, keepdim=True))),
    ("var_mean", lambda x: (torch.var_mean(x), torch.var_mean(x, 1), torch.var_mean(x, unbiased=False))),
    ("std", lambda x: (torch.std(x), x.std(-1), x.std(0, keepdim=True), torch.std(x, 1, unbiased=False))),
    ("logsumexp", lambda x: torch.logsumexp(x, -1)),
    ("nothing left out", lambda x: (torch.nansum(x), torch.std_mean(x, 1), torch.cumprod(x, 0))),
]
CASES = [case(f"{name} {x.shape}", f, x, sums=True) for name, f in SUMS for x in (SPREAD, S((4, 5, 1), near=2.0))]
CASES += [
    case("sum of anything", lambda x: (x.sum(), x.sum(0), x.mean(1), x.cumsum(0)), X, sums=True),
    case(
        "sum of changed",
        lambda x: (x.sum(), x.mean(0), x.amax(), x.var(0)),
        C((4, 5), form="low", tame=1.0),
        sums=True,
    ),
    case(
        "sum of one number", lambda x: (x.sum(), x.mean(), x.sum(0), x.amax(), x.cumsum(0), x.max(), x.sum(-1)), S(())
    ),
    case("sum of nothing", lambda x: (x.sum(), x.sum(0), x.sum(1), x.cumsum(0)), S((0, 3))),
    case("sum is no view", lambda x: (x.sum().add_(1), x), S(())),
    case(
        "sum of integers",
        lambda i: (i.sum(), i.sum(0), i.cumsum(1), torch.sum(i, -1, keepdim=True), i.prod(), i.prod(0)),
        COUNTS,
    ),
    case("sum of flags", lambda b: (b.sum(), b.sum(0), b.sum(dim=-1), b.any(), b.all(), b.cumsum(0)), BS((3, 4))),
    case("sum of one flag", lambda b: (b.sum(), b.any()), BS(())),
    case(
        "any",
        lambda b: (torch.any(b), b.any(0), torch.all(b, -1, keepdim=True), b.any(dim=(0, 1)), b.all((0, 1))),
        BS((3, 4)),
    ),
    case("mean of integers", lambda i: (i.float().mean(), i.sum(0, dtype=torch.float32)), COUNTS),
    case("prod", lambda x: (torch.prod(x), x.prod(0), torch.prod(x, dim=1, keepdim=True)), SPREAD, slack=10),
    case(
        "norm",
        lambda x: (torch.norm(x), x.norm(2, -1), torch.norm(x, p=2, dim=0, keepdim=True), x.norm(dim=(0, 1))),
        SPREAD,
        sums=True,
    ),
    case(
        "norms", lambda x: (x.norm(1), torch.norm(x, p=1, dim=0), torch.linalg.vector_norm(x, 1, -1)), SPREAD, sums=True
    ),
    case(
        "linalg norm",
        lambda x: (torch.linalg.norm(x), torch.linalg.norm(x, dim=-1), torch.linalg.vector_norm(x, 2, 0, True)),
        SPREAD,
        sums=True,
    ),
    case("matrix norms", lambda x: (torch.linalg.matrix_norm(x), torch.linalg.norm(x, "fro")), SPREAD, sums=True),
    case(
        "spectral norm", lambda x: torch.linalg.norm(x.double(), 2), S((4, 5), near=2.0, dtype=torch.float32), sums=True
    ),
    case(
        "norm of a vector",
        lambda x: (torch.linalg.norm(x, 2), torch.linalg.vector_norm(x), x.norm()),
        S((6,)),
        sums=True,
    ),
    case(
        "argmax",
        lambda x: (torch.argmax(x), x.argmax(0), x.argmax(-1, keepdim=True), torch.argmin(x, dim=1), x.argmin()),
        X,
    ),
    case("argmax keepdim", lambda x: (torch.argmax(x, keepdim=True), x.argmin(keepdim=True)), X),
    case(
        "max",
        lambda x: (torch.max(x), x.max(0), x.max(-1, keepdim=True), torch.max(x, dim=1), x.min(), torch.min(x, 0)),
        X,
    ),
    case("max fields", lambda x: (x.max(0).values, x.max(0).indices, x.min(1)[0]), X),
    case(
        "amax",
        lambda x: (torch.amax(x), x.amax(0), x.amax((0, 2)), x.amax(-1, keepdim=True), torch.amin(x, dim=(1, 2))),
        X3,
    ),
    case(
        "amax over all",
        lambda x: (x.amax(()), x.amin(keepdim=True), torch.amax(x, dim=(0, 1, 2), keepdim=True), x.amin()),
        X3,
    ),
    case("max of integers", lambda i: (i.max(), i.amax(0), i.argmax(1), i.min(1), torch.sort(i), i.topk(2)), COUNTS),
    case(
        "topk",
        lambda x: (torch.topk(x, 2), x.topk(3, 0), x.topk(k=2, dim=-1, largest=False), x.topk(2, sorted=True)),
        X,
    ),
    case(
        "sort", lambda x: (torch.sort(x), x.sort(0), x.sort(-1, descending=True), torch.sort(x, dim=1, stable=True)), X
    ),
    case("sort fields", lambda x: (x.sort().values, x.sort(0, True).indices, torch.msort(x), x.msort()), X),
    case("argsort", lambda x: (torch.argsort(x), x.argsort(0, descending=True), x.argsort(dim=-1, stable=True)), X),
    case("max_pool1d", lambda x: (F.max_pool1d(x, 2), F.max_pool1d(x, 3, 2, 1), torch.max_pool1d(x, 2)), S((2, 3, 6))),
    case(
        "max_pool2d",
        lambda x: (F.max_pool2d(x, 2), F.max_pool2d(x, 3, stride=2, padding=1), torch.max_pool2d(x, 2, 1)),
        IMAGE,
    ),
    case("max_pool2d holes", lambda x: F.max_pool2d(x, 2, dilation=2, ceil_mode=True), IMAGE),
    case(
        "max_pool2d places", lambda x: (F.max_pool2d(x, 2, return_indices=True), F.max_pool2d_with_indices(x, 2)), IMAGE
    ),
    case("max_pool2d below", lambda x: torch._C._nn.max_pool2d_with_indices(x, (2, 2)), IMAGE),
    case(
        "max_pool2d of one image", lambda x: (F.max_pool2d(x, 2), F.max_pool2d(x, 2, return_indices=True)), S((3, 6, 6))
    ),
    case(
        "max_pool3d",
        lambda x: (F.max_pool3d(x, 2), torch.max_pool3d(x, 2), F.max_pool3d(x, 2, return_indices=True)),
        S((1, 2, 4, 4, 4)),
    ),
    case(
        "max_pool1d places",
        lambda x: (F.max_pool1d(x, 2, return_indices=True), torch.max_pool1d_with_indices(x, 2)),
        S((2, 3, 6)),
    ),
    case("max_pool3d below", lambda x: torch._C._nn.max_pool3d_with_indices(x, (2, 2, 2)), S((1, 2, 4, 4, 4))),
    case(
        "pool names",
        lambda x: (F.max_pool1d_with_indices(x, 2), F.adaptive_max_pool1d_with_indices(x, 2)),
        S((2, 3, 6)),
    ),
    case(
        "adaptive",
        lambda x: (F.adaptive_max_pool2d(x, 2), F.adaptive_max_pool2d(x, (3, 2), return_indices=True)),
        IMAGE,
    ),
    case("adaptive 1d", lambda x: (F.adaptive_max_pool1d(x, 2), torch.adaptive_max_pool1d(x, 3)), S((2, 3, 6))),
    case("adaptive 3d", lambda x: F.adaptive_max_pool3d(x, 2), S((1, 2, 4, 4, 4))),
    case(
        "adaptive below",
        lambda x: (torch._C._nn.adaptive_max_pool2d(x, (2, 2)), F.adaptive_max_pool2d_with_indices(x, 2)),
        IMAGE,
    ),
    case(
        "adaptive 3d below",
        lambda x: (torch._C._nn.adaptive_max_pool3d(x, (2, 2, 2)), F.max_pool3d_with_indices(x, 2)),
        S((1, 2, 4, 4, 4)),
    ),
    case("adaptive 3d names", lambda x: F.adaptive_max_pool3d_with_indices(x, 2), S((1, 2, 4, 4, 4))),
]


@pytest.mark.parametrize("one", CASES, ids=lambda c: c.name)
@settings(max_examples=8, deadline=None)
@given(st.data())
def test_a_rule_is_the_change_in_float64(one, data):
    one.check(data.draw(WORLDS))
