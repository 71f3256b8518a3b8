"""layer_norm_delta against its plain torch: a row's norm and its exact changes, parameters moving or not, a residual.

python bench/bench_layer_norm_delta.py [--save] [--quick]
"""

from __future__ import annotations

import torch

import stacks
import table
from finf_fast import reference
from finf_fast.ops import layer_norm_delta


def run(Q: int, N: int, D: int, dtype: torch.dtype, rounds: int) -> list[table.Row]:
    x, residual = stacks.make(Q, N, D, dtype=dtype), stacks.make(Q, N, D, dtype=dtype)
    weight, bias, change = torch.randn(D), torch.randn(D), 1e-3 * torch.randn(Q, D)
    moving = {"dweight": change, "dbias": change}
    cases = {"": {}, "parameters move": moving, "residual": {"residual": residual}}

    def row(word: str, more: dict) -> table.Row:
        return stacks.measured(
            stacks.name(x, word),
            lambda: layer_norm_delta(x, weight, bias, **more),
            lambda: reference.layer_norm_delta(x, weight, bias, **more),
            [x, residual] if "residual" in more else [x],
            rounds,
            writes=1 + ("residual" in more),  # with a residual also the sum
        )

    return [row(word, more) for word, more in cases.items()]


if __name__ == "__main__":
    stacks.main("layer_norm_delta", __doc__.splitlines()[0], run)
