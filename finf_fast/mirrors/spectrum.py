"""The second moment of the gradient along each pair of eigenvectors of K-FAC's factors: what makes EK-FAC of it.

George, Laurent, Bouthillier, Ballas and Vincent, "Fast Approximate Natural Gradient Descent in a Kronecker-factored
Eigenbasis", NeurIPS 2018, equation 12.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from finf_fast.mirrors.collect import counting, extended
from finf_fast.mirrors.curvature import Block
from finf_fast.mirrors.watch import TURNED, Use

CHUNK = 1 << 24  # numbers of the samples' gradients that are formed at a time: 64 MiB in float32
Sides = tuple[Tensor, Tensor]


class Spectra:
    """Adds up the squared gradients of samples, turned into the eigenbasis of their block.

    The gradient is a sample's own, summed over positions and uses, before it is squared. Where a side is diagonal (the
    ids of an embedding) positions are taken as independent instead.
    """

    def __init__(self, blocks: Mapping[str, Block], dtype: torch.dtype):
        self._blocks, self._dtype, self._samples = blocks, dtype, 0
        self._sums = {
            name: torch.zeros(block.rows.size, block.cols.size, dtype=dtype, device=block.rows.values.device)
            for name, block in blocks.items()
        }

    def add(self, uses: Sequence[Use], gradients: Sequence[Tensor | None], samples: int, mask: Tensor | None) -> None:
        """One batch, as :meth:`finf_fast.mirrors.collect.Collector.add` takes it, positions sample by sample."""
        self._samples += samples
        by_weight: dict[str, list[tuple[Use, Tensor]]] = {}
        for use, gradient in zip(uses, gradients, strict=True):
            if gradient is not None and use.weight in self._blocks:
                use.require_unwritten()
                by_weight.setdefault(use.weight, []).append((use, gradient))
        for name, calls in by_weight.items():
            self._add(name, calls, samples, mask)

    def blocks(self) -> dict[str, Block]:
        """The blocks with their spectra."""
        return {
            name: replace(block, spectrum=self._sums[name] / max(1, self._samples))
            for name, block in self._blocks.items()
        }

    def _add(self, name: str, calls: list[tuple[Use, Tensor]], samples: int, mask: Tensor | None) -> None:
        block, total = self._blocks[name], self._sums[name]
        if block.rows.is_diagonal or block.cols.is_diagonal:
            for use, gradient in calls:
                self._add_positions(block, total, use, gradient, mask)
            return
        sides = [self._turned(block, use, gradient, mask) for use, gradient in calls]
        rows, cols = (torch.cat([side[i].view(samples, -1, side[i].shape[1]) for side in sides], 1) for i in (0, 1))
        if rows.shape[1] == 1:
            total.addmm_(rows[:, 0].square().T, cols[:, 0].square())
            return
        step = max(1, CHUNK // total.numel())
        for first in range(0, samples, step):
            part = slice(first, first + step)
            total += (rows[part].mT @ cols[part]).square().sum(0)

    def _add_positions(self, block: Block, total: Tensor, use: Use, gradient: Tensor, mask: Tensor | None) -> None:
        if use.kind == "embedding" and block.rows.is_diagonal:
            ids, outputs = use.inputs(), self._into(block, use.outputs(gradient), 1)
            kept = counting(use, mask)
            ids, outputs = (ids, outputs) if kept is None else (ids[kept], outputs[kept])
            total.index_add_(0, ids, outputs.square())
            return
        rows, cols = self._turned(block, use, gradient, mask)
        total.addmm_(rows.square().T, cols.square())

    def _turned(self, block: Block, use: Use, gradient: Tensor, mask: Tensor | None) -> Sides:
        """(P, rows) and (P, cols) in the block's eigenbasis; positions that do not count are 0."""
        outputs, kept = use.outputs(gradient).to(self._dtype), counting(use, mask)
        if kept is not None:
            outputs = outputs * kept[:, None]
        if use.kind == "embedding":
            inputs = torch.nn.functional.one_hot(use.inputs(), use.width)
        else:
            inputs = extended(use.inputs(), block.bias)
        rows, cols = (inputs, outputs) if use.kind in TURNED else (outputs, inputs)
        return self._into(block, rows, 0), self._into(block, cols, 1)

    def _into(self, block: Block, x: Tensor, side: int) -> Tensor:
        vectors, size = block.eigenbasis()[side], (block.rows, block.cols)[side].size
        x = torch.nn.functional.pad(x.to(self._dtype), (0, size - x.shape[1]))  # a tied head's bias
        return x if vectors is None else x @ vectors.to(x.dtype)
