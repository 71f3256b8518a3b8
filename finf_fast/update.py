"""The change of weights that one query makes: θ' = θ + change, and the buffers that travelled with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

DIRECTIONS = ("ascent", "descent")


@dataclass(frozen=True, eq=False)
class Update:
    """The mirror step of one query, as the *change* of each tensor, so that a step far below the weights' rounding
    survives.

    Attributes:
        params: name -> dense change θ' − θ of that parameter, its shape; names as in ``model.named_parameters()``.
        buffers: name -> new value of that buffer (running statistics); names as in ``model.named_buffers()``.
        direction: ``"ascent"`` (the query's loss went up: positive delta = helpful) or ``"descent"``.
        name: what reports and columns call this query.
        record: how it was made; JSON-able.
    """

    params: Mapping[str, Tensor]
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
            for name, tensor in mine.items():
                if name not in theirs:
                    raise ValueError(f"updates: the model has no {kind} {name!r}")
                if tensor.shape != theirs[name].shape:
                    raise ValueError(
                        f"updates: {kind} {name!r} wanted shape {tuple(theirs[name].shape)}, got {tuple(tensor.shape)}"
                    )

    @property
    def fingerprint(self) -> str:
        """Hash of every name and value."""
        return fingerprint(
            {"direction": self.direction}, {**self.params, **{f"buffer {k}": v for k, v in self.buffers.items()}}
        )

    @property
    def nbytes(self) -> int:
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

    def save(self, path: str | Path) -> None:
        """Writes the update with ``torch.save``: tensors and plain values, so it loads with ``weights_only=True``."""
        torch.save(
            {**vars(self), "params": dict(self.params), "buffers": dict(self.buffers), "record": dict(self.record)},
            path,
        )

    @classmethod
    def load(cls, path: str | Path) -> Update:
        """Reads what :meth:`save` wrote."""
        return cls(**torch.load(path, map_location="cpu", weights_only=True))


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
