"""Many small models trained at once: stacked parameters, one batch a model, each model's own data order and start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

__all__ = ["Recipe", "losses", "train", "unstack"]


@dataclass(frozen=True)
class Recipe:
    """How every model of an experiment is trained: SGD with momentum, the rate falling to zero along a cosine."""

    epochs: int = 60
    batch: int = 50
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-3


def train(
    make: Callable[[], nn.Module],
    x: Tensor,
    y: Tensor,
    members: Tensor,
    seeds: Sequence[int],
    recipe: Recipe,
    without: Tensor | None = None,
) -> dict[str, Tensor]:
    """Parameters of M models, stacked (M, ...), each trained on its own samples.

    Args:
        make: a fresh model; its start comes from the seed.
        x, y: all samples (N, ...), (N,).
        members: (M, n) which samples each model sees.
        seeds: M, of start and order.
        without: (M, k) samples that count nothing in a model's loss, or -1. All else, the order too, stays as it is
            with them, so that two models differ by these alone.
    """
    shell = make()
    weights = _starts(make, seeds)
    orders = [torch.Generator().manual_seed(seed) for seed in seeds]
    optimizer = torch.optim.SGD(
        weights.values(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    n = members.shape[1]
    steps = recipe.epochs * (n // recipe.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(recipe.epochs):
        shuffled = torch.stack([own[torch.randperm(n, generator=g)] for own, g in zip(members, orders, strict=True)])
        for batch in shuffled[:, : n // recipe.batch * recipe.batch].split(recipe.batch, 1):
            optimizer.zero_grad()
            each = _each(shell, weights, x[batch], y[batch])
            if without is not None:
                each = each * (batch[:, :, None] != without[:, None]).all(2)
            each.mean(1).sum().backward()  # a model's gradient is its own: no other reads its parameters
            optimizer.step()
            schedule.step()
    return {name: weight.detach() for name, weight in weights.items()}


@torch.no_grad()
def losses(make: Callable[[], nn.Module], weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """(M, N) loss of each of N samples under each of M models."""
    count = len(next(iter(weights.values())))
    return _each(make(), weights, x.expand(count, *x.shape), y.expand(count, *y.shape))


def unstack(make: Callable[[], nn.Module], weights: dict[str, Tensor], index: int) -> nn.Module:
    """One of the models, in eval mode."""
    model = make().eval()
    model.load_state_dict({name: weight[index] for name, weight in weights.items()})
    return model


def _starts(make: Callable[[], nn.Module], seeds: Sequence[int]) -> dict[str, Tensor]:
    models = []
    for seed in seeds:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            models.append(make())
    params, buffers = stack_module_state(models)
    if buffers:
        raise ValueError(f"make: wanted a model without buffers, got {', '.join(buffers)}")
    return {name: weight.detach().requires_grad_() for name, weight in params.items()}


def _each(shell: nn.Module, weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """(M, B) losses of batches (M, B, ...)."""
    outputs = vmap(lambda own, rows: functional_call(shell, own, (rows,)))(weights, x)
    return F.cross_entropy(outputs.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
