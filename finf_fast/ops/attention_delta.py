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
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """What `torch.nn.functional.scaled_dot_product_attention` gives, and by how much each query's changes move it.

    A stack holds the value in row 0 and the change of query n in row 1+n. With s0 the scores, p their softmax over the
    keys, and 0, 1 for before and after::

        ds     = scale (dq k0ᵀ + q1 dkᵀ)
        dp     = p (e - u) / (1 + u),    e = expm1(ds - ds_j),   u = sum p e,   j the leading key of the row
        y[0]   = p v0
        y[1+n] = p dv + dp v1

    exactly the difference of the attention after and before, and no term of it a difference of two near numbers. Where
    a score gains more than 20 on the leading key, dp is the difference of two softmaxes. Where a processor multiplies
    bfloat16 itself, numbers below 1.2e-38 are zero to it.

    Args:
        q: (1+Q, B, H, T, E), or leading size 1 where it has not changed; float32, float64, bfloat16 or float16, any
            strides. T rows ask.
        k: (1+Q, B, H', T', E) or leading size 1, q's dtype; H' divides H, and H / H' neighbouring heads of q share one.
        v: (1+Q, B, H', T', E') or leading size 1, q's dtype.
        causal: row t sees keys 0 to t, whatever T' is (as is_causal in torch).
        scale: factor on the products, 1 / sqrt(E) if None.
        mask: broadcastable to (B, H, T, T'), the same for all queries: bool (True is seen), or a float that is added to
            the scores; may stand beside `causal`. A compiled face passes by blocks of keys that it hides.
        softcap: c > 0, a normal number of float32, makes a score c tanh(s / c), before the mask; or None.
        cu_seqlens: (S+1,) int32 or int64 from 0 to T = T', ascending, for S texts that lie one behind another: rows
            and keys cu_seqlens[i] to cu_seqlens[i+1] are text i, and see nothing of another; the same for all of B.
            Scores between texts are not computed. A NaN may cross to the text beside it, and from a hidden key to rows
            that do not see it, as it does from the infinite values of one in plain torch.

    Returns:
        (1+Q, B, H, T, E') in q's dtype, contiguous; leading size 1 where nothing changes. A row that sees no key gives
        0 and does not change. The arithmetic inside is float64 for float64, else float32; results are rounded once.

    Raises:
        TypeError: a dtype not named above, or k's or v's is not q's.
        ValueError: shapes, numbers of queries or devices do not fit; softcap out of range; cu_seqlens does not go from
            0 to T in ascending order (looked at on a CPU only: a GPU would have to be waited for); a face is forced
            that refuses these inputs.

    Source: design section 2, "softmax" and "a product".
    """
    return _attention_delta(q, k, v, causal, scale, mask, softcap, cu_seqlens)


def _check(q: Tensor, k: Tensor, v: Tensor, mask, softcap, cu_seqlens) -> int:
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
    if cu_seqlens is not None:
        _check_cu_seqlens(q, cu_seqlens, T, k.shape[3])
    return stacked_queries({"q": q, "k": k, "v": v})


def _allocate(q, k, v, causal, scale, mask, softcap, cu_seqlens):
    return _result(q, v, _check(q, k, v, mask, softcap, cu_seqlens))


def _result(q: Tensor, v: Tensor, Q: int) -> Tensor:
    return q.new_empty(1 + Q, *q.shape[1:4], v.shape[4])


