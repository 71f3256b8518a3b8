"""linear_delta against its plain torch: the best product that torch has, and the changes' products added one by one.

Counted are the multiplications of a layer whose weight has not changed, 2 (1+Q) N D D'; what a change of rank 32 costs
beyond these is seen in the difference. The peak is what one thread multiplies and adds in registers, times the threads.

    python bench/bench_linear_delta.py [--save] [--quick]
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import machine
import measure
import stacks
import table
from finf_fast import _C, reference
from finf_fast.ops import linear_delta

RANK = 32
# (Q, N, D, D'): the layers of a GPT-2 of 512 tokens, more queries, a few rows, a narrow layer of many.
SHAPES = [(4, 512, 768, 3072), (4, 512, 3072, 768), (4, 512, 768, 768), (1, 512, 768, 3072), (16, 512, 768, 3072)]
SHAPES += [(1, 32, 768, 3072), (4, 4096, 64, 64)]
KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Row:
    """One measured case: median milliseconds, the rate of the shared product, and how much longer plain torch takes."""

    case: str
    ms: float
    gflops: float
    peak_percent: float
    torch_ratio: float

    def line(self) -> str:
        rate = f"{self.gflops:6.1f} GFLOP/s | {self.peak_percent:4.1f} % of peak"
        return f"{self.case:52} | {self.ms:8.2f} ms | {rate} | {self.torch_ratio:.2f} x torch"


def layer(Q: int, N: int, D: int, E: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, dict]:
    draw = torch.Generator().manual_seed(0)
    U, V = (torch.randn(Q, width, RANK, generator=draw) for width in (E, D))
    W = torch.randn(E, D, generator=draw) / D**0.5
    given = {"dW_factors": (U.mul_(1e-3).to(dtype), V.to(dtype))}
    return stacks.make(Q, N, D, dtype=dtype), W.to(dtype), torch.randn(E, generator=draw).to(dtype), given


def run(Q: int, N: int, D: int, E: int, dtype: torch.dtype, rounds: int, peak: float) -> list[Row]:
    x, W, bias, low_rank = layer(Q, N, D, E, dtype)
    rows = []
    for word, more in {"": {}, f"rank {RANK}": low_rank}.items():
        ways = {
            "ours": lambda more=more: linear_delta(x, W, bias, **more),
            "torch": lambda more=more: reference.linear_delta(x, W, bias, **more),
        }
        seconds = measure.interleaved(ways, rounds)
        ms = measure.median_ms(seconds["ours"])
        gflops = 2 * (1 + Q) * N * D * E / ms / 1e6
        case = " ".join([f"Q={Q} N={N} {D} to {E} {KINDS[dtype]}", word]).strip()
        rows.append(Row(case, ms, gflops, 100 * gflops / peak, measure.ratio(seconds["torch"], seconds["ours"])))
    return rows


def main(argv: list[str] | None = None) -> None:
    options = table.parser(__doc__.splitlines()[0]).parse_args(argv)
    torch.set_num_threads(options.threads)
    about, rows = machine.describe(), []
    print(f"linear_delta on {about['processor']}, {options.threads} threads, {about['isa']}, torch {about['torch']}")
    with torch.inference_mode():
        for dtype, kind in KINDS.items():
            peak = options.threads * max(_C.fma_peak(kind) for _ in range(5))
            for shape in SHAPES[-2:] if options.quick else SHAPES:
                rows += run(*shape, dtype, options.rounds or (3 if options.quick else 9), peak)
                print("\n".join(row.line() for row in rows[-2:]), flush=True)
    if options.save:
        print(f"saved to {table.append('linear_delta', [asdict(row) for row in rows], about)}")


if __name__ == "__main__":
    main()
