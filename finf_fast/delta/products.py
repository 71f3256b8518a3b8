"""Rules of matrix products: by a shared weight one for the whole stack, by a changed one what the change adds."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finf_fast.delta.arithmetic import add, kind_of, mul
from finf_fast.delta.head import Linear, logical_of
from finf_fast.delta.stack import Carried, Changed, Group, NotCarried, Stack, align, lift
from finf_fast.delta.structure import count_of, folded, transpose
from finf_fast.delta.table import current, rule, unruled, words
from finf_fast.fold import laid_out
from finf_fast.reference.product import add_linear_
from finf_fast.runs import runs


@rule("linear")
def linear(input, weight, bias=None):
    if isinstance(weight, Stack):  # a weight that was computed: no factors, and nothing to put off
        return _by_matmul(input, transpose(weight, -2, -1), bias)
    if input.dim() == 1:
        return linear(input.unsqueeze(0), weight, bias).squeeze(0)
    queries = count_of(input, weight, bias) - 1
    x = input.stacked if isinstance(input, Carried) else input[None]
    rows = x.shape[1:-1]
    x = x.flatten(1, -2) if x.dim() > 3 else x.unsqueeze(1) if x.dim() == 2 else x
    found = Linear(x, weight, bias, rows, queries)
    current().wait(found)
    return found


def _by_matmul(input: Any, weight: Any, bias: Any) -> Any:
    y = matmul(input, weight)
    return y if bias is None else add(y, bias)


@rule("addmm")
def addmm(input, mat1, mat2, *, beta=1, alpha=1):
    if not isinstance(mat2, Stack) and beta == alpha == 1 and tuple(input.shape) == tuple(mat2.shape[1:]):
        return linear(mat1, transpose(mat2, 0, 1) if isinstance(mat2, Changed) else mat2.t(), input)
    return _sum(input, mat1, mat2, beta, alpha)


@rule("baddbmm")
def baddbmm(input, batch1, batch2, *, beta=1, alpha=1):
    return _sum(input, batch1, batch2, beta, alpha)


def _sum(input: Any, x: Any, y: Any, beta: float, alpha: float) -> Any:
    product = matmul(x, y) if isinstance(x, Carried) or isinstance(y, Carried) else x @ y
    product = product if alpha == 1 else product * alpha
    return product if beta == 0 else product + (input if beta == 1 else input * beta)


@rule("bmm", "mm", "mv", "dot")
def multiplied(input, other=None, *, mat2=None, vec=None, tensor=None):
    """torch's names for the products of two matrices, of a matrix and a vector, of two vectors."""
    return matmul(input, next(x for x in (other, mat2, vec, tensor) if x is not None))


@rule("matmul", "__matmul__")
def matmul(input, other):
    if isinstance(other, Changed) and other.base.dim() == 2 and input.dim() > 1:
        return linear(input, other.transposed())
    x, y = input.dim(), other.dim()
    if x == 1 or y == 1:
        return _with_vector(input, other, x, y)
    dims = max(x, y)
    kind = kind_of(input, other)
    a, b = (align(v.stacked, dims) if isinstance(v, Carried) else v for v in (input, other))
    if not isinstance(other, Carried):
        return Stack(_product(a.to(kind), b.to(kind)))
    if not isinstance(input, Carried):
        return Stack(_product(a.to(kind), b.to(kind)))
    return Stack(_both(a, b, kind))


def _both(a: Tensor, b: Tensor, kind: torch.dtype) -> Tensor:
    """Δ(ab) = Δa·b + (a + Δa)·Δb."""
    value = a[0] @ b[0]
    out = torch.empty((len(a), *value.shape), dtype=kind, device=value.device)
    out[0] = value
    change = a[1:] @ b[:1]
    change = change + (a[:1] + a[1:]) @ b[1:]
    out[1:] = change
    return out


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def _with_vector(input: Any, other: Any, x: int, y: int) -> Any:
    a = input.unsqueeze(0) if x == 1 else input
    b = other.unsqueeze(1) if y == 1 else other
    found = matmul(a, b)
    found = found.squeeze(-1) if y == 1 else found
    return found.squeeze(-2 if y != 1 else -1) if x == 1 else found


@rule("outer", "ger")
def outer(input, vec2):
    return mul(input.unsqueeze(1), vec2.unsqueeze(0))


@rule("einsum")
def einsum(equation, *operands):
    operands = operands[0] if len(operands) == 1 and isinstance(operands[0], (tuple, list)) else operands
    if not isinstance(equation, str) or len(operands) > 2:
        return unruled(torch.einsum, equation, *operands)
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    if not arrow:  # in alphabetical order what stands there once
        result = "..." * ("..." in inputs) + "".join(c for c in sorted(inputs) if c.isalpha() and inputs.count(c) == 1)
    letter = next(c for c in "ZYXWVUTSRQ" if c not in equation)
    sides = inputs.split(",")
    stacks = [x.stacked if isinstance(x, Carried) else None for x in operands]

    def product(tensors: list[Tensor], carried: list[bool]) -> Tensor:
        left = ",".join((letter if c else "") + side for c, side in zip(carried, sides, strict=True))
        return torch.einsum(f"{left}->{letter}{result}", *tensors)

    if sum(s is not None for s in stacks) == 1:
        tensors = [s if s is not None else x for s, x in zip(stacks, operands, strict=True)]
        return Stack(product(tensors, [s is not None for s in stacks]))
    a, b = stacks
    value = torch.einsum(f"{inputs}->{result}", a[0], b[0])
    change = product([a[1:], b[0]], [True, False])
    change = change + product([a[:1] + a[1:], b[1:]], [True, True])
    return Stack(torch.cat([value[None], change]))


