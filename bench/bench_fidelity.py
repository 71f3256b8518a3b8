"""What the scores are worth: against retraining, and on leaks that were planted; trivial ways in the same table.

    python bench/bench_fidelity.py [--tasks retraining convex ...] [--fashion FOLDER] [--seeds 3] [--quick] [--save]

Other libraries stand in the table where ``make bench-peers`` has let them judge the same models.
Models that only give the truth are trained once and kept in runs/fidelity. The best of each table is marked, trivial or
not. Nothing here is timed but each way's seconds, once, on a machine that may be busy.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

import machine
import table
from fidelity import brittleness, convex, data, facts, leakage, mislabel, retraining
from fidelity.judging import Estimate

TASKS = ("retraining", "convex", "leakage", "mislabel", "brittleness", "facts")
CACHE = Path("runs/fidelity")


def tables(found: list[dict[str, object]]) -> Iterator[str]:
    """A table for each task, data set, kind of copy and net."""
    keys = ("task", "data", "copy", "net")
    for title in dict.fromkeys(tuple(str(row[key]) for key in keys if key in row) for row in found):
        part = [row for row in found if tuple(str(row[key]) for key in keys if key in row) == title]
        measures = [name for name, value in part[0].items() if isinstance(value, Estimate)]
        best = {name: max(row[name].mean for row in part) for name in measures}
        yield f"\n{', '.join(title)}\n{'':28}" + "".join(f"{name:>26}" for name in measures) + f"{'seconds':>10}"
        for row in part:
            cells = "".join(
                f"{f'{row[name]}' + (' *' if row[name].mean == best[name] else '  '):>26}" for name in measures
            )
            yield f"{row['way']:28}{cells}{row['seconds']:10.1f}"


def rows(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Of all tasks asked for, as they come: hours on one core."""
    if "retraining" in options.tasks:
        yield from retraining.rows(CACHE, options.quick)
    if "convex" in options.tasks:
        yield from convex.rows(options.fashion, options.quick)
    if "leakage" in options.tasks:
        yield from leakage.rows(
            options.fashion, 1 if options.quick else options.seeds, options.nets, options.copies, options.quick
        )
    if "mislabel" in options.tasks:
        yield from mislabel.rows(CACHE, options.fashion, options.quick)
    if "brittleness" in options.tasks:
        yield from brittleness.rows(CACHE, options.quick)
    if "facts" in options.tasks:
        yield from facts.rows(CACHE, options.quick)


def plain(row: dict[str, object]) -> dict[str, object]:
    """A row as it is kept: an estimate becomes its three numbers."""
    return {
        key: [round(number, 4) for number in (value.mean, value.low, value.high)]
        if isinstance(value, Estimate)
        else value
        for key, value in row.items()
    }


def main(argv: list[str] | None = None) -> None:
    options = table.parser(__doc__.splitlines()[0])
    options.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    options.add_argument("--fashion", type=Path, default=data.DEBIAN, help="folder with Fashion-MNIST's IDX files")
    options.add_argument("--seeds", type=int, default=3, help="of the leakage tasks")
    options.add_argument("--copies", nargs="+", default=["exact", "altered"], help="of the leakage tasks")
    options.add_argument("--nets", default="", help="of the leakage tasks, only those with this in their name")
    options.add_argument("--problems", action="store_true", help="only write down what peers are to judge")
    options = options.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.problems:
        return retraining.write_problems(CACHE)
    found, about = [], machine.describe()
    for row in rows(options):
        found.append(row)
        print(" | ".join(str(value) for value in row.values()), flush=True)
        if options.save:  # each as it comes: the next may take an hour
            table.append("fidelity", [plain(row)], about)
    print("\n".join(tables(found)))


if __name__ == "__main__":
    main()
