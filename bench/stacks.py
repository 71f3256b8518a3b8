"""What the benches of the row operations share: stacks of (value, changes), and one measured row of such an operation.

"read" is here as much reading and writing as the operation needs, by torch's copies: into new memory, whose pages on
some machines cost more than the copying, or with --kept into memory that was used before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

import machine
import measure
import table

__all__ = ["SHAPES", "main", "make", "measured", "name"]

# (Q, N, D): past a second-level cache, and past a last-level one. N is divided by QUICK in a quick run.
SHAPES = ((4, 512, 768), (4, 8192, 768))
QUICK = 8


def make(Q: int, *shape: int, dtype: torch.dtype, step: float = 1e-3) -> torch.Tensor:
    """(1+Q, *shape): values of width 1, changes of width `step`."""
    x = torch.randn(1 + Q, *shape, generator=torch.Generator().manual_seed(0))
    x[1:] *= step
    return x.to(dtype)


def name(x: torch.Tensor, *more: str) -> str:
    return " ".join(["x".join(map(str, x.shape)), str(x.dtype).removeprefix("torch."), *more])


def measured(
    case: str, ours: Callable, plain: Callable, stacks: Sequence[torch.Tensor], rounds: int, writes: int = 1
) -> table.Row:
    """A row of an operation that reads these stacks, all of one size, and writes as many as `writes` says."""
    x = stacks[0]
    moved = (len(stacks) + writes) * x.element_size() * x.numel()

    def read() -> None:
        copies = [stack.clone() for stack in stacks[:writes]]
        machine.read(*stacks[writes:])
        del copies

    return table.measured(case, {"ours": ours, "torch": plain, "read": read}, moved, rounds)


def main(op: str, what: str, run: Callable[[int, int, int, torch.dtype, int], list[table.Row]], argv=None) -> None:
    """Every shape and dtype through run(Q, N, D, dtype, rounds), as the options say."""
    parser = table.parser(what)
    parser.add_argument("--kept", action="store_true", help="results in memory that was used before, as in a sweep")
    options = parser.parse_args(argv)
    if options.kept:
        measure.keep_freed()
    torch.set_num_threads(options.threads)
    rounds = options.rounds or (3 if options.quick else 15)
    rows = []
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            for Q, N, D in SHAPES:
                rows += run(Q, N // (QUICK if options.quick else 1), D, dtype, rounds)
    if options.kept:
        rows = [replace(row, case=f"{row.case.strip()}, memory kept") for row in rows]
    table.show(op, rows, save=options.save)
