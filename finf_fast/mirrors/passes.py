"""Batches of a fit, forward and backward: what each layer reads, and the gradient at what it gives, told by sample."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from finf_fast.mirrors.body import ALIKE
from finf_fast.mirrors.query import longest, tree_map
from finf_fast.mirrors.watch import Use, Watch, each_its_own, owned, positions_of
from finf_fast.order import Mixed
from finf_fast.skeleton import Skeleton

__all__ = ["Pass", "Passes"]

# Of the largest gradient at any layer: what is so much smaller is allowed its rounding in full.
SMALL = 1e-3
# Times the largest number that differs: beyond is what masked places are filled with, against which all else is small.
FILLING = 100
GOLDEN = (5**0.5 - 1) / 2


Call = tuple[str, int]


class Pass(NamedTuple):
    """Layers' uses, the gradient of each one's output (None where nothing depends on it), B, and (B, L) which tokens
    are there, or None."""

    uses: list[Use]
    gradients: list[Tensor | None]
    samples: int
    mask: Tensor | None


class Passes:
    """Takes batches whole, or one sample at a time from where the model is seen to mix them.

    The first batch of every kind, and the first where another use of a layer has a gradient, is checked: its samples'
    losses are weighted, each with a weight of its own, and so must be the gradients at each one's positions, or, where
    their order does not matter, at each position by some one's; and a few samples must have the model's output that
    they have alone, and where order matters their layers must read the same. A loss that couples its samples, and so
    knows none alone, is taken as it is where order does not matter.

    Args:
        body: the model's stand-in.
        names: of the parameters whose layers are watched.
        output: batch -> the model's output (B, ...) with its graph.
        judged: (output, batch, indices) -> (B,) numbers to differentiate.
        ordered: whether positions must lie sample by sample; where a batch masks tokens they must in any case.

    Attributes:
        alone: why samples are taken one at a time; "" while they are not.
    """

    def __init__(
        self,
        body: Skeleton,
        names: list[str],
        output: Callable[[Any], Tensor],
        judged: Callable[[Tensor, Any, np.ndarray], Tensor],
        ordered: bool,
    ):
        self._body, self._names, self._output, self._judged, self._ordered = body, names, output, judged, ordered
        self._proven: dict[tuple[Any, ...], set[Call]] = {}  # kind of batch -> uses that were right
        self._fixed = {slot.tensor.untyped_storage().data_ptr() for slot in body.slots.values()}
        self._gives, self.alone = True, ""  # whether each sample is given positions of its own, where they are shared

    def of(self, batch: Any, indices: np.ndarray) -> Iterator[Pass]:
        """The passes that a batch takes, of the samples with these indices."""
        together = self._together(batch, indices)
        if together is not None:
            yield together
            return
        for row in range(len(indices)):
            yield self._pass(_single(batch, row), indices[row : row + 1])

    def _together(self, batch: Any, indices: np.ndarray) -> Pass | None:
        while not self.alone:
            try:
                return self._pass(batch, indices)
            except Mixed as error:
                self.alone = "" if self._gives else str(error)
                self._gives = False  # what counts up may be ids of the samples themselves
        return None

    def _pass(self, batch: Any, indices: np.ndarray) -> Pass:
        samples, mask = len(indices), _mask(batch)
        ordered = self._ordered or mask is not None
        watch = Watch(self._body, self._names, samples if self._gives else 0, longest(batch), one_each=True)
        with each_its_own(watch, samples if ordered else 1, self._fixed):
            value = self._output(batch)
        with owned(watch):
            losses = self._judged(value, batch, indices)
        kind = (samples, samples == longest(batch), longest(batch) % samples == 0, watch.given)
        proven, calls = self._proven.setdefault(kind, set()), _calls(watch.uses)
        unsure = samples > 1 and not proven.issuperset(calls)
        gradients = watch.gradients(losses.sum(), again=unsure)
        if ordered:
            _require_whole(watch.uses, gradients, samples)
        felt = _felt(calls, gradients) - proven if unsure else set()
        if felt:  # a gradient of zeros says nothing of whose its positions are
            weights = 1 + torch.arange(samples, dtype=losses.dtype, device=losses.device) * GOLDEN % 1
            weighted = watch.gradients((losses * weights).sum())
            free = not ordered and not watch.given
            if self._as_alone(batch, value.detach(), watch.uses if ordered else [], free):
                _check_told_apart(watch.uses, gradients, weighted, weights, ordered)
            proven |= felt
        return Pass(watch.uses, gradients, samples, mask)

    def _as_alone(self, batch: Any, value: Tensor, uses: list[Use], free: bool) -> bool:
        """Whether the first sample, one in the middle and the last have alone the output that they have here.

        Args:
            uses: which must read the same besides.
            free: whether samples may have another output.

        Raises:
            Mixed: one has not what it must have.
        """
        for row in sorted({0, len(value) // 2, len(value) - 1}):
            with Watch(self._body, self._names) as watch:
                alone = self._output(_single(batch, row)).detach()
            if not _same(alone, value[row : row + 1], value):
                if free:
                    return False
                raise Mixed("the model's output, which is another among other samples")
            for use, own in zip(uses, watch.uses, strict=False):
                whole = use.inputs().detach()
                each = len(whole) // len(value)
                if not _same(own.inputs(), whole[row * each : (row + 1) * each], whole):
                    raise Mixed(f"{use.weight}, which reads a sample at another place among others")
        return True


def _check_told_apart(
    uses: list[Use], gradients: list[Tensor | None], weighted: list[Tensor | None], weights: Tensor, ordered: bool
) -> None:
    """Raises :class:`Mixed` unless each use's gradients are weighted with the weight of the sample they belong to."""
    pairs = [
        (use, use.outputs(plain), use.outputs(other))
        for use, plain, other in zip(uses, gradients, weighted, strict=True)
        if plain is not None
    ]
    most = max((plain.norm() for _, plain, _ in pairs), default=0.0)
    for use, plain, other in pairs:
        own = _in_turn(plain, weights) if ordered else _nearest(plain, other, weights)
        gap = torch.addcmul(other, own[:, None], plain, value=-1).norm()
        if not bool(gap <= ALIKE * (plain.norm() + SMALL * most)):
            raise Mixed(f"{use.weight}, at whose positions samples cannot be told apart")


