"""The table of modules: what it recognises, and the lookalikes that it must leave alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import finf_fast as ff
from finf_fast.delta import DeltaEngine, modules
from finf_fast.loss import resolve

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


class Squared(Norm):
    """As good as a norm while its weight is 1 everywhere."""

    def __init__(self):
        super().__init__()
        nn.init.ones_(self.weight)

    def forward(self, x):
        return super().forward(x) * self.weight


class Writing(Spelt):
    def forward(self, x):
        return x.copy_(super().forward(x))


class Counting(nn.Module):
    """A GELU for its first two calls."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return F.gelu(x) * (1 if self.calls < 3 else 2)


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
        (Squared(), None),
        (Writing(), None),
        (Counting(), None),
    ],
)
def test_lookalikes_are_left_alone(module, kind):
    found = modules.install(nn.Sequential(module))
    assert found == ({} if kind is None else {kind: 1})
    assert ("forward" in vars(module)) == (kind is not None)
    assert getattr(module, "calls", 0) == 0


class Wide(Norm):
    """A norm over channels, over all but the batch, or plus a mean over tokens, none of them seen in rows."""

    def __init__(self, width, kind):
        super().__init__()
        self.weight, self.kind = nn.Parameter(torch.rand(width) + 0.5), kind

    def forward(self, x):
        over = tuple(range(1, x.dim())) if self.kind == "all" else 1 if self.kind == "channels" else -1
        weight = self.weight.view(-1, *(1,) * (x.dim() - 2)) if self.kind == "channels" else self.weight
        y = x * torch.rsqrt(x.pow(2).mean(over, keepdim=True) + self.eps) * weight
        return y + x.mean(1, keepdim=True) if self.kind == "tokens" and x.dim() == 3 else y


class Mixed(Gate):
    def forward(self, x):
        h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(h + h.mean(1, keepdim=True) if x.dim() == 3 else h)


class Centred(nn.Module):
    def forward(self, x):
        y = F.gelu(x)
        return y - y.mean(1, keepdim=True) if x.dim() == 3 else y


class Fickle(nn.Module):
    """An activation that its parent turns up, by an attribute, an argument or another mode."""

    def __init__(self):
        super().__init__()
        self.scale = 1.0

    def forward(self, x, times=1.0):
        return F.gelu(x) * self.scale * times


class Turning(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.first, self.act, self.last, self.how = nn.Linear(8, 8), Fickle(), nn.Linear(8, 5), how

    def forward(self, x):
        if self.how == "attribute":
            self.act.scale = x.shape[-1] / 2
        h = self.first(x)
        return self.last(
            {"place": lambda: self.act(h, 3.0), "name": lambda: self.act(h, times=3.0)}.get(
                self.how, lambda: self.act(h)
            )()
        )


class Seeing(nn.Module):
    """A net of one module between linear layers, its rows given this shape in the middle."""

    def __init__(self, module, *shape):
        super().__init__()
        self.first, self.module, self.shape = nn.Linear(8, torch.Size(shape).numel()), module, shape
        self.last = nn.Linear(torch.Size(shape).numel(), 5)

    def forward(self, x):
        return self.last(self.module(self.first(x).view(len(x), *self.shape)).flatten(1))


def assert_exact(net):
    """The engine's scores against those of plain float64 forwards."""
    torch.manual_seed(1)
    net, x, y = net.double(), torch.randn(6, 8, dtype=torch.float64), torch.randint(0, 5, (6,))
    update = ff.Update({name: 0.1 * torch.randn_like(p) for name, p in net.named_parameters()})
    found = DeltaEngine(net, [update], resolve("cross_entropy"), torch.device("cpu"), torch.float64).score((x, y))
    wanted = ff.sweep(net, [update], (x, y), engine="pair", dtype=torch.float64)
    torch.testing.assert_close(found.base, torch.tensor(wanted.base), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.delta, torch.tensor(wanted.delta), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (Wide(8, "channels"), (8, 8, 8)),
        (Wide(8, "channels"), (8, 8)),
        (Wide(8, "all"), (3, 8)),
        (Wide(8, "all"), (8, 8, 8)),
        (Wide(8, "tokens"), (3, 8)),
        (Mixed(), (4, 8)),
        (Centred(), (4, 8)),
        (Spelt(), (2, 2, 3, 8)),  # five dimensions: more than were compared
        (Gate(), (2, 3, 8)),
        (Wide(8, "plain"), (2, 3, 8)),
        (Wide(8, "plain"), (8,)),
    ],
)
def test_what_agrees_in_rows_may_differ_in_more_dimensions(module, shape):
    assert_exact(Seeing(module, *shape))


@pytest.mark.parametrize("how", ["attribute", "place", "name", "not"])
def test_a_call_unlike_those_compared_goes_to_the_modules_own_forward(how):
    net = Turning(how)
    assert modules.install(torch.nn.Sequential(Fickle())) == {"activation": 1}
    assert_exact(net)


class Picky(Spelt):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        if x.shape[-1] != 8:
            raise self.error
        return super().forward(x)


class PickyGate(Gate):
    def forward(self, x):
        if len(x) not in (1, 6):  # a sample as planning sees it, or all
            raise IndexError("one or six")
        return super().forward(x)


@pytest.mark.parametrize(
    "module",
    [*map(Picky, (IndexError("i"), ValueError("v"), AssertionError("a"), KeyError("k"), OSError("o"))), PickyGate()],
)
def test_a_module_that_will_not_have_a_made_up_input_is_left_alone(module):
    assert modules.install(nn.Sequential(module)) == {}
    assert_exact(Seeing(module, 8))


def test_a_fused_relu_counts_as_a_kink():
    torch.manual_seed(0)
    net, batch = Seeing(Gate(act=nn.ReLU()), 8), (torch.randn(6, 8), torch.randint(0, 5, (6,)))
    update = ff.mirror(net, (batch[0][:1], batch[1][:1]), lr=1e-2)
    runner = DeltaEngine(net, [update], resolve("cross_entropy"), torch.device("cpu"), torch.float32)
    runner.score(batch)
    assert runner.record()["fused_modules"] == {"gated": 1} and runner.kinks() == ["relu"]
