"""How the files of one corpus are read: mapped or by pread, with how many threads, into which memory.

A mapping saves a copy, and costs calls that stop the process's other threads; which is faster depends on kernel and
machine, so the first readings of some size try both in turn. What still has to come from the disk is read, for of a
mapping the system reads less ahead; and a reader that goes from front to back has a thread run ahead of it
(csrc/io/forerunner.h: a cold pass over 250 MB then takes as long as reading it, without 1.3 times as long). A mapped
file that shrinks between the check of a piece and its use would end the process, if the compiled loops did not handle
that signal (csrc/io/rescue.h); pread needs no such help, so mapping has to be worth it.
"""

from __future__ import annotations

import functools
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from finf_fast.corpus.slots import Slots

__all__ = ["Reading", "adopting", "reading_of_new_files"]

WAYS = ("auto", "map", "read")
READ, MAP, MAP_WHAT_IS_THERE = range(3)  # finf::Way
TRIAL_BYTES = 1 << 18  # readings below are ruled by other costs than those that are compared
TRIALS = 16  # of each way
# The fourth fastest of them counts: a disk or a neighbour slows many down, and one in sixteen is fast by chance. By the
# fastest a mapping was taken every third time that took 1.2 times as long on the median (Zen 3).
RANK = 3
WORTH = 1.1  # times faster that mapping has to be: less is chance

POPULATE_READ = 22  # of madvise, since Linux 5.14 (csrc/io/file.cpp); Python's mmap does not name it
MOST_THREADS = 4  # two saturate the memory of the processor measured (Zen 5)


class Reading:
    """The choice between the ways, and what goes with it.

    Args:
        asked: ``"auto"``, ``"map"`` or ``"read"``.

    Raises:
        ValueError: another word.
    """

    def __init__(self, asked: str = "auto"):
        if asked not in WAYS:
            raise ValueError(f"io: wanted one of {WAYS}, got {asked!r}")
        self.slots, self.threads, self.files = Slots(), _threads(), 0
        self._seconds: dict[str, list[float]] = {"read": [], "map": []}
        self._asked = self._way = asked
        self._reason = "as asked"
        if asked == "auto" and not _has_populate():
            self._way, self._reason = "read", "this system cannot bring in a mapping's pages by a call that may fail"

    def settle_for_network(self) -> None:
        """A file of the corpus lies behind a network, where mappings are slow, few, and break with the connection."""
        if self._way == "auto":
            self._way, self._reason = "read", "a file lies on a network file system"

    def way(self, count: int) -> int:
        """READ, MAP or MAP_WHAT_IS_THERE for the next reading, of ``count`` bytes."""
        if self._asked != "auto":
            return MAP if self._asked == "map" else READ
        if count < TRIAL_BYTES or self._way == "read":
            return READ
        tried = self._seconds
        return MAP_WHAT_IS_THERE if self._way == "map" or len(tried["map"]) < len(tried["read"]) else READ

    @property
    def on_trial(self) -> bool:
        """Whether :meth:`note` still has something to learn."""
        return self._way == "auto"

    def note(self, mapped: bool, count: int, seconds: float) -> None:
        """How long a reading took."""
        if not self.on_trial or count < TRIAL_BYTES:
            return
        self._seconds["map" if mapped else "read"].append(seconds / count)
        if min(map(len, self._seconds.values())) >= TRIALS:
            self._choose()

    def _choose(self) -> None:
        read, mapped = (sorted(self._seconds[way])[RANK] for way in ("read", "map"))
        self._reason = f"read {1e-9 / read:.1f} GB/s, map {1e-9 / mapped:.1f} GB/s over {TRIALS} readings of each"
        self._way = "map" if read > WORTH * mapped else "read"

    def describe(self) -> dict[str, Any]:
        """For the description of a corpus: what was chosen, and why."""
        undecided = f"fewer than {TRIALS} readings of {TRIAL_BYTES >> 10} KiB and more by each way: read so far"
        reason = undecided if self._way == "auto" else self._reason
        return {"io": self._way, "io_reason": reason, "io_threads": self.threads}


def reading_of_new_files() -> Reading:
    """That of the corpus which is being opened, or a new one."""
    reading = _adopting.get() or Reading()
    reading.files += 1
    return reading


@contextmanager
def adopting(reading: Reading) -> Iterator[None]:
    """Files opened inside the ``with`` belong to this reading."""
    token = _adopting.set(reading)
    try:
        yield
    finally:
        _adopting.reset(token)


_adopting: ContextVar[Reading | None] = ContextVar("finf_fast_reading", default=None)


def _threads() -> int:
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(mine, MOST_THREADS)


@functools.cache
def _has_populate() -> bool:
    if sys.platform != "linux":
        return False
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        try:
            page.madvise(POPULATE_READ)
        except OSError:
            return False
    return True
