"""Steps that divide every coordinate by a number of its own: the diagonal Fisher, and the statistics of a real Adam."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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

    That mean counts as at least ε^¾ of the mean over all tensors, ε of the dtype, for a parameter that no loss can feel
    (the bias of attention's keys, one before a norm) has gradients of rounding alone, ε of others'.

    The step is dense; ``rank`` compresses it.
    """

    name: ClassVar[str] = "fisher_diag"
    fits: ClassVar[str | None] = "fisher_diag"
    damping: float = 0.1

    def direction_of(self, body: Body, caught: dict[str, Gradient]) -> Direction:
        found = Direction({}, notes=self.left(body))
        usual = _usual(self.factors.diagonals, power=0.75)
        for name, diagonal in self.factors.diagonals.items():
            if name in caught:
                step = caught[name].total() / (diagonal + self.damping * usual[name])
                found.params[name], found.shares[name] = compressed(step, self.rank)
        return found


@dataclass(frozen=True, kw_only=True)
class AdamWState(Preconditioned):
    """g / (√v + λ) with the running mean v of squared gradients that a real optimizer has gathered in training.

    As in ``torch.optim.AdamW``, v is corrected by its step count where the state has one. λ is ``eps``, as there, plus
    ``damping`` · mean(√v) of the tensor, bounded from below as in :class:`FisherDiagonal`: without it a weight that
    training never moved, such as that of a dead pixel, would take all of the step of a query that has a use for it.
    ``size`` is a share of 1, and the length of the step that of the metric it inverts: √⟨g, d⟩. That is no curvature,
    so the training losses move by ``size`` to an order of magnitude only; with states of larger batches, by more.

    Args:
        state: the optimizer; or what its ``state_dict()`` gave; or a mapping name -> v, shaped as the parameter. The
            parameters of a state dict are told by ``param_names``, or without by their order in the model, of several
            groups only where none has a shape of another's.
        eps, damping: as above.
        told_by: how the parameters were told; found by the method.

    Raises:
        TypeError, ValueError: no state, or one that does not fit the model.
    """

    name: ClassVar[str] = "adamw_state"
    hidden: ClassVar[tuple[str, ...]] = ("state",)

    state: torch.optim.Optimizer | Mapping[Any, Any] | None = None
    eps: float = 1e-8
    damping: float = 0.1
    told_by: str = "name"

    def __post_init__(self):
        super().__post_init__()
        require_number("eps", self.eps)
        require_number("damping", self.damping)
        if not isinstance(self.state, (Mapping, torch.optim.Optimizer)) or self.state == {}:
            raise TypeError(
                "state: method='adamw_state' wants the optimizer, its state_dict() or a mapping name -> exp_avg_sq, "
                f"got {'an empty one' if self.state == {} else type(self.state).__name__}"
            )

    def prepared(self, model: nn.Module, loss: Loss, device: torch.device) -> Method:
        means, told_by = self.state, self.told_by
        if isinstance(self.state, torch.optim.Optimizer) or {"state", "param_groups"} <= self.state.keys():
            entries, told_by = _entries(self.state, model)
            means = _means(entries)
        named = dict(model.named_parameters())
        for name, mean in means.items():
            if name not in named:
                raise ValueError(f"state: the model has no parameter {name!r}")
            if not isinstance(mean, Tensor) or mean.shape != named[name].shape:
                got = tuple(mean.shape) if isinstance(mean, Tensor) else type(mean).__name__
                raise ValueError(f"state: {name!r} wanted shape {tuple(named[name].shape)}, got {got}")
        return replace(self, state={name: mean.detach().to(device) for name, mean in means.items()}, told_by=told_by)

    def direction_of(self, body: Body, caught: dict[str, Gradient]) -> Direction:
        found = Direction({}, notes={"left_still": [n for n in body.weights if n not in self.state]})
        roots = {name: mean.to(body.dtype).sqrt() for name, mean in self.state.items()}
        usual = _usual(roots, power=0.375)
        for name, root in roots.items():
            if name in caught:
                step = caught[name].total() / (root + self.eps + self.damping * usual[name])
                found.params[name], found.shares[name] = compressed(step, self.rank)
        return found


