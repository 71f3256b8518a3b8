"""The dot engine: one forward and one backward pass over activations, all queries' products taken on the way back.

To first order the change of a sample's loss is the gradient of that loss times the change of the weights. No gradient
of a weight is kept, nor asked of autograd: each layer's is multiplied with all queries' changes as it comes by.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finf_fast.dot.changes import Change, packed
from finf_fast.dot.elementwise import ELEMENTWISE
from finf_fast.dot.matrices import MATRICES
from finf_fast.dot.taps import Taps
from finf_fast.loss import Loss, Result, batch_size, cast, mapped
from finf_fast.order import InOrder, Mixed
from finf_fast.skeleton import Skeleton
from finf_fast.update import Update

__all__ = ["DotEngine"]

CALLS = {**MATRICES, **ELEMENTWISE}
DTYPES = (torch.bfloat16, torch.float32, torch.float64)
NARROW = 4096  # outputs; of so many the loss is taken in float64, as in a mirror step, of more it would cost too much
# How far a layer's share may lie from the same samples' taken one by one: rounding against a mix-up.
ALIKE = {torch.bfloat16: 0.1, torch.float32: 1e-3, torch.float64: 1e-6}


class DotEngine:
    """Scores batches to first order in the updates.

    A layer whose rows cannot be told apart by sample, or a parameter used in a way that has no rule, has its batches
    taken one sample at a time; the record says which and why. The first batch of every kind, and the first in which
    another layer has a share, is checked against that at three of its samples.

    Args:
        model: the user's model, never modified; scored in eval mode.
        updates: Q updates, of any forms; of a moved buffer the derivative is taken too.
        loss: what is measured, of samples.
        device, dtype: where and in what the passes run; bfloat16, float32 or float64.

    Raises:
        ValueError: another dtype; a loss that is asked for each token; a buffer of whole numbers that an update moves.
    """

    name = "dot"
    rows = 1  # of a sample under way at once
    room = 0  # bytes kept between chunks of queries
    columns = 1  # of a text's batch, a multiple: any number

    def __init__(
        self, model: nn.Module, updates: Sequence[Update], loss: Loss, device: torch.device, dtype: torch.dtype
    ):
        if dtype not in DTYPES:
            raise ValueError(f"dtype: wanted torch.bfloat16, torch.float32 or torch.float64, got {dtype}")
        if loss.per_token:
            raise ValueError("per_token: wanted engine='delta' or 'pair', got 'dot', which knows samples only")
        self.loss, self.device, self.dtype, self._queries = loss, device, dtype, len(updates)
        with torch.inference_mode(False):
            self._prepare(model, updates)

    def _prepare(self, model: nn.Module, updates: Sequence[Update]) -> None:
        device, dtype = self.device, self.dtype
        self._body = Skeleton(model, device, dtype)
        frozen = {name: slot.tensor for name, slot in self._body.slots.items() if slot.tensor.is_inference()}
        self._body.put({name: tensor.clone() for name, tensor in frozen.items()})  # which no graph may hold
        self._images = any(isinstance(m, nn.Conv2d) for m in model.modules())
        self._buffers = {name: self._body.slots[name].tensor for name in self._body.buffers}
        self._changes = self._packed(updates)
        self._leaves = {
            name: self._body.slots[name].tensor.detach().requires_grad_()
            for name in self._changes.keys() - self._buffers
        }
        self._body.put(self._leaves)
        self._own = {slot.tensor.untyped_storage().data_ptr() for slot in self._body.slots.values()}
        self._alone: str = ""
        self._proven: dict[str, set[str]] = {}  # kind of batch -> layers whose share was right

    @property
    def score_dtype(self) -> torch.dtype:
        """Of the scores."""
        return torch.float64 if self.dtype is torch.float64 else torch.float32

    def settings(self) -> dict[str, Any]:
        """What a resumed run must share."""
        return {
            "engine": self.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
        }

    def record(self) -> dict[str, Any]:
        """What was done, for the manifest."""
        return {**self.settings(), "order": "first", "one_sample_at_a_time": self._alone}

    def counted(self) -> dict[str, Any]:
        """What earlier batches decide for later ones, as JSON has it."""
        proven = {kind: sorted(names) for kind, names in self._proven.items()}
        return {"one_sample_at_a_time": self._alone, "proven": proven}

    def resume(self, counted: Mapping[str, Any]) -> None:
        """Goes on as an engine would that has decided so."""
        self._alone = counted["one_sample_at_a_time"]
        self._proven = {kind: set(names) for kind, names in counted["proven"].items()}

    def output(self, batch: Any) -> Tensor:
        """Output of the model, (B, ...), by way of both passes: what planning measures."""
        with self._running():
            return self._passes(cast(batch, self.dtype, self._images))[0]

    def score(self, batch: Any) -> Result:
        """Base and delta of every sample of a batch that lies on the engine's device."""
        with self._running():
            batch = cast(batch, self.dtype, self._images)
            if batch_size(batch) > 1 and not self._alone:
                try:
                    return self._together(batch)
                except Mixed as error:
                    self._alone = str(error)
            return _in_a_row([self._result(_single(batch, row)) for row in range(batch_size(batch))])

    def _together(self, batch: Any) -> Result:
        """The result of a batch in one go, checked where it has shares of a kind not seen before.

        Raises:
            Mixed: some of its samples give another share when taken by themselves.
        """
        kind, shares = _kind(batch), {}
        result = self._result(batch, shares)
        proven = self._proven.get(kind, ())
        if kind not in self._proven or any(bool(share.any()) for n, share in shares.items() if n not in proven):
            self._proven.setdefault(kind, set()).update(self._checked(batch, shares))
        return result

    def _checked(self, batch: Any, shares: dict[str, Tensor]) -> set[str]:
        """Names of the layers whose shares of a few samples are those of the same samples alone, and not nothing."""
        singles: list[dict[str, Tensor]] = []
        for row in _few(batch_size(batch)):
            singles.append({})
            self._result(_single(batch, row), singles[-1])
        names = shares.keys() | {name for single in singles for name in single}
        alone = {name: torch.cat([single.get(name, self._nothing(1)) for single in singles]) for name in names}
        whole = torch.stack([share.norm() for share in alone.values()]).norm() if names else 0.0
        for name, own in alone.items():
            far = (shares.get(name, torch.zeros_like(own)) - own).norm()
            if not bool(far <= ALIKE[self.dtype] * (own.norm() + 0.1 * whole)):
                raise Mixed(f"{name}, whose share of a batch is not that of its samples")
        return {name for name, own in alone.items() if bool(own.any())}

    def _result(self, batch: Any, shares: dict[str, Tensor] | None = None) -> Result:
        _, losses, delta = self._passes(batch, shares)
        return Result(losses.to(self.score_dtype), delta.T.to(self.score_dtype), self.loss.without_target(batch))

    def _passes(self, batch: Any, shares: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Output, (B,) losses and (B, Q) changes of one forward and one backward pass."""
        samples = batch_size(batch)
        delta, few = self._nothing(samples), _few(samples)

        def note(name: str, part: Tensor) -> None:
            delta.add_(part)
            if shares is not None:
                shares[name] = shares.get(name, 0) + part[few].to(delta.dtype)

        fresh = self._fresh_buffers()
        leaves = {**self._leaves, **{name: fresh[name] for name in self._changes.keys() & fresh.keys()}}
        fixed = self._own | {buffer.untyped_storage().data_ptr() for buffer in fresh.values()}
        taps = Taps(self._changes, leaves, samples, _length(batch), CALLS, note)
        value = self._forward(taps, InOrder(samples, fixed), batch)
        losses = self.loss.judged(_precise(value), batch)
        self._backward(losses, taps.roots, leaves, samples, note)
        delta[losses.detach().isnan()] = torch.nan  # a sample without a target
        return value.detach(), losses.detach(), delta

    def _forward(self, taps: Taps, order: InOrder, batch: Any) -> Tensor:
        try:
            with taps, order:
                return self.loss.output(self._body.module, mapped(torch.clone, batch))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not taps.given or "allocate memory" in str(error):
                raise
            raise Mixed(f"{taps.given}, whose rows all samples share ({error})") from error

    def _backward(
        self,
        losses: Tensor,
        roots: list[Tensor],
        leaves: dict[str, Tensor],
        samples: int,
        note: Callable[[str, Tensor], None],
    ) -> None:
        """Sends the losses' gradient back; what reaches a parameter itself can be told of a single sample only."""
        if not losses.requires_grad:
            return
        found = torch.autograd.grad(losses.sum(), [*roots, *leaves.values()], allow_unused=True)[len(roots) :]
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True):
            if gradient is None:
                continue
            if samples > 1:
                raise Mixed(f"{name}, a parameter of shape {tuple(leaf.shape)} in a call without a rule")
            gradient = gradient if gradient.layout is torch.strided else gradient.to_dense()
            note(name, self._changes[name].formed(gradient[None]))

    def _fresh_buffers(self) -> dict[str, Tensor]:
        """Puts fresh buffers into the body, since a forward may count in one; those that queries move, with a graph."""
        fresh = {name: buffer.clone() for name, buffer in self._buffers.items()}
        for name in self._changes.keys() & fresh.keys():
            fresh[name].requires_grad_()
        self._body.put(fresh)
        return fresh

    def _packed(self, updates: Sequence[Update]) -> dict[str, Change]:
        changes: dict[str, dict[int, Any]] = {}
        for number, update in enumerate(updates):
            for name, change in update.params.items():
                changes.setdefault(name, {})[number] = change
            for name, value in update.buffers.items():
                before = self._buffers[name]
                if before.is_floating_point():
                    changes.setdefault(name, {})[number] = value.double().to(before.device) - before.double()
                elif not name.endswith("num_batches_tracked"):  # which no forward in eval mode reads
                    raise ValueError(f"engine: 'dot' has no derivative by {name!r}, a buffer of {before.dtype}")
        return {name: packed(of, self._queries, self.device, self.dtype) for name, of in changes.items()}

    def _nothing(self, samples: int) -> Tensor:
        return torch.zeros(samples, self._queries, device=self.device, dtype=self.score_dtype)

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Gradients on, whatever the caller has set, and the user's autocast off."""
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(self.device.type, enabled=False),
        ):
            yield


