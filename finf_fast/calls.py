"""What a model's calls of linear layers are made of: shared by whoever watches a forward go by."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["by_place", "ordinary", "patches", "plain", "self_attention", "takes"]

# What torch calls the arguments that come first; of other functions only the first is known, ``input``.
NAMES: Mapping[Any, tuple[str, ...]] = {
    **dict.fromkeys((F.linear, F.conv1d, F.conv2d, F.conv3d), ("input", "weight", "bias")),
    **dict.fromkeys((torch.matmul, torch.mul, torch.add), ("input", "other")),
    F.embedding: ("input", "weight"),
    torch.addmm: ("input", "mat1", "mat2"),
    torch.mm: ("input", "mat2"),
}


def ordinary() -> bool:
    """Whether this call is one of a forward that autograd records as usual.

    Not under ``no_grad``, in a transform of ``torch.func``, under ``torch.compile``, or where saved tensors pass
    through hooks: a checkpointed layer runs again in the backward pass, out of the mode's sight, and must do the same.
    """
    return (
        torch.is_grad_enabled()
        and not torch._C._are_functorch_transforms_active()
        and not torch.compiler.is_compiling()
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    )


def plain(input: Any) -> bool:
    """No tensor subclass, which has rules of its own."""
    return type(input) in (Tensor, torch.nn.Parameter)


def by_place(
    func: Callable, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call; those that the model gave by name, as in ``F.linear(input=x, weight=W)``, in place."""
    kwargs = dict(kwargs)
    for name in NAMES.get(func, ("input",))[len(args) :]:
        if name not in kwargs:
            break
        args = (*args, kwargs.pop(name))
    return args, kwargs


def takes(rule: Callable, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a rule can be called so; it may not know all the names that torch has for its arguments."""
    if not kwargs:
        return True
    try:
        inspect.signature(rule).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def self_attention(
    project: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    heads: int,
    in_weight: Tensor | None,
    in_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout: float,
    out_weight: Tensor,
    out_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None] | None:
    """Self-attention of ``nn.MultiheadAttention`` (L, B, E), written out so that its projections are seen.

    Args:
        project: ``F.linear``'s stand-in, called with samples first: (B, L, E), weight, bias.
        others: this and all between as ``F.multi_head_attention_forward`` has them.

    Returns:
        As that function; None for a form of it that is not written out here.
    """
    known = {"average_attn_weights", "is_causal"}  # the mask is always given where it is causal
    plainly = all(not value for name, value in others.items() if name not in known)
    alike = query is key and key is value and query.dim() == 3 and in_weight is not None
    if not (alike and plainly and plain(query)) or bias_k is not None or add_zero_attn or (training and dropout):
        return None
    x = query.transpose(0, 1)
    batch, length, width = x.shape
    q, k, v = project(x, in_weight, in_bias).view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT * (width // heads) ** -0.5 + _added(attn_mask, (-1, heads, length, length), x)
    weights = (scores + _added(key_padding_mask, (batch, 1, 1, length), x)).softmax(-1)
    out = project((weights @ v).transpose(1, 2).reshape(batch, length, width), out_weight, out_bias)
    seen = weights.mean(1) if others.get("average_attn_weights", True) else weights
    return out.transpose(0, 1), seen if need_weights else None


def _added(mask: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor | float:
    """What a mask adds to the scores: -∞ where a boolean one is True, itself where it is numbers."""
    if mask is None:
        return 0.0
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)
    return mask if mask.dim() == 2 and shape[1] > 1 else mask.reshape(shape)


def patches(x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Tensor:
    """What a convolution multiplies its kernel with: (B · positions, C · kernel) from x (B, C, *sizes)."""
    dims = len(kernel)
    stride, dilation = _each(stride, dims), _each(dilation, dims)
    x = F.pad(x, _borders(padding, kernel, dilation))
    for axis, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + axis, gap * (size - 1) + 1, step)[..., ::gap]
    # (B, C, *positions, *kernel)
    x = x.movedim(1, 1 + dims)
    return x.reshape(math.prod(x.shape[: 1 + dims]), -1)


def _borders(padding: Any, kernel: Any, dilation: tuple[int, ...]) -> list[int]:
    """For ``F.pad``: last axis first, before and after."""
    if padding == "same":
        whole = [gap * (size - 1) for size, gap in zip(kernel, dilation, strict=True)]
        pairs = [(n // 2, n - n // 2) for n in whole]
    else:
        pairs = [(n, n) for n in _each(0 if padding == "valid" else padding, len(kernel))]
    return [n for pair in reversed(pairs) for n in pair]


def _each(value: Any, dims: int) -> tuple[int, ...]:
    """One number for every axis."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * dims if len(values) == 1 else values
