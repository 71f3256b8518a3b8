"""Sums over a sample of the training data that become Kronecker factors: second moments of what a layer reads and of
the gradient at what it gives.

A layer that is used at R positions a sample (tokens, pixels, repeated calls) has the gradient Σ_r g_r a_rᵀ. Eschenhagen
et al., "Kronecker-Factored Approximate Curvature for Modern Neural Network Architectures", NeurIPS 2023, give two ways:
``"expand"`` takes positions as samples of their own, mean of a aᵀ over all of them times the sum of g gᵀ a sample;
``"reduce"`` takes (mean_r a_r) and (Σ_r g_r) a sample. Martens & Grosse, ICML 2015, is both where R = 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from finf_fast.mirrors.curvature import Block, Factor
from finf_fast.mirrors.watch import TURNED, Use

CONVENTIONS = ("expand", "reduce")


@dataclass
class _Sums:
    """What one weight's uses of one kind have added up.

    Attributes:
        inputs, outputs: sums of second moments, or of squares; (n, n) or (n,).
        ones: whether the inputs end with the coordinate of a bias.
        positions: added to ``inputs``.
        calls: of the layer.
    """

    inputs: Tensor
    outputs: Tensor
    ones: bool
    positions: int = 0
    calls: int = 0


@dataclass
class Collector:
    """Adds up batches, and makes blocks of the sums.

    Args:
        dtype: of the sums.
        convention: ``"expand"`` or ``"reduce"``; an embedding, whose inputs have a diagonal only so, is expanded in
            both.
        limit: a side longer than this has a diagonal factor.
    """

    dtype: torch.dtype
    convention: str
    limit: int
    _sums: dict[str, dict[tuple[str, bool], _Sums]] = field(default_factory=dict)
    _biases: dict[str, set[str | None]] = field(default_factory=dict)
    _samples: int = 0
    _batches: int = 0

    def add(self, uses: Sequence[Use], gradients: Sequence[Tensor | None], samples: int, mask: Tensor | None) -> None:
        """One batch.

        Args:
            uses, gradients: of every layer, None where nothing depends on its output. Where positions are reduced or
                masked they lie sample by sample.
            samples: B.
            mask: (B, L) which tokens are there, or None.
        """
        self._samples += samples
        self._batches += 1
        for use, gradient in zip(uses, gradients, strict=True):
            if gradient is None:
                continue
            use.require_unwritten()
            outputs = use.outputs(gradient).to(self.dtype)
            if use.kind == "embedding":
                self._add_ids(use, outputs, counting(use, mask))
            else:
                self._biases.setdefault(use.weight, set()).add(use.bias)
                self._add_rows(use, outputs, samples, counting(use, mask))

    def _add_ids(self, use: Use, outputs: Tensor, kept: Tensor | None) -> None:
        """Ids are one-hot rows: the second moment of those is a diagonal of counts."""
        ids = use.inputs()
        ids, outputs = (ids, outputs) if kept is None else (ids[kept], outputs[kept])
        sums = self._of(use, use.width, outputs, diagonal=True)
        sums.inputs += torch.bincount(ids, minlength=use.width).to(self.dtype)
        sums.positions += len(ids)
        _add_moment(sums.outputs, outputs)

    def _add_rows(self, use: Use, outputs: Tensor, samples: int, kept: Tensor | None) -> None:
        inputs = extended(use.inputs().to(self.dtype), use.bias)
        if self.convention == "reduce":
            inputs, outputs = _reduced(inputs, outputs, samples, kept)
        elif kept is not None:
            inputs, outputs = inputs[kept], outputs[kept]
        sums = self._of(use, inputs.shape[1], outputs, diagonal=inputs.shape[1] > self.limit)
        sums.positions += len(inputs)
        _add_moment(sums.inputs, inputs)
        _add_moment(sums.outputs, outputs)

    def _of(self, use: Use, width: int, outputs: Tensor, diagonal: bool) -> _Sums:
        kinds, key = self._sums.setdefault(use.weight, {}), (use.kind, use.bias is not None)
        if key not in kinds:
            height = outputs.shape[1]
            inputs = outputs.new_zeros(width if diagonal else (width, width))
            kinds[key] = _Sums(inputs, outputs.new_zeros(height if height > self.limit else (height, height)), key[1])
        kinds[key].calls += 1
        return kinds[key]

    def blocks(self) -> tuple[dict[str, Block], dict[str, str]]:
        """Name of a weight -> its block; name -> why a weight that was seen has none."""
        owners = Counter(bias for biases in self._biases.values() for bias in biases)
        blocks, left = {}, {}
        for name in self._sums:
            block = self._block(name, owners)
            if block.rows.trace * block.cols.trace > 0:
                blocks[name] = block
            else:
                left[name] = "its gradient was 0 on every sample"
        return blocks, left

    def _block(self, name: str, owners: Counter) -> Block:
        biases, kinds = self._biases.get(name, set()), self._sums[name]
        bias = next(iter(biases)) if len(biases) == 1 else None  # one that all uses add, and no other weight's
        sides = {kind in TURNED for kind, ones in kinds if ones}  # that its coordinate would be added to
        bias = bias if owners[bias] == 1 and len(sides) == 1 else None
        turned = all(kind in TURNED for kind, _ in kinds)
        pairs = []
        for (kind, _), sums in kinds.items():
            inputs = sums.inputs / max(sums.positions, 1)
            inputs = _without_last(inputs) if sums.ones and bias is None else inputs
            outputs = sums.outputs / max(self._samples, 1)
            pairs.append((inputs, outputs) if kind in TURNED else (outputs, inputs))
        rows, cols = _joined(pairs)
        uses = {kind: -(-sums.calls // max(self._batches, 1)) for (kind, _), sums in kinds.items()}
        return Block(Factor(rows), Factor(cols), bias, turned, uses=uses)


def extended(inputs: Tensor, bias: str | None) -> Tensor:
    """Input rows (P, n), with a last coordinate of 1 where a bias is added."""
    return inputs if bias is None else F.pad(inputs, (0, 1), value=1.0)


def counting(use: Use, mask: Tensor | None) -> Tensor | None:
    """(P,) positions of a use that count: no padding; None for all. They lie sample by sample."""
    kept = use.kept
    if mask is not None and _of_tokens(use.lead, tuple(mask.shape)):
        there = mask.reshape(-1) != 0
        kept = there if kept is None else kept & there
    return kept


def _of_tokens(lead: tuple[int, ...], shape: tuple[int, int]) -> bool:
    """Whether a use's positions are the tokens of a mask (B, L); of one sample they may also stand in another place."""
    alone = shape[0] == 1 and tuple(n for n in lead if n != 1) == shape[1:]
    return alone or lead in (shape, (shape[0] * shape[1],))


