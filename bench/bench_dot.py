"""First order for many queries: what a query costs the dot engine, and a whole job beside the engines and the loop.

GPT-2's shape (124 M parameters, head tied) on windows of 512 tokens, float32 with oneDNN's product. The cost of a query
is the slope between 16 and 256 of them, in plain forwards without gradients; their factors are random, which changes no
cost. The whole job is a sweep from end to end with real steps (planning and checks included), against the method's
released loop on the same samples; the error is against float64 gradients' worth: the carried change in float64.

    python bench/bench_dot.py [--samples 8] [--quick] [--save]
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import bench_sweep
import finf_fast as ff
import machine
import measure
import table
from finf_fast.dot import DotEngine
from finf_fast.loss import resolve
from finf_fast.lowrank import LowRank
from finf_fast.pair import PairEngine

CPU = torch.device("cpu")
RANK, FEW, MANY, QUERIES = 16, 16, 256, 16
LR = 1e-4


def tied_gpt2(quick: bool) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    size = {"n_layer": 2, "n_embd": 128, "n_head": 4} if quick else {}
    return GPT2LMHeadModel(GPT2Config(n_positions=512, **size)).eval()


def random_update(model: nn.Module) -> ff.Update:
    """Factors of the stated rank wherever they pay, as a step with ``rank=`` makes them."""

    def change(p: Tensor) -> Tensor | LowRank:
        if p.dim() != 2 or min(p.shape) <= 2 * RANK:
            return 1e-4 * torch.randn_like(p)
        return LowRank(*(1e-2 * torch.randn(n, RANK) for n in p.shape))

    return ff.Update({name: change(p.detach()) for name, p in model.named_parameters()})


def cost(model: nn.Module, batch: Tensor, rounds: int) -> dict[str, Any]:
    """Seconds of a batch by number of queries, and the slope."""
    loss, update = resolve("causal_lm"), random_update(model)
    plain = PairEngine(model, [], loss, CPU, torch.float32)
    ways: dict[str, Callable[[], object]] = {"forward": lambda: plain.output(batch)}
    for queries in (FEW, MANY):
        engine = DotEngine(model, [update] * queries, loss, CPU, torch.float32)
        engine.score(batch)  # the first of its kind is checked sample by sample
        ways[str(queries)] = lambda engine=engine: engine.score(batch)
    seconds = measure.interleaved(ways, rounds)
    of = {name: statistics.median(values) for name, values in seconds.items()}
    slopes = [
        (many - few) / (MANY - FEW) / forward
        for forward, few, many in zip(seconds["forward"], seconds[str(FEW)], seconds[str(MANY)], strict=True)
    ]
    return {
        "case": f"a query of rank {RANK}",
        "tokens": batch.numel(),
        "forward_seconds": round(of["forward"], 3),
        f"forwards_Q{FEW}": round(of[str(FEW)] / of["forward"], 2),
        f"forwards_Q{MANY}": round(of[str(MANY)] / of["forward"], 2),
        "percent_of_a_forward_per_query": round(100 * statistics.median(slopes), 2),
    }


def job(model: nn.Module, data: Any, held_out: Tensor) -> list[dict[str, Any]]:
    """A sweep with real steps by each engine, and the released loop: seconds, and how far from float64."""
    updates = [ff.mirror(model, one[None], loss="causal_lm", lr=LR, rank=RANK) for one in held_out]
    lost = [share for update in updates for share in update.record["discarded_by_tensor"].values()]
    settings = {"loss": "causal_lm", "progress": False}
    ways = {
        "dot fp32": {"engine": "dot"},
        "delta bf16": {"engine": "delta", "dtype": torch.bfloat16},
        "delta fp32": {"engine": "delta"},
    }
    true = np.asarray(ff.sweep(model, updates, data.corpus(), dtype=torch.float64, **settings).delta)
    found = {}
    for name, how in ways.items():
        found[name] = timed(lambda how=how: ff.sweep(model, updates, data.corpus(), **how, **settings).delta)
    found["released loop"] = timed(lambda: bench_sweep.released(model, data, updates, "causal_lm", 4))
    return [
        {
            "case": f"whole job, Q = {len(updates)}, rank {RANK}",
            "way": name,
            "samples": len(data),
            "seconds": round(seconds, 2),
            "times_faster_than_released": round(found["released loop"][0] / seconds, 1),
            "error": float(f"{np.linalg.norm(np.asarray(delta, np.float64) - true) / np.linalg.norm(true):.2g}"),
            "mean_discarded_percent": round(100 * statistics.mean(lost), 2),
        }
        for name, (seconds, delta) in found.items()
    ]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    since = time.perf_counter()
    result = work()
    return time.perf_counter() - since, result


def main(argv: list[str] | None = None) -> None:
    options = table.parser(__doc__.splitlines()[0])
    options.add_argument("--samples", type=int, default=8, help="of the whole job")
    options = options.parse_args(argv)
    torch.set_num_threads(options.threads)
    quick, found = options.quick, []
    model, samples = tied_gpt2(quick), 2 if quick else options.samples
    found.append(cost(model, bench_sweep.Tokens(2).ids, 1 if quick else 3))
    print(found[-1], flush=True)
    held_out = bench_sweep.Tokens(samples + (2 if quick else QUERIES)).ids[samples:]
    found += job(model, bench_sweep.Tokens(samples), held_out)
    print("\n".join(bench_sweep.show(row) for row in found[1:]))
    if options.save:
        print(f"saved to {table.append('dot', found, machine.describe())}")


if __name__ == "__main__":
    main()
