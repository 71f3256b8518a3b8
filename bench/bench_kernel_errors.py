"""Errors of every operation's faces against float64: plain torch, the compiled one, and Triton's kernel.

Where there is no GPU the kernels run in Triton's interpreter, which does their arithmetic in numpy: what is compared is
the formula, its blocks and its masks, not a GPU's rounding of a product. The error is of the change alone,
‖Δ - Δ₆₄‖ / ‖Δ₆₄‖ over all queries; truth is the reference in float64 on the very inputs that the face was given.

    python bench/bench_kernel_errors.py [--quick] [--save]
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from torch import Tensor

import machine
import table
from finf_fast import ops
from finf_fast.ops import dispatch

FACES = ("reference", "cpp", "triton")
DTYPES = (torch.float32, torch.bfloat16)
STEPS = (1e-1, 1e-3, 1e-5)  # of changes beside values of size 1
Q, N, D, V = 3, 70, 40, 333  # no multiple of any block
Drawn = tuple[Any, ...]


def drawn(step: float) -> Callable[..., Tensor]:
    """``stack(*shape)``: a value of size 1, and Q changes of size ``step``."""

    def stack(*shape: int) -> Tensor:
        return torch.cat([torch.randn(1, *shape), step * torch.randn(Q, *shape)])

    return stack


def head(step: float) -> tuple[Drawn, Callable[..., Tensor]]:
    x = drawn(step)(N, D)
    target = torch.randint(V, (N,))
    factors = step * torch.randn(Q, V, 4), torch.randn(Q, D, 4)
    return (
        x[0],
        x[1:],
        torch.randn(V, D) * D**-0.5,
        target,
        *factors,
    ), lambda x, dx, W, y, u, v: ops.linear_cross_entropy_delta(x, dx, W, y, dW_factors=(u, v))[1]


def linear(step: float) -> tuple[Drawn, Callable[..., Tensor]]:
    inputs = (drawn(step)(N, D), torch.randn(V, D) * D**-0.5, step * torch.randn(Q, V, 4), torch.randn(Q, D, 4))
    return inputs, lambda x, W, u, v: ops.linear_delta(x, W, dW_factors=(u, v))[1:]


def attention(step: float) -> tuple[Drawn, Callable[..., Tensor]]:
    inputs = tuple(drawn(step)(2, 2, N, 16) for _ in "qkv")
    return inputs, lambda q, k, v: ops.attention_delta(q, k, v, causal=True)[1:]


def layer_norm(step: float) -> tuple[Drawn, Callable[..., Tensor]]:
    inputs = (drawn(step)(N, D), torch.randn(D), torch.randn(D))
    return inputs, lambda x, w, b: ops.layer_norm_delta(x, w, b)[1:]


def rms_norm(step: float) -> tuple[Drawn, Callable[..., Tensor]]:
    return (drawn(step)(N, D), torch.randn(D)), lambda x, w: ops.rms_norm_delta(x, w)[1:]


def group_norm(step: float) -> tuple[Drawn, Callable[..., Tensor]]:
    return (drawn(step)(2, 6, 5, 7), torch.randn(6)), lambda x, w: ops.group_norm_delta(x, 3, w)[1:]


def activation(kind: str) -> Callable[[float], tuple[Drawn, Callable[..., Tensor]]]:
    return lambda step: ((drawn(step)(N, D),), lambda x: ops.activation_delta(x, kind)[1:])


def gated(step: float) -> tuple[Drawn, Callable[..., Tensor]]:
    return (drawn(step)(N, D), drawn(step)(N, D)), lambda x, g: ops.activation_delta(x, "silu", g)[1:]


CASES: dict[str, tuple[str, Callable]] = {
    "head, change of input and low-rank weight": ("linear_cross_entropy_delta", head),
    "linear layer, low-rank change": ("linear_delta", linear),
    "attention, causal": ("attention_delta", attention),
    "layer norm": ("layer_norm_delta", layer_norm),
    "RMS norm": ("rms_norm_delta", rms_norm),
    "group norm": ("group_norm_delta", group_norm),
    "GELU": ("activation_delta", activation("gelu")),
    "ReLU": ("activation_delta", activation("relu")),
    "SwiGLU": ("activation_delta", gated),
}


def faces_of(op: str, dtype: torch.dtype) -> list[str]:
    """Those that are there and take this type."""
    there = [face for face in FACES if face != "triton" or importlib.util.find_spec("triton")]
    return [face for face in there if face in dispatch.TABLE[op] and dtype in dispatch.TABLE[op][face].dtypes]


def error(face: str, inputs: Drawn, work: Callable[..., Tensor], dtype: torch.dtype) -> float:
    """Of one face on these inputs rounded to ``dtype``."""
    given = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    true = with_face("reference", work, [x.double() if x.is_floating_point() else x for x in given])
    device = "cuda" if face == "triton" and torch.cuda.is_available() else "cpu"
    got = with_face(face, work, [x.to(device) for x in given]).double().cpu()
    return float((got - true).norm() / true.norm())


def with_face(face: str, work: Callable[..., Tensor], inputs: list[Tensor]) -> Tensor:
    os.environ["FINF_BACKEND"] = face
    try:
        return work(*inputs)
    finally:
        del os.environ["FINF_BACKEND"]


def rows(quick: bool) -> list[dict[str, Any]]:
    """A row for each case, type and step: the error of every face that takes it."""
    found = []
    for case, (op, make) in CASES.items():
        for dtype in DTYPES:
            for step in STEPS[1:2] if quick else STEPS:
                torch.manual_seed(0)
                inputs, work = make(step)
                errors = {face: float(f"{error(face, inputs, work, dtype):.2g}") for face in faces_of(op, dtype)}
                word = str(dtype).removeprefix("torch.")
                found.append({"case": case, "face of": op, "dtype": word, "step": step, **errors})
    return found


def main(argv: list[str] | None = None) -> None:
    options = table.parser(__doc__.splitlines()[0]).parse_args(argv)
    torch.set_num_threads(options.threads)
    found = rows(options.quick)
    for row in found:
        print(" | ".join(f"{key} {value}" for key, value in row.items()))
    if options.save:
        where = "on the GPU" if torch.cuda.is_available() else "in the interpreter"
        found = [{**row, "triton ran": where} for row in found]
        print(f"saved to {table.append('kernel_errors', found, machine.describe())}")


if __name__ == "__main__":
    main()
