"""A small byte-level transformer, as plain as one can be: the text demo trains it from nothing in about a minute."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ByteModel"]

BYTES = 256  # the vocabulary


class ByteModel(nn.Module):
    """Causal language model over bytes, pre-norm, learned positions (Radford et al., 2019, the GPT-2 layout).

    Args:
        width: D, a multiple of ``heads``.
        layers: transformer blocks.
        window: longest input, L.
        heads: attention heads.
    """

    def __init__(self, width: int = 128, layers: int = 4, window: int = 128, heads: int = 4):
        super().__init__()
        self.bytes, self.places = nn.Embedding(BYTES, width), nn.Embedding(window, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, BYTES, bias=False)
        for weight in (p for p in self.parameters() if p.dim() == 2):
            nn.init.normal_(weight, std=0.02)  # GPT-2's

    def forward(self, ids: Tensor) -> Tensor:
        """Byte values (B, L) to logits (B, L, 256) for the byte after each."""
        x = self.bytes(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(x)))


class Block(nn.Module):
    """Attention, then a two-layer net, each added to what came in."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_a, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm_b, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self._attend(self.qkv(self.norm_a(x))))
        return x + self.down(F.gelu(self.up(self.norm_b(x))))

    def _attend(self, qkv: Tensor) -> Tensor:
        samples, length, _ = qkv.shape
        q, k, v = qkv.view(samples, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x.transpose(1, 2).reshape(samples, length, -1)
