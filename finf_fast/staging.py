"""Stage 2, staging: one thread reads blocks ahead of the model, never more than a few, and hands them over in order.

A block is read when there is a place for it, and gives its place back when the consumer takes it: two decoded blocks
may wait at any moment whatever their size, more where all of them are small; whoever waits sleeps until it is woken.
What is read can be sent on its way to the device by the same thread, so that it crosses while the consumer computes.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from finf_fast.loss import byte_size
from finf_fast.records import Block, Part, Plan

__all__ = ["PADDED", "ROOM", "stage"]

_END = object()
PADDED = 8 << 20  # tokens of a batch, padding counted: 64 MiB as int64, what a window of samples of one length has
ROOM = 32 << 20  # bytes of blocks that wait: more would have left a processor's last cache when their turn comes
MOST = 8  # blocks in that room: they even out a reading that stutters, which a few do as well as many
GRACE = 5.0  # seconds that the end of the interpreter waits for a reading that hangs, on a network disk perhaps


def stage(
    corpus: Any,
    plan: Plan,
    numbers: Iterable[int],
    depth: int = 2,
    send: Callable[[Any], Any] | None = None,
    room: int = 0,
) -> Iterator[Block]:
    """Read blocks of a plan ahead, in one background thread, and yield them in the order asked for.

    The thread starts with the first ``next`` and is gone when the iterator ends, fails or is closed; closing waits for
    the block that is being read.

    Args:
        corpus: anything with ``read(start, stop) -> batch``, and where blocks are windows of texts ``lengths`` and
            ``take``, as a :class:`finf_fast.corpus.Corpus`; called from the one thread only.
        plan: cuts the corpus into blocks.
        numbers: which blocks, 0 … plan.blocks - 1, in this order.
        depth: decoded blocks that may wait, 1 or more, besides the one the consumer holds.
        send: called in the thread with every batch read; what it gives back is the part's ``sent``.
        room: bytes in which more than ``depth`` may wait, up to MOST, should they be small enough.

    Raises:
        ValueError: depth below 1; a block number that the plan does not have.
        RuntimeError: this process was forked from the one that reads; the thread stayed there.
        Exception: whatever reading a block raised, with its own traceback, when that block's turn comes.
    """
    if isinstance(depth, bool) or not isinstance(depth, int):
        raise TypeError(f"depth: wanted an integer, got {depth!r}")
    if depth < 1:
        raise ValueError(f"depth: wanted 1 or more blocks, got {depth}")
    return _staged(_Reader(corpus, plan, numbers, _Places(depth, room), send))


def _staged(reader: _Reader) -> Iterator[Block]:
    reader.start()
    try:
        while (item := reader.next()) is not _END:
            if isinstance(item, BaseException):
                raise item
            reader.places.leave()
            yield item
            # The block is the consumer's alone from here: not kept alive while the next one is awaited.
            del item
    finally:
        reader.stop()


class _Places:
    """Where blocks wait, the first that comes being the first that leaves."""

    def __init__(self, depth: int, room: int):
        self._depth, self._room = depth, room
        self._sizes: deque[int] = deque()
        self._largest = 0  # of all blocks so far: what the next one is taken to have
        self._changed, self._closed = threading.Condition(), False

    def wait(self) -> bool:
        """Sleeps until there is one for a block that is about to be read; False when nobody wants it any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._free())
        return not self._closed

    def enter(self, size: int) -> None:
        with self._changed:
            self._sizes.append(size)
            self._largest = max(self._largest, size)

    def leave(self) -> None:
        with self._changed:
            self._sizes.popleft()
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _free(self) -> bool:
        count = len(self._sizes)
        return count < self._depth or (count < MOST and sum(self._sizes) + self._largest <= self._room)


class _Reader(threading.Thread):
    """The thread that reads, and what it has read: blocks, then the end or the exception that ended it."""

    def __init__(
        self,
        corpus: Any,
        plan: Plan,
        numbers: Iterable[int],
        places: _Places,
        send: Callable[[Any], Any] | None,
    ):
        # A daemon, so that a second Ctrl-C, while a read hangs on a dead network disk, still ends the process.
        super().__init__(name="finf-fast-staging", daemon=True)
        self._ready: SimpleQueue[Any] = SimpleQueue()
        self._process = os.getpid()
        self.places = places
        self._work, self._send = (corpus, plan, numbers), send

    def start(self) -> None:
        self._process = os.getpid()
        _running.add(self)
        super().start()

    def next(self) -> Any:
        """What has been read, when it is there: a block, the end, or the exception that ended it."""
        if os.getpid() != self._process:
            raise RuntimeError("staging: a process was forked while it read ahead, and the child has no thread that "
                               "reads; start the sweep in the child")  # fmt: skip
        return self._ready.get()

    def run(self) -> None:
        try:
            _stay_alone()
            self._read_all(*self._work)
        except BaseException as error:
            self._ready.put(error)
        else:
            self._ready.put(_END)

    def _read_all(self, corpus: Any, plan: Plan, numbers: Iterable[int]) -> None:
        for number in numbers:
            if not self.places.wait():
                return
            if not 0 <= number < plan.blocks:
                raise ValueError(f"numbers: wanted blocks 0 to {plan.blocks - 1}, got {number}")
            start, stop = plan.rows(number)
            block = Block(number, start, stop, tuple(map(self._sent, _parts(corpus, plan, start, stop))))
            self.places.enter(sum(byte_size(part.batch) for part in block.parts))
            self._ready.put(block)
            del block  # the consumer's alone, as soon as it is taken

    def _sent(self, part: Part) -> Part:
        return part if self._send is None else replace(part, sent=self._send(part.batch))

    def stop(self, patience: float | None = None) -> None:
        """Wake the thread if it waits for a place, and wait until it is gone, or for so many seconds.

        A forked child has no such thread, and may find its locks held for ever.
        """
        if os.getpid() != self._process:
            return
        self.places.close()
        self.join(patience)


def _parts(corpus: Any, plan: Plan, start: int, stop: int) -> Iterator[Part]:
    """A block's samples in one batch; in several where padding all to the longest would fill the memory."""
    counts = None if plan.forward is None else corpus.lengths(start, stop)
    if counts is None or len(counts) * int(counts.max()) <= PADDED:
        yield Part(torch.arange(stop - start), corpus.read(start, stop))
        return
    order, first = np.argsort(counts, kind="stable"), 0
    for last in range(1, len(order) + 1):
        if last == len(order) or (last + 1 - first) * counts[order[last]] > PADDED:
            yield Part(torch.from_numpy(order[first:last]), corpus.take(start + order[first:last]))
            first = last


def _stay_alone() -> None:
    """Keeps torch's operations in the calling thread to that thread; others are as they were.

    A second team of OpenMP's threads, beside that of the model, would spin on the cores that the model's wait for.
    """
    torch.get_num_threads()  # torch gives a thread its number at the first question, and would undo what comes before
    try:
        limit = getattr(ctypes.CDLL(None), "omp_set_num_threads", None)
    except (OSError, TypeError):  # a system whose programs have no symbols of their own
        return
    if limit is not None:
        limit(1)


_running: weakref.WeakSet[_Reader] = weakref.WeakSet()


# A daemon thread that is inside torch when the interpreter ends takes the process down with it, exit status and all.
@atexit.register
def _stop_all() -> None:
    for reader in tuple(_running):
        reader.stop(GRACE)
