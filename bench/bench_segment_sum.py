"""segment_sum against torch.segment_reduce: losses of tokens added up to losses of samples.

python bench/bench_segment_sum.py [--save] [--quick]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import machine
import table
from finf_fast.ops import segment_sum

TOKENS, QUICK_TOKENS = 1 << 26, 1 << 22


@dataclass(frozen=True)
class Case:
    L: int  # mean length of a segment
    ragged: bool
    Q: int = 1

    def name(self, S: int) -> str:
        return f"S={S} Q={self.Q} L={'up to ' if self.ragged else ''}{self.L * (1 + self.ragged)}"


# Windows of a language model; documents of every length; a classifier's few tokens.
CASES = (Case(1024, False), Case(1024, True), Case(1024, True, Q=8), Case(8, True))


def inputs(case: Case, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """values (Q,N) with Q × N of about `tokens`, offsets (S+1)."""
    draw = torch.Generator().manual_seed(0)
    S = max(1, tokens // (case.Q * case.L))
    lengths = torch.randint(2 * case.L + 1, (S,), generator=draw) if case.ragged else torch.full((S,), case.L)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return torch.randn(case.Q, int(offsets[-1]), generator=draw), offsets


def run(case: Case, tokens: int, rounds: int) -> table.Row:
    values, offsets = inputs(case, tokens)

    def ours():
        return segment_sum(values, offsets)

    def plain():
        return torch.stack([torch.segment_reduce(row, "sum", offsets=offsets) for row in values])

    ways = {"ours": ours, "torch": plain, "read": lambda: machine.read(values)}
    read_bytes = values.element_size() * values.numel()
    return table.measured(case.name(len(offsets) - 1), ways, read_bytes, rounds)


def main(argv: list[str] | None = None) -> None:
    options = table.parser(__doc__.splitlines()[0]).parse_args(argv)
    torch.set_num_threads(options.threads)
    tokens, rounds = (QUICK_TOKENS, 3) if options.quick else (TOKENS, 15)
    with torch.inference_mode():
        rows = [run(case, tokens, options.rounds or rounds) for case in CASES]
    table.show("segment_sum", rows, save=options.save)


if __name__ == "__main__":
    main()
