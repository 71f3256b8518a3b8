"""Small models and data of each kind, and the plain float64 scores that every engine must give."""

from __future__ import annotations

import copy

import torch
from torch import nn

from finf_fast.loss import Loss
from finf_fast.lowrank import dense
from finf_fast.update import Update


class Mlp(nn.Sequential):
    def __init__(self, inputs=12, classes=5):
        super().__init__(nn.Linear(inputs, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, classes))


class ConvNet(nn.Module):
    """Batch norms that can be folded, one that cannot (its convolution has a second reader), a residual."""

    def __init__(self):
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.norm_b = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, affine=False)
        self.c, self.norm_c = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.head, self.norm_head = nn.Linear(8, 6), nn.BatchNorm1d(6)

    def forward(self, x):
        x = torch.relu(self.norm_a(self.a(x)))
        x = x + torch.relu(self.norm_b(self.b(x)))
        c = self.c(x)
        return self.norm_head(self.head((c + self.norm_c(c)).mean((2, 3))))


class TinyLm(nn.Module):
    """A causal language model with tied embeddings."""

    def __init__(self, vocabulary=19, width=16):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary, bias=False)
        self.block = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.1, batch_first=True, norm_first=True)
        self.head.weight = self.embed.weight

    def forward(self, input_ids, attention_mask=None):
        length = input_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).triu(1)
        return self.head(self.block(self.embed(input_ids), src_mask=causal))


def mlp(samples=60):
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    x = torch.randn(samples, 12, dtype=torch.float64, generator=generator)
    return Mlp().double(), (x, torch.randint(0, 5, (samples,), generator=generator))


def conv_net(samples=40):
    torch.manual_seed(0)
    net = ConvNet().double()
    net.train()(torch.randn(32, 3, 6, 6).double())  # running statistics that are not 0 and 1
    x, y = torch.randn(samples, 3, 6, 6).double(), torch.randint(0, 6, (samples,))
    return net.eval(), (x, y)


def language_model(samples=30):
    """A model and a map-style dataset of ragged dicts, some labels ignored, one sample without any target."""
    torch.manual_seed(0)
    data = []
    for i in range(samples):
        ids = torch.randint(0, 19, (3 + i % 6,))
        labels = ids.clone()
        labels[: i % 3] = -100
        data.append({"input_ids": ids, "labels": labels if i != 7 else torch.full_like(ids, -100)})
    return TinyLm().double().eval(), data


def learn(model: nn.Module, x, y, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.Optimizer:
    """The optimizer after so many steps of the model on all of its samples at once."""
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return optimizer


def plain_losses(model: nn.Module, update: Update | None, loss: Loss, batch) -> torch.Tensor:
    """(B,) losses in float64 of a copy of the model to which the update was added."""
    other = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for name, change in (update.params if update else {}).items():
            other.get_parameter(name).add_(dense(change))
        for name, value in (update.buffers if update else {}).items():
            other.get_buffer(name).copy_(value)
        return loss.per_sample(other, copy.deepcopy(batch))  # a model may write into its input


def plain_scores(model: nn.Module, updates, loss: Loss, batches) -> tuple[torch.Tensor, torch.Tensor]:
    """base (S,) and delta (Q, S) by two float64 forwards a sample and query; nothing of the engine is used."""
    base = torch.cat([plain_losses(model, None, loss, batch) for batch in batches])
    after = [torch.cat([plain_losses(model, update, loss, batch) for batch in batches]) for update in updates]
    return base, torch.stack(after) - base
