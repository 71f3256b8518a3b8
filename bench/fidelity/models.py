"""The nets of the bench, and how one is trained."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["conv_net", "mlp", "res_net", "trained"]


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between, of flattened images."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def conv_net(side: int, channels: int = 16) -> nn.Sequential:
    """Two convolutions, each halved by max-pooling, and two linear layers."""
    return nn.Sequential(
        *(nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(2 * channels * (side // 4) ** 2, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


class Block(nn.Module):
    """A residual block of two convolutions with batch norm, the first with a stride."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs))
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        self.around = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.around(x))


def res_net(channels: int = 8) -> nn.Sequential:
    """Seven layers with batch norm, widths C, 2C and 4C."""
    return nn.Sequential(
        *(nn.Conv2d(1, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()),
        *(Block(channels, channels, 1), Block(channels, 2 * channels, 2), Block(2 * channels, 4 * channels, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * channels, 10)),
    )


def trained(make: Callable[[], nn.Module], x: Tensor, y: Tensor, epochs: int, seed: int) -> nn.Module:
    """A fresh model in eval mode after AdamW, 1e-3, batches of 128."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = make().train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.0)
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(128):
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
    return model.eval().requires_grad_(True)
