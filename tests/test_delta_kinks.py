"""Which nets count as having kinks: those whose masks depend on what they compute, not on masks that are given."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import finf_fast as ff
from finf_fast.delta import DeltaEngine
from finf_fast.loss import mapped, resolve

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import architectures

CPU = torch.device("cpu")
CAUSAL = torch.ones(6, 6).tril().bool()


class Around(nn.Module):
    """A function between two linear layers."""

    def __init__(self, f):
        super().__init__()
        self.first, self.last, self.f = nn.Linear(4, 6), nn.Linear(6, 3), f

    def forward(self, x):
        h = self.first(x)
        y = self.f(h)
        return self.last(y.reshape(len(x), -1)[:, :1] + h if y.shape != h.shape else y)


def kinks_of(f):
    torch.manual_seed(0)
    net, x, y = Around(f), torch.randn(6, 4), torch.randint(0, 3, (6,))
    update = ff.Update({"first.bias": torch.full((6,), 1e-3)})
    runner = DeltaEngine(net, [update], resolve("cross_entropy"), CPU, torch.float32)
    runner.score((x, y))
    return runner.kinks()


ROUTED = {
    "gt": lambda h: h * (h > 0),
    "le": lambda h: torch.where(h <= 0, -h, h),
    "eq": lambda h: h + torch.eq(h, 0.5),
    "where": lambda h: torch.where(h.argsort(-1) > 2, h, 0.0),
    "masked_fill": lambda h: h.masked_fill(h < h.mean(), 0.0),
}
SHARP = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "prelu": lambda h: F.prelu(h, torch.tensor(0.2)),
    "threshold": lambda h: F.threshold(h, 0.1, 0.0),
    "hardtanh": F.hardtanh,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "selu": F.selu,
    "elu": lambda h: F.elu(h, 2.0),
    "softplus": lambda h: F.softplus(h, 1.0, 0.5),
    "abs": abs,
    "sign": torch.sign,
    "round": torch.round,
    "floor": torch.Tensor.floor_,
    "ceil": torch.ceil,
    "trunc": torch.trunc,
    "frac": torch.frac,
    "remainder": lambda h: torch.remainder(h, 0.5),
    "fmod": lambda h: torch.fmod(h, 0.5),
    "floordiv": lambda h: h // 0.5,
    "div": lambda h: torch.div(h, 0.5, rounding_mode="floor"),
    "bucketize": lambda h: torch.bucketize(h, torch.tensor([-0.5, 0.5])) + h,
    "searchsorted": lambda h: torch.searchsorted(torch.tensor([-0.5, 0.5]), h) + h,
    "long": lambda h: h.long() + h,
    "to": lambda h: h.to(torch.int32) + h,
    "max": lambda h: h.max(-1, keepdim=True).values,
    "amax": lambda h: h.amax(-1, keepdim=True),
    "min": lambda h: torch.min(h, -1, keepdim=True).values,
    "amin": lambda h: h.amin(-1, keepdim=True),
    "maximum": lambda h: torch.maximum(h, -h),
    "minimum": lambda h: torch.minimum(h, torch.zeros(6)),
    "median": lambda h: h.median(-1, keepdim=True).values,
    "kthvalue": lambda h: h.kthvalue(2, -1, keepdim=True).values,
    "topk": lambda h: h.topk(2, -1).values,
    "sort": lambda h: h.sort(-1).values,
    "argsort": lambda h: h.argsort(-1) + h,
    "argmin": lambda h: h.argmin(-1, keepdim=True) + h,
    "argmax": lambda h: h.argmax(-1, keepdim=True) + h,
    "clamp": lambda h: h.clamp(-1, 1),
    "clamp_min": lambda h: h.clamp_min(0.1),
    "clamp_max": lambda h: h.clamp_max(0.1),
    "max_pool1d": lambda h: F.max_pool1d(h, 2),
    "adaptive_max_pool1d": lambda h: F.adaptive_max_pool1d(h, 2),
    "max_pool2d": lambda h: F.max_pool2d(h[:, None, None], (1, 2)),
    "adaptive_max_pool2d": lambda h: F.adaptive_max_pool2d(h[:, None, None], (1, 2)),
    "vector_norm": lambda h: torch.linalg.vector_norm(h, 1, -1, keepdim=True),
}
ROUND = {
    "causal masked_fill": lambda h: (h * h.mT).masked_fill(~CAUSAL, torch.finfo(h.dtype).min).softmax(-1),
    "causal where": lambda h: torch.where(CAUSAL, h * h.mT, -1e9).softmax(-1),
    "a plain condition": lambda h: torch.where(torch.arange(6) > 2, h, 0.0),
    "a plain index": lambda h: h[:, torch.arange(6).argsort(descending=True)],
    "attention": lambda h: F.scaled_dot_product_attention(h[None], h[None], h[None], is_causal=True)[0],
    "gelu": F.gelu,
    "mish": F.mish,
    "elu": F.elu,
    "softplus": F.softplus,
    "normalize": F.normalize,
    "norm": lambda h: h.norm(dim=-1, keepdim=True),
    "bounds out of reach": lambda h: h.clamp(torch.finfo(h.dtype).min, torch.finfo(h.dtype).max),
    "casts of numbers": lambda h: h.to(torch.float64).type(torch.float32).float(),
    "is finite": lambda h: h * torch.isfinite(h),
}


@pytest.mark.parametrize("name", SHARP)
def test_a_corner_or_a_step_is_a_kink(name):
    assert name in kinks_of(SHARP[name])


@pytest.mark.parametrize("name", ROUTED)
def test_a_mask_made_of_changed_values_is_a_kink(name):
    assert kinks_of(ROUTED[name])


@pytest.mark.parametrize("name", ROUND)
def test_what_is_smooth_has_none(name):
    assert kinks_of(ROUND[name]) == []


@pytest.mark.parametrize("mask", ["where", "masked_fill"])
def test_a_choice_by_a_mask_that_a_query_changes_is_a_kink(mask):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(4, 3)
            self.register_buffer("on", torch.tensor([True, False, True, True]))

        def forward(self, x):
            return self.last(torch.where(self.on, x, 0.0) if mask == "where" else x.masked_fill(self.on, 0.0))

    update = ff.Update({}, {"on": torch.tensor([True, True, False, True])})
    runner = DeltaEngine(Masked(), [update], resolve("cross_entropy"), CPU, torch.float32)
    runner.score((torch.randn(6, 4), torch.randint(0, 3, (6,))))
    assert runner.kinks() == [mask]


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_half_precision_stays_where_an_architecture_is_smooth(name):
    case = architectures.build(name)
    half = type_of(case.model)
    data = mapped(lambda x: x.bfloat16() if x.is_floating_point() else x, case.batch)
    update = ff.mirror(half, mapped(lambda x: x[:1], data), loss=case.loss, lr=1e-3)
    plan = ff.sweep(half, [update], mapped(lambda x: x[:4], data), loss=case.loss).plan
    assert ("bfloat16 (the model's own)" in plan) == (case.kind != "kinked"), plan


def type_of(model: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(model).bfloat16()


def test_a_t5_with_relu_has_a_kink():
    import transformers

    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4, "vocab_size": 32}
    net = transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)
    ).bfloat16()
    ids: Tensor = torch.randint(1, 32, (4, 5))
    batch = {"input_ids": ids, "labels": ids.flip(1)}
    update = ff.mirror(net, mapped(lambda x: x[:1], batch), loss="seq2seq", lr=1e-3)
    assert "relu in bfloat16 would flip masks" in ff.sweep(net, [update], batch, loss="seq2seq").plan
