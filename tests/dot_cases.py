"""Models of every kind that the dot engine meets, updates of all forms for them, and their gradients one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import finf_fast as ff
from finf_fast.loss import mapped
from finf_fast.lowrank import LowRank, dense
from mixing_models import TimeFirst

B, Q = 6, 3


class Block(nn.Module):
    """A pre-norm decoder layer as nanoGPT writes it."""

    def __init__(self, width: int, norm=nn.LayerNorm):
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class NanoGpt(nn.Module):
    """Positions looked up once for all samples, head tied to the embedding."""

    def __init__(self, length: int = 5, tied: bool = True):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 8), nn.Embedding(length, 8)
        self.block, self.norm, self.head = Block(8), nn.LayerNorm(8), nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        return self.head(self.norm(self.block(x)))


class GemmaNorm(nn.Module):
    """A norm whose weight is stored less one, and cast."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return x * (1.0 + self.weight.to(x.dtype))


class Own(nn.Module):
    """Parameters used by hand: a class token, a table of positions, products with W and Wᵀ, a scale."""

    def __init__(self):
        super().__init__()
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 5, 6))
        self.W, self.V = nn.Parameter(torch.randn(6, 7)), nn.Parameter(torch.randn(6, 7))
        self.norm, self.scale = GemmaNorm(6), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        x = self.scale * self.norm(x)
        return (torch.tanh(x @ self.W) @ self.V.T).mean(1)


class Residual(nn.Module):
    """Convolutions of every kind, batch norm, and sums in place."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False)
        self.dilated = nn.Conv2d(8, 8, 3, padding="same", dilation=2)
        self.bn, self.gn, self.head = nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.Linear(8, 4)
        self.bn.running_mean.normal_(), self.bn.running_var.uniform_(0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.bn(self.first(x)))
        y = self.depthwise(x)
        y += x
        return self.head(F.relu(self.gn(self.dilated(y)), inplace=True).mean((2, 3)))


class Experts(nn.Module):
    """Tokens sent to experts, gathered from all samples of a batch: rows in no known order."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(6, 2), nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        rows, out = x.flatten(0, 1), torch.zeros_like(x.flatten(0, 1))
        chosen = self.gate(rows).argmax(-1)
        for number, expert in enumerate(self.experts):
            out[chosen == number] = torch.tanh(expert(rows[chosen == number]))
        return out.view(x.shape).mean(1)


class Recurrent(nn.Module):
    """A recurrent layer, whose weights no rule knows."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(6, 5, batch_first=True), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Computed(nn.Module):
    """Weights and biases that are computed from parameters: normed, with a low-rank part beside, scaled."""

    def __init__(self):
        super().__init__()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 7))
        self.W, self.A, self.B = (nn.Parameter(torch.randn(*s)) for s in ((7, 7), (2, 7), (7, 2)))
        self.bias, self.gain, self.head = *(nn.Parameter(torch.randn(7)) for _ in "ab"), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(torch.tanh(self.normed(x)).mean(1), (7,), torch.exp(self.gain), self.bias)
        x = torch.tanh(F.linear(x, self.W + self.B @ self.A))
        return self.head(torch.tanh(F.linear(x, self.W, 2 * self.bias)))


class Upcast(nn.Module):
    """Values in float32 from the first layer on, before weights in whatever the net is in."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.rows, self.W, self.head = nn.Conv1d(4, 3, 1), nn.Parameter(torch.randn(8, 7)), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.norm(x.to(torch.promote_types(x.dtype, torch.float32)))
        return self.head(torch.tanh(self.rows(x) @ self.W).mean(1))


def images() -> tuple[Tensor, ...]:
    return torch.randn(B, 3, 8, 8), torch.randint(4, (B,))


def sequences(classes: int = 4, steps: int = 4) -> tuple[Tensor, ...]:
    return torch.randn(B, steps, 6), torch.randint(classes, (B,))


def tokens(length: int = 5) -> Tensor:
    return torch.randint(1, 11, (B, length))  # 0 pads


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(inplace=True), nn.LayerNorm(9), nn.Linear(9, 4))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True, activation="gelu")
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(1), nn.Linear(24, 4))


def hugging_face(name: str, **config) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, name + "ForCausalLM" if name != "GPT2" else "GPT2LMHeadModel")(
        getattr(transformers, name + "Config")(vocab_size=11, **config)
    )


