"""The table every benchmark prints, and the rows it keeps under bench/results/."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import machine
import measure

__all__ = ["RESULTS", "Row", "append", "measured", "parser", "show"]

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("case", "ms", "GB/s", "× torch", "% of bandwidth", "peak MiB")


@dataclass(frozen=True)
class Row:
    """One measured case.

    Attributes:
        case: what was run, in a few words.
        ms: median milliseconds of a call.
        gb_per_s: bytes of the inputs that have to be read, each once, over that time.
        torch_ratio: how many times longer plain torch takes, median over rounds.
        read_percent: time of merely reading what is read (and writing as much as is written) over the time of the
            call, in percent, median over rounds.
        peak_mib, torch_peak_mib: memory held at the highest beyond the inputs.
    """

    case: str
    ms: float
    gb_per_s: float
    torch_ratio: float
    read_percent: float
    peak_mib: float
    torch_peak_mib: float

    def cells(self) -> tuple[str, ...]:
        numbers = (f"{self.ms:.2f}", f"{self.gb_per_s:.1f}", f"{self.torch_ratio:.1f}", f"{self.read_percent:.0f}")
        return (self.case, *numbers, f"{self.peak_mib:.0f} (torch {self.torch_peak_mib:.0f})")


def measured(case: str, ways: dict[str, Callable[[], object]], read_bytes: int, rounds: int) -> Row:
    """One row from the ways "ours", "torch" and "read", the last merely reading the same `read_bytes`.

    Reading takes turns with ours alone: beside plain torch's temporaries, which are several times as large, what either
    finds in caches, and which freed memory it is given, is a matter of chance.
    """
    peaks = {name: measure.peak_mib(ways[name]) for name in ("ours", "torch")}
    seconds = measure.interleaved({name: ways[name] for name in ("ours", "torch")}, rounds)
    alone = measure.interleaved({name: ways[name] for name in ("ours", "read")}, rounds)
    ms = measure.median_ms(alone["ours"])
    return Row(
        case=case,
        ms=ms,
        gb_per_s=read_bytes / ms / 1e6,
        torch_ratio=measure.ratio(seconds["torch"], seconds["ours"]),
        read_percent=100 * measure.ratio(alone["read"], alone["ours"]),
        peak_mib=peaks["ours"],
        torch_peak_mib=peaks["torch"],
    )


def parser(what: str) -> argparse.ArgumentParser:
    """The options all benchmarks share."""
    options = argparse.ArgumentParser(description=what)
    options.add_argument("--quick", action="store_true", help="small cases and few rounds: does it run?")
    options.add_argument("--rounds", type=int, default=0, help="rounds counted; 15, or 3 when quick")
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--save", action="store_true", help=f"append the rows to {RESULTS.name}/<op>.jsonl")
    return options


def show(op: str, rows: list[Row], *, save: bool) -> None:
    """Prints the table; with `save` appends a JSON line a row, each with the machine it was measured on."""
    table = [COLUMNS, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(COLUMNS))]
    about = machine.describe()
    print(f"{op} on {about['processor']}, {about['threads']} threads, {about['isa']}, torch {about['torch']}")
    for line in table:
        print(" | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]))
    if save:
        print(f"saved to {append(op, [asdict(row) for row in rows], about)}")


def append(op: str, rows: list[dict[str, object]], about: dict[str, object]) -> Path:
    """Adds a JSON line a row to bench/results/<op>.jsonl, each with its date and the machine it was measured on."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{op}.jsonl"
    when = time.strftime("%Y-%m-%d", time.gmtime())
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"op": op, "date": when, **row, **about}) + "\n" for row in rows)
    return path
