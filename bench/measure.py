"""How things are timed here: several ways of the same work, in turn, so that a busy moment hits all of them alike."""

from __future__ import annotations

import ctypes
import random
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["interleaved", "keep_freed", "median_ms", "peak_mib", "ratio"]

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)
CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def interleaved(
    ways: dict[str, Callable[[], object]], rounds: int, before: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each way in each round, after one that is not counted (first touch of memory, threads starting).

    ``before`` is called before every one, and takes no time. The order is drawn anew each round: none always follows
    the same one, whose memory, freed or still in a cache, it would find.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    turns, draw = list(ways.items()), random.Random(0)
    for counted in [False] + [True] * rounds:
        for name, work in turns:
            before()
            since = time.perf_counter()
            work()
            if counted:
                seconds[name].append(time.perf_counter() - since)
        draw.shuffle(turns)
    return seconds


def median_ms(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1e3


def ratio(slow: list[float], fast: list[float]) -> float:
    """Median of the ratios round by round: what both rounds suffered alike cancels."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def peak_mib(work: Callable[[], object]) -> float:
    """MiB that `work` holds at its highest over what the process held before.

    On Linux the kernel's high-water mark is set back first; elsewhere only growth past the highest mark so far is seen.
    """
    if not CLEAR_REFS.exists():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    _give_back_freed()
    CLEAR_REFS.write_text("5")  # 5: reset the peak resident size, nothing else (proc(5))
    before = _status_kib("VmRSS")
    work()
    return (_status_kib("VmHWM") - before) / 1024


def keep_freed() -> None:
    """Has glibc keep what is freed, large blocks too: results then lie in memory that was used before.

    So it is in most of a sweep, where a layer's results take the place of another's; the first touch of new memory is
    the system's time, and as long as several writings.

    Raises:
        RuntimeError: no mallopt(3) here. (Where another allocator was put in glibc's place, nothing happens.)
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if not mallopt or not mallopt(M_MMAP_MAX, 0) or not mallopt(M_TRIM_THRESHOLD, 2**31 - 1):
        raise RuntimeError("keep_freed: wanted glibc's allocator, got none with mallopt(3)")


def _give_back_freed() -> None:
    """Asks glibc to return freed memory, which would hide as much of what `work` takes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def _status_kib(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1])
