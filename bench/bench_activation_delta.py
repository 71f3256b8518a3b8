"""activation_delta against its plain torch: every function, one gate, and changes of the size of the values.

python bench/bench_activation_delta.py [--save] [--quick]
"""

from __future__ import annotations

import torch

import stacks
import table
from finf_fast import reference
from finf_fast.ops import activation_delta
from finf_fast.ops.activation_delta import KINDS


def run(Q: int, N: int, D: int, dtype: torch.dtype, rounds: int) -> list[table.Row]:
    def row(kind: str, gate: torch.Tensor | None = None, step: float = 1e-3) -> table.Row:
        x = stacks.make(Q, N, D, dtype=dtype, step=step)
        word = kind + (" gated" if gate is not None else "") + ("" if step < 1 else " large changes")
        return stacks.measured(
            stacks.name(x, word),
            lambda: activation_delta(x, kind, gate),
            lambda: reference.activation_delta(x, kind, gate),
            [x] if gate is None else [x, gate],
            rounds,
        )

    gate = stacks.make(Q, N, D, dtype=dtype)
    return [*(row(kind) for kind in KINDS), row("silu", gate), row("gelu", step=1.0)]


if __name__ == "__main__":
    stacks.main("activation_delta", __doc__.splitlines()[0], run)
