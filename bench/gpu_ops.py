"""The GPU suite's timing of the operations, a process of its own: what it finds it prints, a JSON object a line.

    python bench/gpu_ops.py --seconds 150 [--dry-run] [--only topk_merge noise]

A failing launch may leave a device unusable for the whole process, which then ends: the suite starts another one for
the operations that were to follow.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import gpu_clock
import gpu_peers
import machine
from finf_fast.ops import dispatch
from gpu_cases import CASES, Work


def say(**found: Any) -> None:
    print(json.dumps(found), flush=True)


def about(device: torch.device) -> dict[str, Any]:
    """The machine, and what is installed on it."""
    found = {**machine.describe(), **gpu_peers.versions(), "device": machine.processor(), "cuda": torch.version.cuda}
    if device.type == "cuda":
        known = torch.cuda.get_device_properties(device)
        found |= {
            "device": known.name,
            "capability": f"{known.major}.{known.minor}",
            "multiprocessors": known.multi_processor_count,
            "memory_mib": known.total_memory >> 20,
            "cache_mib": known.L2_cache_size >> 20,
        }
    return found


def face_of(op: str, inputs: Sequence, device: torch.device) -> tuple[str | None, str]:
    """The face that is to be timed, or None, and why there is none.

    On a GPU that is a face for GPUs and never the reference, the first of its row; in a dry run Triton's, interpreted,
    or the compiled one, or where there is none the reference. It is asked for by name, so that no earlier measurement
    chooses another.
    """
    floats = [x for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
    reasons = []
    for face in ("triton", "cuda") if device.type == "cuda" else ("triton", "cpp", "reference"):
        if face in dispatch.TABLE[op]:
            os.environ["FINF_BACKEND"] = face
            verdict = next(v for v in dispatch.faces(op, *floats) if v.face == face)
            if verdict.available:
                return face, ""
            reasons.append(f"{face}: {verdict.reason}")
    return None, "not there: " + ("; ".join(reasons) or "the table has no such face")


def measured(op: str, work: Work, device: torch.device, peaks: dict[str, float]) -> dict[str, Any]:
    """The row of one case."""
    with torch.device(device):
        inputs = [work.make()]
    row = {"op": op, "case": work.name, "notes": dict(work.missing), "of": work.case}
    face, row["notes"]["ours"] = face_of(op, inputs[0], device)
    if face is None:
        return row
    ways, row["peak_mib"] = {"ours": work.ours}, gpu_clock.peak_mib(work.ours, inputs[0], device)
    for name, way in work.beside.items():
        try:
            way(*inputs[0])
            ways[name] = way
        except Exception as error:  # a peer that cannot is told of, and no reason to lose the row
            row["notes"][name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    with torch.device(device):
        inputs += [work.make() for _ in range(gpu_clock.copies(bytes_of(inputs[0]), device) - 1)]
    seconds = gpu_clock.medians(ways, inputs, device)
    return row | {"face": face, **rates(work, seconds, peaks)}


def bytes_of(inputs: Sequence) -> int:
    return sum(x.untyped_storage().nbytes() for x in inputs if isinstance(x, Tensor))


def rates(work: Work, seconds: dict[str, float], peaks: dict[str, float]) -> dict[str, Any]:
    ours = seconds.pop("ours")
    found: dict[str, Any] = {"ms": 1e3 * ours, "times": {name: other / ours for name, other in seconds.items()}}
    if work.flop:
        tflops = work.flop / ours / 1e12
        return found | {"tflops": tflops, "percent_of_gemm": 100 * tflops / peaks["gemm_tflops"]}
    speed = work.moved / ours / 1e9
    return found | {"gb_per_s": speed, "percent_of_copy": 100 * speed / peaks["copy_gb_per_s"]}


def run(op: str, device: torch.device, dry: bool, peaks: dict[str, float], until: float) -> None:
    say(begin=op)
    for work in CASES[op](dry):
        if time.monotonic() > until:
            say(row={"op": op, "case": work.name, "notes": {"ours": "not run: no time left"}})
            continue
        try:
            say(row=measured(op, work, device, peaks))
        except Exception as error:
            say(row={"op": op, "case": work.name, "notes": {"ours": f"failed: {type(error).__name__}: {error}"}})
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # raises, and ends this process, where the device is lost
            torch.cuda.empty_cache()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--seconds", type=float, required=True, help="after which no further case is begun")
    options.add_argument("--dry-run", action="store_true")
    options.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    options = options.parse_args()
    until = time.monotonic() + options.seconds
    device = torch.device("cpu" if options.dry_run else "cuda")
    torch.manual_seed(0)
    say(about=about(device), order=options.only)
    peaks = gpu_clock.peaks(device, options.dry_run)
    say(peaks=peaks)
    with torch.inference_mode():
        for op in options.only:
            run(op, device, options.dry_run, peaks, until)
    say(done=True)


if __name__ == "__main__":
    main()