def _require_whole(uses: list[Use], gradients: list[Tensor | None], samples: int) -> None:
    """Raises :class:`Mixed` where positions cannot lie sample by sample, for there are not as many for each."""
    for use, gradient in zip(uses, gradients, strict=True):
        if gradient is not None and positions_of(use, samples) is None:
            raise Mixed(f"{use.weight}, at {math.prod(use.lead)} positions of {samples} samples")


def _calls(uses: list[Use]) -> list[Call]:
    """Name of each use's weight, and how many uses of it came before."""
    before: Counter[str] = Counter()
    calls = []
    for use in uses:
        calls.append((use.weight, before[use.weight]))
        before[use.weight] += 1
    return calls


def _felt(calls: list[Call], gradients: list[Tensor | None]) -> set[Call]:
    """Those whose gradient is not zero."""
    return {call for call, g in zip(calls, gradients, strict=True) if g is not None and bool(g.any())}


def _same(one: Tensor, other: Tensor, among: Tensor) -> bool:
    """Whether two tensors are alike, for such as they are part of; infinities and ids only where they are equal."""
    if one.shape != other.shape:
        return False
    apart = one != other  # so that equal infinities have no difference, which would be NaN
    if not bool(apart.any()) or not one.is_floating_point():
        return not bool(apart.any())
    one, other = one[apart].double(), other[apart].double()
    gap, most = (one - other).norm(), torch.maximum(one.abs(), other.abs()).max()
    usual = torch.linalg.vector_norm(_unfilled(among, FILLING * most), dtype=torch.float64)
    usual = usual * (apart.numel() / among.numel()) ** 0.5
    return bool(torch.isfinite(gap) & (gap <= ALIKE * usual))


def _unfilled(values: Tensor, limit: Tensor) -> Tensor:
    """The values, with 0 in place of those beyond a limit if they are all one: what a mask fills places with."""
    beyond = values.abs() > limit
    filled = values[beyond]
    constant = len(filled) > 1 and bool(filled.min() == filled.max())
    return values.masked_fill(beyond, 0.0) if constant else values


def _in_turn(plain: Tensor, weights: Tensor) -> Tensor:
    """(P,) weight of each position, where they lie sample by sample."""
    return weights.repeat_interleave(len(plain) // len(weights)).to(plain)


def _nearest(plain: Tensor, other: Tensor, weights: Tensor) -> Tensor:
    """(P,) weight that is nearest to what each position seems to be weighted with."""
    seen = (plain * other).sum(1) / plain.square().sum(1).clamp(min=torch.finfo(plain.dtype).tiny)
    known = weights.to(plain).sort().values
    return known[torch.bucketize(seen, (known[1:] + known[:-1]) / 2)]


def _single(batch: Any, row: int) -> Any:
    return tree_map(lambda leaf: leaf[row : row + 1], batch)


def _mask(batch: Any) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
