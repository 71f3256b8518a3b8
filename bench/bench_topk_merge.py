"""topk_merge in place, as the running list of a sweep is kept, against torch.topk of the kept and the new together.

python bench/bench_topk_merge.py [--save] [--quick]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import machine
import table
from finf_fast.ops import topk_merge_

SCORES, QUICK_SCORES = 1 << 24, 1 << 20


@dataclass(frozen=True)
class Case:
    K: int
    Q: int
    block: int  # new scores a query brings at a time
    rising: bool = False  # every score beats all before it: the worst order there is

    def name(self) -> str:
        return f"K={self.K} Q={self.Q} blocks of {self.block}{' rising' if self.rising else ''}"


CASES = (Case(10, 16, 4096), Case(1000, 16, 4096), Case(100, 1, 1 << 20), Case(1000, 2, 65536, rising=True))


def ours(scores: torch.Tensor, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    values, indices = torch.full((case.Q, case.K), -torch.inf), torch.full((case.Q, case.K), -1)
    for start in range(0, scores.shape[1], case.block):
        topk_merge_(values, indices, scores[:, start : start + case.block], start)
    return values, indices


def plain(scores: torch.Tensor, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    values, indices = torch.full((case.Q, case.K), -torch.inf), torch.full((case.Q, case.K), -1)
    for start in range(0, scores.shape[1], case.block):
        new = scores[:, start : start + case.block]
        numbers = torch.arange(start, start + new.shape[1]).expand(case.Q, -1)
        values, place = torch.cat([values, new], 1).topk(case.K)
        indices = torch.cat([indices, numbers], 1).gather(1, place)
    return values, indices


def run(case: Case, total: int, rounds: int) -> table.Row:
    scores = torch.randn(case.Q, total // case.Q, generator=torch.Generator().manual_seed(0))
    scores = scores.sort(1).values if case.rising else scores
    ways = {
        "ours": lambda: ours(scores, case),
        "torch": lambda: plain(scores, case),
        "read": lambda: machine.read(scores),
    }
    return table.measured(case.name(), ways, scores.element_size() * scores.numel(), rounds)


def main(argv: list[str] | None = None) -> None:
    options = table.parser(__doc__.splitlines()[0]).parse_args(argv)
    torch.set_num_threads(options.threads)
    total, rounds = (QUICK_SCORES, 3) if options.quick else (SCORES, 15)
    with torch.inference_mode():
        rows = [run(case, total, options.rounds or rounds) for case in CASES]
    table.show("topk_merge", rows, save=options.save)


if __name__ == "__main__":
    main()
