"""Which engine scores: the carried change wherever the model can be carried, pairs of plain forwards elsewhere.

The choice is made once, on the first sample, and says why; a batch that cannot be carried although the first could (a
branch that only some samples take) is scored by pairs alone, counted in the record.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from finf_fast import graphs
from finf_fast.delta import DeltaEngine, NotCarried
from finf_fast.dot import DotEngine
from finf_fast.graphs import CudaRecorder, Graphed
from finf_fast.loss import Loss, Result
from finf_fast.lowrank import LowRank
from finf_fast.pair import PairEngine
from finf_fast.planning import SHARE, Probe, free_bytes, out_of_memory, probe
from finf_fast.skeleton import Guard, WritesWeights
from finf_fast.update import Update

__all__ = ["ENGINES", "Chosen", "Settled", "choose_engine"]

ENGINES = ("auto", "delta", "pair", "dot")
FEW = 8  # queries that are not worth a look at memory beforehand
HALF = (torch.bfloat16, torch.float16)
Engine = DeltaEngine | PairEngine


class Carried:
    """The delta engine, with pairs behind it for a batch that it cannot carry."""

    def __init__(self, delta: DeltaEngine | Graphed, pair: Any):
        self._delta, self._make_pair = delta, pair
        self._pair: PairEngine | None = None
        self._by_pair: dict[str, int] = {}
        self.loss, self.device, self.dtype, self.score_dtype = delta.loss, delta.device, delta.dtype, delta.score_dtype
        self.output, self.settings, self.columns = delta.output, delta.settings, delta.columns
        self.rows, self.room = delta.rows, delta.room

    def score(self, batch: Any) -> Result:
        try:
            found = self._delta.score(batch)
            if not bool((found.delta.isnan() & found.base.isfinite()).any()):
                return found
            raise NotCarried("a change that is not a number")
        except Exception as error:  # a rule that fails on a legal model must not end a sweep that pairs can finish
            if out_of_memory(error):
                raise
            self._by_pair[_said(error)] = self._by_pair.get(_said(error), 0) + 1
            self._pair = self._pair or self._make_pair()
            return self._pair.score(batch)

    def record(self) -> dict[str, Any]:
        return {**self._delta.record(), "batches_by_pair": dict(self._by_pair)}

    def counted(self) -> dict[str, Any]:
        """What grows from batch to batch, as JSON has it."""
        return {**self._delta.counted(), "batches_by_pair": dict(self._by_pair)}

    def resume(self, counted: Mapping[str, Any]) -> None:
        """Goes on from where an engine had counted so far."""
        self._by_pair = dict(counted.get("batches_by_pair", {}))
        self._delta.resume(counted)


@dataclass(frozen=True)
class Chosen:
    """The engine, what one sample through it showed, and one line that says why it is this one."""

    engine: Any
    found: Probe
    reason: str


@dataclass(frozen=True)
class Settled:
    """What memory decided when a sweep began; it holds for whoever goes on with it, however much is free then.

    Attributes:
        engine, dtype: as in the folder's settings.
        stack, room: as in its plan.
    """

    engine: str
    dtype: str
    stack: int
    room: int

    def suits(self, engine: str, dtype: torch.dtype | None) -> bool:
        """Whether what is asked for leaves it open; if not, the folder will be refused for what it holds."""
        return engine in ("auto", self.engine) and (dtype is None or _word(dtype) == self.dtype)


def choose_engine(
    model: nn.Module,
    updates: Sequence[Update],
    loss: Loss,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    engine: str,
    keep: int,
    sample: Any,
    settled: Settled | None = None,
) -> Chosen:
    """The engine for a model, its updates and a sample of the corpus.

    Args:
        dtype: of the forwards as asked for; None for the model's own (half precision in bfloat16 where the net is
            smooth and in float32 where it has kinks, whose masks bfloat16 flips).
        engine: ``"delta"``, ``"pair"``, ``"dot"`` (first order), or ``"auto"``: delta wherever it applies.
        keep: bytes that the queries' changes may take in the engine.
        sample: a batch of one, on the device.
        settled: of the sweep that is resumed, if one is.

    Raises:
        NotCarried: ``engine="delta"`` and the model cannot be carried.
        ValueError: a dtype that the engine does not have.
    """
    settled = settled if settled is not None and settled.suits(engine, dtype) else None
    try:
        with Guard(model):
            return _choose(model, updates, loss, device, dtype, engine, keep, sample, settled)
    except WritesWeights:
        private = copy.deepcopy(model)  # one that writes into its weights gets weights of its own
        return _choose(private, updates, loss, device, dtype, engine, keep, sample, settled)


def _choose(
    model: nn.Module,
    updates: Sequence[Update],
    loss: Loss,
    device: torch.device,
    dtype: torch.dtype | None,
    engine: str,
    keep: int,
    sample: Any,
    settled: Settled | None,
) -> Chosen:
    own = _own(model)

    def pair(reason: str) -> Chosen:
        wanted = dtype if dtype is not None else torch.float64 if own is torch.float64 else torch.float32
        if engine == "auto" and wanted is torch.bfloat16:  # pairs would only say that they do not take it
            hint = "wanted torch.float32 or torch.float64, or None"
            raise ValueError(f"dtype: torch.bfloat16 is for changes that are carried, and here {reason}; {hint}")
        runner = PairEngine(model, updates, loss, device, wanted, keep=keep)
        return Chosen(runner, probe(runner.output, sample), f"{reason}, {_word(wanted)}")

    if engine == "pair":
        return pair("as asked")
    if engine == "dot":
        return _first_order(model, updates, loss, device, dtype, own, sample)
    if settled is not None and settled.engine == "pair":
        return pair("as the sweep began")
    if engine == "auto" and settled is None and (reason := _too_large(updates, keep)):
        return pair(reason)
    try:
        runner, found, reason = _carried(model, updates, loss, device, dtype, own, sample, settled)
    except Exception as error:  # what is wrong with the model or the batch itself, pairs will say in their turn
        if engine == "delta" or out_of_memory(error) or isinstance(error, WritesWeights):
            raise
        return pair(f"cannot be carried ({_said(error)})")
    reason += _cheaper(updates)
    if graphs.wanted(device) and runner.rows == 1 + len(updates):  # chunks hand products on, by where they lie
        runner, reason = Graphed(runner, CudaRecorder(device)), f"{reason}; CUDA graphs as asked (FINF_GRAPHS)"
    if engine == "auto":
        plain = torch.float64 if runner.dtype is torch.float64 else torch.float32
        runner = Carried(runner, lambda: PairEngine(model, updates, loss, device, plain, keep=keep))
    return Chosen(runner, found, reason)


def _first_order(
    model: nn.Module,
    updates: Sequence[Update],
    loss: Loss,
    device: torch.device,
    dtype: torch.dtype | None,
    own: torch.dtype,
    sample: Any,
) -> Chosen:
    """The dot engine: half precision in bfloat16, whose range holds every gradient."""
    wanted = dtype if dtype is not None else torch.bfloat16 if own in HALF else own
    runner = DotEngine(model, updates, loss, device, wanted)
    return Chosen(runner, probe(runner.output, sample), f"first order only, as asked, {_word(wanted)}")


def _carried(
    model: nn.Module,
    updates: Sequence[Update],
    loss: Loss,
    device: torch.device,
    dtype: torch.dtype | None,
    own: torch.dtype,
    sample: Any,
    settled: Settled | None,
) -> tuple[DeltaEngine, Probe, str]:
    """The delta engine in the precision that suits the net."""
    first = dtype if dtype is not None else torch.bfloat16 if own in HALF else own
    runner, found, chunks = _fitting(model, updates, loss, device, first, sample, settled)
    kinks = runner.kinks()
    if dtype is None and own in HALF and kinks:
        runner, found, chunks = _fitting(model, updates, loss, device, torch.float32, sample, settled)
        why = f"{', '.join(kinks)} in bfloat16 would flip masks"
        return runner, found, f"{_word(own)} weights in float32: {why}{chunks}"
    why = "as asked" if dtype is not None else "the model's own"
    if dtype is torch.bfloat16 and kinks:
        why += f", though {', '.join(kinks)} in bfloat16 may flip masks"
    why = "float16 weights, whose changes would underflow" if dtype is None and own is torch.float16 else why
    generic = runner.record()["generic_rules"]
    also = f"; in float64 for want of a rule: {', '.join(generic)}" if generic else ""
    return runner, found, f"every change carried, {_word(runner.dtype)} ({why}){also}{chunks}"


def _fitting(
    model: nn.Module,
    updates: Sequence[Update],
    loss: Loss,
    device: torch.device,
    dtype: torch.dtype,
    sample: Any,
    settled: Settled | None,
) -> tuple[DeltaEngine, Probe, str]:
    """The engine with as many queries in a stack as memory holds for a sample; what it showed; a word on chunks."""
    chunk, room = len(updates), free_bytes(device) // SHARE
    if settled is not None:
        chunk, room = settled.stack - 1, settled.room
    elif chunk > FEW:
        found = probe(DeltaEngine(model, updates[:1], loss, device, dtype).output, sample)
        rows = room * 2 // max(1, found.bytes)  # a stack of one query has two rows
        chunk = max(1, min(chunk, rows - 1))
    runner = DeltaEngine(model, updates, loss, device, dtype, chunk, keep=room)
    said = f"; queries in chunks of {chunk}" if chunk < len(updates) else ""
    return runner, probe(runner.output, sample), said


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, NotCarried) else f"{type(error).__name__}: {error}"


def _too_large(updates: Sequence[Update], keep: int) -> str:
    """Why the changes cannot be held at once beside the user's own, or nothing."""
    need = sum(update.nbytes for update in updates)
    return f"the updates' {need / 2**30:.3g} GiB leave no room for stacks" if need > keep else ""


def _cheaper(updates: Sequence[Update]) -> str:
    """A word on first order where it would take half the products or less: 3 forwards and the queries' factors, against
    1 + Q forwards."""
    matrices = [change for change in updates[0].params.values() if len(change.shape) > 1]
    whole = sum(change.shape.numel() for change in matrices)
    thin = sum(c.rank * (c.u.shape[0] + c.v.shape[0]) for c in matrices if isinstance(c, LowRank))
    share = (3 + len(updates) * thin / max(1, whole)) / (1 + len(updates))
    return f"; to first order engine='dot' would take {share:.0%} of the products" if share <= 0.5 else ""


def _own(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
