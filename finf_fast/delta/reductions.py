"""Rules of reductions: sums, means, spreads, lengths, and the ones that choose (maximum, top-k, sort, max-pooling)."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finf_fast.delta.arithmetic import mul, wide
from finf_fast.delta.choices import maximum, minimum
from finf_fast.delta.functions import sqrt
from finf_fast.delta.integers import collapse
from finf_fast.delta.stack import Stack, values_of
from finf_fast.delta.structure import behind, cast
from finf_fast.delta.table import rule, unruled

Chosen = namedtuple("Chosen", ["values", "indices"])


def over(dim: int | Sequence[int] | None, dims: int) -> tuple[int, ...]:
    """The stacked dimensions that a reduction over logical ``dim`` runs over."""
    if dims == 0 or dim is None or (isinstance(dim, (tuple, list)) and not dim):
        return tuple(range(1, dims + 1))
    return tuple(behind(d) for d in ((dim,) if isinstance(dim, int) else dim))


@rule("sum")
def sum_(input, dim=None, keepdim=False, *, dtype=None, axis=None):
    x = input if dtype is None else cast(input, dtype)
    s = x.stacked
    dims = over(axis if axis is not None else dim, s.dim() - 1)
    if not s.is_floating_point():
        return collapse(s.sum(dims, keepdim=keepdim) if dims else s.long())
    return Stack(s.sum(dims, keepdim=keepdim) if dims else s.clone())


@rule("mean")
def mean(input, dim=None, keepdim=False, *, dtype=None, axis=None):
    x = input if dtype is None else cast(input, dtype)
    s = x.stacked
    dims = over(axis if axis is not None else dim, s.dim() - 1)
    return Stack(s.mean(dims, keepdim=keepdim) if dims else s.clone())


@rule("cumsum")
def cumsum(input, dim, *, dtype=None):
    x = input if dtype is None else cast(input, dtype)
    found = x.stacked.cumsum(behind(dim), dtype=dtype) if x.dim() else x.stacked.clone()
    return Stack(found) if found.is_floating_point() else collapse(found)


@rule("var")
def var(input, dim=None, unbiased=None, keepdim=False, *, correction=None):
    dim, unbiased = (None, dim) if isinstance(dim, bool) else (dim, unbiased)
    correction = correction if correction is not None else 1 if unbiased is None or unbiased else 0
    s = input.stacked
    dims = over(dim, s.dim() - 1)
    x = wide(s)
    c = x - x.mean(dims, keepdim=True)
    count = c[0].numel() // max(1, c[0].sum([d - 1 if d > 0 else d for d in dims]).numel())
    out = torch.empty_like(c)
    out[0] = c[0].square()
    out[1:] = c[1:] * (2 * c[0] + c[1:])  # (c + dc)² - c²
    return Stack((out.sum(dims, keepdim=keepdim) / (count - correction)).to(s.dtype))


@rule("std")
def std(input, dim=None, unbiased=None, keepdim=False, *, correction=None):
    return sqrt(var(input, dim, unbiased, keepdim, correction=correction))


@rule("var_mean")
def var_mean(input, dim=None, unbiased=None, keepdim=False, *, correction=None):
    dim, unbiased = (None, dim) if isinstance(dim, bool) else (dim, unbiased)
    return var(input, dim, unbiased, keepdim, correction=correction), mean(input, dim, keepdim)


@rule(torch.linalg.vector_norm)
def vector_norm(x, ord=2, dim=None, keepdim=False, *, dtype=None):
    if ord != 2:
        return unruled(torch.linalg.vector_norm, x, ord, dim, keepdim, dtype=dtype)
    kind = dtype if dtype is not None else x.dtype
    x = cast(x, torch.promote_types(kind, torch.float32))
    return cast(sqrt(sum_(mul(x, x), dim, keepdim)), kind)


@rule(torch.norm, Tensor.norm)
def norm(input, p="fro", dim=None, keepdim=False, out=None, dtype=None):
    if p in (2, "fro", None):
        return vector_norm(input, 2, dim, keepdim, dtype=dtype)
    return unruled(torch.norm, input, p, dim, keepdim, dtype=dtype)


@rule(torch.linalg.norm, torch.linalg.matrix_norm)
def matrix_norm(A, ord=None, dim=None, keepdim=False, *, dtype=None):
    """A vector's norm, or a matrix' Frobenius norm; its other norms are those of its singular values."""
    pair = len(dim) == 2 if isinstance(dim, (tuple, list)) else dim is None and A.dim() == 2
    if ord == "fro" or ord is None or (ord == 2 and not pair):
        return vector_norm(A, 2, dim, keepdim, dtype=dtype)
    return unruled(torch.linalg.norm, A, ord, dim, keepdim, dtype=dtype)


@rule("prod")
def prod(input, dim=None, keepdim=False, *, dtype=None):
    if input.stacked.is_floating_point():
        how = {"dtype": dtype} if dim is None else {"dim": dim, "keepdim": keepdim, "dtype": dtype}
        return unruled(torch.prod, input, **how)
    v = input.stacked.flatten(1) if dim is None else input.stacked
    return collapse(v.prod(1 if dim is None else behind(dim), keepdim=keepdim and dim is not None))


def picked(stacked: Tensor, indices: Tensor, dim: int) -> Tensor:
    """Numbers of a stack at each row's own places (1 + Q, …): value, and what each query finds at its places less it.

    Where a query's places are the base's, that difference is its change and nothing cancels.
    """
    value = stacked[0].gather(dim, indices[0])
    out = stacked.new_empty((len(stacked), *value.shape))
    out[0] = value
    for q in range(1, len(stacked)):
        out[q] = moved(value, stacked[0].gather(dim, indices[q]), stacked[q].gather(dim, indices[q]))
    return out


def moved(before: Tensor, place: Tensor, change: Tensor) -> Tensor:
    """What stands at another place after its change, less what was read before: any two of three terms may cancel."""
    return torch.where(place == before, 0, place.double() - before) + change


def _chosen(s: Tensor, indices: Tensor, dim: int, keepdim: bool = True) -> Chosen:
    dim = dim if dim < 0 else dim - (s.dim() - 1)
    values = picked(s, indices, dim) if s.is_floating_point() else s.gather(dim, indices)
    if not keepdim:
        values, indices = values.squeeze(dim), indices.squeeze(dim)
    return Chosen(Stack(values), collapse(indices))


@rule("topk")
def topk(input, k, dim=-1, largest=True, sorted=True):
    return _chosen(input.stacked, values_of(input).topk(k, behind(dim), largest, sorted).indices, dim)


@rule("msort")
def msort(input):
    return sort(input, 0).values


@rule("sort")
def sort(input, dim=-1, descending=False, stable=False):
    found = torch.sort(values_of(input), dim=behind(dim), descending=descending, stable=True)
    return _chosen(input.stacked, found.indices, dim)


@rule("argsort")
def argsort(input, dim=-1, descending=False, stable=False):
    return sort(input, dim, descending).indices


def _argument(name: str) -> None:
    function = getattr(torch, name)

    def run(input, dim=None, keepdim=False):
        v = values_of(input)
        if dim is not None and input.dim():
            return collapse(function(v, behind(dim), keepdim=keepdim))
        found = function(v.flatten(1), 1) if input.dim() else torch.zeros_like(v, dtype=torch.long)
        return collapse(found.view(-1, *(1,) * input.dim()) if keepdim else found)

    rule(name)(run)


for _name in ("argmax", "argmin"):
    _argument(_name)


def _extreme(name: str, pairwise: Any) -> None:
    function = getattr(torch, f"arg{name}")

    def run(input, dim=None, keepdim=False, **kwargs):
        other = kwargs.get("other", dim)
        if isinstance(other, Tensor):
            return pairwise(input, other)
        if dim is None or not input.dim():
            found = run(input.flatten(), 0)
            return found.values if dim is None else Chosen(*found)
        indices = function(values_of(input), behind(dim), keepdim=True)
        return _chosen(input.stacked, indices, dim, keepdim)

    def alone(input, dim=None, keepdim=False):
        s = input.stacked
        places = sorted(d % s.dim() for d in over(dim, input.dim()))
        if not places:
            return Stack(s.clone())
        joined = s.movedim(places, tuple(range(-len(places), 0))).flatten(-len(places))
        found = run(Stack(joined), -1).values.stacked
        for place in places if keepdim else ():
            found = found.unsqueeze(place)
        return Stack(found)

    rule(name)(run)
    rule(f"a{name}")(alone)


_extreme("max", maximum)
_extreme("min", minimum)


def _side_by_side(
    spatial: int, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> tuple[int, ...] | None:
    """The window of a pool whose windows neither overlap nor reach beyond the edge, None of others."""
    kernel, stride, padding, dilation = (
        tuple(n) if isinstance(n, (tuple, list)) else (n,) * spatial
        for n in (kernel_size, stride or kernel_size, padding, dilation)
    )
    plain = stride == kernel and not any(padding) and set(dilation) == {1} and not ceil_mode
    return kernel if plain else None


def _pooled(input: Stack, window: tuple[int, ...], pool: Any) -> Stack | None:
    """Each window's largest number and its change, max((x - m) + d) for a base whose largest is m.

    The difference x - m is exact where the two are within a factor of two, as they are where a change decides; far
    below m its rounding is one of the change that it would take. None where a largest number is not finite.
    """
    s = input.stacked
    s = s[(..., *(slice(n // k * k) for n, k in zip(s.shape[-len(window) :], window, strict=True)))]
    largest = pool(s[0], window)
    if not bool(largest.isfinite().all()):
        return None
    spread = largest
    for place, k in enumerate(window, start=-len(window)):
        spread = spread.repeat_interleave(k, place)
    wide = torch.promote_types(s.dtype, torch.float32)
    below = s[0].to(wide) - spread
    changes = pool((s[1:] + below).flatten(0, 1), window).unflatten(0, (len(s) - 1, len(largest)))
    return Stack(torch.cat([largest[None], changes.to(s.dtype)]))


def _pool(name: str, spatial: int) -> None:
    function = getattr(F, f"{name}_with_indices")

    def values(input, *args, return_indices=False, **kwargs):
        window = _side_by_side(spatial, *args, **kwargs) if name.startswith("max") else None
        found = _pooled(input, window, getattr(F, name)) if window and input.dim() == spatial + 2 else None
        return both(input, *args, **kwargs)[0] if found is None else found

    def both(input, *args, return_indices=True, **kwargs):
        kwargs["return_indices"] = True
        x = input if input.dim() == spatial + 2 else input.unsqueeze(0)
        v = values_of(x)
        indices = function(v.flatten(0, 1), *args, **kwargs)[1].unflatten(0, v.shape[:2])
        flat = picked(x.stacked.flatten(-spatial), indices.flatten(-spatial), -1)
        found = Stack(flat.unflatten(-1, indices.shape[-spatial:]))
        return (found, collapse(indices)) if x is input else (found.squeeze(0), collapse(indices.squeeze(1)))

    rule(name)(values)
    # Of torch's adaptive pools only those of torch.nn.functional give the values alone.
    below = [getattr(home, name, None) for home in (torch, torch._C._nn) if name.startswith("adaptive")]
    rule(f"{name}_with_indices", *(f for f in below if f is not None and f is not getattr(F, name)))(both)


for _spatial in (1, 2, 3):
    _pool(f"max_pool{_spatial}d", _spatial)
    _pool(f"adaptive_max_pool{_spatial}d", _spatial)
