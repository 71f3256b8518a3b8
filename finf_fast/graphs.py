"""The forward of a batch as a CUDA graph where batches of one shape come again: one launch instead of thousands.

Asked for by ``FINF_GRAPHS=1`` where the engine's device is a GPU; ``FINF_GRAPHS=0``, or nothing, leaves it out. It has
run on no GPU yet: what is shown on a CPU is which batches are recorded, that results are those of the batch at hand,
and that whatever fails leaves the plain forward.

A graph repeats the same launches on the same addresses, so nothing of what a forward does may depend on the values in
a batch. That needs no proof by model: to look at a value on a GPU is to wait for it, which recording refuses; the sweep
then goes on without graphs, and its record says why. A model that asks whether it is being recorded, as those of
transformers do, forms masks in full that it would else leave out: the same numbers, rounded another way.

Shapes of texts repeat because columns are cut at a multiple of `COLUMNS`; a forward whose shape came once runs as it
is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from finf_fast.loss import Result, mapped
from finf_fast.planning import out_of_memory

__all__ = ["COLUMNS", "CudaRecorder", "Graphed", "Recorder", "wanted"]

# Texts are cut at multiples of this many tokens: a few shapes for a corpus. Half of it is padding on the mean, 3 % of a
# text of 1024.
COLUMNS = 64
# Shapes recorded at the most. Each holds a copy of its batch and of its scores; what lies between they share.
MOST = 64


def wanted(device: torch.device) -> bool:
    """Whether graphs were asked for and the device has them.

    Raises:
        ValueError: FINF_GRAPHS is neither 0 nor 1.
    """
    asked = os.environ.get("FINF_GRAPHS") or "0"
    if asked not in ("0", "1"):
        raise ValueError(f"FINF_GRAPHS: wanted 0 or 1, got {asked!r}")
    return asked == "1" and device.type == "cuda"


class Recorder(Protocol):
    """What records launches."""

    def record(self, work: Callable[[], Result]) -> tuple[Result, Callable[[], Any]]:
        """The result of `work`, whose tensors hold nothing yet, and what fills them, each time it is called."""


@contextmanager
def _as_if_recording() -> Iterator[None]:
    ask = torch.cuda.is_current_stream_capturing
    torch.cuda.is_current_stream_capturing = lambda: True
    try:
        yield
    finally:
        torch.cuda.is_current_stream_capturing = ask


class CudaRecorder:
    """Graphs of a GPU. All share one pool of memory: they run one after another, and results are copied at once."""

    def __init__(self, device: torch.device):
        self._device, self._pool = device, None

    def record(self, work: Callable[[], Result]) -> tuple[Result, Callable[[], Any]]:
        with torch.cuda.device(self._device):
            # A model that asks takes the way of a recording, which may launch what no forward before it did; loading
            # a kernel is one of the things that recording refuses.
            with _as_if_recording():
                work()
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            try:
                # Only this thread's calls are held to what may be recorded: the staging thread goes its own way.
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    result = work()
            except Exception:
                self._leave(stream)
                raise
        return result, graph.replay

    def _leave(self, stream: torch.cuda.Stream) -> None:
        """A recording that fails may leave its stream the current one and its pool open (torch 2.11: pytorch#180395),
        which would fail whatever comes next."""
        torch.cuda.set_stream(stream)
        with suppress(Exception):  # it was closed after all, or this torch has no such word
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
        self._pool = None


@dataclass(frozen=True)
class _Recorded:
    """One shape's graph, with the tensors it reads and those it writes."""

    inputs: list[Tensor]
    result: Result
    replay: Callable[[], Any]

    def run(self, batch: Any) -> Result:
        for mine, given in zip(self.inputs, _tensors(batch), strict=True):
            mine.copy_(given)
        self.replay()
        found = (getattr(self.result, field.name) for field in fields(Result))
        return Result(*(x.clone() if isinstance(x, Tensor) else x for x in found))


class Graphed:
    """An engine whose forwards are recorded the second time that a shape comes, and repeated from then on.

    The first forward of a shape runs as it is: it compiles and allocates what must not happen under recording.

    Args:
        engine: scores ``score(batch)`` on its device; its weights stay where they are from one batch to the next.
        recorder: a :class:`Recorder`.
    """

    columns = COLUMNS

    def __init__(self, engine: Any, recorder: Recorder):
        self._engine, self._recorder = engine, recorder
        self.loss, self.device, self.dtype = engine.loss, engine.device, engine.dtype
        self.score_dtype, self.output = engine.score_dtype, engine.output
        self.rows, self.room = engine.rows, engine.room
        self._seen: set[Any] = set()
        self._recorded: dict[Any, _Recorded] = {}
        self._shapes = self._replays = 0
        self._ended = ""

    def settings(self) -> dict[str, Any]:
        """What a resumed run must share: columns of padding round a sum another way."""
        return {**self._engine.settings(), "graphs": True}

    def record(self) -> dict[str, Any]:
        graphs = {"shapes": self._shapes, "batches": self._replays, **({"ended": self._ended} if self._ended else {})}
        return {**self._engine.record(), "graphs": graphs}

    def counted(self) -> dict[str, Any]:
        """The engine's own."""
        return self._engine.counted()

    def resume(self, counted: Mapping[str, Any]) -> None:
        self._engine.resume(counted)

    def score(self, batch: Any) -> Result:
        """As the engine's, and the same numbers."""
        key = None if self._ended else shape_of(batch)
        if key is None:
            return self._engine.score(batch)
        if key not in self._recorded and key in self._seen and len(self._recorded) < MOST:
            self._try_to_record(key, batch)
        self._seen.add(key)
        if key not in self._recorded:
            return self._plain(batch)
        self._replays += 1
        return self._recorded[key].run(batch)

    def _try_to_record(self, key: Any, batch: Any) -> None:
        """A failure ends recording for good: what one shape's forward does, the others' do too."""
        kept = mapped(torch.clone, batch)
        try:
            self._recorded[key] = _Recorded(_tensors(kept), *self._recorder.record(lambda: self._engine.score(kept)))
            self._shapes += 1
        except Exception as error:  # whatever it is, the plain forward that follows meets it again or does without
            self._end(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")

    def _plain(self, batch: Any) -> Result:
        """The engine's own; if memory runs out because graphs hold some, once more without them."""
        try:
            return self._engine.score(batch)
        except Exception as error:
            if not (self._recorded and out_of_memory(error)):
                raise
        self._end("their memory was needed")
        return self._engine.score(batch)

    def _end(self, why: str) -> None:
        self._ended = why
        self._recorded.clear()
        if self.device.type == "cuda":
            with suppress(RuntimeError):  # of a recording that torch does not know to be over
                torch.cuda.empty_cache()


def shape_of(batch: Any) -> Any:
    """What two batches share whose forwards are the same launches; None for one that holds more than tensors.

    A string or a number in a batch may be what a model branches on, and need not be hashable: such batches run plainly.
    """
    if isinstance(batch, Tensor):
        return (tuple(batch.shape), batch.stride(), batch.dtype, batch.device)
    if isinstance(batch, dict):
        parts = [(key, shape_of(value)) for key, value in batch.items()]
        return None if any(part is None for _, part in parts) else ("dict", *parts)
    if isinstance(batch, (tuple, list)):
        parts = [shape_of(value) for value in batch]
        return None if any(part is None for part in parts) else ("tuple", *parts)
    return None


def _tensors(batch: Any) -> list[Tensor]:
    """In the order in which `mapped` walks them."""
    found: list[Tensor] = []
    mapped(found.append, batch)
    return found
