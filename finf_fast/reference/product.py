"""The matrix product of the plain torch faces: oneDNN's in float32 on a processor, torch's own everywhere else.

On AMD processors torch's default library gives half of what oneDNN reaches. Measured, 2 Zen 5 cores, torch 2.13,
GFLOP/s, default against oneDNN: (2048×768)·(768×3072) 118 / 451, (2048×768)·(768×50257) 163 / 350.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["add_linear_", "available", "fits", "linear"]


def available() -> bool:
    """Whether this torch has oneDNN and its fused product."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def fits(x: Tensor, W: Tensor, bias: Tensor | None = None) -> bool:
    """Whether oneDNN takes this product: float32 matrices on a processor, none of them empty.

    What does not fit together goes to torch, whose error tells the shapes.
    """
    return (
        available()
        and x.dtype == W.dtype == torch.float32
        and (bias is None or (bias.dtype == torch.float32 and bias.shape == W.shape[:1]))
        and x.device.type == "cpu"
        and x.dim() > 1
        and W.dim() == 2
        and x.shape[-1] == W.shape[1]
        and x.numel() > 0
        and W.numel() > 0
    )


def linear(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: (..., D) · (D', D)ᵀ + (D') -> (..., D'), of any strides; all of one dtype."""
    if not fits(x, W, bias):
        return F.linear(x, W, bias)
    return torch.ops.mkldnn._linear_pointwise(_dense(x), _dense(W), bias, "none", [], "")


def _dense(x: Tensor) -> Tensor:
    """A matrix without gaps, by rows or by columns: oneDNN takes 50 times longer to gather one with gaps itself."""
    return x if x.is_contiguous() or (x.dim() == 2 and x.T.is_contiguous()) else x.contiguous()


def add_linear_(y: Tensor, x: Tensor, W: Tensor) -> None:
    """y_q += x_q W_qᵀ for each q: (Q, N, D'), (Q, N, D) and (Q, D', D) of one dtype."""
    if not len(W) or not fits(x[0], W[0]):
        y.baddbmm_(x, W.mT)  # adds before it rounds
        return
    for q in range(len(W)):
        y[q].add_(linear(x[q], W[q]))
