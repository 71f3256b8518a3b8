"""Cross-entropy in its four dresses: classification, causal, masked and sequence-to-sequence language models.

All are the same thing: rows of logits with one target each, and rows summed (or averaged) into samples. They differ
only in how the model is called and where a row's target stands. A row without a target carries ``ignore_index``:
shifting the targets by one token and marking the last row ignored costs nothing, where shifting the logits would copy
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finf_fast import ops
from finf_fast.loss.base import Draw, Head, Loss, Result, check_range, prediction, split, target_of
from finf_fast.runs import picked, runs

TOKEN_KEYS = ("input_ids", "decoder_input_ids")


class CrossEntropy(Loss):
    """Classification: ``model(x)`` gives (B, V), or (B, V, d1, ...) with targets (B, d1, ...) as in
    ``F.cross_entropy``.

    Args:
        reduction: ``"mean"`` or ``"sum"`` over a sample's rows (tokens, pixels).
        label_smoothing: as in ``torch.nn.functional.cross_entropy``.
        ignore_index: target of a row that does not count.
        per_token: also return each row's loss and change.

    A sample all of whose rows are ignored has base and delta NaN under ``"mean"`` (0/0, as torch has it), 0 under
    ``"sum"``.
    """

    name = "cross_entropy"

    def __init__(
        self, reduction="mean", label_smoothing: float = 0.0, ignore_index: int = -100, per_token: bool = False
    ):
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction: wanted 'mean' or 'sum', got {reduction!r}")
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing: wanted a number in [0, 1], got {label_smoothing}")
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.per_token = per_token

    def output(self, model: Any, batch: Any) -> Tensor:
        args, kwargs, _ = split(batch)
        logits = prediction(model(*args, **kwargs))
        if logits.dim() < 2:
            raise ValueError(f"model: wanted logits (B, classes), got shape {tuple(logits.shape)}")
        return logits if logits.dim() == 2 else logits.movedim(1, -1)

    def target(self, batch: Any) -> Tensor:
        """(B, ...) int64 target of every row, ``ignore_index`` where it does not count."""
        target = target_of(batch, self.name)
        if target.is_floating_point() or target.dtype == torch.bool:
            raise TypeError(f"target: wanted class indices (integers), got {target.dtype}")
        return target

    def without_target(self, batch: Any) -> Tensor:
        target = self.target(batch)
        return (target == self.ignore_index).view(len(target), -1).all(1)

    def check(self, batch: Any, outputs: int | None, vocabulary: int | None) -> None:
        if outputs is not None:
            check_range("label", self.target(batch), outputs, self.ignore_index)
        if vocabulary is not None and isinstance(batch, Mapping):
            for key in TOKEN_KEYS:
                if key in batch:
                    check_range(f"{key}: token id", batch[key], vocabulary)

    def finish(self, value: Tensor, change: Tensor, batch: Any) -> Result:
        target = self._rows_of(value.shape, batch)
        samples, width = value.shape[0], value.shape[-1]
        z, dz = value.reshape(-1, width), change.reshape(change.shape[0], -1, width)
        base, delta = ops.cross_entropy_delta(
            z, dz, target, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing
        )
        counted = (target != self.ignore_index).view(samples, -1)
        return self._samples(base, delta, counted)

    def finish_head(self, head: Head, batch: Any) -> Result:
        target = self._rows_of(head.shape, batch)
        counted = (target != self.ignore_index).view(head.rows[0], -1)
        base, delta = None, None
        for queries, dW, factors in head.changes or (((), None, None),):
            rows = None if len(queries) == head.queries else queries
            if head.dx is None and head.db is None and dW is None and factors is None:  # these queries move nothing
                continue
            dx, db = (x if x is None or rows is None else picked(x, rows) for x in (head.dx, head.db))
            base, part = ops.linear_cross_entropy_delta(
                *(head.x, dx, head.W, target),
                **{"bias": head.bias, "db": db, "dW": dW, "dW_factors": factors},
                **{"softcap": head.softcap, "ignore_index": self.ignore_index},
                label_smoothing=self.label_smoothing,
            )
            if rows is None:
                delta = part
                continue
            delta = part.new_zeros((head.queries, len(target))) if delta is None else delta
            for mine, theirs in runs(rows):
                delta[theirs] = part[mine]
        return self._samples(base, delta, counted)

    def per_sample(self, model: Any, batch: Any) -> Tensor:
        logits = self.output(model, batch)
        return self.judged(logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits, batch)

    def precise(self, model: Any, batch: Any) -> Tensor:
        """In float64 from the logits on: in float32 the gradient p - 1 of a target learnt by heart is 0 from 6e-8."""
        return self.judged(self.output(model, batch).double(), batch)

    def judged(self, logits: Tensor, batch: Any) -> Tensor:
        target = self._rows_of(logits.shape, batch)
        rows = F.cross_entropy(
            logits.reshape(target.numel(), -1),
            target,
            reduction="none",
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        ).view(logits.shape[0], -1)
        counts = (target != self.ignore_index).view(logits.shape[0], -1).sum(1)
        return rows.sum(1) / counts if self.reduction == "mean" else rows.sum(1)

    def fisher(self, value: Tensor, batch: Any, draw: Draw | None) -> Tensor:
        target = self._rows_of(value.shape, batch)
        counted = (target != self.ignore_index).view(len(value), -1)
        z = value.reshape(target.numel(), -1)
        smoothing = self.label_smoothing
        if draw is not None:  # the curvature of a smoothed loss is that of the plain one: they differ by linear terms
            drawn = _drawn(z.detach(), draw((counted.shape[1],)))
            target, smoothing = drawn.masked_fill(~counted.view(-1), self.ignore_index), 0.0
        rows = F.cross_entropy(
            *(z, target), reduction="none", ignore_index=self.ignore_index, label_smoothing=smoothing
        )
        return rows.view(counted.shape).sum(1) * self._weights(counted).sqrt()

    def scattered(self, value: Tensor, batch: Any, draw: Draw) -> Tensor:
        """With signs u, one a logit, along L u, where L = diag(√p) - p √pᵀ: L Lᵀ is the curvature diag(p) - p pᵀ."""
        counted = (self._rows_of(value.shape, batch) != self.ignore_index).view(len(value), -1)
        p = value.detach().double().softmax(-1)  # in float32 what is left beside a label learnt by heart is 0 from 6e-8
        signed = p.sqrt() * torch.where(draw(value.shape[1:]) < 0, -1.0, 1.0)
        along = signed - p * signed.sum(-1, keepdim=True)
        weights = counted * self._weights(counted).sqrt()[:, None]
        value = value.masked_fill(p == 0, 0.0)  # a masked class has no part in it, and -inf * 0 is NaN
        return (value * along.to(value) * weights.view(*value.shape[:-1], 1)).flatten(1).sum(1)

    def gauss_newton(self, value: Tensor, batch: Any, tangent: Tensor) -> Tensor:
        counted = (self._rows_of(value.shape, batch) != self.ignore_index).view(len(value), -1)
        p, t = value.softmax(-1), tangent
        product = p * (t - (p * t).sum(-1, keepdim=True))
        weights = counted * self._weights(counted)[:, None]
        return product * weights.view(*value.shape[:-1], 1)

    def _weights(self, counted: Tensor) -> Tensor:
        """(B,) what each row of a sample counts in its loss; of samples without any, nothing."""
        counts = counted.sum(1)
        each = counts.clamp(min=1).reciprocal() if self.reduction == "mean" else 1.0
        return (counts > 0) * each

    def _rows_of(self, shape: Sequence[int], batch: Any) -> Tensor:
        """(N,) targets, one for each row of logits of this shape (B, ..., V)."""
        target = self.target(batch)
        rows, given = shape[1:-1], target.shape[1:]
        if target.shape[0] != shape[0] or [n for n in rows if n != 1] != [n for n in given if n != 1]:
            raise ValueError(
                f"target: wanted one index for each row of the logits {tuple(shape)}, got {tuple(target.shape)}"
            )
        return target.reshape(-1).long()

    def _samples(self, base: Tensor, delta: Tensor, counted: Tensor) -> Result:
        """Rows into samples, by a fixed-order sum of the rows' deltas."""
        samples, rows = counted.shape
        if rows == 1 and not self.per_token:
            empty = ~counted[:, 0]
            if self.reduction == "mean":
                base, delta = base.masked_fill(empty, torch.nan), delta.masked_fill(empty, torch.nan)
            return Result(base, delta, empty)
        offsets = torch.arange(samples + 1, device=base.device) * rows
        per_sample_base = ops.segment_sum(base[None], offsets)[0]
        per_sample_delta = ops.segment_sum(delta, offsets)
        counts = counted.sum(1)
        if self.reduction == "mean":
            per_sample_base, per_sample_delta = per_sample_base / counts, per_sample_delta / counts
        if not self.per_token:
            return Result(per_sample_base, per_sample_delta, counts == 0)
        gone = ~counted
        token_base = base.view(samples, rows).masked_fill(gone, torch.nan)
        token_delta = delta.view(-1, samples, rows).masked_fill(gone, torch.nan)
        return Result(per_sample_base, per_sample_delta, counts == 0, token_base, token_delta)


