"""noise against torch.randn, which is tied to no sample. Bytes: the numbers written; "read" is filling as many.

python bench/bench_noise.py [--save] [--quick]
"""

from __future__ import annotations

import torch

import table
from finf_fast.ops import noise

# Pictures of 64 by 64, and latents of 4 by 64 by 64.
SHAPES = ((3, 64, 64), (4, 64, 64))
SAMPLES, QUICK_SAMPLES = 256, 8


def run(shape: tuple[int, ...], S: int, rounds: int) -> table.Row:
    samples, size = torch.arange(S), (S, *shape)
    ways = {
        "ours": lambda: noise(0, samples, 0, shape),
        "torch": lambda: torch.randn(size),
        "read": lambda: torch.ones(size),
    }
    return table.measured(f"S={S} of {'x'.join(map(str, shape))}", ways, 4 * torch.Size(size).numel(), rounds)


def main(argv: list[str] | None = None) -> None:
    options = table.parser(__doc__.splitlines()[0]).parse_args(argv)
    torch.set_num_threads(options.threads)
    S, rounds = (QUICK_SAMPLES, 3) if options.quick else (SAMPLES, 15)
    with torch.inference_mode():
        rows = [run(shape, S, options.rounds or rounds) for shape in SHAPES]
    table.show("noise", rows, save=options.save)


if __name__ == "__main__":
    main()
