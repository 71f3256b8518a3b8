"""Models whose rows do not lie sample by sample, which whoever takes a batch apart must see."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Sorted(nn.Module):
    """Samples put in the order of their first number, and back."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return self.head(torch.tanh(self.first(x[order])))[order.argsort()]


class TimeFirst(nn.Module):
    """Samples in the second dimension; as many of them as there are steps in time."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.tanh(self.first(x.transpose(0, 1))) * torch.arange(1.0, 1 + x.shape[1])[:, None, None].to(x)
        return self.head(mixed.mean(0))


class Late(nn.Module):
    """A branch that counts for large samples only, and swaps the last two by a product before its layer and after."""

    def __init__(self):
        super().__init__()
        self.first, self.branch, self.head = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        swap = torch.eye(len(x)).to(x)
        swap[-2:] = swap[-2:].flip(0)
        branch = swap @ self.branch(swap @ x)
        return self.head(torch.tanh(self.first(x) + (x.norm(dim=1, keepdim=True) > 10) * branch))
