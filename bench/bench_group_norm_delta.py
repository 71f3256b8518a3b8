"""group_norm_delta against its plain torch, on pictures of 16 by 16 as a diffusion net has them.

python bench/bench_group_norm_delta.py [--save] [--quick]
"""

from __future__ import annotations

import torch

import stacks
import table
from finf_fast import reference
from finf_fast.ops import group_norm_delta

SIDE, GROUPS, CHANNELS = 16, 32, 128


def run(Q: int, N: int, D: int, dtype: torch.dtype, rounds: int) -> list[table.Row]:
    samples = max(1, N * D // (CHANNELS * SIDE * SIDE))
    x = stacks.make(Q, samples, CHANNELS, SIDE, SIDE, dtype=dtype)
    weight, bias = torch.randn(CHANNELS), torch.randn(CHANNELS)
    ways = (
        lambda: group_norm_delta(x, GROUPS, weight, bias),
        lambda: reference.group_norm_delta(x, GROUPS, weight, bias),
    )
    return [stacks.measured(stacks.name(x), *ways, [x], rounds)]


if __name__ == "__main__":
    stacks.main("group_norm_delta", __doc__.splitlines()[0], run)
