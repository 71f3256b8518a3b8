"""A model may name the arguments of the calls it makes: every way through it does as if they stood in their places."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import finf_fast as ff

S = 12


class Layers(nn.Module):
    """Calls of layers, their arguments by name or by place."""

    def __init__(self, named: bool):
        super().__init__()
        torch.manual_seed(0)
        self.named = named
        self.W, self.V, self.gain = (nn.Parameter(torch.randn(*shape)) for shape in ((6, 6), (6, 6), (6,)))
        self.kernel, self.head = nn.Parameter(torch.randn(4, 1, 3)), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.named:
            x = torch.add(input=torch.mul(input=x, other=self.gain), other=self.gain)
            x = torch.matmul(input=F.linear(input=x, weight=self.W, bias=self.gain), other=self.V)
            x = F.layer_norm(input=x, normalized_shape=(6,), weight=self.gain)
            x = torch.addmm(input=self.gain, mat1=torch.tanh(x), mat2=self.W)
            x = F.conv1d(input=x[:, None], weight=self.kernel, bias=None)
            return F.linear(torch.tanh(x).flatten(1), weight=self.head.weight, bias=self.head.bias)
        x = F.linear(x * self.gain + self.gain, self.W, self.gain) @ self.V
        x = torch.addmm(self.gain, torch.tanh(F.layer_norm(x, (6,), self.gain)), self.W)
        return self.head(torch.tanh(F.conv1d(x[:, None], self.kernel)).flatten(1))


def _models() -> tuple[nn.Module, nn.Module]:
    return Layers(named=True).eval(), Layers(named=False).eval()


def _corpus() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(S, 6), torch.randint(4, (S,))


@pytest.mark.parametrize("params", ["*", "head.*"])
@pytest.mark.parametrize("engine", ["delta", "pair", "dot"])
def test_scores(engine, params):
    corpus = _corpus()
    found = []
    for model in _models():
        update = ff.mirror(model, (corpus[0][:2], corpus[1][:2]), params=params, lr=1e-3)
        found.append(ff.sweep(model, [update], corpus, engine=engine, progress=False))
    named, placed = (np.asarray(scores.delta) for scores in found)
    np.testing.assert_allclose(named, placed, rtol=1e-3, atol=1e-6 * np.abs(placed).max())


@pytest.mark.parametrize("method", ["sgd", "kfac"])
def test_mirror_steps(method):
    x, y = _corpus()
    named, placed = (ff.forward_inf(model, (x, y), (x[:2], y[:2]), method=method) for model in _models())
    np.testing.assert_allclose(named.delta, placed.delta, rtol=5e-3, atol=1e-5 * np.abs(placed.delta).max())
