"""Rules of whole layers that have an operation of their own: norms and attention, and batch norm in eval mode."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finf_fast import ops
from finf_fast.delta.arithmetic import wide
from finf_fast.delta.products import linear, logical_of
from finf_fast.delta.stack import Carried, NotCarried, Stack
from finf_fast.delta.structure import count_of
from finf_fast.delta.table import rule


def rows_of(x: Any) -> Tensor:
    """(1 + Q, …), or (1, …) where nothing has changed."""
    return x.stacked if isinstance(x, Carried) else x[None]


def change_of(parameter: Any) -> Tensor | None:
    """(Q, *shape) change of a parameter, None where it has none."""
    return parameter.stacked[1:] if isinstance(parameter, Carried) else None


def _joined(stack: Tensor, dims: int) -> tuple[Tensor, torch.Size]:
    """The last ``dims`` dimensions as one, as the norms take them, and what they were."""
    shape = stack.shape[stack.dim() - dims :]
    return (stack if dims == 1 else stack.flatten(-dims)), shape


def _flat(parameter: Any, dims: int) -> tuple[Any, Any]:
    """A parameter and its change as vectors."""
    if parameter is None:
        return None, None
    base, change = logical_of(parameter), change_of(parameter)
    return base.flatten(), None if change is None else change.flatten(1)


@rule("layer_norm")
def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    dims = len(normalized_shape) if isinstance(normalized_shape, Sequence) else 1
    stack, shape = _joined(rows_of(input), dims)
    (w, dw), (b, db) = _flat(weight, dims), _flat(bias, dims)
    y = ops.layer_norm_delta(stack, w, b, dweight=dw, dbias=db, eps=eps)
    return Stack(y if dims == 1 else y.unflatten(-1, shape))


@rule("rms_norm")
def rms_norm(input, normalized_shape, weight=None, eps=None):
    dims = len(normalized_shape) if isinstance(normalized_shape, Sequence) else 1
    stack, shape = _joined(rows_of(input), dims)
    w, dw = _flat(weight, dims)
    eps = _usual_eps(stack.dtype, stack.device) if eps is None else eps
    y = ops.rms_norm_delta(stack, w, dweight=dw, eps=eps)
    return Stack(y if dims == 1 else y.unflatten(-1, shape))


@functools.cache
def _usual_eps(dtype: torch.dtype, device: torch.device) -> float:
    """What this release of torch adds in rms_norm where it is told nothing: the dtype's last digit, or float32's."""
    wide = torch.promote_types(dtype, torch.float32)
    x = torch.full((1,), 1e-5, dtype=dtype, device=device)  # 3 % of float32's root eps, a ten-thousandth of bfloat16's
    return torch.finfo(wide if dtype != wide and float(F.rms_norm(x, (1,))) > 1e-2 else dtype).eps


@rule("group_norm")
def group_norm(input, num_groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):
    (w, dw), (b, db) = _flat(weight, 1), _flat(bias, 1)
    return Stack(ops.group_norm_delta(rows_of(input), num_groups, w, b, dweight=dw, dbias=db, eps=eps))


@rule(F.instance_norm)
def instance_norm(
    input,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    use_input_stats=True,
    momentum=0.1,
    eps=1e-5,
    cudnn_enabled=True,
):
    if not use_input_stats:
        return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    return group_norm(input, input.shape[1], weight, bias, eps)


@rule(torch.instance_norm)
def instance_norm_below(input, weight, bias, mean, var, use_input_stats, momentum, eps, cudnn_enabled):
    return instance_norm(input, mean, var, weight, bias, use_input_stats, momentum, eps)


@rule(torch.batch_norm)
def batch_norm_below(input, weight, bias, mean, var, training, momentum, eps, cudnn_enabled):
    return batch_norm(input, mean, var, weight, bias, training, momentum, eps)


@rule(F.batch_norm)
def batch_norm(
    input,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
    cudnn_enabled=True,
):
    """y = (h - m)·a + b, a = weight / sqrt(var + eps): the change of h times a, and h1 times what moved in a and b."""
    if training or running_mean is None:
        raise NotCarried("batch norm over the batch's own statistics")
    a, shift = _batch_norm_affine(running_mean, running_var, weight, bias, eps)
    spread = (-1, *(1,) * (input.dim() - 2))
    (a, da), (shift, dshift) = (
        (x, None) if not isinstance(x, Carried) else (x.stacked[0], x.stacked[1:]) for x in (a, shift)
    )
    s = rows_of(input)
    x = wide(s)
    y = x * a.view(spread)
    y[0] += shift.view(spread)
    if da is None and dshift is None:
        return Stack(y.to(s.dtype))
    count = count_of(running_mean, running_var, weight, bias)
    if len(y) == 1:
        y = torch.cat([y, y.new_zeros((count - 1, *y.shape[1:]))])
    if da is not None:
        after = x[:1] + x[1:] if len(x) > 1 else x
        y[1:] += after * da.view(count - 1, 1, *spread)
    if dshift is not None:
        y[1:] += dshift.view(count - 1, 1, *spread)
    return Stack(y.to(s.dtype))


def _batch_norm_affine(mean: Any, var: Any, weight: Any, bias: Any, eps: float) -> tuple[Any, Any]:
    """Scale and shift of each channel in float32 at least, carried where something they are made of is."""
    mean, var, weight, bias = (x if x is None else _at_least_single(x) for x in (mean, var, weight, bias))
    a = (var + eps).rsqrt()
    a = a if weight is None else a * weight
    shift = -(mean * a)
    return a, shift if bias is None else shift + bias


def _at_least_single(x: Any) -> Any:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else _as_stack(x)


def _as_stack(x: Any) -> Any:
    return Stack(x.stacked) if isinstance(x, Carried) else x


@rule("scaled_dot_product_attention")
def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if dropout_p:
        raise NotCarried("attention with dropout on")
    if isinstance(attn_mask, Carried):
        return _attention_by_rules(query, key, value, attn_mask, is_causal, scale)
    q, k, v = (rows_of(x) for x in (query, key, value))
    dims = q.dim() - 1
    if dims != 4:  # (T, E) and (B, T, E) are legal: as one head
        q, k, v = (x.flatten(1, -3).unsqueeze(2) if dims > 2 else x[:, None, None] for x in (q, k, v))
        if attn_mask is not None and attn_mask.dim() > 2:
            attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2]).flatten(0, -3).unsqueeze(1)
    y = ops.attention_delta(q, k, v, causal=is_causal, scale=scale, mask=attn_mask)
    return Stack(y if dims == 4 else y.reshape(len(y), *query.shape[:-1], value.shape[-1]))


def _attention_by_rules(query: Any, key: Any, value: Any, mask: Any, causal: bool, scale: float | None) -> Any:
    """Attention spelt out, for a mask that is carried (a position bias with changed weights)."""
    if query.shape[-3] != key.shape[-3]:
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    return torch.matmul(_attention_weights(query, key, mask, causal, scale), value)


def _attention_weights(query: Any, key: Any, mask: Any, causal: bool, scale: float | None) -> Any:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.matmul(query, key.transpose(-2, -1)) * scale
    if mask is not None:
        scores = torch.where(mask, scores, -torch.inf) if mask.dtype is torch.bool else scores + mask
    if causal:
        rows, columns = query.shape[-2], key.shape[-2]
        above = torch.ones(rows, columns, dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(above, -torch.inf)
    return torch.softmax(scores, -1)


@rule("multi_head_attention_forward")
def multi_head_attention(
    query,
    key,
    value,
    embed_dim_to_check,
    num_heads,
    in_proj_weight,
    in_proj_bias,
    bias_k,
    bias_v,
    add_zero_attn,
    dropout_p,
    out_proj_weight,
    out_proj_bias,
    training=True,
    key_padding_mask=None,
    need_weights=True,
    attn_mask=None,
    use_separate_proj_weight=False,
    q_proj_weight=None,
    k_proj_weight=None,
    v_proj_weight=None,
    static_k=None,
    static_v=None,
    average_attn_weights=True,
    is_causal=False,
):
    """torch.nn.MultiheadAttention, (T, B, E), spelt out; with the weights, if asked for, score by score."""
    single = query.dim() == 2
    if single:
        same = query is key is value
        query, key, value = (query.unsqueeze(1),) * 3 if same else (x.unsqueeze(1) for x in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    if (
        use_separate_proj_weight
        or bias_k is not None
        or add_zero_attn
        or static_k is not None
        or (training and dropout_p)
    ):
        raise NotCarried("multi_head_attention_forward with separate projections, extra keys or dropout")
    projected = linear_each((query, key, value), in_proj_weight, in_proj_bias)
    q, k, v = (x.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for x in projected)
    mask = _merged_mask(attn_mask, key_padding_mask, q.shape, k.shape)
    weights = None
    if need_weights:
        weights = _attention_weights(q, k, mask, is_causal and mask is None, None)
        y = torch.matmul(weights, v)
        weights = weights.mean(1) if average_attn_weights else weights
        weights = weights.squeeze(0) if single else weights
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal and mask is None)
    y = y.permute(2, 0, 1, 3).flatten(-2)
    y = F.linear(y, out_proj_weight, out_proj_bias)
    return y.squeeze(1) if single else y, weights


def linear_each(inputs: tuple, weight: Any, bias: Any) -> list[Any]:
    """The three projections of one stacked weight; one product where all read the same input."""
    if inputs[0] is inputs[1] is inputs[2]:
        y = linear(inputs[0], weight, bias) if _carried(inputs[0], weight, bias) else F.linear(inputs[0], weight, bias)
        return list(y.chunk(3, -1))
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    return [F.linear(x, w, b) for x, w, b in zip(inputs, weight.chunk(3), biases, strict=True)]


def _carried(*xs: Any) -> bool:
    return any(isinstance(x, Carried) for x in xs)


def _merged_mask(attn: Any, padding: Any, q: torch.Size, k: torch.Size) -> Any:
    """(B, H, T, Tk) or what broadcasts to it: additive, or None. In this function True means "look away"."""
    found = None
    for mask, shape in ((attn, None), (padding, (k[0], 1, 1, k[2]))):
        if mask is None:
            continue
        if mask.dtype is torch.bool:
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill(mask, -torch.inf)
        if shape is not None:
            mask = mask.view(shape)
        elif mask.dim() == 3:
            mask = mask.view(q[0], q[1], q[2], k[2])
        found = mask if found is None else found + mask
    return found