def _check_mask(q: Tensor, mask: Tensor, shape: tuple[int, ...]) -> None:
    check_dtype("mask", mask, torch.bool, *FLOATS)
    check_same_device(q=q, mask=mask)
    fits = mask.dim() <= 4 and all(
        size in (1, wanted) for size, wanted in zip(reversed(mask.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(f"mask: wanted a shape that broadcasts to (B, H, T, T') = {shape}, got {tuple(mask.shape)}")


def _check_cu_seqlens(q: Tensor, cu_seqlens: Tensor, T: int, Tk: int) -> None:
    check_dtype("cu_seqlens", cu_seqlens, torch.int32, torch.int64)
    check_shape("cu_seqlens", cu_seqlens, "S+1", None)
    check_same_device(q=q, cu_seqlens=cu_seqlens)
    if Tk != T:
        raise ValueError(f"cu_seqlens: wanted as many keys as rows, got T = {T} and T' = {Tk}")
    if not len(cu_seqlens):
        raise ValueError("cu_seqlens: wanted (S+1,) numbers from 0 to T, got none")


def _check_ascends(cu_seqlens: Tensor, T: int) -> None:
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first or last != T:
        raise ValueError(f"cu_seqlens: wanted numbers from 0 to T = {T}, got {first} to {last}")
    falls = (cu_seqlens[1:] < cu_seqlens[:-1]).nonzero()  # a difference may pass the largest integer
    if len(falls):
        at = int(falls[0])
        raise ValueError(f"cu_seqlens: wanted no number below the one before, got {cu_seqlens[at : at + 2].tolist()}")


def _run_reference(q, k, v, causal, scale, mask, softcap, cu_seqlens, _):
    options = {"causal": causal, "scale": scale, "mask": mask, "softcap": softcap, "cu_seqlens": cu_seqlens}
    return reference.attention_delta(q, k, v, **options)


def _run_cpp(q, k, v, causal, scale, mask, softcap, cu_seqlens, Q):
    out = _result(q, v, Q)
    (_, B, H, T, E), (Hk, Tk, Ev) = q.shape, (*k.shape[2:4], v.shape[4])
    q, k, v, mask = rows(q), rows(k), rows(v), _numbers(mask)
    shared = None if mask is None else mask.expand(B, H, T, Tk)
    edges = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    dispatch.compiled().attention_delta(
        *(CODES[q.dtype], *_told(q), *_told(k), *_told(v)),
        *(
            address(mask),
            mask is not None and mask.dtype == torch.bool,
            shared.stride() if mask is not None else [0] * 4,
        ),
        *(address(edges), 0 if edges is None else len(edges) - 1),
        *(out.data_ptr(), Q, B, H, Hk, T, Tk, E, Ev),
        *(1 / math.sqrt(max(E, 1)) if scale is None else scale, softcap or 0.0, causal, torch.get_num_threads()),
    )
    return out


def _told(x: Tensor) -> tuple[int, tuple[int, ...], bool]:
    """Address of a stack of heads, distances of all but the last dimension, whether it moves."""
    return x.data_ptr(), x.stride()[:4], x.shape[0] > 1


def _numbers(mask: Tensor | None) -> Tensor | None:
    """A mask as bool or float32, which hold every bfloat16 and float16 as it is; float64 ones are rounded."""
    return mask if mask is None or mask.dtype == torch.bool else mask.to(torch.float32)


def _run_triton(q, k, v, causal, scale, mask, softcap, cu_seqlens, Q):
    from finf_fast.kernels import attention_delta as kernel

    out = _result(q, v, Q)
    B, H, T, E = q.shape[1:]
    if not out.numel() or not k.shape[3]:
        return out.zero_()
    scale = 1 / math.sqrt(max(E, 1)) if scale is None else scale
    mask = None if mask is None else mask.expand(B, H, T, k.shape[3])
    options = {"causal": causal, "scale": scale, "mask": mask, "cap": softcap, "cu_seqlens": cu_seqlens}
    kernel.attention_delta(q, k, v, out, **options)
    return out


# Each is told how many queries the check found.
_FACES = {"cpp": _run_cpp, "triton": _run_triton, "reference": _run_reference}


@register(
    "attention_delta",
    "(Tensor q, Tensor k, Tensor v, bool causal, float? scale, Tensor? mask, float? softcap, Tensor? cu_seqlens) "
    "-> Tensor",
    _allocate,
)
def _attention_delta(q, k, v, causal, scale, mask, softcap, cu_seqlens):
    Q = _check(q, k, v, mask, softcap, cu_seqlens)
    if cu_seqlens is not None and q.device.type == "cpu":
        _check_ascends(cu_seqlens, q.shape[3])
    face = dispatch.choose("attention_delta", q, width=max(q.shape[4], v.shape[4]))
    return _FACES[face](q, k, v, causal, scale, mask, softcap, cu_seqlens, Q)