def _reduced(inputs: Tensor, outputs: Tensor, samples: int, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, n) mean input and (B, m) sum of the gradients of every sample."""
    here = inputs.new_ones(len(inputs)) if kept is None else kept.to(inputs.dtype)
    counts = here.view(samples, -1).sum(1, keepdim=True).clamp(min=1)
    inputs, outputs = ((x * here[:, None]).view(samples, -1, x.shape[1]).sum(1) for x in (inputs, outputs))
    return inputs / counts, outputs


def _add_moment(total: Tensor, rows: Tensor) -> None:
    """Adds Σ r rᵀ, or its diagonal, of rows (P, n)."""
    if total.dim() == 1:
        total += rows.square().sum(0)
    else:
        total.addmm_(rows.T, rows)


def _without_last(values: Tensor) -> Tensor:
    return values[:-1] if values.dim() == 1 else values[:-1, :-1]


def _joined(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One Kronecker product for a weight of several kinds of use, such as an embedding tied to the head.

    Σ_k R_k ⊗ C_k is taken as (Σ_k tr(C_k) R_k) ⊗ (Σ_k tr(R_k) C_k) / Σ_k tr(R_k) tr(C_k): the same trace, and the same
    matrix where one of the sides is alike in all.
    """
    if len(pairs) == 1:
        return pairs[0]
    traces = [tuple(Factor(side).trace for side in pair) for pair in pairs]
    whole = sum(r * c for r, c in traces)
    rows = _total([pair[0] for pair in pairs], [c for _, c in traces])
    cols = _total([pair[1] for pair in pairs], [r / whole if whole else 0.0 for r, _ in traces])
    return rows, cols


def _total(sides: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted sum; diagonal where one is that long a side's only form, padded with zeros to the longest."""
    size = max(len(side) for side in sides)
    matrix = any(side.dim() == 2 for side in sides)
    total = sides[0].new_zeros((size, size) if matrix else size)
    for side, weight in zip(sides, weights, strict=True):
        part = torch.diag(side) if matrix and side.dim() == 1 else side
        (total[: len(part), : len(part)] if matrix else total[: len(part)]).add_(part, alpha=weight)
    return total
