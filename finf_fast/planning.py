"""How many samples go through the model at once, from what one sample costs and what memory there is.

One forward on a single sample is watched: the bytes of every tensor it makes bound what a sample needs, and the width
of its output bounds the labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from finf_fast.loss import byte_size, mapped
from finf_fast.ragged import FORWARDS
from finf_fast.records import Plan

SHARE = (
    4  # a quarter of the free memory: the rest belongs to the user's process, the page cache and what the bound misses
)
CPU_BYTES = 256 << 20  # beyond it a forward on a CPU only leaves the caches behind
# What a sample's own bytes cost: three blocks are under way (two staged, one at work), each through a few temporaries
# when decoded. With it a 3072-input net takes 1024 images a forward; 4096 ran at a third of that speed (page faults).
INPUT_COPIES = 16
WINDOW_BYTES = 64 << 20  # of a window's staged samples; three are under way
MOST = 4096  # samples in a forward; small models gain nothing beyond, and a block is what an interruption can lose


@dataclass(frozen=True)
class Probe:
    """What one sample through the engine showed.

    Attributes:
        bytes: of all tensors that one forward makes for one sample, the output's change and the staged input
            included: an upper bound of its need.
        inputs: bytes of the sample itself.
        outputs: width V of the output (its last dimension).
        tokens: rows of output a sample has, the L of (B, L, V); 1 for (B, V).
    """

    bytes: int
    inputs: int
    outputs: int
    tokens: int


def probe(output: Callable[[Any], Tensor], sample: Any) -> Probe:
    """Runs ``output`` on a batch of one and counts what it allocates.

    A bad token id must not end here without its sample being named, nor spoil a GPU: if the sample as it is fails, or
    on a GPU at first, it is tried with its integers replaced by zeros.

    Raises:
        ValueError: two forwards of the same sample differ: the model draws random numbers in eval mode.
    """
    sample, value, watch = _first_that_runs(output, sample)
    again = output(sample)
    if not torch.allclose(value, again, rtol=1e-3, atol=1e-5, equal_nan=True):
        raise ValueError("model: wanted the same output twice in eval mode, got two that differ "
                         "(dropout left on, or a loss that draws numbers?)")  # fmt: skip
    tokens = value[0, ..., 0].numel() if value.dim() > 1 else 1
    inputs = byte_size(sample)
    held = watch.bytes + 2 * value.nbytes + INPUT_COPIES * inputs
    return Probe(held, inputs, value.shape[-1] if value.dim() > 1 else 1, tokens)


def _first_that_runs(output: Callable[[Any], Tensor], sample: Any) -> tuple[Any, Tensor, _Watch]:
    ways = [sample, _harmless(sample)]
    first, second = ways if _device(sample).type == "cpu" else ways[::-1]
    try:
        return _watched(output, first)
    except (IndexError, RuntimeError) as error:
        try:
            return _watched(output, second)
        except (IndexError, RuntimeError):
            raise error from None


def _watched(output: Callable[[Any], Tensor], sample: Any) -> tuple[Any, Tensor, _Watch]:
    with _Watch() as watch:
        return sample, output(sample), watch


def make_plan(
    found: Probe,
    start: int,
    stop: int,
    device: torch.device,
    batch_size: int | None,
    engine: str = "",
    rows: int = 1,
    ragged: int = 0,
    room: int = 0,
) -> Plan:
    """The plan of a sweep over samples ``[start, stop)``.

    Args:
        found: what one sample costs.
        batch_size: samples per forward, or None to choose by memory.
        engine: why the engine is the one it is, for the plan's reason.
        rows: what the engine carries of a sample at once, 1 + Q in a stack.
        ragged: tokens of the sample, where texts differ in length and a block is a window to sort them in; else 0.
        room: bytes that the engine may keep from one chunk of queries to the next.

    Raises:
        ValueError: ``batch_size`` below 1.
    """
    engine = f"{_one_line(engine)}; " if engine else ""
    if batch_size is not None:
        if batch_size < 1:
            raise ValueError(f"batch_size: wanted at least 1, got {batch_size}")
        size, tokens, why = batch_size, None, f"batch of {batch_size} as asked"
    else:
        size, free = _fitting(found, device, rows)
        tokens = size * ragged if ragged else None
        named = f"{tokens} tokens" if ragged else str(size)
        why = f"batch of {named}: {found.bytes / 2**20:.3g} MiB a sample, {free / 2**30:.3g} GiB free"
    block, forward = size, None
    if ragged:
        block = max(size, min(FORWARDS * size, WINDOW_BYTES // max(1, found.inputs)))
        forward = batch_size or min(block, MOST)
        why += f", samples sorted by length in windows of {block}"
    threads = torch.get_num_threads()
    return Plan(start, stop, block, forward, tokens, stack=rows, room=room, threads=threads, reason=engine + why)


def _fitting(found: Probe, device: torch.device, rows: int) -> tuple[int, int]:
    """Samples that fit in a forward, a power of two, and the bytes that are free."""
    free = free_bytes(device)
    budget = free // SHARE if device.type != "cpu" else min(free // SHARE, rows * CPU_BYTES)
    fits = max(1, min(MOST, budget // max(1, found.bytes)))
    return 1 << (fits.bit_length() - 1), free


def _one_line(reason: str) -> str:
    """A reason may quote an exception of many lines: its first and its last say what and where."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    return reason if len(lines) < 2 else f"{lines[0]} … {lines[-1]}"


def free_bytes(device: torch.device) -> int:
    """Memory that may still be used: of the device, or of this machine or its control group, whichever is less."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for what comes next
        return torch.cuda.mem_get_info(device)[0] + kept
    return min(_available(), _group_left())


def out_of_memory(error: BaseException) -> bool:
    """Whether this exception means that a smaller batch might pass."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def _available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        table = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
        return table["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError):
        return 4 << 30  # not Linux: a modest machine


def _group_left() -> int:
    try:
        group = Path("/sys/fs/cgroup")
        return int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no control group, or "max"
        return 1 << 62


class _Watch(TorchDispatchMode):
    """Adds up the bytes of every tensor that an operation makes; views cost nothing."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and guarding against it would import torch's compiler: seconds

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        for value, spec in zip(out if isinstance(out, (tuple, list)) else (out,), returns, strict=False):
            if isinstance(value, Tensor) and spec.alias_info is None:
                self.bytes += value.nbytes
        return out


def _device(batch: Any) -> torch.device:
    found: list[torch.device] = []
    mapped(lambda tensor: found.append(tensor.device) or tensor, batch)
    return found[0] if found else torch.device("cpu")


def _harmless(sample: Any) -> Any:
    """The batch with its integers set to zero: a valid token id and label for any model."""
    if isinstance(sample, Mapping):
        return {k: v if k == "attention_mask" else _harmless(v) for k, v in sample.items()}
    if isinstance(sample, (tuple, list)):
        return tuple(_harmless(v) for v in sample)
    # Masks stay: all zero they would leave a model nothing to look at.
    whole = isinstance(sample, Tensor) and not sample.is_floating_point() and sample.dtype is not torch.bool
    return torch.zeros_like(sample) if whole else sample
