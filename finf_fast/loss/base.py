"""What every loss answers, and how a batch is split into what the model reads and what it is judged by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finf_fast.records import BadSample

Draw = Callable[[Sequence[int]], Tensor]
LABEL_KEYS = ("labels", "label", "targets", "target", "y")


@dataclass(frozen=True)
class Result:
    """Scores of one batch.

    Attributes:
        base: (B,) loss of each sample under the model as it is; NaN where a sample has no target.
        delta: (Q, B) change of that loss.
        empty: (B,) bool, samples without any target; None where that can't be.
        token_base: (B, L) loss of each token, NaN where a token has no target; only when asked for.
        token_delta: (Q, B, L) its change; only when asked for.
    """

    base: Tensor
    delta: Tensor
    empty: Tensor | None = None
    token_base: Tensor | None = None
    token_delta: Tensor | None = None


def joined(parts: Sequence[Result]) -> Result:
    """Results of several chunks of queries as one; the base is the same in each."""
    first = parts[0]
    if len(parts) == 1:
        return first
    tokens = None if first.token_delta is None else torch.cat([part.token_delta for part in parts])
    delta = torch.cat([part.delta for part in parts])
    return Result(first.base, delta, first.empty, first.token_base, tokens)


@dataclass(frozen=True)
class Head:
    """What a model's logits would be made of, where they are the result of a linear layer that nobody looked at.

    Attributes:
        x: (N, D) its input rows; rows: their logical shape (B, ...), N in all.
        dx: (Q, N, D) change of the input; None where nothing before the head changes.
        W, bias: (V, D) and (V) or None.
        db: (Q, V) change of the bias, or None.
        changes: ``(queries, dW, factors)`` for each form of the weight's change: dW (q, V, D) or None, factors
            ((q, V, r), (q, D, r)) or None; a query of whom no form speaks leaves the weight as it is.
        queries: Q.
        softcap: c where the logits would be ``c tanh(z / c)``.
    """

    x: Tensor
    rows: tuple[int, ...]
    dx: Tensor | None
    W: Tensor
    bias: Tensor | None
    db: Tensor | None
    changes: tuple[tuple[tuple[int, ...], Tensor | None, tuple[Tensor, Tensor] | None], ...]
    queries: int
    softcap: float | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the logits that are not formed."""
        return (*self.rows, len(self.W))


class Loss(ABC):
    """One loss: how the model is called, and how (value, change) of its output become (base, delta)."""

    name: str
    per_token = False

    @abstractmethod
    def output(self, model: Any, batch: Any) -> Tensor:
        """The model's output for a batch: what the loss is a function of, leading dimension B."""

    @abstractmethod
    def finish(self, value: Tensor, change: Tensor, batch: Any) -> Result:
        """Loss and change of loss from the output's ``value`` (B, ...) and its ``change`` (Q, B, ...)."""

    def finish_head(self, head: Head, batch: Any) -> Result | None:
        """The same from the head's input, without forming logits; None where this loss needs them."""
        return None

    def per_sample(self, model: Any, batch: Any) -> Tensor:
        """(B,) losses in plain torch, differentiable."""
        return self.judged(self.output(model, batch), batch)

    @abstractmethod
    def judged(self, value: Tensor, batch: Any) -> Tensor:
        """(B,) losses of an output (B, ...), differentiable."""

    def precise(self, model: Any, batch: Any) -> Tensor:
        """As :meth:`per_sample`, with a gradient as exact as the model's output is."""
        return self.per_sample(model, batch)

    def without_target(self, batch: Any) -> Tensor | None:
        """(B,) bool: samples that have no loss because nothing of theirs counts; None where that can't be."""
        return None

    def check(self, batch: Any, outputs: int | None, vocabulary: int | None) -> None:  # noqa: B027 (a loss may accept anything)
        """Raises :class:`BadSample` for a value that cannot be scored.

        Args:
            outputs: width V of the model's output, the number of classes.
            vocabulary: number of token ids the model's embedding knows, where there is one.
        """

    def fisher(self, value: Tensor, batch: Any, draw: Draw | None) -> Tensor:
        """(B,) numbers whose gradients have the curvature of :meth:`per_sample` as their second moment.

        With ``draw`` it is the mean over labels that the model itself draws, the true Fisher, which is the Gauss-Newton
        matrix of this loss, its mean over tokens included: the gradients of a sample's T tokens enter over √T. Without
        it the labels are the batch's own: the empirical Fisher.

        Args:
            value: the model's output (B, ...), with its graph.
            draw: shape -> (B, *shape) float32 standard normal numbers, each sample's own.

        Raises:
            ValueError: ``draw`` is given and this loss names no distribution of labels.
        """
        raise ValueError(
            f"loss: {self.name!r} names no distribution to draw labels from; the empirical Fisher needs none: "
            "factors = fit_factors(model, corpus, loss=loss, fisher='empirical'), and options={'factors': factors}"
        )

    def scattered(self, value: Tensor, batch: Any, draw: Draw) -> Tensor:
        """As :meth:`fisher` with ``draw``, with as little spread as one draw a sample can have.

        Where the model is sure of itself, labels that it draws are nearly all the same one and its curvature hangs on
        the few others; here every label has its part in every draw.
        """
        return self.fisher(value, batch, draw)

    def gauss_newton(self, value: Tensor, batch: Any, tangent: Tensor) -> Tensor:
        """H t for each sample: the second derivative of :meth:`per_sample` by the model's output, times ``tangent``.

        Args:
            value, tangent: (B, ...), without graph.

        Raises:
            ValueError: this loss does not know it.
        """
        raise ValueError(f"loss: the curvature of {self.name!r} is not known; the empirical Fisher needs none")

    def settings(self) -> dict[str, Any]:
        """What changes the numbers, for the manifest."""
        return {"loss": self.name, **{k: v for k, v in vars(self).items() if not k.startswith("_")}}


