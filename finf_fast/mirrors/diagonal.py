"""Steps that divide every coordinate by a number of its own: the diagonal Fisher, and the statistics of a real Adam."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finf_fast.loss import Loss
from finf_fast.lowrank import compress_whole
from finf_fast.mirrors.base import Method, require_number
from finf_fast.mirrors.body import Body
from finf_fast.mirrors.factors import Gradient
from finf_fast.mirrors.preconditioned import Direction, Fitted, Preconditioned


@dataclass(frozen=True, kw_only=True)
class FisherDiagonal(Fitted):
    """g / (F + λ), F the mean squared gradient of each coordinate, λ = ``damping`` · mean(F) of its tensor.

    The step is dense; ``rank`` compresses it.
    """

    name: ClassVar[str] = "fisher_diag"
    fits: ClassVar[str | None] = "fisher_diag"
    damping: float = 0.1

    def direction_of(self, body: Body, caught: dict[str, Gradient]) -> Direction:
        found = Direction({}, notes=self.left(body))
        for name, diagonal in self.factors.diagonals.items():
            if name in caught:
                floor = self.damping * diagonal.mean()
                step = caught[name].total() / (diagonal + torch.where(floor > 0, floor, 1.0))
                found.params[name], found.shares[name] = compressed(step, self.rank)
        return found


@dataclass(frozen=True, kw_only=True)
class AdamWState(Preconditioned):
    """g / (√v + eps) with the running mean v of squared gradients that a real optimizer has gathered in training.

    As in ``torch.optim.AdamW``, v is corrected by its step count where the state has one. ``size`` is a share of 1, and
    the length of the step that of the metric v: √(dᵀ diag(v) d).

    Args:
        state: what ``optimizer.state_dict()`` gave, or a mapping name -> v, shaped as the parameter; of the former the
            parameters are told by ``param_names``, or, in a single group without, by their order in the model.
        eps: added to the root, as in the optimizer.

    Raises:
        TypeError, ValueError: no state, or one that does not fit the model.
    """

    name: ClassVar[str] = "adamw_state"
    hidden: ClassVar[tuple[str, ...]] = ("state",)

    state: Mapping[Any, Any] | None = None
    eps: float = 1e-8

    def __post_init__(self):
        super().__post_init__()
        require_number("eps", self.eps)
        if not isinstance(self.state, Mapping) or not self.state:
            raise TypeError(
                "state: method='adamw_state' wants optimizer.state_dict() or a mapping name -> exp_avg_sq, got "
                f"{type(self.state).__name__}"
            )

    def prepared(self, model: nn.Module, loss: Loss, device: torch.device) -> Method:
        means = _by_name(self.state, model) if {"state", "param_groups"} <= self.state.keys() else self.state
        named = dict(model.named_parameters())
        for name, mean in means.items():
            if name not in named:
                raise ValueError(f"state: the model has no parameter {name!r}")
            if not isinstance(mean, Tensor) or mean.shape != named[name].shape:
                got = tuple(mean.shape) if isinstance(mean, Tensor) else type(mean).__name__
                raise ValueError(f"state: {name!r} wanted shape {tuple(named[name].shape)}, got {got}")
        return replace(self, state={name: mean.detach().to(device) for name, mean in means.items()})

    def direction_of(self, body: Body, caught: dict[str, Gradient]) -> Direction:
        found, squares = Direction({}, notes={"left_still": [n for n in body.weights if n not in self.state]}), 0.0
        for name, mean in self.state.items():
            if name in caught:
                mean = mean.to(body.dtype)
                step = caught[name].total() / (mean.sqrt() + self.eps)
                squares += (step.double().square() * mean).sum().item()
                found.params[name], found.shares[name] = compressed(step, self.rank)
        return replace(found, length=math.sqrt(squares))


def compressed(step: Tensor, rank: int | None) -> tuple[Any, float]:
    """A dense step, as factors of at most ``rank`` columns where asked for and where they pay."""
    return (step, 0.0) if rank is None else compress_whole(step, rank)


def _by_name(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Name -> corrected exp_avg_sq of an optimizer's state dict."""
    names = _names(state["param_groups"], model)
    found = {}
    for group in state["param_groups"]:
        beta = group.get("betas", (0.9, 0.999))[1]
        for key in group["params"]:
            own = state["state"].get(key, {})
            if "exp_avg_sq" in own:
                found[names[key]] = own["exp_avg_sq"] / _correction(beta, own.get("step"))
    if not found:
        raise ValueError("state: wanted exp_avg_sq of at least one parameter, as Adam keeps, got none")
    return found


def _names(groups: Any, model: nn.Module) -> dict[Any, str]:
    """Key of the state -> name of the parameter."""
    if all("param_names" in group for group in groups):
        return {key: name for g in groups for key, name in zip(g["params"], g["param_names"], strict=True)}
    keys = [key for group in groups for key in group["params"]]
    training = [name for name, p in model.named_parameters() if p.requires_grad]
    for names in ([name for name, _ in model.named_parameters()], training):
        if len(groups) == 1 and len(names) == len(keys):
            return dict(zip(keys, names, strict=True))
    raise ValueError(
        f"state: wanted param_names in its {len(groups)} groups, or one group with all of the model's parameters in "
        f"their order, got {len(keys)} without names; a mapping name -> exp_avg_sq says it plainly"
    )


def _correction(beta: float, step: Any) -> float:
    """1 - β₂ᵗ; 1 where no step is told."""
    return 1.0 if step is None else 1.0 - beta ** float(step)
