"""Small nets of every kind the delta engine must carry, trained a few steps on real text or images.

Text is the standard library's own source, a byte a token; images are scikit-learn's digits. The sizes are small so that
a float64 truth costs seconds; the operations are those of the real ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finf_fast import loss as losses
from finf_fast.demo.source import source_files

__all__ = ["ARCHITECTURES", "Case", "build"]

BYTES, LENGTH = 256, 24  # one token a byte
SAMPLES, QUERIES = 96, 4  # trained on, held out
STEPS = 20  # of Adam: losses are no longer those of random weights


@dataclass(frozen=True)
class Case:
    """A trained net and what it is judged by.

    Attributes:
        model: in eval mode, float32, with weights that bfloat16 holds too.
        batch: S samples as a batch.
        queries: batches of one that were not trained on.
        loss: name of the loss.
        kind: "smooth", "conv" or "kinked" (ReLU, max-pooling, routing): which bounds of design section 2 hold.
    """

    model: nn.Module
    batch: Any
    queries: tuple[Any, ...]
    loss: str
    kind: str


class Mlp(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(768, 64), nn.Tanh(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))


class ReluNet(nn.Sequential):
    """Convolutions, batch norm, max and average pooling, a residual."""

    def __init__(self):
        super().__init__(
            *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            *(Residual(16), nn.AvgPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
        )


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        y = self.norm(self.conv(x))
        y += x
        return F.relu(y, inplace=True)


class TorchTransformer(nn.Module):
    """torch's own layers: nn.TransformerEncoderLayer with nn.MultiheadAttention inside."""

    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(BYTES, 32), nn.Parameter(0.02 * torch.randn(LENGTH, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, activation="gelu", batch_first=True, norm_first=True, dropout=0.0)
        self.blocks, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, BYTES)

    def forward(self, ids):
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(
            self.blocks(self.embed(ids) + self.place[: ids.shape[1]], mask=mask.to(self.place), is_causal=True)
        )


