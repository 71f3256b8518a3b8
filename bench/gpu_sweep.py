"""The GPU suite's sweeps end to end, a process of its own: what it finds it prints, a JSON object a line.

A GPT-2-shaped net in bfloat16 under four queries, against the device's peak; ResNet-18 on 32×32 images under sixteen,
against the method's released loop over the same images, updates and device (float32, as it comes). The sweep runs once
unmeasured, on a few samples, for what is compiled at first use.

    python bench/gpu_sweep.py --seconds 60 --gemm-tflops 790 [--dry-run]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import bench_sweep
import finf_fast as ff
from bench_delta_sweep import LR, RANK
from finf_fast import loss as losses
from finf_fast.transfer import to_device

WARM = 8  # samples of the sweep that is not measured


def say(**found: Any) -> None:
    print(json.dumps(found), flush=True)


def steps(model: nn.Module, queries: list[Any], loss: str) -> list[ff.Update]:
    """One plain gradient step a query, in factors of rank RANK where these pay."""
    return [ff.mirror(model, query, loss=loss, lr=LR, rank=RANK) for query in queries]


def seconds_of(
    model: nn.Module, updates: list[ff.Update], corpus: Any, loss: str, engine: str = "delta"
) -> tuple[float, ff.Scores]:
    """Of one sweep in bfloat16; scores lie on the CPU at its end, so that the device is done."""
    since = time.perf_counter()
    scores = ff.sweep(model, updates, corpus, loss=loss, dtype=torch.bfloat16, engine=engine, progress=False)
    return time.perf_counter() - since, scores


def flop_of(model: nn.Module, sample: Any, loss: str) -> int:
    """Products of one plain forward of a sample, by torch's own counter."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        losses.resolve(loss).per_sample(model, to_device(sample, next(model.parameters()).device))
    return counter.get_total_flops()


def language(device: torch.device, dry: bool, peak: float) -> dict[str, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    Q, S, length = (2, 2, 8) if dry else (4, 1024, 512)
    small = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 97, "n_positions": length}
    model = GPT2LMHeadModel(GPT2Config(**small)) if dry else bench_sweep.gpt2()
    model = model.eval().bfloat16().float().to(device)
    ids = torch.randint(0, model.config.vocab_size, (S + Q, length))
    updates = steps(model, [ids[S + q : S + q + 1] for q in range(Q)], "causal_lm")
    seconds_of(model, updates, ff.open_corpus(ids[:WARM]), "causal_lm")
    seconds, scores = seconds_of(model, updates, ff.open_corpus(ids[:S]), "causal_lm")
    graphed, said = with_graphs(model, updates, ff.open_corpus(ids[:S]), scores)
    dot, first = seconds_of(model, updates, ff.open_corpus(ids[:S]), "causal_lm", engine="dot")
    tflops = (1 + Q) * S * flop_of(model, ids[:1], "causal_lm") / seconds / 1e12
    return {
        "case": f"gpt2 T={length} Q={Q} bf16",
        "samples": S,
        "ms": 1e3 * seconds,
        "tflops": tflops,
        "percent_of_gemm": 100 * tflops / peak,
        "times": {"with graphs": graphed / seconds, "to first order": dot / seconds},
        "notes": {"plan": scores.plan, "graphs": said, "time": where_to(scores), "first order": apart(first, scores)},
    }


def where_to(scores: ff.Scores) -> str:
    """What a sweep's time went to, in percent, and how many batches crossed ahead of it."""
    stages = ", ".join(f"{stage} {share}" for stage, share in scores.record["percent_of_time"].items())
    return f"{stages} %; {scores.record.get('batches_sent_ahead', 0)} batches sent ahead"


def with_graphs(model: nn.Module, updates: list[ff.Update], corpus: Any, plain: ff.Scores) -> tuple[float, str]:
    """Seconds of the same sweep with forwards recorded, and how its scores compare."""
    os.environ["FINF_GRAPHS"] = "1"
    try:
        seconds, scores = seconds_of(model, updates, corpus, "causal_lm")
    finally:
        del os.environ["FINF_GRAPHS"]
    return seconds, f"{scores.record.get('graphs', 'none on this device')}, {apart(scores, plain)}"


def apart(scores: ff.Scores, plain: ff.Scores) -> str:
    return f"scores {np.linalg.norm(scores.delta - plain.delta) / np.linalg.norm(plain.delta):.1e} apart"


def images(device: torch.device, dry: bool, peak: float) -> dict[str, Any]:
    Q, S = (2, 4) if dry else (16, 8192)
    model = bench_sweep.ResNet18().eval().bfloat16().float().to(device)
    data, held_out = bench_sweep.Images(S), bench_sweep.Images(S + Q).corpus()
    updates = steps(model, [held_out.read(S + q, S + q + 1) for q in range(Q)], "cross_entropy")
    seconds_of(model, updates, bench_sweep.Images(WARM).corpus(), "cross_entropy")
    seconds, scores = seconds_of(model, updates, data.corpus(), "cross_entropy")
    since = time.perf_counter()
    bench_sweep.released(model, data, updates, "cross_entropy", bench_sweep.CASES["resnet18"][4])
    released = time.perf_counter() - since
    tflops = (1 + Q) * S * flop_of(model, held_out.read(0, 1), "cross_entropy") / seconds / 1e12
    return {
        "case": f"resnet18 32x32 Q={Q} bf16",
        "samples": S,
        "ms": 1e3 * seconds,
        "tflops": tflops,
        "percent_of_gemm": 100 * tflops / peak,
        "times": {"released loop": released / seconds},
        "notes": {"plan": scores.plan, "time": where_to(scores)},
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--seconds", type=float, required=True, help="after which no further case is begun")
    options.add_argument("--gemm-tflops", type=float, required=True, help="the device's peak, for the percentages")
    options.add_argument("--dry-run", action="store_true")
    options = options.parse_args()
    until = time.monotonic() + options.seconds
    device = torch.device("cpu" if options.dry_run else "cuda")
    for work in (language, images):
        torch.manual_seed(0)
        row = {"case": work.__name__, "notes": {}}
        try:
            if time.monotonic() > until:
                row["notes"]["ours"] = "not run: no time left"
            else:
                row = work(device, options.dry_run, options.gemm_tflops)
        except Exception as error:
            row["notes"]["ours"] = f"failed: {type(error).__name__}: {error}"
        say(row={"op": "sweep", **row})
    say(done=True)


if __name__ == "__main__":
    main()
