"""What curvature factors of a 100 M-parameter transformer cost: time and memory of the fit, and of a query's step.

    python bench/bench_factors.py [--quick] [--save]

A language model shaped as GPT-2 (12 layers of width 768, 124 M parameters, its head tied to the embedding) on random
tokens: their values change nothing here. Beside the fit stands a plain forward and backward over the same samples.
Then the steps of many queries of an MLP, in passes that they share against a pass each.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import finf_fast as ff
import measure
import table
from finf_fast import loss as losses
from finf_fast.mirrors import joint, mirrors_of

LENGTH, QUERIES = 128, 64


def model(quick: bool) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    size = {"n_layer": 2, "n_embd": 128, "n_head": 4} if quick else {}
    return GPT2LMHeadModel(GPT2Config(n_positions=LENGTH, **size)).eval()


def plain_pass(net: nn.Module, ids: torch.Tensor, batch: int) -> None:
    """Forward and backward over all samples, as training would."""
    for rows in ids.split(batch):
        losses.CausalLM().per_sample(net, {"input_ids": rows}).mean().backward()
        net.zero_grad()


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    since = time.perf_counter()
    result = work()
    return time.perf_counter() - since, result


def row(quick: bool, samples: int, batch: int) -> dict[str, Any]:
    """The measurements of one fit and two steps; the first step makes the inverses."""
    net, ids = model(quick), torch.randint(0, 50257, (samples, LENGTH))
    plain = seconds(lambda: plain_pass(net, ids, batch))[0]
    kept: list[Any] = []

    def fit() -> None:
        settings = {"loss": "causal_lm", "batch_size": batch, "progress": False}
        kept.append(seconds(lambda: ff.fit_factors(net, {"input_ids": ids}, **settings)))

    peak = measure.peak_mib(fit)
    spent, factors = kept[0]

    def step() -> None:
        ff.mirror(net, {"input_ids": ids[:1]}, loss="causal_lm", method="kfac", factors=factors)

    first, again = seconds(step)[0], seconds(step)[0]
    return {
        "case": f"GPT-2 shape, {sum(p.numel() for p in net.parameters()) / 1e6:.0f} M parameters",
        "tokens": ids.numel(),
        "fit_seconds": round(spent, 2),
        "plain_seconds": round(plain, 2),
        "peak_mib": round(peak),
        "factors_mib": round(factors.nbytes / 2**20),
        "first_step_seconds": round(first, 2),
        "step_seconds": round(again, 2),
    }


def joined(width: int, rounds: int) -> dict[str, Any]:
    """Milliseconds a K-FAC step of each of many queries, sharing passes and not."""
    torch.manual_seed(0)
    sizes = (784, width, width, 10)
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    net, x, y = nn.Sequential(*layers[:-1]).eval(), torch.randn(512, 784), torch.randint(10, (512,))
    factors = ff.fit_factors(net, (x, y), progress=False)

    def steps(most: int) -> None:
        before, joint.MOST = joint.MOST, most
        try:
            mirrors_of(net, (x[:QUERIES], y[:QUERIES]), method="kfac", factors=factors)
        finally:
            joint.MOST = before

    spent = measure.interleaved({"joint": lambda: steps(QUERIES), "alone": lambda: steps(1)}, rounds)
    return {
        "case": f"MLP {'-'.join(map(str, sizes))}, {QUERIES} queries",
        "step_ms": round(measure.median_ms(spent["joint"]) / QUERIES, 2),
        "alone_ratio": round(measure.ratio(spent["alone"], spent["joint"]), 2),
    }


def main(argv: list[str] | None = None) -> None:
    options = table.parser(__doc__.splitlines()[0])
    options.add_argument("--samples", type=int, default=32, help=f"of {LENGTH} tokens")
    options.add_argument("--batch", type=int, default=8)
    options = options.parse_args(argv)
    torch.set_num_threads(options.threads)
    rounds = options.rounds or (1 if options.quick else 5)
    rows = [joined(width, rounds) for width in ((256,) if options.quick else (256, 2048))]
    rows.append(row(options.quick, options.samples, options.batch))
    print("\n".join(" | ".join(f"{key} {value}" for key, value in found.items()) for found in rows))
    if options.save:
        print(f"saved to {table.append('factors', rows, table.machine.describe())}")


if __name__ == "__main__":
    main()
