"""Time on a device: events, medians, inputs that change from call to call so that no cache holds them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

__all__ = ["copies", "medians", "peak_mib", "peaks"]

# Cycles for which the device is kept busy before a timed call, about 2 ms: the host queues a call's launches meanwhile,
# and what is timed are the kernels.
HEAD_START = 4_000_000
# Rounds at least, at most, and seconds that the rounds of one case should take together.
FEWEST, MOST, SECONDS = 5, 30, 1.0
# Side of the product and bytes of the copy that show the device's own peaks: past all caches, some milliseconds long.
SIDE, COPIED = 8192, 1 << 30


def once(way: Callable, given: Sequence, device: torch.device) -> float:
    """Seconds of one call."""
    if device.type != "cuda":
        since = time.perf_counter()
        way(*given)
        return time.perf_counter() - since
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    start.record()
    result = way(*given)
    stop.record()
    stop.synchronize()
    del result
    return start.elapsed_time(stop) / 1e3


def medians(ways: dict[str, Callable], inputs: list[Sequence], device: torch.device) -> dict[str, float]:
    """Median seconds of each way, all in turn in each round; each was called before, so nothing is compiled here."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    calls, until = 0, time.perf_counter() + SECONDS
    for number in range(MOST):
        if number >= FEWEST and time.perf_counter() > until:
            break
        for name, way in ways.items():
            found[name].append(once(way, inputs[calls % len(inputs)], device))
            calls += 1
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def copies(size: int, device: torch.device) -> int:
    """How many sets of inputs of `size` bytes are walked in turn: together twice the last-level cache, if MOST do."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return min(MOST, max(1, -(-2 * cache // max(size, 1))))


def peak_mib(way: Callable, given: Sequence, device: torch.device) -> float | None:
    """MiB on the device at the highest of a call, results included, beyond what lay there before; None on a CPU."""
    if device.type != "cuda":
        way(*given)
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    way(*given)
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def peaks(device: torch.device, dry: bool) -> dict[str, float]:
    """What the device does at its best: TFLOP/s of a bfloat16 product, GB/s of a copy, read and written counted."""
    side, size = (64, 1 << 16) if dry else (SIDE, COPIED)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in "ab")
    x, y = (torch.zeros(size, device=device, dtype=torch.uint8) for _ in "xy")
    ways = {"product": lambda: torch.mm(a, b), "copy": lambda: y.copy_(x)}
    for way in ways.values():
        way()
    seconds = medians(ways, [()], device)
    return {"gemm_tflops": 2 * side**3 / seconds["product"] / 1e12, "copy_gb_per_s": 2 * size / seconds["copy"] / 1e9}