def _precise(value: Tensor) -> Tensor:
    """In float64 where the output is narrow: in float32 the gradient of a target learnt by heart is 0 from 6e-8."""
    wide = torch.float64 if value.dim() < 2 or value.shape[-1] <= NARROW else torch.float32
    return value.to(torch.promote_types(value.dtype, wide))


def _in_a_row(results: Sequence[Result]) -> Result:
    """Of samples taken one by one."""
    empty = None if results[0].empty is None else torch.cat([one.empty for one in results])
    return Result(torch.cat([one.base for one in results]), torch.cat([one.delta for one in results], 1), empty)


def _single(batch: Any, row: int) -> Any:
    return mapped(lambda tensor: tensor[row : row + 1], batch)


def _few(samples: int) -> list[int]:
    """First, middle and last: what a check looks at."""
    return sorted({0, samples // 2, samples - 1})


def _length(batch: Any) -> int:
    """Of a sample's first dimension."""
    shapes: list[torch.Size] = []
    mapped(lambda tensor: shapes.append(tensor.shape) or tensor, batch)
    return shapes[0][1] if shapes and len(shapes[0]) > 1 else 0


def _kind(batch: Any) -> str:
    """What decides how the rows of a batch lie: whether its sizes could be taken for one another."""
    samples, length = batch_size(batch), _length(batch)
    return "equal" if samples == length else "multiple" if length % samples == 0 else "other"