def mapped(function: Callable[[Tensor], Any], batch: Any) -> Any:
    """``function`` of every tensor of a batch, in containers of their own."""
    if isinstance(batch, Mapping):
        return {key: mapped(function, value) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(mapped(function, value) for value in batch)
    return function(batch) if isinstance(batch, Tensor) else batch


def cast(batch: Any, dtype: torch.dtype, images: bool) -> Any:
    """Floating-point tensors of a batch in ``dtype``; 4-D ones channels-last where they are ``images``: what
    convolutions on a processor read fastest."""

    def one(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        image = images and tensor.dim() == 4
        return tensor.to(dtype, memory_format=torch.channels_last if image else torch.preserve_format)

    return mapped(one, batch)


def byte_size(batch: Any) -> int:
    """Bytes of a batch's tensors."""
    sizes: list[int] = []
    mapped(lambda tensor: sizes.append(tensor.nbytes) or tensor, batch)
    return sum(sizes)


def batch_size(batch: Any) -> int:
    """Leading dimension B of a batch: a tensor, a tuple or a dict of tensors."""
    first = batch
    while not isinstance(first, Tensor):
        if isinstance(first, Mapping):
            first = next(iter(first.values()))
        elif isinstance(first, (tuple, list)) and len(first):
            first = first[0]
        else:
            raise TypeError(f"batch: wanted a tensor, a tuple or a dict of tensors, got {type(first).__name__}")
    return first.shape[0]


def split(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None]:
    """What the model reads, positional and by keyword, and the target: the last of a tuple, ``labels`` of a dict."""
    if isinstance(batch, Tensor):
        return (batch,), {}, None
    if isinstance(batch, Mapping):
        key = next((k for k in LABEL_KEYS if k in batch), None)
        return (), {k: v for k, v in batch.items() if k != key}, None if key is None else batch[key]
    if isinstance(batch, (tuple, list)):
        return (tuple(batch[:-1]), {}, batch[-1]) if len(batch) > 1 else (tuple(batch), {}, None)
    raise TypeError(f"batch: wanted a tensor, a tuple or a dict of tensors, got {type(batch).__name__}")


def target_of(batch: Any, loss: str) -> Tensor:
    """What a batch is judged by; ValueError where a loss of this name finds nothing."""
    target = split(batch)[2]
    if target is None:
        wanted = f"wants a target, (x, y) or a dict with one of {list(LABEL_KEYS)}"
        columns = f"a dict of {list(batch)} (columns= names what is read of a dataset)"
        got = columns if isinstance(batch, Mapping) else "inputs alone"
        raise ValueError(f"corpus: {loss} {wanted}, got {got}")
    return target


def prediction(out: Any) -> Tensor:
    """The prediction in what a model returned: a tensor, ``.logits``, ``["logits"]`` or the first of a tuple."""
    if isinstance(out, Tensor):
        return out
    if isinstance(getattr(out, "logits", None), Tensor):
        return out.logits
    if isinstance(out, Mapping) and isinstance(out.get("logits"), Tensor):
        return out["logits"]
    if isinstance(out, (tuple, list)) and len(out) and isinstance(out[0], Tensor):
        return out[0]
    wanted = "a tensor, something with .logits, or a tuple that starts with a tensor"
    raise TypeError(f"model: wanted it to return {wanted}, got {type(out).__name__}")


def check_range(what: str, values: Tensor, limit: int, allowed: int | None = None) -> None:
    """Raises :class:`BadSample` at the first sample holding a value outside ``[0, limit)`` that is not ``allowed``."""
    if values.numel() == 0:
        return
    low, high = torch.aminmax(values)
    if low >= 0 and high < limit:
        return
    bad = (values < 0) | (values >= limit)
    if allowed is not None:
        bad &= values != allowed
    rows = bad.reshape(bad.shape[0], -1)
    if not rows.any():
        return
    row = int(rows.any(1).nonzero()[0, 0])
    found = int(values.reshape(bad.shape[0], -1)[row][rows[row]][0])
    also = "" if allowed is None else f" (or {allowed}, ignored)"
    raise BadSample(f"{what} wanted in [0, {limit}){also}, got {found}", row)
