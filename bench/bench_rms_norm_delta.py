"""rms_norm_delta against its plain torch: a row's norm and its exact changes.

python bench/bench_rms_norm_delta.py [--save] [--quick]
"""

from __future__ import annotations

import torch

import stacks
import table
from finf_fast import reference
from finf_fast.ops import rms_norm_delta


def run(Q: int, N: int, D: int, dtype: torch.dtype, rounds: int) -> list[table.Row]:
    x, weight = stacks.make(Q, N, D, dtype=dtype), torch.randn(D)
    ways = (lambda: rms_norm_delta(x, weight), lambda: reference.rms_norm_delta(x, weight))
    return [stacks.measured(stacks.name(x), *ways, [x], rounds)]


if __name__ == "__main__":
    stacks.main("rms_norm_delta", __doc__.splitlines()[0], run)
