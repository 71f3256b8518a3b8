"""attention_delta beside its plain torch face: time, rate, and memory over long rows.

    python bench/bench_attention_delta.py [--save] [--quick] [--threads 1]

GFLOP/s count the products that are needed: 1 + 2 Q on either side of the softmax for every pair of row and key seen.
Memory is what a call takes with its result, at T and at 16 T.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

import measure
import table
from finf_fast.ops import attention_delta

B, H, E = 1, 12, 64
FACES = ("cpp", "reference")


def inputs(T: int, Q: int, dtype: torch.dtype, heads: int = H) -> list[torch.Tensor]:
    """q, k and v as a transformer hands them over: heads beside each other in a row."""
    draw = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1.0] + Q * [1e-3]).view(-1, 1, 1, 1, 1)
    return [(sizes * torch.randn(1 + Q, B, T, heads, E, generator=draw)).to(dtype).transpose(2, 3) for _ in range(3)]


def way(face: str, qkv: list[torch.Tensor], causal: bool) -> Callable[[], object]:
    def run() -> object:
        os.environ["FINF_BACKEND"] = face
        with torch.inference_mode():
            return attention_delta(*qkv, causal=causal)

    return run


def compare(T: int, Q: int, dtype: torch.dtype, causal: bool, rounds: int) -> dict[str, object]:
    qkv = inputs(T, Q, dtype)
    seconds = measure.interleaved({face: way(face, qkv, causal) for face in FACES}, rounds)
    pairs = T * (T + 1) // 2 if causal else T * T
    ms = measure.median_ms(seconds["cpp"])
    return {
        "case": f"{str(dtype)[6:]}, Q={Q}, T={T}, H={H}, E={E}{', causal' if causal else ''}",
        "ms": round(ms, 2),
        "GFLOP/s": round(B * H * pairs * E * 4 * (1 + 2 * Q) / ms / 1e6),
        "× reference": round(measure.ratio(seconds["reference"], seconds["cpp"]), 2),
    }


def memory(T: int, Q: int) -> dict[str, object]:
    """Of a call, its result included; one head, whose scores and changes would take (1 + Q) T² numbers."""
    qkv = inputs(T, Q, torch.float32, heads=1)
    peak = measure.peak_mib(way("cpp", qkv, True))
    result, scores = ((1 + Q) * B * T * width * 4 / 2**20 for width in (E, T))
    return {
        "case": f"memory, T={T}",
        "peak MiB": round(peak, 1),
        "result MiB": round(result, 1),
        "scores MiB": round(scores),
    }


def main(argv: list[str] | None = None) -> None:
    options = table.parser(__doc__.splitlines()[0]).parse_args(argv)
    torch.set_num_threads(options.threads)
    rounds = options.rounds or (3 if options.quick else 15)
    T = 64 if options.quick else 512
    rows = [
        compare(T, Q, dtype, causal, rounds)
        for Q in (1, 4)
        for dtype in (torch.float32, torch.bfloat16)
        for causal in (True, False)
    ]
    rows += [memory(long, 4) for long in (T, 16 * T)]
    about = table.machine.describe()
    for row in rows:
        print(" | ".join(f"{key} {value}" for key, value in row.items()))
    if options.save:
        print(f"saved to {table.append('attention_delta', rows, about)}")


if __name__ == "__main__":
    main()
