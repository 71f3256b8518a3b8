"""K-FAC and EK-FAC: the gradient of a layer times the inverse of a Kronecker product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from finf_fast.lowrank import LowRank, compress_whole
from finf_fast.mirrors.body import Body
from finf_fast.mirrors.curvature import Block, Inverse
from finf_fast.mirrors.diagonal import compressed
from finf_fast.mirrors.factors import Gradient
from finf_fast.mirrors.preconditioned import Direction, Fitted

Change = Tensor | LowRank


@dataclass(frozen=True, kw_only=True)
class KFAC(Fitted):
    """Kronecker-factored natural gradient (Martens & Grosse, ICML 2015): R⁻¹ G C⁻¹ for each weight with its bias.

    The gradient of a linear map stays in pairs: (R⁻¹ g)(C⁻¹ a)ᵀ token by token, compressed to ``rank``, never a dense
    matrix of the query's. Only what comes through autograd whole, as the kernel of a convolution, is multiplied whole.
    """

    name: ClassVar[str] = "kfac"
    joint: ClassVar[bool] = True
    fits: ClassVar[str | None] = "kfac"
    rank: int | None = 32  # as of sgd

    @classmethod
    def kinds(cls) -> tuple[str, ...]:
        return ("kfac", "ekfac")

    def directions_of(self, body: Body, caught: Sequence[dict[str, Gradient]]) -> list[Direction]:
        found = [Direction({}, notes=self.left(body)) for _ in caught]
        for name, block, bias in self.blocks(caught[0]):
            solved = _solved(block, self.damping, [pieces[name] for pieces in caught], bias)
            for direction, (gradient, step) in zip(found, solved, strict=True):
                direction.params[name], direction.shares[name] = _kept(gradient, self.rank)
                if bias is not None:
                    direction.params[block.bias] = step
        return found


@dataclass(frozen=True, kw_only=True)
class EKFAC(Fitted):
    """K-FAC with its eigenvalues corrected (George et al., NeurIPS 2018): U_R ((U_Rᵀ G U_C) / (S + λ)) U_Cᵀ.

    Every entry is divided by a number of its own, so the step is dense; ``rank`` compresses it.
    """

    name: ClassVar[str] = "ekfac"
    joint: ClassVar[bool] = True
    fits: ClassVar[str | None] = "ekfac"
    # More than K-FAC's, whose small eigenvalues come out too large: on digits the LDS is .61, and .58 at 1e-2.
    damping: float = 0.1

    def direction_of(self, body: Body, caught: dict[str, Gradient]) -> Direction:
        found = Direction({}, notes=self.left(body))
        for name, block, bias in self.blocks(caught):
            whole = _with_bias(block, caught[name].total(), bias)
            weight, step = _without_bias(block, _divided(block, whole, self.damping))
            found.params[name], found.shares[name] = compressed(weight.reshape(caught[name].shape), self.rank)
            if bias is not None:
                found.params[block.bias] = step
        return found


def _solved(
    block: Block, damping: float, several: Sequence[Gradient], bias: Tensor | None
) -> list[tuple[Gradient, Tensor | None]]:
    """R⁻¹ G C⁻¹ of each query in the pieces that its G comes in, and its part for the bias.

    Several have gradients of the same pieces and none that is whole; their columns go through one product.
    """
    rows, cols = block.inverses(damping)
    found = [Gradient(pieces.shape) for pieces in several]
    steps: list[Any] = [None if bias is None else torch.zeros_like(bias) for _ in several]
    if several[0].rest is not None:
        return [_solved_whole(block, rows, cols, several[0], bias)]
    for pairs in zip(*(pieces.pairs for pieces in several), strict=True):
        u, v = _ones(block, *(torch.cat(side, 1) for side in zip(*pairs, strict=True)), bias is not None)
        _give(block, rows.times(u), cols.times(v), [u.shape[1] for u, _ in pairs], found, steps)
    for lists in zip(*(pieces.rows for pieces in several), strict=True):
        ids, values = (torch.cat(side) for side in zip(*lists, strict=True))
        v = cols.times(F.pad(values.T, (0, 0, 0, block.cols.size - values.shape[1])))
        counts = [len(ids) for ids, _ in lists]
        if rows.is_diagonal:
            _give_rows(ids, v * rows.values[ids].to(v), counts, found, steps)
        else:
            _give(block, rows.values[:, ids].to(v), v, counts, found, steps)
    return list(zip(found, steps, strict=True))


def _solved_whole(
    block: Block, rows: Inverse, cols: Inverse, pieces: Gradient, bias: Tensor | None
) -> tuple[Gradient, Tensor | None]:
    """The same of a gradient that came through autograd."""
    whole = _with_bias(block, pieces.total(), bias)
    weight, step = _without_bias(block, cols.times(rows.times(whole).T).T)
    return Gradient(pieces.shape, weight.reshape(pieces.shape)), step


def _give(block: Block, u: Tensor, v: Tensor, counts: list[int], found: list[Gradient], steps: list[Any]) -> None:
    """Columns of solved pairs to the queries they are of, ``counts`` each."""
    for n, (left, right) in enumerate(zip(u.split(counts, 1), v.split(counts, 1), strict=True)):
        left, right, part = _parted(block, left, right)
        found[n].pairs.append((left, right))
        steps[n] = None if steps[n] is None else steps[n] + part


def _give_rows(ids: Tensor, v: Tensor, counts: list[int], found: list[Gradient], steps: list[Any]) -> None:
    """Columns of solved rows of an embedding, likewise."""
    width = found[0].shape[1]
    for n, (mine, values) in enumerate(zip(ids.split(counts), v.split(counts, 1), strict=True)):
        found[n].rows.append((mine, values[:width].T))
        steps[n] = None if steps[n] is None else steps[n].index_add(0, mine, values[-1])


def _ones(block: Block, u: Tensor, v: Tensor, biased: bool) -> tuple[Tensor, Tensor]:
    """The columns of a gradient's pairs, inputs with the bias' coordinate: 1, or 0 where it does not move."""
    if block.bias is None:
        return u, v
    more = (0, 0, 0, 1)
    return (F.pad(u, more, value=float(biased)), v) if block.turned else (u, F.pad(v, more, value=float(biased)))


def _parted(block: Block, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
    """The pairs without that coordinate, and the bias' part of the step."""
    if block.bias is None:
        return u, v, 0.0
    return (u[:-1], v, v @ u[-1]) if block.turned else (u, v[:-1], u @ v[-1])