LLAMA = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
CASES = {  # model, batch, loss, whether batches go through whole
    "mlp": (mlp, lambda: (torch.randn(B, 6), torch.randint(4, (B,))), "cross_entropy", True),
    "regression": (mlp, lambda: (torch.randn(B, 6), torch.randn(B, 4)), "squared_error", True),
    "nanogpt": (NanoGpt, tokens, "causal_lm", True),
    "nanogpt, B = L": (lambda: NanoGpt(B), lambda: tokens(B), "causal_lm", True),
    "nanogpt, L = 2 B": (lambda: NanoGpt(2 * B), lambda: tokens(2 * B), "causal_lm", True),
    "gpt2": (lambda: hugging_face("GPT2", n_embd=8, n_layer=2, n_head=2, n_positions=8), tokens, "causal_lm", True),
    "llama": (lambda: hugging_face("Llama", **LLAMA), tokens, "causal_lm", True),
    "gemma": (lambda: hugging_face("Gemma", head_dim=4, num_key_value_heads=2, **LLAMA), tokens, "causal_lm", True),
    "own": (Own, lambda: sequences(6), "cross_entropy", True),
    "residual": (Residual, images, "cross_entropy", True),
    "upcast": (Upcast, sequences, "cross_entropy", True),
    "encoder": (encoder, sequences, "cross_entropy", True),
    "computed": (Computed, sequences, "cross_entropy", False),
    "experts": (Experts, lambda: sequences(6), "cross_entropy", False),
    "recurrent": (Recurrent, sequences, "cross_entropy", False),
    "time first": (TimeFirst, sequences, "cross_entropy", False),
    "time first, B = L": (TimeFirst, lambda: sequences(steps=B), "cross_entropy", False),
}


def updates_of(model: nn.Module, low: bool, buffers: bool = True) -> list[ff.Update]:
    """Q of them; two of the three as factors where a tensor is a matrix, the last without half of the parameters."""
    generator, updates = torch.Generator().manual_seed(1), []
    for q in range(Q):
        params = {}
        for number, (name, p) in enumerate(model.named_parameters()):
            if q == Q - 1 and number % 2:
                continue
            change = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if low and p.dim() > 1 and q:
                u, v = change.flatten(1)[:, :1].repeat(1, q), torch.randn(p[0].numel(), q, generator=generator).double()
                change = LowRank(u, v, tuple(p.shape[1:]) if p.dim() > 2 else ())
            params[name] = change
        moved = {n: b + 0.1 for n, b in model.named_buffers() if buffers and b.is_floating_point() and "running" in n}
        updates.append(ff.Update(params, moved))
    return updates


def truth_of(model: nn.Module, updates: list[ff.Update], loss, batch) -> np.ndarray:
    """(Q, B): float64 gradients of one sample at a time by plain autograd; of buffers by central differences."""
    model = model.double().eval()
    rows = [
        mapped(lambda t, i=i: t[i : i + 1].double() if t.is_floating_point() else t[i : i + 1], batch) for i in range(B)
    ]
    found = np.zeros((Q, B))
    for i, row in enumerate(rows):
        names, params = zip(*model.named_parameters(), strict=True)
        params = [p.requires_grad_() for p in params]
        gradients = torch.autograd.grad(loss.per_sample(model, row).sum(), params, allow_unused=True)
        for q, update in enumerate(updates):
            for name, gradient in zip(names, gradients, strict=True):
                if name in update.params and gradient is not None:
                    found[q, i] += (gradient * dense(update.params[name]).double()).sum().item()
            found[q, i] += _along_buffers(model, update, loss, row)
    return found


@torch.no_grad()
def _along_buffers(model: nn.Module, update: ff.Update, loss, row, step: float = 1e-5) -> float:
    own = {name: buffer.clone() for name, buffer in model.named_buffers()}
    ends = []
    for sign in (1, -1):
        for name, value in update.buffers.items():
            model.get_buffer(name).add_(sign * step * (value.double() - own[name]))
        ends.append(loss.per_sample(model, row).item())
        for name, buffer in own.items():
            model.get_buffer(name).copy_(buffer)
    return (ends[0] - ends[1]) / (2 * step)


def far(got, truth) -> float:
    return float(np.abs(np.asarray(got, np.float64) - truth).max() / np.abs(truth).max())
