"""The table of modules: what it recognises, and the lookalikes that it must leave alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from finf_fast.delta import modules

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import architectures


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("gpt2", {"activation": 2}),
        ("llama", {"rms_norm": 5, "gated": 2}),
        ("gemma2", {"rms_norm": 9, "gated": 2}),
        ("mixtral", {"rms_norm": 5, "experts": 2}),
        ("t5", {"rms_norm": 12}),
        ("bert", {}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_known_structures_are_found_in_every_type(name, wanted, dtype):
    import copy

    body = copy.deepcopy(architectures.build(name).model).to(dtype)
    found = modules.install(body)
    assert {kind: found.get(kind, 0) for kind in wanted} == wanted


class Norm(nn.Module):
    """RMS norm, or something that only looks like it."""

    def __init__(self, after=lambda y: y):
        super().__init__()
        self.weight, self.eps, self.after = nn.Parameter(torch.rand(16) + 0.5), 1e-6, after

    def forward(self, x):
        return self.after(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)) * self.weight


class Gate(nn.Module):
    def __init__(self, extra=0.0, act=None):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act_fn, self.extra = act or nn.SiLU(), extra

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + self.extra))


class Experts(nn.Module):
    def __init__(self, interleaved=False):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 12, 8))
        self.down_proj = nn.Parameter(torch.randn(4, 8, 6))
        self.act_fn, self.interleaved = nn.SiLU(), interleaved

    def forward(self, x, index, weights):
        out = torch.zeros_like(x)
        for place in range(index.shape[1]):
            h = torch.einsum("td,tud->tu", x, self.gate_up_proj[index[:, place]])
            gate, up = (h[:, ::2], h[:, 1::2]) if self.interleaved else h.chunk(2, -1)
            y = torch.einsum("tu,tdu->td", self.act_fn(gate) * up, self.down_proj[index[:, place]])
            out = out + y * weights[:, place, None]
        return out


class Clipped(nn.Module):
    def forward(self, x):
        return F.gelu(x).clamp(-10, 10)


class Spelt(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1 + torch.erf(x / 2**0.5))


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (Norm(), "rms_norm"),
        (Norm(lambda y: y + 1e-3), None),
        (Norm(lambda y: y.clamp(-2, 2)), None),
        (Gate(), "gated"),
        (Gate(act=nn.GELU(approximate="tanh")), "gated"),
        (Gate(extra=1.0), None),
        (Gate(act=nn.Mish()), None),
        (Experts(), "experts"),
        (Experts(interleaved=True), None),
        (Spelt(), "activation"),
        (Clipped(), None),
    ],
)
def test_lookalikes_are_left_alone(module, kind):
    found = modules.install(nn.Sequential(module))
    assert found == ({} if kind is None else {kind: 1})
    assert ("forward" in vars(module)) == (kind is not None)
