"""Softmax attention on stacks of (value, exact changes) of queries, keys and values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from finf_fast import reference
from finf_fast.ops import dispatch
from finf_fast.ops.border import CODES, FLOATS, check_dtype, check_same_device, check_shape, check_softcap, rows
from finf_fast.ops.register import register
from finf_fast.ops.stacks import address, check_stack, stacked_queries

__all__ = ["attention_delta"]


def attention_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """What `torch.nn.functional.scaled_dot_product_attention` gives, and by how much each query's changes move it.

    A stack holds the value in row 0 and the change of query n in row 1+n. With s0 the scores, p their softmax over the
    keys, and 0, 1 for before and after::

        ds     = scale (dq k0ᵀ + q1 dkᵀ)
        dp     = p (e - u) / (1 + u),    e = expm1(ds - ds_j),   u = sum p e,   j the leading key of the row
        y[0]   = p v0
        y[1+n] = p dv + dp v1

    exactly the difference of the attention after and before, and no term of it a difference of two near numbers. Where
    a score gains more than 20 on the leading key, dp is the difference of two softmaxes.

    Args:
        q: (1+Q, B, H, T, E), or leading size 1 where it has not changed; float32, float64, bfloat16 or float16, any
            strides. T rows ask.
        k: (1+Q, B, H', T', E) or leading size 1, q's dtype; H' divides H, and H / H' neighbouring heads of q share one.
        v: (1+Q, B, H', T', E') or leading size 1, q's dtype.
        causal: row t sees keys 0 to t, whatever T' is (as is_causal in torch).
        scale: factor on the products, 1 / sqrt(E) if None.
        mask: broadcastable to (B, H, T, T'), the same for all queries: bool (True is seen), or a float that is added to
            the scores; may stand beside `causal`.
        softcap: c > 0, a normal number of float32, makes a score c tanh(s / c), before the mask; or None.

    Returns:
        (1+Q, B, H, T, E') in q's dtype, contiguous; leading size 1 where nothing changes. A row that sees no key gives
        0 and does not change. The arithmetic inside is float64 for float64, else float32; results are rounded once.

    Raises:
        TypeError: a dtype not named above, or k's or v's is not q's.
        ValueError: shapes, numbers of queries or devices do not fit; softcap out of range; a face is forced that
            refuses these inputs.

    Source: design section 2, "softmax" and "a product".
    """
    return _attention_delta(q, k, v, causal, scale, mask, softcap)


def _allocate(q, k, v, causal, scale, mask, softcap):
    check_dtype("q", q, *FLOATS)
    check_dtype("k", k, q.dtype)
    check_dtype("v", v, q.dtype)
    check_shape("q", q, "1+Q,B,H,T,E", None, None, None, None, None)
    _, B, H, T, E = q.shape
    check_shape("k", k, "1+Q,B,H',T',E", None, B, None, None, E)
    check_shape("v", v, "1+Q,B,H',T',E'", None, B, k.shape[2], k.shape[3], None)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_stack(name, x)
    check_same_device(q=q, k=k, v=v)
    if H and (not k.shape[2] or H % k.shape[2]):
        raise ValueError(f"k: wanted a number of heads that divides q's {H}, got {k.shape[2]}")
    check_softcap(softcap)
    if mask is not None:
        _check_mask(q, mask, (B, H, T, k.shape[3]))
    return q.new_empty(1 + stacked_queries({"q": q, "k": k, "v": v}), B, H, T, v.shape[4])


def _check_mask(q: Tensor, mask: Tensor, shape: tuple[int, ...]) -> None:
    check_dtype("mask", mask, torch.bool, *FLOATS)
    check_same_device(q=q, mask=mask)
    fits = mask.dim() <= 4 and all(
        size in (1, wanted) for size, wanted in zip(reversed(mask.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(f"mask: wanted a shape that broadcasts to (B, H, T, T') = {shape}, got {tuple(mask.shape)}")


def _run_reference(q, k, v, causal, scale, mask, softcap):
    return reference.attention_delta(q, k, v, causal=causal, scale=scale, mask=mask, softcap=softcap)


def _run_cpp(q, k, v, causal, scale, mask, softcap):
    out = _allocate(q, k, v, causal, scale, mask, softcap)
    (_, B, H, T, E), (Hk, Tk, Ev) = q.shape, (*k.shape[2:4], v.shape[4])
    q, k, v, mask = rows(q), rows(k), rows(v), _numbers(mask)
    shared = None if mask is None else mask.expand(B, H, T, Tk)
    dispatch.compiled().attention_delta(
        *(CODES[q.dtype], *_told(q), *_told(k), *_told(v)),
        *(
            address(mask),
            mask is not None and mask.dtype == torch.bool,
            shared.stride() if mask is not None else [0] * 4,
        ),
        *(out.data_ptr(), len(out) - 1, B, H, Hk, T, Tk, E, Ev),
        *(1 / math.sqrt(max(E, 1)) if scale is None else scale, softcap or 0.0, causal, torch.get_num_threads()),
    )
    return out


def _told(x: Tensor) -> tuple[int, tuple[int, ...], bool]:
    """Address of a stack of heads, distances of all but the last dimension, whether it moves."""
    return x.data_ptr(), x.stride()[:4], len(x) > 1


def _numbers(mask: Tensor | None) -> Tensor | None:
    """A mask as bool or float32, which hold every bfloat16 and float16 as it is; float64 ones are rounded."""
    return mask if mask is None or mask.dtype == torch.bool else mask.to(torch.float32)


def _run_triton(q, k, v, causal, scale, mask, softcap):
    from finf_fast.kernels import attention_delta as kernel

    out = _allocate(q, k, v, causal, scale, mask, softcap)
    B, H, T, E = q.shape[1:]
    if not out.numel() or not k.shape[3]:
        return out.zero_()
    scale = 1 / math.sqrt(max(E, 1)) if scale is None else scale
    mask = None if mask is None else mask.expand(B, H, T, k.shape[3])
    kernel.attention_delta(q, k, v, out, causal=causal, scale=scale, mask=mask, cap=softcap)
    return out


_FACES = {"cpp": _run_cpp, "triton": _run_triton, "reference": _run_reference}


@register(
    "attention_delta",
    "(Tensor q, Tensor k, Tensor v, bool causal, float? scale, Tensor? mask, float? softcap) -> Tensor",
    _allocate,
)
def _attention_delta(q, k, v, causal, scale, mask, softcap):
    _allocate(q, k, v, causal, scale, mask, softcap)
    face = dispatch.choose("attention_delta", q, width=max(q.shape[4], v.shape[4]))
    return _FACES[face](q, k, v, causal, scale, mask, softcap)
