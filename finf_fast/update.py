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
    def between(
        cls, before: Mapping[str, Tensor] | nn.Module, after: Mapping[str, Tensor] | nn.Module, **named: Any
    ) -> Update:
        """The update that turns one model (or state dict) into another of the same shape; equal tensors are left out.

        Keyword arguments go to :class:`Update` (``direction``, ``name``, ``record``).

        Raises:
            ValueError: the two do not have the same names.
        """
        old, new = _state(before), _state(after)
        if old.keys() != new.keys():
            raise ValueError(f"after: wanted the names of before, differing: {sorted(old.keys() ^ new.keys())[:5]}")
        params, buffers = {}, {}
        for name, tensor in old.items():
            if not torch.equal(tensor, new[name]):
                if isinstance(before, nn.Module) and name not in dict(before.named_parameters()):
                    buffers[name] = new[name].detach().clone()
                elif tensor.is_floating_point():
                    params[name] = (new[name] - tensor).detach()
                else:
                    buffers[name] = new[name].detach().clone()
        return cls(params, buffers, **named)

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
    """Hash of the model's class, its structure (``repr``: hyper-parameters too), every parameter and buffer."""
    shape = {"class": f"{type(model).__module__}.{type(model).__qualname__}", "structure": repr(model)}
    buffers = {f"buffer {name}": b for name, b in model.named_buffers()}
    return fingerprint(shape, {**dict(model.named_parameters()), **buffers})


def _state(source: Mapping[str, Tensor] | nn.Module) -> dict[str, Tensor]:
    return dict(source.state_dict()) if isinstance(source, nn.Module) else dict(source)
