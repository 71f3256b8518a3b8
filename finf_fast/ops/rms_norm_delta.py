"""RMS norm of a stack of (value, exact changes), its own weight's change included."""

from __future__ import annotations

import torch
from torch import Tensor

from finf_fast import reference
from finf_fast.ops import dispatch
from finf_fast.ops.border import CODES
from finf_fast.ops.layer_norm_delta import check_row_norm, results, rows_of_norm
from finf_fast.ops.register import register
from finf_fast.ops.stacks import address, parameter, stack_of_rows, told

__all__ = ["rms_norm_delta"]


def rms_norm_delta(
    stack: Tensor,
    weight: Tensor | None = None,
    *,
    dweight: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """What `torch.nn.functional.rms_norm` over the last dimension gives, and how much each query's change moves it.

    As `finf_fast.ops.layer_norm_delta`, without centring and bias: v is the mean square of the values plus eps, and
    ``v1 - v0 = mean(d (2 h + d))``. Where a model scales by 1 + weight, the sum is the weight to give.

    Args:
        stack: (1+Q, ..., D), or (1, ..., D) where it has not changed; float32, float64, bfloat16 or float16, any
            strides.
        weight: (D), or None for 1; any of those dtypes.
        dweight: (Q, D) change of the weight, or None.
        residual: a stack of the same dtype and shape, or (1, ..., D) where it has not changed; added first.
        eps: added to the mean square (in its unit).

    Returns:
        (1+Q, ..., D) in the stack's dtype, contiguous; (1, ..., D) where nothing changes. With a residual the pair of
        that and the sum. Rounded as there.

    Raises:
        TypeError: a dtype not named above, or the residual's is not the stack's.
        ValueError: shapes, numbers of queries or devices do not fit; eps below 0.

    Source: Zhang and Sennrich, arXiv 1910.07467, equation 4; design section 2, "norms".
    """
    out = _rms_norm_delta(stack, weight, dweight, residual, eps)
    return out[0] if residual is None else (out[0], out[1])


def _check(stack, weight, dweight, residual, eps):
    return check_row_norm(stack, weight, None, dweight, None, residual, eps)


def _allocate(stack, weight, dweight, residual, eps):
    return results(stack, _check(stack, weight, dweight, residual, eps))


def _run_reference(stack, weight, dweight, residual, eps, _):
    out = reference.rms_norm_delta(stack, weight, dweight=dweight, residual=residual, eps=eps)
    return [out] if residual is None else list(out)


def _run_cpp(stack, weight, dweight, residual, eps, sizes):
    out = results(stack, sizes)
    x, other = (stack_of_rows(s, stack.shape[-1]) for s in (stack, residual))
    params = [parameter(p) for p in (weight, dweight)]
    dispatch.compiled().rms_norm_delta(
        *(CODES[stack.dtype], *told(x), *told(other), *map(address, params)),
        *(out[0].data_ptr(), address(out[1]) if len(out) > 1 else 0),
        *(x.shape[1], x.shape[2], sizes[0] - 1, eps, torch.get_num_threads()),
    )
    return out


def _run_triton(stack, weight, dweight, residual, eps, sizes):
    from finf_fast.kernels import rms_norm_delta as kernel

    out = results(stack, sizes)
    if stack.numel():
        x, other, y, total = rows_of_norm(stack, residual, out)
        kernel.rms_norm_delta(x, other, parameter(weight), parameter(dweight), y, total, eps)
    return out


# Each is told the leading sizes that the check found.
_FACES = {"cpp": _run_cpp, "triton": _run_triton, "reference": _run_reference}


@register(
    "rms_norm_delta",
    "(Tensor stack, Tensor? weight, Tensor? dweight, Tensor? residual, float eps) -> Tensor[]",
    _allocate,
)
def _rms_norm_delta(stack, weight, dweight, residual, eps):
    sizes = _check(stack, weight, dweight, residual, eps)
    return _FACES[dispatch.choose("rms_norm_delta", stack)](stack, weight, dweight, residual, eps, sizes)
