"""cross_entropy_delta against plain torch: F.cross_entropy(reduction="none") before and after, and a subtraction.

torch gets the changed logits z + dz for nothing. Bytes: z and every dz once; what torch writes and reads in between is
its own affair. The loss of accuracy of the subtraction is the tests' matter, not this page's.

    python bench/bench_cross_entropy_delta.py [--save] [--quick]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import machine
import table
from finf_fast.ops import cross_entropy_delta

# Classes of a small vocabulary, Llama-2's, Llama-3's. Everything is far past the last-level cache.
WIDTHS = (1_000, 32_000, 128_000)
ELEMENTS, QUICK_ELEMENTS = 1 << 26, 1 << 22


@dataclass(frozen=True)
class Case:
    V: int
    Q: int = 1
    dtype: torch.dtype = torch.float32
    step: float = 1e-2  # width of the change; past 0.25 the longer polynomial is at work

    def name(self, N: int) -> str:
        return f"N={N} V={self.V} Q={self.Q} {str(self.dtype).removeprefix('torch.')} step {self.step:g}"


CASES = (
    *(Case(V) for V in WIDTHS),
    *(Case(V, dtype=torch.bfloat16) for V in WIDTHS),
    Case(32_000, Q=4),
    Case(32_000, step=1.0),
    Case(100),
)


def inputs(case: Case, elements: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """z (N,V), dz (Q,N,V), target (N), together of about 2 × `elements` numbers."""
    N = max(1, 2 * elements // (case.V * (1 + case.Q)))
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(N, case.V, generator=draw).to(case.dtype)
    dz = torch.randn(case.Q, N, case.V, generator=draw).mul_(case.step).to(case.dtype)
    return z, dz, torch.randint(case.V, (N,), generator=draw)


def run(case: Case, elements: int, rounds: int) -> table.Row:
    z, dz, target = inputs(case, elements)
    after = z + dz

    def ours():
        return cross_entropy_delta(z, dz, target)

    def plain():
        base = F.cross_entropy(z, target, reduction="none")
        return base, torch.stack([F.cross_entropy(z1, target, reduction="none") - base for z1 in after])

    ways = {"ours": ours, "torch": plain, "read": lambda: machine.read(z, dz)}
    read_bytes = z.element_size() * (z.numel() + dz.numel())
    return table.measured(case.name(len(target)), ways, read_bytes, rounds)


def main(argv: list[str] | None = None) -> None:
    options = table.parser(__doc__.splitlines()[0]).parse_args(argv)
    torch.set_num_threads(options.threads)
    elements, rounds = (QUICK_ELEMENTS, 3) if options.quick else (ELEMENTS, 15)
    with torch.inference_mode():
        rows = [run(case, elements, options.rounds or rounds) for case in CASES]
    table.show("cross_entropy_delta", rows, save=options.save)


if __name__ == "__main__":
    main()
