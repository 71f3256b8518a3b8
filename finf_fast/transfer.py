"""Stage 3, the device: batches cross in a stream of their own while those before them are computed.

Three orders have to hold. What computes waits for the event after a batch's last copy; memory that is copied from is
held until that event has passed, and only then is a slot for another batch; memory that was copied to belongs to both
streams, and is free when the later of them is done with it. `Crossing` keeps the first two, whatever streams and events
are made of; `CudaLanes` are those of a GPU, and keep the third.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from finf_fast.loss import mapped
from finf_fast.ops import dispatch
from finf_fast.records import Part

__all__ = ["Crossing", "CudaLanes", "Lanes", "crossing_to", "decodes", "rows", "to_device"]

AHEAD = 2  # batches on their way at most beside the one that is sent: they go one by one, so more keep no lane busier


class Lanes(Protocol):
    """A stream that copies, the stream of the caller, which computes, and events in the one for the other."""

    def pinned(self, tensor: Tensor) -> Tensor:
        """The tensor, or a copy, in memory that can be read while this thread goes on."""

    def copy(self, tensor: Tensor) -> Tensor:
        """One on the device that holds nothing yet; the copy comes after those before it."""

    def mark(self) -> Any:
        """An event that passes when all copies so far are done."""

    def passed(self, event: Any) -> bool:
        """Whether it has passed."""

    def finish(self, event: Any) -> None:
        """Sleeps until it has passed."""

    def wait(self, event: Any, batch: Any) -> Any:
        """What is computed from here on comes after the event, and may use the batch, even when nobody holds it."""

    def seconds(self, wait: Any) -> float:
        """How long the computing stream stood still for a wait, once it has gone on."""


class Sent(NamedTuple):
    """A batch on its way: on the device when the event has passed."""

    batch: Any
    copied: Any


class Crossing:
    """Sends batches ahead from the thread that reads them, and hands them to the one that computes.

    What cannot be sent ahead, for want of memory above all, stays where it is: it crosses when its turn comes, and if
    that fails too it is an error then.

    Args:
        lanes: to the device; None where nothing has to cross.
        ahead: batches that may be on their way when another is sent, 1 or more.
    """

    def __init__(self, lanes: Lanes | None, ahead: int = AHEAD):
        self._lanes, self._ahead = lanes, ahead
        self._held: deque[tuple[Any, Any]] = deque()  # events, and the memory that is read until they pass
        self._waits: list[Any] = []
        self._batches, self._stayed = 0, Counter[str]()

    @property
    def crosses(self) -> bool:
        """Whether there is a way to cross at all."""
        return self._lanes is not None

    def __enter__(self) -> Crossing:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        """Waits for what is on its way. Nothing may be sent any more: the reader has ended."""
        try:
            for copied, _ in self._held:
                self._lanes.finish(copied)
        except Exception:
            if kind is None:  # else the error that ended the sweep, perhaps this device's, says more
                raise
        finally:
            self._held.clear()

    def send(self, batch: Any) -> Sent | None:
        """Begins to copy a batch; waits first if too many are on their way. None where it stays."""
        if self._lanes is None:
            return None
        try:
            self._let_go()
            sent = self._sent(mapped(self._lanes.pinned, batch))
        except Exception as error:
            self._stayed[type(error).__name__] += 1
            return None
        self._batches += 1
        return sent

    def receive(self, part: Part) -> Any:
        """The batch of a part where it is computed: on the device if it was sent, which computing then waits for."""
        if part.sent is None:
            return part.batch
        self._waits.append(self._lanes.wait(part.sent.copied, part.sent.batch))
        return part.sent.batch

    def waited(self) -> float:
        """Seconds that the device stood still for copies since the last call; its results have been waited for."""
        waits, self._waits = self._waits, []
        return sum(self._lanes.seconds(wait) for wait in waits)

    def record(self) -> dict[str, Any]:
        """For the record of a sweep; empty where nothing crosses."""
        stayed = {"batches_not_sent_ahead": dict(self._stayed)} if self._stayed else {}
        return {} if self._lanes is None else {"batches_sent_ahead": self._batches, **stayed}

    def _sent(self, source: Any) -> Sent:
        try:
            batch = mapped(self._lanes.copy, source)
        finally:  # where one tensor finds no room on the device, those before it are being copied
            copied = self._lanes.mark()
            self._held.append((copied, source))
        return Sent(batch, copied)

    def _let_go(self) -> None:
        while self._held and (len(self._held) > self._ahead or self._lanes.passed(self._held[0][0])):
            self._lanes.finish(self._held[0][0])
            self._held.popleft()


class CudaLanes:
    """Of a GPU: a stream for copies beside torch's current one."""

    def __init__(self, device: torch.device):
        self._device, self._copies = device, torch.cuda.Stream(device)

    def pinned(self, tensor: Tensor) -> Tensor:
        return _pinned(tensor)

    def copy(self, tensor: Tensor) -> Tensor:
        with torch.cuda.stream(self._copies):
            return tensor.to(self._device, non_blocking=True)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(blocking=True)  # one that is waited for by sleeping: the model wants the core
        event.record(self._copies)
        return event

    def passed(self, event: torch.cuda.Event) -> bool:
        return event.query()

    def finish(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def wait(self, event: torch.cuda.Event, batch: Any) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        stream = torch.cuda.current_stream(self._device)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(stream)
        stream.wait_event(event)
        after.record(stream)
        mapped(lambda tensor: tensor.record_stream(stream), batch)
        return before, after

    def seconds(self, wait: tuple[torch.cuda.Event, torch.cuda.Event]) -> float:
        before, after = wait
        after.synchronize()
        return before.elapsed_time(after) / 1000


def crossing_to(device: torch.device) -> Crossing:
    """To a GPU by a stream of its own; to anything else nothing is sent ahead."""
    return Crossing(CudaLanes(device) if device.type == "cuda" else None)


def decodes(device: torch.device, kind: str) -> bool:
    """Whether ``"pixels"`` or ``"tokens"`` are to cross as stored, fewer bytes, and be decoded there: by the kernel."""
    if device.type != "cuda":
        return False
    op = f"decode_{kind}"
    try:
        there = torch.empty(0, dtype=dispatch.TABLE[op]["cuda"].dtypes[0], device=device)
        return dispatch.choose(op, there) == "cuda"
    except ValueError:  # FINF_BACKEND asks for a face that this operation has not
        return False


def to_device(batch: Any, device: torch.device) -> Any:
    """The same pytree with every tensor on ``device``, after what the current stream has to do; on a CPU no copy."""

    def move(tensor: Tensor) -> Tensor:
        source = _pinned(tensor) if device.type == "cuda" else tensor
        return source.to(device, non_blocking=True)

    return mapped(move, batch)


def rows(batch: Any, start: int, stop: int) -> Any:
    """Samples ``[start, stop)`` of a batch, as views."""
    return mapped(lambda tensor: tensor[start:stop], batch)


def _pinned(tensor: Tensor) -> Tensor:
    """On a CPU pinned and without gaps: anything else is copied by way of memory that this thread waits for."""
    if tensor.device.type != "cpu":
        return tensor
    dense = tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
    tensor = tensor if dense else tensor.contiguous()
    return tensor if tensor.is_pinned() else tensor.pin_memory()