class UNet(nn.Module):
    """A diffusion net in small: timestep embedding, group norm, SiLU, cross-attention to a class token, skips."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(10, width)
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.down = TimedBlock(width, width)
        self.shrink = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.middle, self.look = TimedBlock(width, width), CrossAttention(width)
        self.up = TimedBlock(2 * width, width)
        self.norm, self.last = nn.GroupNorm(8, width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x, t, label):
        frequencies = torch.exp(-torch.arange(16, device=x.device, dtype=torch.float32) * 0.5)
        angles = t[:, None].float() * frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1).to(x.dtype))
        kept = self.down(self.first(x), time)
        h = self.look(self.middle(self.shrink(kept), time), self.classes(label)[:, None])
        h = self.up(torch.cat([F.interpolate(h, scale_factor=2, mode="nearest"), kept], 1), time)
        return self.last(F.silu(self.norm(h)))


class TimedBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(outputs, outputs)
        self.norm2, self.conv2 = nn.GroupNorm(8, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        return self.conv2(F.silu(self.norm2(h))) + self.skip(x)


class CrossAttention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm, self.own = nn.GroupNorm(8, width), nn.Linear(width, width)
        self.look = nn.MultiheadAttention(width, 4, batch_first=True)

    def forward(self, x, context):
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        both = torch.cat([context, self.own(tokens)], 1)
        seen, _ = self.look(tokens, both, both, need_weights=False)
        return x + seen.transpose(1, 2).reshape(x.shape)


@functools.cache
def text() -> Tensor:
    """(SAMPLES + QUERIES, LENGTH) windows of the standard library's source; the last are the queries."""
    data = b"".join(path.read_bytes() for path in source_files()[:20])
    starts = torch.linspace(0, len(data) - LENGTH - 1, SAMPLES + QUERIES).long()
    return torch.stack([torch.tensor(list(data[s : s + LENGTH])) for s in starts.tolist()])


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """(SAMPLES + QUERIES, 3, 16, 16) images in [-1, 1] and their labels; the last are the queries."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.images[: SAMPLES + QUERIES], dtype=torch.float32)[:, None] / 8 - 1
    x = F.interpolate(x, (16, 16), mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    return x, torch.tensor(data.target[: SAMPLES + QUERIES]).long()


def images() -> Any:
    return digits()


def tokens() -> Any:
    return {"input_ids": text()}


def masked() -> Any:
    """Every seventh token is to be guessed back."""
    ids = text().clone()
    labels = torch.full_like(ids, -100)
    labels[:, ::7] = ids[:, ::7]
    ids[:, ::7] = 0
    return {"input_ids": ids, "labels": labels}


def pairs() -> Any:
    """The second half of a window from its first."""
    ids = text()
    return {"input_ids": ids[:, : LENGTH // 2], "labels": ids[:, LENGTH // 2 :].contiguous()}


def noisy() -> Any:
    """(noisy image, timestep, label), noise: one draw a sample."""
    x, y = digits()
    generator = torch.Generator().manual_seed(1)
    noise, t = torch.randn(x.shape, generator=generator), torch.randint(1, 100, (len(x),), generator=generator)
    keep = (torch.cos(t / 100 * 1.57) ** 2)[:, None, None, None]
    return keep.sqrt() * x + (1 - keep).sqrt() * noise, t, y, noise


def _hf(name: str, config: str, **settings: Any) -> nn.Module:
    import transformers

    made = getattr(transformers, config)(**settings)
    return getattr(transformers, name)(made)


SMALL = {"vocab_size": BYTES, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}
PICTURE = {"image_size": 16, "num_labels": 10}


def gpt2() -> nn.Module:
    return _hf("GPT2LMHeadModel", "GPT2Config", vocab_size=BYTES, n_embd=32, n_layer=2, n_head=4, n_positions=64)


def llama() -> nn.Module:
    return _hf("LlamaForCausalLM", "LlamaConfig", **LLAMA)


def gemma2() -> nn.Module:
    return _hf("Gemma2ForCausalLM", "Gemma2Config", **LLAMA, head_dim=8, sliding_window=16)


def mixtral() -> nn.Module:
    return _hf("MixtralForCausalLM", "MixtralConfig", **LLAMA, num_local_experts=4, num_experts_per_tok=2)


def bert() -> nn.Module:
    return _hf("BertForMaskedLM", "BertConfig", **SMALL, intermediate_size=64, max_position_embeddings=64)


def t5() -> nn.Module:
    settings = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": BYTES}
    settings |= {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0, "pad_token_id": 0}
    return _hf("T5ForConditionalGeneration", "T5Config", **settings)


def vit() -> nn.Module:
    settings = {**SMALL, **PICTURE, "patch_size": 4, "intermediate_size": 64}
    settings.pop("vocab_size")
    return _hf("ViTForImageClassification", "ViTConfig", **settings)


def convnext() -> nn.Module:
    settings = {**PICTURE, "patch_size": 2, "hidden_sizes": [8, 16, 32, 32], "depths": [1, 1, 1, 1]}
    return _hf("ConvNextForImageClassification", "ConvNextConfig", **settings)


# name -> model, data, loss, kind
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], str, str]] = {
    "mlp": (Mlp, images, "cross_entropy", "smooth"),
    "resnet": (ReluNet, images, "cross_entropy", "kinked"),
    "vit": (vit, images, "cross_entropy", "smooth"),
    "convnext": (convnext, images, "cross_entropy", "conv"),
    "transformer": (TorchTransformer, text, "causal_lm", "smooth"),
    "gpt2": (gpt2, tokens, "causal_lm", "smooth"),
    "llama": (llama, tokens, "causal_lm", "smooth"),
    "gemma2": (gemma2, tokens, "causal_lm", "smooth"),
    "bert": (bert, masked, "masked_lm", "smooth"),
    "t5": (t5, pairs, "seq2seq", "smooth"),
    "mixtral": (mixtral, tokens, "causal_lm", "kinked"),
    "unet": (UNet, noisy, "squared_error", "conv"),
}


@functools.cache
def build(name: str) -> Case:
    """The trained net of that name; the same in every process."""
    make, data, loss, kind = ARCHITECTURES[name]
    torch.manual_seed(0)
    model, whole = make(), data()
    batch = losses.mapped(lambda x: x[:SAMPLES], whole)
    queries = tuple(losses.mapped(lambda x, i=i: x[SAMPLES + i :][:1], whole) for i in range(QUERIES))
    train(model, batch, losses.resolve(loss))
    model.bfloat16().float()  # as checkpoints are kept: every way and precision is then asked about the same net
    return Case(model.eval(), batch, queries, loss, kind)


def train(model: nn.Module, batch: Any, loss: losses.Loss) -> None:
    """STEPS steps of Adam on the whole batch, so that some of it is learnt and nothing is random."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss.per_sample(model, batch).mean().backward()
        optimizer.step()
