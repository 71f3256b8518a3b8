"""What Triton's kernels share about where they run: architectures, their limits, and the specimens a test compiles.

An architecture is a number like 90, compute capability 9.0 without its dot; 0 is Triton's interpreter on a CPU. Every
kernel file keeps its settings as frozen data in one table by architecture and takes its row with `settings_for`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

INTERPRETER = 0
# Bytes of shared memory that one program may hold (CUDA C++ programming guide, table of compute capabilities).
SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
# Newer than 80 and 100, but with 89's shared memory.
_SMALLER = {86: 89, 120: 89, 121: 89}
# Multiprocessors of the part that a table's row is made for: A100, L40S, H200, B200. The interpreter's stands for few,
# so that small tests too cut an axis in several parts.
MULTIPROCESSORS = {INTERPRETER: 6, 80: 108, 89: 142, 90: 132, 100: 148}

# Of every launch: Triton 3.10 would otherwise split each multiply-add, and the formulas are full of them.
OPTIONS = {"enable_fp_fusion": True}

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Specimen:
    """One way in which a kernel is compiled: what `tests/test_ahead_of_time.py` builds without a GPU and looks into.

    A kernel file lists its own in ``specimens(architecture) -> list[Specimen]``, made from its table's row.
    """

    name: str
    kernel: Any  # a function under @triton.jit
    signature: Mapping[str, str]  # argument to type, "*bf16", "i32", "fp32", "tensordesc<bf16[128,64]>"
    constexprs: Mapping[str, Any]  # all other arguments; None for a tensor that is not given
    num_warps: int
    num_stages: int
    unaligned: tuple[str, ...] = ()  # pointers and integers that are not multiples of 16
    instructions: tuple[str, ...] = ()  # that the machine code must hold: HGMMA, UTMALDG, ...
    options: Mapping[str, Any] = field(default_factory=dict)  # of triton.compile, beyond the two above


def newer_assembler() -> bool:
    """Whether Triton is 3.9 or newer: its code and its ptxas need fewer registers for the same tiles than 3.6's do.

    Versions between were not tried and count as older: a tile too small costs little, one that spills much.
    """
    import triton

    return tuple(int(number) for number in triton.__version__.split(".")[:2]) >= (3, 9)


def roomy(num_warps: int) -> dict[str, int]:
    """Options of a launch whose kernel, before Triton 3.9, would spill a few registers so that another program fits on
    the multiprocessor: as many as there are for one program. Newer assemblers need no telling."""
    return {} if newer_assembler() else alone(num_warps)


def alone(num_warps: int) -> dict[str, int]:
    """Options of a launch whose program may have all registers of a multiprocessor."""
    return {"maxnreg": min(255, 65536 // (32 * num_warps))}


def interpreted() -> bool:
    """Whether kernels run through Triton's interpreter; Triton itself asks when a kernel's file is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def architecture(device: torch.device) -> int:
    """What `device` is: 90 for compute capability 9.0, `INTERPRETER` for a CPU."""
    if device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at once where one fills a multiprocessor."""
    if device.type != "cuda":
        return MULTIPROCESSORS[INTERPRETER]
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def second_level_cache(device: torch.device) -> int:
    """Bytes; the interpreter's stands for little, so that small tests have several groups of rows."""
    if device.type != "cuda":
        return 48 << 10
    return torch.cuda.get_device_properties(device).L2_cache_size


def settings_for(table: Mapping[int, Settings], architecture: int) -> Settings:
    """The table's row for `architecture`: its own, or that of the newest before it."""
    architecture = _SMALLER.get(architecture, architecture)
    known = [row for row in table if row <= architecture and (row == INTERPRETER) == (architecture == INTERPRETER)]
    if not known:
        wanted = ", ".join(map(str, sorted(table)))
        raise ValueError(f"architecture: wanted one of {wanted} or newer, got {architecture}")
    return table[max(known)]


def has_descriptors(architecture: int) -> bool:
    """Whether tiles are loaded through tensor descriptors (TMA); the interpreter plays them.

    Triton has those that a host makes since 3.4; before it, tiles are loaded by addresses on any GPU.
    """
    return (architecture >= 90 or architecture == INTERPRETER) and _descriptors_known()


@functools.cache
def _descriptors_known() -> bool:
    return importlib.util.find_spec("triton.tools.tensor_descriptor") is not None
