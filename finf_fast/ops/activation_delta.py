"""An activation function on a stack of (value, exact changes), with or without a gate (swiglu, geglu)."""

from __future__ import annotations

import torch
from torch import Tensor

from finf_fast import reference
from finf_fast.ops import dispatch
from finf_fast.ops.border import CODES, FLOATS, check_dtype, check_same_device
from finf_fast.ops.register import register
from finf_fast.ops.stacks import check_stack, stack_of_rows, stacked_queries, told

__all__ = ["KINDS", "activation_delta"]

KINDS = ("relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "quick_gelu")


def activation_delta(stack: Tensor, kind: str, gate: Tensor | None = None) -> Tensor:
    """What an activation function gives, and by how much each query's change moves it.

    A stack holds the value in row 0 and the change of query q in row 1+q. With f the function, h = stack[0] and
    d = stack[1+q]::

        y[0]   = f(h)            f(h) g0                                            with a gate, g0 = gate[0]
        y[1+q] = f(h+d) - f(h)   (f(h+d) - f(h)) g0 + f(h+d) gate[1+q]

    in forms that do not cancel, whatever the size of d and however far h lies in a tail: `finf_fast.reference.changes`.

    Args:
        stack: (1+Q, ...), or (1, ...) where it has not changed; float32, float64, bfloat16 or float16, any strides.
        kind: relu, gelu (with erf), gelu_tanh, silu, tanh, sigmoid or quick_gelu (x sigmoid(1.702 x)).
        gate: a stack of the same shape and dtype, or (1, ...) where it has not changed; or None.

    Returns:
        (1+Q, ...) in the stack's dtype, contiguous; (1, ...) where nothing changes. The arithmetic inside is float64
        for float64, else float32; results are rounded once. A processor that rounds to bfloat16 itself makes those
        below 1.2e-38 zero.

    Raises:
        TypeError: a dtype not named above, or the gate's is not the stack's.
        ValueError: an unknown kind; shapes, numbers of queries or devices do not fit.

    Source: design section 2, "a nonlinearity" and "a product".
    """
    return _activation_delta(stack, kind, gate)


def _check(stack: Tensor, kind: str, gate: Tensor | None) -> int:
    check_dtype("stack", stack, *FLOATS)
    check_stack("stack", stack)
    if kind not in KINDS:
        raise ValueError(f"kind: wanted one of {', '.join(KINDS)}, got {kind!r}")
    if gate is not None:
        check_dtype("gate", gate, stack.dtype)
        check_stack("gate", gate, stack.shape[1:])
        check_same_device(stack=stack, gate=gate)
    return stacked_queries({"stack": stack, "gate": gate})


def _allocate(stack, kind, gate):
    return stack.new_empty(1 + _check(stack, kind, gate), *stack.shape[1:])


def _run_cpp(stack, kind, gate, Q):
    y = stack.new_empty(1 + Q, *stack.shape[1:])
    M = stack.shape[1:].numel()
    x, g = (stack_of_rows(s, M) for s in (stack, gate))
    (at, x_q, _, x_moves), (gate_at, g_q, _, g_moves) = told(x), told(g)
    dispatch.compiled().activation_delta(
        *(kind, CODES[stack.dtype], at, x_q, x_moves, gate_at, g_q, g_moves),
        *(y.data_ptr(), M, Q, torch.get_num_threads()),
    )
    return y


def _run_triton(stack, kind, gate, Q):
    from finf_fast.kernels import activation_delta as kernel

    y = stack.new_empty(1 + Q, *stack.shape[1:])
    M = stack.shape[1:].numel()
    if y.numel():
        # A stack with gaps inside a row is copied by `stack_of_rows`, as every face but the plain one needs it.
        x, g = (stack_of_rows(s, M) for s in (stack, gate))
        kernel.activation_delta(x, g, y.view(len(y), M), kind)
    return y


def _run_reference(stack, kind, gate, _):
    return reference.activation_delta(stack, kind, gate)


# Each is told how many queries the check found.
_FACES = {"cpp": _run_cpp, "triton": _run_triton, "reference": _run_reference}


@register("activation_delta", "(Tensor stack, str kind, Tensor? gate) -> Tensor", _allocate)
def _activation_delta(stack, kind, gate):
    Q = _check(stack, kind, gate)
    return _FACES[dispatch.choose("activation_delta", stack)](stack, kind, gate, Q)
