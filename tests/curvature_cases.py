"""Curvature by its definition, sample by sample and in float64: what factors and steps are judged by."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from finf_fast import ops
from finf_fast.lowrank import dense


def flat(changes: dict[str, Tensor], names: list[str]) -> Tensor:
    """All changes as one vector."""
    return torch.cat([dense(changes[name]).reshape(-1) for name in names])


def drawn_gradients(model: nn.Module, loss, batch, indices, seed=0, names=None) -> dict[str, Tensor]:
    """Name -> (S, *shape) gradient of each sample's loss for the labels that a fit draws with this seed."""
    names = names or [name for name, _ in model.named_parameters()]
    weights = [model.get_parameter(name) for name in names]
    rows: list[list[Tensor]] = []
    for row, index in enumerate(indices):
        one = pick(batch, slice(row, row + 1))
        known = torch.tensor([index])
        value = loss.output(model, one)
        total = loss.fisher(value, one, lambda shape, known=known: ops.noise(seed, known, 0, shape)).sum()
        found = torch.autograd.grad(total, weights, allow_unused=True)
        rows.append([torch.zeros_like(w) if g is None else g for g, w in zip(found, weights, strict=True)])
    return {name: torch.stack(each) for name, each in zip(names, zip(*rows, strict=True), strict=True)}


def pick(batch, rows):
    if isinstance(batch, dict):
        return {key: value[rows] for key, value in batch.items()}
    return tuple(part[rows] for part in batch)


def second_moment(gradients: Tensor) -> Tensor:
    """(n, n) mean of g gᵀ over samples (S, n)."""
    return gradients.T @ gradients / len(gradients)