def _with_bias(block: Block, gradient: Tensor, bias: Tensor | None) -> Tensor:
    """A dense gradient as a matrix (rows, cols) of the block."""
    matrix = gradient.flatten(1)
    if block.bias is None:
        return matrix
    last = matrix.new_zeros(matrix.shape[1 if block.turned else 0]) if bias is None else bias
    return torch.cat([matrix, last[None]]) if block.turned else torch.cat([matrix, last[:, None]], 1)


def _without_bias(block: Block, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
    if block.bias is None:
        return matrix, None
    return (matrix[:-1], matrix[-1]) if block.turned else (matrix[:, :-1], matrix[:, -1])


def _divided(block: Block, whole: Tensor, damping: float) -> Tensor:
    """The matrix divided by the damped spectrum, in the eigenbasis; float64 inside."""
    left, right = block.eigenbasis()
    spectrum = block.spectrum.double()
    turned = _times(_times(whole.double(), left, True).T, right, True).T
    turned = turned / (spectrum + damping * spectrum.mean())
    return _times(_times(turned, left, False).T, right, False).T.to(whole.dtype)


def _times(x: Tensor, vectors: Tensor | None, transposed: bool) -> Tensor:
    return x if vectors is None else (vectors.T if transposed else vectors) @ x


def _kept(solved: Gradient, rank: int | None) -> tuple[Change, float]:
    """A step as factors of at most ``rank`` columns where they pay, else whole."""
    if rank is None:
        return solved.total(), 0.0
    if solved.rest is not None:
        return compress_whole(solved.total(), rank)
    return solved.whole(rank)
