"""squared_error_delta against its plain torch. Bytes: predictions, targets and changes, each read once.

python bench/bench_squared_error_delta.py [--save] [--quick]
"""

from __future__ import annotations

import torch

import machine
import stacks
import table
from finf_fast import reference
from finf_fast.ops import squared_error_delta


def run(Q: int, N: int, D: int, dtype: torch.dtype, rounds: int) -> list[table.Row]:
    x, y = stacks.make(Q, N, D, dtype=dtype), torch.randn(N, D).to(dtype)
    ways = {
        "ours": lambda: squared_error_delta(x[0], x[1:], y),
        "torch": lambda: reference.squared_error_delta(x[0], x[1:], y),
        "read": lambda: machine.read(x, y),
    }
    return [table.measured(stacks.name(x), ways, x.element_size() * (x.numel() + y.numel()), rounds)]


if __name__ == "__main__":
    stacks.main("squared_error_delta", __doc__.splitlines()[0], run)
