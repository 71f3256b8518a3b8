"""The pair engine: one body, 1 + Q sets of weights put into it in turn, each batch read once.

Per batch: a forward with the weights as they are, a forward with each query's weights, the outputs subtracted, and from
(value, change) the loss and its change. Everything the user gave stays as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finf_fast import fold
from finf_fast.loss import Loss, Result, cast, joined, mapped
from finf_fast.pair.linear import OneDnnLinear
from finf_fast.pair.weights import WeightSets
from finf_fast.reference import product
from finf_fast.skeleton import Skeleton
from finf_fast.update import Update

CHANGE_BYTES = (
    64 << 20
)  # outputs' changes held at once: enough to give the loss kernel many queries of a small head together


class PairEngine:
    """Scores batches by plain forwards of the model as it is and as each query's update makes it.

    Args:
        model: the user's model, never modified; scored in eval mode.
        updates: Q updates.
        loss: what is measured.
        device, dtype: where and in what the forwards run; float32 or float64.
        keep: bytes that may be spent on keeping the updated weights; beyond it they are formed anew for every batch.
        fold_batch_norm: fold batch norm where exact.

    Raises:
        ValueError: another dtype.
    """

    name = "pair"
    rows = 1  # of a sample under way at once
    room = 0  # bytes kept between chunks of queries
    columns = 1  # of a text's batch, a multiple: any number

    def __init__(
        self,
        model: nn.Module,
        updates: Sequence[Update],
        loss: Loss,
        device: torch.device,
        dtype: torch.dtype,
        keep: int = 1 << 30,
        fold_batch_norm: bool = True,
    ):
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype: wanted torch.float32 or torch.float64, got {dtype}")
        self.loss, self.device, self.dtype = loss, device, dtype
        self._body = Skeleton(model, device, dtype)
        self._images = any(isinstance(m, nn.Conv2d) for m in model.modules())
        self._folds = fold.find(self._body) if fold_batch_norm else []
        self._weights = WeightSets(self._body, updates, self._folds, keep)
        self._writes_input = False
        self._onednn = device.type == "cpu" and dtype is torch.float32 and product.available()

    @property
    def score_dtype(self) -> torch.dtype:
        """Of the scores."""
        return self.dtype

    def record(self) -> dict[str, Any]:
        """What was done, for the manifest."""
        return self.settings()

    def counted(self) -> dict[str, Any]:
        """Nothing that a later batch depends on."""
        return {}

    def resume(self, counted: Mapping[str, Any]) -> None:
        """Nothing to take up."""

    def settings(self) -> dict[str, Any]:
        """What a resumed run must share."""
        return {
            "engine": self.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "folded_batch_norms": len(self._folds),
            "onednn_linear": self._onednn,
        }

    def output(self, batch: Any) -> Tensor:
        """Output of the model as it is, (B, ...): what planning measures.

        A model that writes into its input is found out here; it is given a copy for every forward from then on.
        """
        with self._settings():
            batch = cast(mapped(torch.clone, batch), self.dtype, self._images)
            before = _versions(batch)
            with torch.inference_mode():
                value = self._forward(self._weights.base, batch)
        self._writes_input = self._writes_input or _versions(batch) != before
        return value

    def score(self, batch: Any) -> Result:
        """Base and delta of every sample of a batch that lies on the engine's device."""
        with self._settings(), torch.inference_mode():
            batch = cast(batch, self.dtype, self._images)
            value = self._forward(self._weights.base, batch)
            parts = [self.loss.finish(value, change, batch) for change in self._changes(value, batch)]
        return joined(parts)

    def _changes(self, value: Tensor, batch: Any) -> Iterator[Tensor]:
        """Changes of the output, (Qc, B, ...), a few queries at a time."""
        count = len(self._weights)
        chunk = max(1, min(count, CHANGE_BYTES // max(1, value.nbytes)))
        masked = _may_be_infinite(value)
        for first in range(0, count, chunk):
            change = value.new_empty((min(chunk, count - first), *value.shape))
            for row in range(len(change)):
                after = self._forward(self._weights[first + row], batch)
                torch.sub(after, value, out=change[row])
                if masked:  # a column at -inf before and after has not changed, though inf - inf is not a number
                    change[row].masked_fill_(after == value, 0)
            yield change

    def _forward(self, weights: Mapping[str, Tensor], batch: Any) -> Tensor:
        self._body.put(weights)
        for (
            name
        ) in self._body.buffers:  # a forward that counts or caches in a buffer starts from the same one each time
            self._body.put({name: weights.get(name, self._weights.base[name]).clone()})
        fresh = mapped(torch.clone if self._writes_input else _same, batch)
        return self.loss.output(self._body.module, fresh)

    @contextlib.contextmanager
    def _settings(self) -> Iterator[None]:
        """The user's autocast off, whose half precision would be subtracted here, and the fast product on."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.autocast(self.device.type, enabled=False))
            if self._onednn:
                stack.enter_context(OneDnnLinear())
            yield


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _versions(batch: Any) -> list[int]:
    """How often each tensor of a batch has been written into."""
    found: list[int] = []
    mapped(lambda tensor: found.append(tensor._version) or tensor, batch)
    return found


def _may_be_infinite(value: Tensor) -> bool:
    """Whether an output may hold infinities (a masked vocabulary); a GPU is not made to wait for the answer."""
    if value.device.type != "cpu" or value.numel() == 0:
        return True
    low, high = torch.aminmax(value)
    return not bool(torch.isfinite(high - low))
