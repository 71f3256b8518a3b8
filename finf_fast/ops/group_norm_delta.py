"""Group norm of a stack of (value, exact changes), its own parameters' changes included."""

from __future__ import annotations

import torch
from torch import Tensor

from finf_fast import reference
from finf_fast.ops import dispatch
from finf_fast.ops.border import CODES, FLOATS, check_dtype
from finf_fast.ops.layer_norm_delta import check_norm
from finf_fast.ops.register import register
from finf_fast.ops.stacks import address, check_stack, parameter, stack_of_rows, stacked_queries, told

__all__ = ["group_norm_delta"]


def group_norm_delta(
    stack: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """What `torch.nn.functional.group_norm` gives, and by how much each query's change moves it.

    As `finf_fast.ops.layer_norm_delta`, over the channels of a group and all of space; the parameters are one number a
    channel.

    Args:
        stack: (1+Q, B, C, ...), or (1, B, C, ...) where it has not changed; float32, float64, bfloat16 or float16, any
            strides.
        groups: number of groups, a divisor of C.
        weight: (C), or None for 1; any of those dtypes, as are all parameters.
        bias: (C), or None for 0.
        dweight: (Q, C) change of the weight, or None.
        dbias: (Q, C) change of the bias, or None.
        eps: added to the variance (in its unit).

    Returns:
        (1+Q, B, C, ...) in the stack's dtype, contiguous; (1, B, C, ...) where nothing changes. The arithmetic inside
        is float64 for float64, else float32; results are rounded once. A processor that rounds to bfloat16 itself makes
        those below 1.2e-38 zero.

    Raises:
        TypeError: a dtype not named above.
        ValueError: shapes, numbers of queries or devices do not fit; groups does not divide C; eps below 0.

    Source: Wu and He, arXiv 1803.08494, section 3; design section 2, "norms".
    """
    return _group_norm_delta(stack, groups, weight, bias, dweight, dbias, eps)


def _check(stack: Tensor, groups: int, weight, bias, dweight, dbias, eps: float) -> int:
    check_dtype("stack", stack, *FLOATS)
    check_stack("stack", stack)
    if stack.dim() < 3:
        raise ValueError(f"stack: wanted (1+Q, B, C, ...), got shape {tuple(stack.shape)}")
    C = stack.shape[2]
    if groups < 1 or C % groups:
        raise ValueError(f"groups: wanted a divisor of the {C} channels, got {groups}")
    check_norm(stack, C, "C", weight, bias, dweight, dbias, eps)
    return stacked_queries({"stack": stack}, {"dweight": dweight, "dbias": dbias})


def _allocate(stack, groups, weight, bias, dweight, dbias, eps):
    return stack.new_empty(1 + _check(stack, groups, weight, bias, dweight, dbias, eps), *stack.shape[1:])


def _run_reference(stack, groups, weight, bias, dweight, dbias, eps, _):
    return reference.group_norm_delta(stack, groups, weight, bias, dweight=dweight, dbias=dbias, eps=eps)


def _run_cpp(stack, groups, weight, bias, dweight, dbias, eps, Q):
    y = stack.new_empty(1 + Q, *stack.shape[1:])
    C, S = stack.shape[2], stack.shape[3:].numel()
    x = stack_of_rows(stack, C // groups * S)
    params = [parameter(p) for p in (weight, bias, dweight, dbias)]
    dispatch.compiled().group_norm_delta(
        *(CODES[stack.dtype], *told(x), *map(address, params), y.data_ptr()),
        *(x.shape[1], x.shape[2], Q, groups, max(S, 1), eps, torch.get_num_threads()),
    )
    return y


def _run_triton(stack, groups, weight, bias, dweight, dbias, eps, Q):
    from finf_fast.kernels import group_norm_delta as kernel

    y = stack.new_empty(1 + Q, *stack.shape[1:])
    if y.numel():
        C, S = stack.shape[2], stack.shape[3:].numel()
        x = stack_of_rows(stack, C // groups * S)
        params = [parameter(p) for p in (weight, bias, dweight, dbias)]
        kernel.group_norm_delta(x, *params, y.view(len(y), *x.shape[1:]), eps, groups=groups, space=S)
    return y


# Each is told how many queries the check found.
_FACES = {"cpp": _run_cpp, "triton": _run_triton, "reference": _run_reference}


@register(
    "group_norm_delta",
    "(Tensor stack, int groups, Tensor? weight, Tensor? bias, Tensor? dweight, Tensor? dbias, float eps) -> Tensor",
    _allocate,
)
def _group_norm_delta(stack, groups, weight, bias, dweight, dbias, eps):
    Q = _check(stack, groups, weight, bias, dweight, dbias, eps)
    face = dispatch.choose("group_norm_delta", stack)
    return _FACES[face](stack, groups, weight, bias, dweight, dbias, eps, Q)
