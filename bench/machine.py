"""What this machine is, what its memory and its arithmetic can do: the ceilings that a kernel is read against.

python bench/machine.py [--save] [--threads 2]
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

import finf_fast
from finf_fast import _C

__all__ = ["copy_bandwidth", "describe", "fma_peak", "read", "read_bandwidth"]

ELEMENTS = 1 << 26  # 256 MiB of float32: far past any last-level cache


def describe() -> dict[str, object]:
    """Processor, threads, versions, instruction set, load and commit: beside every row that is kept."""
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "isa": _C.isa(),
        "compiler": _C.build_info()["compiler"],
        "finf_fast": finf_fast.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 1),
        "commit": commit(),
    }


def processor() -> str:
    """Name and family from Linux, or what Python knows: in a virtual machine the name alone says little."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor() or platform.machine()
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in said:
        return platform.machine()
    return f"{said['model name']} (family {said.get('cpu family', '?')}, model {said.get('model', '?')})"


def commit() -> str | None:
    """Short hash of this checkout, with + where files differ from it (results aside); None outside a checkout."""
    here = Path(__file__).parent
    try:
        head = _git("rev-parse", "--short=12", "HEAD", cwd=here)
        changed = _git("status", "--porcelain", "--untracked-files=no", ":/", ":(top,exclude)bench/results", cwd=here)
        return head + ("+" if changed else "")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def _git(*words: str, cwd: Path) -> str:
    return subprocess.run(["git", *words], cwd=cwd, check=True, capture_output=True, text=True).stdout.strip()


def read(*tensors: torch.Tensor) -> None:
    """Reads every element once; a sum is among torch's fastest ways to."""
    for x in tensors:
        x.view(-1).sum()


def read_bandwidth(rounds: int = 5) -> float:
    """GB/s of reading, the best of some rounds."""
    x = torch.ones(ELEMENTS)
    return 4 * ELEMENTS / _best_seconds(lambda: read(x), rounds) / 1e9


def copy_bandwidth(rounds: int = 5) -> float:
    """GB/s of copying, read and written bytes both counted, the best of some rounds."""
    x, y = torch.ones(ELEMENTS), torch.zeros(ELEMENTS)
    return 8 * ELEMENTS / _best_seconds(lambda: y.copy_(x), rounds) / 1e9


def fma_peak(kind: str, rounds: int = 5) -> float:
    """GFLOP/s of multiplying and adding in registers on every thread at once; kind: fp32 or bf16."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        return max(sum(pool.map(_C.fma_peak, [kind] * threads)) for _ in range(rounds))


def ceilings() -> dict[str, float]:
    """GFLOP/s and GB/s of all threads together."""
    peaks = {f"{kind}_gflops": fma_peak(kind) for kind in ("fp32", "bf16")}
    return peaks | {"read_gb_per_s": read_bandwidth(), "copy_gb_per_s": copy_bandwidth()}


def _best_seconds(work, rounds: int) -> float:
    found = []
    for _ in range(rounds):
        since = time.perf_counter()
        work()
        found.append(time.perf_counter() - since)
    return min(found)


def main(argv: list[str] | None = None) -> None:
    import table  # which imports this page

    options = table.parser("What this machine can do.").parse_args(argv)
    torch.set_num_threads(options.threads)
    found = {name: round(value, 1) for name, value in ceilings().items()}
    print(" | ".join(f"{name} {value}" for name, value in found.items()))
    if options.save:
        print(f"saved to {table.append('machine', [found], describe())}")


if __name__ == "__main__":
    main()