@rule("bilinear")
def bilinear(input1, input2, weight, bias=None):
    return unruled(F.bilinear, input1, input2, weight, bias)


def _convolution(name: str) -> None:
    function = getattr(F, name)

    def run(input, weight, bias=None, *args, **kwargs):
        return convolve(function, input, weight, bias, args, kwargs)

    rule(name)(run)


TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)

for _name in words("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"):
    _convolution(_name)


def convolve(function: Any, input: Any, weight: Any, bias: Any, args: tuple, kwargs: dict) -> Stack:
    """A convolution: the shared kernel on all rows at once, and each query's change of the kernel on its own input."""
    spatial = weight.dim() - 2
    if input.dim() == spatial + 1:
        return convolve(function, input.unsqueeze(0), weight, bias, args, kwargs).squeeze(0)
    count = count_of(input, weight, bias)
    W = logical_of(weight)

    def run(x: Tensor, kernel: Tensor) -> Tensor:
        return function(x, kernel, None, *args, **kwargs)

    y = _by_kernel(run, input, W, count)
    if isinstance(weight, Carried):
        filters = None if function in TRANSPOSED or W.shape[1] != input.shape[1] else run  # one group of channels
        _kernel_changes(run, filters, input, weight, y)
    if bias is not None:
        shape = (-1, *(1,) * spatial)
        if isinstance(bias, Carried):
            y += bias.stacked.to(y.dtype).view(count, 1, *shape)
        else:
            y[0] += bias.view(shape)
    return Stack(y)


def _by_kernel(run: Any, input: Any, W: Tensor, count: int) -> Tensor:
    """(1 + Q, …): the shared kernel on all rows in one call, or on the base's alone where nothing has changed yet."""
    kept, x = current().kept, input.stacked if isinstance(input, Carried) else input[None]
    key, value = (None, None) if kept is None else kept.find(x[0], W)
    if value is None and len(x) > 1:
        y = folded(run, x, W)
    else:
        value = run(x[0], W) if value is None else value
        y = torch.zeros((count, *value.shape), dtype=value.dtype, device=value.device)
        y[0] = value
        if len(x) > 1:
            y[1:] = folded(run, x[1:], W)
    if kept is not None:
        kept.keep(key, x[0], y[0])
    return y


def _kernel_changes(run: Any, filters: Any, input: Any, weight: Any, y: Tensor) -> None:
    """Adds (x + Δx) * dW, query by query; ``filters`` runs r filters of the kernel's shape, None where it has none."""
    groups = weight.groups if isinstance(weight, Changed) else [Group(tuple(range(len(y) - 1)), weight.stacked[1:])]
    for group in groups:
        low = group.dense is None and filters is not None
        whole = None if low else group.full(logical_of(weight))
        for at, q in enumerate(group.queries):
            after = input.stacked[0] + input.stacked[1 + q] if isinstance(input, Carried) else input
            if not low:
                y[1 + q] += run(after, whole[at])
                continue
            if group.scale is not None:
                _rescale(y, q, group.scale[at])
            if not group.u.shape[2]:
                continue
            V = group.v[at].T.reshape(-1, *weight.shape[1:])
            _mix(y[1 + q], filters(after, laid_out(V)), group.u[at])


def _rescale(y: Tensor, q: int, scale: Tensor) -> None:
    """Adds scale times the layer's whole output after the change, of which y holds value and change, not yet a bias."""
    spread = scale.view(-1, *(1,) * (y.dim() - 3))
    y[1 + q].addcmul_(y[0] + y[1 + q], spread)


def _mix(y: Tensor, h: Tensor, u: Tensor) -> None:
    """Adds to y (B, C', …) the r channels of h (B, r, …) mixed by u (C', r)."""
    rows, filtered = y.movedim(1, -1), h.movedim(1, -1)
    if rows.is_contiguous() and filtered.is_contiguous():  # channels last: one product, added before it rounds
        add_linear_(rows.view(1, -1, rows.shape[-1]), filtered.view(1, -1, h.shape[1]), u[None])
    else:
        y += torch.einsum("br...,cr->bc...", h, u)


@rule("embedding")
def embedding(input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False):
    if max_norm is not None:
        raise NotCarried("an embedding with max_norm, which rescales its weight as it reads")
    if isinstance(input, Carried):
        from finf_fast.delta.indexing import by_rows

        return by_rows(lift(weight, count_of(input, weight)), input)
    base = F.embedding(input, logical_of(weight))
    if isinstance(weight, Stack):
        return Stack(torch.stack([F.embedding(input, row) for row in weight.stacked]))
    out = base.new_zeros((1 + weight.queries, *base.shape))
    out[0] = base
    for group in weight.groups:
        if group.dense is not None:
            rows = torch.stack([F.embedding(input, change) for change in group.dense])
        else:
            picked = torch.stack([F.embedding(input, u) for u in group.u])
            rows = torch.einsum("q...r,qdr->q...d", picked, group.v)
        for mine, queries in runs(group.queries):
            out[1:][queries] = rows[mine].to(out.dtype)
    return Stack(out)


@rule(torch.embedding)
def embedding_below(weight, indices, *args, **kwargs):
    return embedding(indices, weight)


def slice_of(weight: Changed, index: int) -> Changed:
    """One of the matrices of a changed (experts, rows, columns) parameter."""
    groups = [Group(group.queries, group.full(weight.base)[:, index]) for group in weight.groups]
    return Changed(weight.base[index], groups, weight.queries)