def _usual(diagonals: Mapping[str, Tensor], power: float) -> dict[str, Tensor]:
    """Name -> () mean of its numbers, at least ε ** ``power`` of the mean of all, or of 1 where that is 0."""
    overall = sum(d.double().sum() for d in diagonals.values()) / sum(d.numel() for d in diagonals.values())
    overall = torch.where(overall > 0, overall, 1.0)
    least = {d.dtype: torch.finfo(d.dtype).eps ** power * overall for d in diagonals.values()}
    return {name: torch.maximum(d.mean(), least[d.dtype].to(d)) for name, d in diagonals.items()}


def compressed(step: Tensor, rank: int | None) -> tuple[Any, float]:
    """A dense step, as factors of at most ``rank`` columns where asked for and where they pay."""
    return (step, 0.0) if rank is None else compress_whole(step, rank)


Entry = tuple[Mapping[str, Any], Any, Mapping[str, Any]]  # group, key, what the optimizer keeps for it


def _entries(state: Any, model: nn.Module) -> tuple[list[tuple[str, Entry]], str]:
    """Every parameter's name with its entry, and how the names were told."""
    if isinstance(state, torch.optim.Optimizer):
        own = {id(parameter): name for name, parameter in model.named_parameters()}
        kept = [(group, id(p), state.state.get(p, {})) for group in state.param_groups for p in group["params"]]
        if not any(key in own for _, key, _ in kept):
            raise ValueError(
                "state: the optimizer steps none of the model's parameters; of a copy's, give state_dict()"
            )
        return [(own[entry[1]], entry) for entry in kept if entry[1] in own], "the optimizer's own parameters"
    groups = state["param_groups"]
    kept = [(group, key, state["state"].get(key, {})) for group in groups for key in group["params"]]
    if all("param_names" in group for group in groups):
        return list(zip([name for g in groups for name in g["param_names"]], kept, strict=True)), "param_names"
    return _in_order(kept, len(groups), model), "their order in the model"


def _in_order(entries: list[Entry], groups: int, model: nn.Module) -> list[tuple[str, Entry]]:
    """Names in the model's order, of each shape apart where there are several groups.

    Groups divide the parameters, and by which rule is not told; but entries of one shape, all in one group, are all the
    model's of that shape (weights that decay and biases that do not).
    """
    named = dict(model.named_parameters())
    for names in (list(named), [name for name, p in named.items() if p.requires_grad]):
        if len(names) == len(entries):
            if groups == 1:
                return list(zip(names, entries, strict=True))
            mine, theirs = _by_shape((tuple(named[n].shape), n) for n in names), _by_shape(map(_shaped, entries))
            apart = all(len({id(group) for group, *_ in some}) == 1 for some in theirs.values())
            if apart and {s: len(some) for s, some in mine.items()} == {s: len(some) for s, some in theirs.items()}:
                return [pair for shape in mine for pair in zip(mine[shape], theirs[shape], strict=True)]
    raise ValueError(
        f"state: wanted param_names in its {groups} groups, or all of the model's parameters in its order, no shape in "
        f"two groups, got {len(entries)} without names; state=optimizer, the object itself, or a mapping "
        "name -> exp_avg_sq says it plainly"
    )


def _shaped(entry: Entry) -> tuple[tuple[int, ...] | None, Entry]:
    mean = entry[2].get("exp_avg_sq")
    return (None if mean is None else tuple(mean.shape)), entry


def _by_shape(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, list[Any]]:
    found: dict[Any, list[Any]] = {}
    for shape, one in pairs:
        found.setdefault(shape, []).append(one)
    return found


def _means(entries: list[tuple[str, Entry]]) -> dict[str, Tensor]:
    """Name -> corrected exp_avg_sq."""
    found = {
        name: own["exp_avg_sq"] / _correction(group.get("betas", (0.9, 0.999))[1], own.get("step"))
        for name, (group, _, own) in entries
        if "exp_avg_sq" in own
    }
    if not found:
        raise ValueError("state: wanted exp_avg_sq of at least one of the model's parameters, as Adam keeps, got none")
    return found


def _correction(beta: float, step: Any) -> float:
    """1 - β₂ᵗ; 1 where no step is told."""
    return 1.0 if step is None else 1.0 - beta ** float(step)
