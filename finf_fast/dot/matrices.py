"""Rules of the dot engine for matrices: linear layers, embeddings, convolutions, and self-attention's projections."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finf_fast.calls import patches, plain, self_attention
from finf_fast.dot.changes import Change, chunked
from finf_fast.dot.taps import Taps, still, wide_sum
from finf_fast.order import Mixed
from finf_fast.reference import product

__all__ = ["MATRICES"]


class _Product(torch.autograd.Function):
    """x (N, n) · Wᵀ + b with the gradient of x alone, both by the fast product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return product.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return product.linear(gradient, ctx.weight.t()), None, None


def _linear(taps: Taps, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if not plain(input) or weight.dim() != 2:
        return None
    out = _matrix(taps, input.reshape(-1, input.shape[-1]), weight, bias, turned=False, lead=input.shape[:-1])
    return out.view(*input.shape[:-1], len(weight))


def _addmm(taps: Taps, bias: Tensor, input: Tensor, weight: Any = None, **scales: Any) -> Tensor | None:
    if scales or not plain(input) or bias.shape != weight.shape[1:]:
        return None
    return _matrix(taps, input, weight, bias, turned=True, lead=input.shape[:-1])


def _matmul(taps: Taps, input: Any, other: Any = None) -> Tensor | None:
    """``x @ W`` with a changed W."""
    if taps.find(other) == [None] or not plain(input) or input.dim() < 2 or other.dim() != 2:
        return None
    out = _matrix(taps, input.reshape(-1, len(other)), other, None, turned=True, lead=input.shape[:-1])
    return out.view(*input.shape[:-1], other.shape[1])


def _matrix(taps: Taps, x: Tensor, weight: Tensor, bias: Tensor | None, turned: bool, lead: torch.Size) -> Tensor:
    """Rows x (N, n) times W (m, n)ᵀ, or W (n, m) where that is turned, plus a bias (m,); N rows stand for ``lead``."""
    mine, its_bias = taps.find(weight, bias)
    matrix = still(weight, mine)
    args = (x, matrix.t() if turned else matrix, still(bias, its_bias))
    if any(t is not None and t.requires_grad for t in args[1:]):  # computed from parameters, which need its gradient
        out = F.linear(*args)
    else:
        out = _Product.apply(*args) if x.requires_grad and product.fits(*args) else product.linear(*args)
    uses = []
    if mine is not None:
        (name, change), rows = mine, taps.kept(taps.by_sample(x.view(*lead, x.shape[1]), mine[0]), mine[0])

        def of_weight(gradient: Tensor) -> Tensor:
            sides = (gradient.reshape(*rows().shape[:2], gradient.shape[1]), rows())
            return change.rows(*(sides[::-1] if turned else sides))

        uses.append((name, of_weight))
    if its_bias is not None:
        uses.append(_summed(taps, its_bias, (*lead, out.shape[1])))
    return taps.passed(out, *uses) if uses else out


def _summed(taps: Taps, found: tuple[str, Change], shape: tuple[int, ...]) -> tuple[str, Callable[[Tensor], Tensor]]:
    """The use of a parameter that is added to the last dimension of ``shape``."""
    name, change = found
    rows = taps.by_sample(torch.empty(shape, device="meta"), name).shape
    return name, lambda g: change.formed(wide_sum(g.reshape(rows)))


def _embedding(
    taps: Taps,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    (found,) = taps.find(weight)
    if found is None or not plain(input):
        return None
    (name, change), ids = found, input
    out = F.embedding(ids, weight.detach(), None, max_norm, norm_type)
    if taps.shared(ids.shape):  # positions, the same for all samples: each is given its own
        lead = ids.shape if ids.dim() == 1 else ids.shape[1:]
        ids, out = (x.expand(taps.samples, *x.shape[-n:]) for x, n in ((ids, len(lead)), (out, len(lead) + 1)))
        out, taps.given = out.clone(), name
    rows = taps.kept(taps.by_sample(ids[..., None], name)[..., 0].long(), name)
    return taps.passed(out, (name, lambda g: change.ids(rows(), g.reshape(*rows().shape, g.shape[-1]))))


def _convolution(function: Callable) -> Callable:
    def conv(
        taps: Taps,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor | None:
        mine, its_bias = taps.find(weight, bias)
        if mine is its_bias is None or not plain(input) or input.dim() != weight.dim():
            return None
        if taps.samples not in (1, len(input)):
            raise Mixed(f"{(mine or its_bias)[0]}, a convolution over {len(input)} of {taps.samples} samples")
        out = function(input, still(weight, mine), still(bias, its_bias), stride, padding, dilation, groups)
        uses = []
        if mine is not None:
            x, unfold = (
                taps.kept(input, mine[0]),
                partial(patches, kernel=weight.shape[2:], stride=stride, padding=padding),
            )
            unfold = partial(unfold, dilation=dilation)
            uses.append((mine[0], lambda g: _all(taps, _kernel(mine[1], g, x(), unfold, groups))))
        if its_bias is not None:
            uses.append((its_bias[0], lambda g: _all(taps, its_bias[1].formed(wide_sum(g.flatten(2).mT)))))
        return taps.passed(out, *uses)

    return conv


def _all(taps: Taps, found: Tensor) -> Tensor:
    """(B, Q) from (pieces, Q): a sample by itself may have gone in as several."""
    return found if len(found) == taps.samples else found.sum(0, keepdim=True)


def _kernel(change: Change, gradient: Tensor, x: Tensor, unfold: Callable[[Tensor], Tensor], groups: int) -> Tensor:
    """(B, Q) of a convolution's kernel, from the gradient (B, m, *positions) at its output and its input."""

    def part(at: slice) -> Tensor:
        left = gradient[at].flatten(2).mT
        right = unfold(x[at]).view(*left.shape[:2], -1)
        if groups == 1:
            return change.rows(left, right)
        left, right = (side.unflatten(2, (groups, -1)).transpose(1, 2) for side in (left, right))
        return change.formed((left.mT @ right).flatten(1, 2))

    positions = math.prod(gradient.shape[2:])
    each = positions * max(1, math.prod(unfold(x[:1]).shape) // positions) if len(x) else 1
    return chunked(part, len(x), each * x.element_size())


def _attention(taps: Taps, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None] | None:
    def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = _linear(taps, x, weight, bias)
        return F.linear(x, weight, bias) if out is None else out

    return self_attention(project, *args, **kwargs)


MATRICES: Mapping[Callable, Callable] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), _matmul),
    F.embedding: _embedding,
    F.multi_head_attention_forward: _attention,
    **{function: _convolution(function) for function in (F.conv1d, F.conv2d, F.conv3d)},
}
