"""The change of weights that one query makes: θ' = θ + change, dense or as two thin factors, and moved buffers."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from finf_fast.disk import save_tensors
from finf_fast.lowrank import LowRank, parts

DIRECTIONS = ("ascent", "descent")


@dataclass(frozen=True, eq=False)
class Update:
    """The mirror step of one query, as the *change* of each tensor, so that a step far below the weights' rounding
    survives.

    Attributes:
        params: name -> change θ' − θ of that parameter, its shape: a tensor or a :class:`finf_fast.LowRank`; names as
            in ``model.named_parameters()``. What is not named does not change.
        buffers: name -> new value of that buffer (running statistics); names as in ``model.named_buffers()``.
        direction: ``"ascent"`` (the query's loss went up: positive delta = helpful) or ``"descent"``.
        name: what reports and columns call this query.
        record: how it was made; JSON-able.
    """

    params: Mapping[str, Tensor | LowRank]
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    direction: str = "ascent"
    name: str = ""
    record: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction: wanted one of {', '.join(DIRECTIONS)}, got {self.direction!r}")

    def check(self, model: nn.Module) -> None:
        """Raises ``ValueError`` unless every tensor of the update has its namesake of the same shape in ``model``."""
        for kind, mine, theirs in (
            ("parameter", self.params, dict(model.named_parameters())),
            ("buffer", self.buffers, dict(model.named_buffers())),
        ):
            for name, change in mine.items():
                if name not in theirs:
                    raise ValueError(f"updates: the model has no {kind} {name!r}")
                if change.shape != theirs[name].shape:
                    raise ValueError(
                        f"updates: {kind} {name!r} wanted shape {tuple(theirs[name].shape)}, got {tuple(change.shape)}"
                    )

    @property
    def fingerprint(self) -> str:
        """Hash of every name and value; factors are hashed as such, so a dense twin of the update has another hash."""
        changes = {name + key: part for name, change in self.params.items() for key, part in parts(change).items()}
        return fingerprint(
            {"direction": self.direction}, {**changes, **{f"buffer {k}": v for k, v in self.buffers.items()}}
        )

    @property
    def nbytes(self) -> int:
        """Of all tensors held, factors as they are."""
        return sum(t.nbytes for t in (*self.params.values(), *self.buffers.values()))

    @classmethod
    def between(cls, before: nn.Module, after: nn.Module | Mapping[str, Tensor], **named: Any) -> Update:
        """The update that turns a model into another of its shape, or into a state dict; equal tensors are left out.

        Keyword arguments go to :class:`Update` (``direction``, ``name``, ``record``). The change is taken in float32 at
        least, so that two half-precision checkpoints lose nothing.

        Raises:
            TypeError: ``before`` is not a module.
            ValueError: a tensor of ``before`` is missing in ``after`` or has another shape.
        """
        if not isinstance(before, nn.Module):
            raise TypeError(f"before: wanted a torch.nn.Module, got {type(before).__name__}")
        new = dict(after.state_dict()) if isinstance(after, nn.Module) else dict(after)
        params = _differing(dict(before.named_parameters()), new)
        buffers = _differing({n: b for n, b in before.named_buffers() if n in before.state_dict()}, new)
        changes = {name: _wide(value) - _wide(old) for name, (old, value) in params.items()}
        return cls(changes, {name: value.clone() for name, (_, value) in buffers.items()}, **named)

    @classmethod
    def masking(cls, model: nn.Module, heads: Mapping[str, Iterable[int]], head_size: int, **named: Any) -> Update:
        """The update that takes attention heads out, as AttentionInfluence does (Hua et al., 2025, arXiv 2505.07293).

        A head speaks only through its ``head_size`` input columns of the output projection; the change is −W there and
        0 elsewhere. Factors where they pay (twice their rank is below both sides), else dense; float32 at least.

        Args:
            model: not modified.
            heads: name of the output projection, as in ``model.named_modules()`` -> numbers of the heads to take out.
                The projection is an ``nn.Linear``, or a Hugging Face ``Conv1D``, whose weight lies the other way round.
            head_size: input columns of a head.
            named: goes to :class:`Update` (``direction``, ``name``, ``record``).

        Raises:
            TypeError: a named module is neither of the two, or a head's number is no whole number.
            ValueError: no heads; a module that the model has not, or whose weight is another module's too or no
                parameter; a head that it has not; a ``head_size`` that does not divide its inputs.
        """
        if not heads:
            raise ValueError("heads: wanted at least one output projection, got none")
        taken = {name: sorted({_whole(name, head) for head in numbers}) for name, numbers in heads.items()}
        changes = dict(_masked(model, name, numbers, head_size) for name, numbers in taken.items())
        named.setdefault("record", {"method": "masking", "heads": taken, "head_size": head_size})
        return cls(changes, **named)

    def save(self, path: str | Path) -> None:
        """Writes the update with ``torch.save``: tensors and plain values, so it loads with ``weights_only=True``.

        Raises:
            OSError: the file cannot be written; none is left that is not whole.
        """
        params = {name: vars(c) if isinstance(c, LowRank) else c for name, c in self.params.items()}
        plain = {"params": params, "buffers": dict(self.buffers), "record": dict(self.record)}
        save_tensors(path, {**vars(self), **plain})

    @classmethod
    def load(cls, path: str | Path) -> Update:
        """Reads what :meth:`save` wrote."""
        plain = torch.load(path, map_location="cpu", weights_only=True)
        params = {name: LowRank(**c) if isinstance(c, Mapping) else c for name, c in plain.pop("params").items()}
        return cls(params, **plain)


def fingerprint(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """XXH3, 128 bits, over settings and every tensor's name, dtype, shape and bytes, hex.

    The same values give the same hash in any process and on any device. Nobody forges weights here, so speed decides: a
    cryptographic hash of Q dense updates takes longer than a small sweep.
    """
    digest = xxhash.xxh3_128(json.dumps(settings, sort_keys=True, default=str).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy() if tensor.numel() else b"")
    return digest.hexdigest()


def model_fingerprint(model: nn.Module) -> str:
    """Hash of the model's class, structure, parameters, buffers, and of every module's plain attributes.

    Plain are numbers, strings, tuples and lists of them, and tensors; a Hugging Face configuration is taken whole. What
    else a module holds (an object of a class of the user's own) is not seen.
    """
    plain, tensors = {}, {**dict(model.named_parameters()), **{f"buffer {n}": b for n, b in model.named_buffers()}}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor):
                tensors[f"attribute {name}.{key}"] = value
            elif key not in ("training", "config") and not key.startswith("_") and _plain(value):
                plain[f"{name}.{key}"] = repr(value)
    config = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        plain["config"] = config.to_dict()
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    return fingerprint({"class": kind, "structure": repr(model), "attributes": plain}, tensors)


def _plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype))


def _differing(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (old, new) of the tensors that are not equal."""
    found = {}
    for name, tensor in old.items():
        if name not in new:
            raise ValueError(f"after: wanted a tensor {name!r}, got none")
        if new[name].shape != tensor.shape:
            raise ValueError(f"after: {name!r} wanted shape {tuple(tensor.shape)}, got {tuple(new[name].shape)}")
        if not torch.equal(tensor, new[name]):
            found[name] = (tensor.detach(), new[name].detach())
    return found


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _whole(name: str, head: Any) -> int:
    if isinstance(head, bool) or not hasattr(head, "__index__"):
        raise TypeError(f"heads: {name!r} wanted whole numbers, got {head!r}")
    return operator.index(head)


def _masked(model: nn.Module, name: str, heads: list[int], head_size: int) -> tuple[str, Tensor | LowRank]:
    """Name of the projection's weight, and its change: −W on the columns that read ``heads``."""
    module = dict(model.named_modules()).get(name)
    if module is None:
        raise ValueError(f"heads: the model has no module {name!r}")
    turned = any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)  # (in, out), of Hugging Face
    if not turned and not isinstance(module, nn.Linear):
        raise TypeError(f"heads: {name!r} wanted nn.Linear or Conv1D, got {type(module).__name__}")
    weight = module.weight.detach()
    columns = _columns(name, heads, head_size, weight.shape[0 if turned else 1]).to(weight.device)
    change = _without(weight.T if turned else weight, columns)
    return _own_weight(model, name, module), (change.t() if turned else change)


def _columns(name: str, heads: list[int], head_size: int, width: int) -> Tensor:
    """Numbers of the input columns that belong to these heads."""
    if isinstance(head_size, bool) or not isinstance(head_size, int) or head_size < 1 or width % head_size:
        raise ValueError(f"head_size: wanted a divisor of the {width} inputs of {name!r}, got {head_size!r}")
    if not heads:
        raise ValueError(f"heads: {name!r} wanted at least one head, got none")
    if heads[0] < 0 or heads[-1] >= width // head_size:
        raise ValueError(f"heads: {name!r} wanted heads in [0, {width // head_size}), got {heads}")
    return (torch.tensor(heads)[:, None] * head_size + torch.arange(head_size)).flatten()


def _without(weight: Tensor, columns: Tensor) -> Tensor | LowRank:
    """−weight (out, in) on some columns, 0 elsewhere."""
    gone = -_wide(weight[:, columns])
    if 2 * len(columns) >= min(weight.shape):  # factors cost as much as the matrix
        return torch.zeros_like(weight, dtype=gone.dtype).index_copy_(1, columns, gone)
    places = gone.new_zeros(weight.shape[1], len(columns))
    places[columns, torch.arange(len(columns), device=columns.device)] = 1
    return LowRank(gone, places)


def _own_weight(model: nn.Module, name: str, module: nn.Module) -> str:
    """Name of the module's weight among the model's parameters."""
    holders = [n for n, m in model.named_modules() if m._parameters.get("weight") is module.weight]
    if not holders:
        raise ValueError(f"heads: {name!r} wanted a weight that is a parameter, got one that is computed")
    if len(holders) > 1:
        raise ValueError(f"heads: {name!r} wanted a weight of its own, got one that {', '.join(holders)} share")
    return next(n for n, parameter in model.named_parameters() if parameter is module.weight)