class MaskedLM(CrossEntropy):
    """Masked language model: logits (B, L, V), ``labels`` (B, L) with ``ignore_index`` wherever nothing was masked."""

    name = "masked_lm"

    def output(self, model: Any, batch: Any) -> Tensor:
        args, kwargs, _ = split(batch)
        return _token_logits(prediction(model(*args, **kwargs)))


class CausalLM(CrossEntropy):
    """Next-token prediction: the row of token t is judged by token t + 1.

    A batch is token ids (B, L), ``(ids,)``, ``(ids, labels)``, or a dict with ``input_ids`` and perhaps
    ``attention_mask`` and ``labels``; labels stand at their own token (the shift is made here) and default to the
    ids, padding ignored.
    """

    name = "causal_lm"

    def output(self, model: Any, batch: Any) -> Tensor:
        args, kwargs, _ = self._split(batch)
        return _token_logits(prediction(model(*args, **kwargs)))

    def target(self, batch: Any) -> Tensor:
        labels = self._split(batch)[2].long()
        last = labels.new_full((labels.shape[0], 1), self.ignore_index)
        return torch.cat([labels[:, 1:], last], 1)

    def check(self, batch: Any, outputs: int | None, vocabulary: int | None) -> None:
        args, kwargs, labels = self._split(batch)
        ids = kwargs.get("input_ids", args[0] if args else None)
        limit = vocabulary if vocabulary is not None else outputs
        if ids is not None and not ids.is_floating_point() and limit is not None:
            check_range("token id", ids, limit)
        if outputs is not None:
            check_range("label", labels, outputs, self.ignore_index)

    def _split(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
        args, kwargs, labels = split(batch)
        ids = kwargs.get("input_ids", args[0] if args else None)
        for what, value in (("token ids", ids), ("labels", labels)):
            if isinstance(value, (list, tuple)):
                wanted = f"{self.name} wants {what} as a tensor (B, L)"
                raise TypeError(f"{wanted}, got a list: return_tensors='pt' gives one")
        if labels is None:
            if ids is None or ids.is_floating_point():
                raise ValueError("corpus: causal_lm wants token ids (B, L), or a dict with 'input_ids' or 'labels'")
            mask = kwargs.get("attention_mask")
            labels = ids if mask is None else ids.masked_fill(mask == 0, self.ignore_index)
        if labels.dim() != 2:
            raise ValueError(f"corpus: causal_lm wants token ids (B, L), got shape {tuple(labels.shape)}")
        return args, kwargs, labels


class Seq2Seq(CrossEntropy):
    """Encoder-decoder: logits of the decoder (B, L, V) judged by ``labels`` (B, L), no shift.

    ``decoder_input_ids`` are made from the labels by the model's own ``prepare_decoder_input_ids_from_labels`` unless
    given.
    """

    name = "seq2seq"

    def output(self, model: Any, batch: Any) -> Tensor:
        if not isinstance(batch, Mapping) or "labels" not in batch:
            raise ValueError("corpus: seq2seq wants a dict with 'input_ids' and 'labels'")
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        if "decoder_input_ids" not in inputs and "decoder_inputs_embeds" not in inputs:
            shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
            if shift is None:
                raise ValueError(
                    "corpus: 'decoder_input_ids' wanted, since the model has no prepare_decoder_input_ids_from_labels"
                )
            inputs["decoder_input_ids"] = shift(labels=batch["labels"])
        return _token_logits(prediction(model(**inputs)))


def _drawn(z: Tensor, normal: Tensor) -> Tensor:
    """(N,) classes drawn from softmax(z), z (N, V): where each row's uniform number, Φ(normal), falls in the sums."""
    sums = z.softmax(-1).cumsum(-1)
    last = sums[:, -1:]
    wanted = torch.special.ndtr(normal.reshape(-1, 1).double()).to(sums) * last
    wanted = wanted.minimum(last.nextafter(torch.zeros_like(last)))  # Φ may round to 1, and the last class be masked
    return torch.searchsorted(sums, wanted, right=True)[:, 0].clamp_(max=z.shape[-1] - 1)  # of NaN it is behind


def _token_logits(logits: Tensor) -> Tensor:
    if logits.dim() != 3:
        raise ValueError(f"model: wanted token logits (B, L, V), got shape {tuple(logits.shape)}")
    return logits
