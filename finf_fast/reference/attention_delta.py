"""Softmax attention on stacks of (value, exact changes) of queries, keys and values."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from finf_fast.reference import product
from finf_fast.reference.changes import tanh_change
from finf_fast.reference.stacks import arithmetic, pieces, queries, split

__all__ = ["attention_delta"]

# Scores worked on at a time, those of all queries together: 2 MiB in float32. Measured (Zen 5, one core, Q = 4, B = 2,
# H = 12, T = 512, E = 64, causal, float32): 2^17 200 ms, 2^19 142, 2^22 154.
_PIECE = 1 << 19
# Past this a change of a score is taken by a second softmax: e^20 is far inside float32, and so large a change is not
# lost in the difference of two probabilities.
_LARGE = 20.0


@dataclass(frozen=True)
class _Rule:
    """What turns products of queries and keys into scores."""

    scale: float
    softcap: float | None
    causal: bool


def attention_delta(q, k, v, *, causal=False, scale=None, mask=None, softcap=None, cu_seqlens=None) -> Tensor:
    """See `finf_fast.ops.attention_delta`."""
    _, B, H, T, E = q.shape
    Tk, Ev = k.shape[3], v.shape[4]
    out = q.new_empty(1 + queries(q, k, v), B, H, T, Ev)
    if not Tk or not out.numel():
        return out.zero_()
    rule = _Rule(1 / math.sqrt(max(E, 1)) if scale is None else scale, softcap, causal)
    masks = None if mask is None else mask.expand(B, H, T, Tk)
    if cu_seqlens is None:
        _attend_all(out, q, k, v, rule, masks)
        return out
    for first, last in itertools.pairwise(cu_seqlens.tolist()):
        text = slice(first, last)
        seen = None if masks is None else masks[:, :, text, text]
        if first < last:
            _attend_all(*(x[:, :, :, text] for x in (out, q, k, v)), rule, seen)
    return out


def _attend_all(out: Tensor, q: Tensor, k: Tensor, v: Tensor, rule: _Rule, masks: Tensor | None) -> None:
    """Fills `out` (1+Q, B, H, T, Ev), piece by piece."""
    Q, (_, B, H, T, _), (Hk, Tk) = len(out) - 1, q.shape, k.shape[2:4]
    dtype, group, causal = arithmetic(q.dtype), H // max(Hk, 1), rule.causal
    for b in range(B):
        for g in range(Hk):
            heads = slice(g * group, (g + 1) * group)
            keys, values = split(k[:, b, g], dtype), split(v[:, b, g], dtype)
            for at in pieces(T, (1 + Q) * group * Tk, _PIECE):
                seen = slice(0, min(at.stop, Tk) if causal else Tk)  # keys after the last row are not looked at
                block = None if masks is None else masks[b, heads, at, seen]
                rows = split(q[:, b, heads, at], dtype)
                part = [x[:, seen] for x in (*keys, *values)]
                _attend(out[:, b, heads, at], rows, part[:2], part[2:], rule, _bias(block, causal, at, seen, rows[0]))


def _bias(mask: Tensor | None, causal: bool, at: slice, seen: slice, like: Tensor) -> Tensor | None:
    """What is added to the scores (heads, rows, keys), -inf where a row may not look."""
    bias = None
    if mask is not None:
        bias = mask.to(like.dtype)
        if mask.dtype == torch.bool:
            bias = torch.zeros_like(bias).masked_fill_(~mask, -torch.inf)
    if causal:
        rows = torch.arange(at.start, at.stop, device=like.device)[:, None]
        later = torch.arange(seen.stop, device=like.device) > rows
        zero = like.new_zeros(later.shape) if bias is None else bias
        bias = zero.masked_fill(later, -torch.inf)
    return bias


def _attend(out: Tensor, q, k, v, rule: _Rule, bias: Tensor | None) -> None:
    """One block: `out` (1+Q, heads, rows, Ev) from pairs (value, changes) of q, k and v."""
    shape = out.shape[1:]
    s, ds = _scores(q, k, rule)
    if bias is not None:
        s = s.view(*shape[:2], -1).add_(bias).view_as(s)
    p = _softmax(s)
    (v0, dv) = v
    out[0] = product.linear(p, v0[0].T).view(shape)
    change = None
    if len(dv):
        change = product.linear(p, dv.mT.reshape(-1, dv.shape[1])).view(len(p), len(dv), -1).transpose(0, 1)
    if ds is not None:
        dp = _probability_change(s, ds, p)
        moved = _products(dp, (v0 + dv if len(dv) else v0).mT)
        change = moved if change is None else moved.add_(change)
    if change is not None:
        out[1:] = change.reshape(-1, *shape)


def _softmax(s: Tensor) -> Tensor:
    """A row that sees nothing gives 0, as in torch; one that holds a NaN gives NaN."""
    return torch.softmax(s, -1).masked_fill_(s.amax(-1, keepdim=True) == -torch.inf, 0)


def _scores(q, k, rule: _Rule) -> tuple[Tensor, Tensor | None]:
    """Scores (heads * rows, keys) before the mask, and their changes (Q, heads * rows, keys).

    scale (dq k0 + q1 dk) as one product of twice the length.
    """
    q0, dq = (x.flatten(1, 2) * rule.scale for x in q)
    k0, dk = k
    s = product.linear(q0[0], k0[0])
    ds = None
    if len(dq) and len(dk):
        ds = _products(torch.cat([dq, q0 + dq], -1), torch.cat([k0.expand_as(dk), dk], -1))
    elif len(dq):
        ds = _products(dq, k0)
    elif len(dk):
        ds = _products(q0, dk)
    if rule.softcap is None:
        return s, ds
    c = rule.softcap
    if ds is not None:
        ds = tanh_change(s / c, ds / c).mul_(c)
    return s.div_(c).tanh_().mul_(c), ds


def _products(x: Tensor, W: Tensor) -> Tensor:
    """x_n W_nᵀ for each n: (Q, R, K), (Q, D, K) -> (Q, R, D); either may have leading size 1."""
    if len(W) == 1:
        return product.linear(x, W[0])
    if not product.fits(x[0], W[0]):
        return x @ W.mT
    return torch.stack([product.linear(a, each) for a, each in zip(x.expand(len(W), -1, -1), W, strict=True)])


def _probability_change(s: Tensor, ds: Tensor, p: Tensor) -> Tensor:
    """p (e - u) / (1 + u), e = expm1(ds), u = sum p e, with ds counted from each row's leading key.

    The softmax does not feel that shift; the leading key's own e is then exactly 0, so that a row that looks at hardly
    anything else keeps the digits of what little moves.
    """
    ds = ds.sub_(ds.gather(-1, s.argmax(-1, keepdim=True).expand(len(ds), -1, -1)))
    if ds.device.type == "cpu" and not (ds.amax(-1) > _LARGE).any():
        return _small_change(ds, p)
    large = ds.masked_fill(s == -torch.inf, 0).amax(-1, keepdim=True) > _LARGE
    after = _softmax(s + ds)
    return torch.where(large, after - p, _small_change(ds.clamp_(max=_LARGE), p))


def _small_change(ds: Tensor, p: Tensor) -> Tensor:
    e = ds.expm1_()
    u = (e * p).sum(-1, keepdim=True)
    return e.sub_(u).mul_(p).div_(u + 1)
