"""The published data-leakage protocol written down a second time, literally, sharing nothing with the library.

Source: the CIFAR-100 notebook of the Forward-INF release (Ko et al., CVPR 2024), retold. It works on deep copies, steps
with torch's own Adam, and scores every training sample by two whole forwards in eval mode.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Told:
    """(S,) |loss after - loss before|, the model after, and the radius where the query had to be moved."""

    scores: Tensor
    after: nn.Module
    radius: float | None


def one_ascent_step(net: nn.Module, pair: list[Tensor], lr: float) -> float:
    """Returns the notebook's number: the loss over the length of the list [inputs, labels], which is 2."""
    net.train()
    adam = torch.optim.Adam(net.parameters(), lr=lr)
    adam.zero_grad()
    negative = -F.cross_entropy(net(pair[0]), pair[1])
    negative.backward()
    adam.step()
    return abs(negative.item()) / len(pair)


def point_on_sphere(x: Tensor, radius: float) -> Tensor:
    """``x`` (1, ...) plus a vector of length ``radius`` that points anywhere."""
    arrow = torch.randn(x.shape).to(x.dtype)
    return x + arrow * (radius / arrow.pow(2).sum().sqrt())


def unlearn(net: nn.Module, x: Tensor, y: Tensor, lr: float = 5e-3) -> tuple[nn.Module, float | None]:
    """The model after unlearning one sample (x (1, ...), y (1,)), and how far it was moved for that, if it was."""
    after = copy.deepcopy(net)
    halved = one_ascent_step(after, [torch.cat([x, x]), torch.cat([y, y])], lr)
    if halved >= 5e-3:
        return after, None
    radius = 3.0
    while True:
        away = point_on_sphere(x, radius)
        after = copy.deepcopy(net)
        halved = one_ascent_step(after, [torch.cat([away, away]), torch.cat([y, y])], lr)
        if halved >= 1e-2:
            return after, radius
        radius *= 1.1


@torch.no_grad()
def losses(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """(S,) cross-entropy in eval mode."""
    return F.cross_entropy(net.eval()(x), y, reduction="none")


def tell(net: nn.Module, x: Tensor, y: Tensor, train_x: Tensor, train_y: Tensor) -> Told:
    """The protocol for one query over the whole training set."""
    after, radius = unlearn(net, x, y)
    before = losses(copy.deepcopy(net), train_x, train_y)
    return Told((losses(after, train_x, train_y) - before).abs(), after, radius)
