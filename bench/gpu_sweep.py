"""The GPU suite's sweeps end to end, a process of its own: what it finds it prints, a JSON object a line.

A GPT-2-shaped net in bfloat16 under four queries, against the device's peak; ResNet-18 on 32×32 images under sixteen,
against the method's released loop over the same images, updates and device (float32, as it comes). Then the texts to
first order and with recorded forwards, each beside a carried sweep of its own. Of two sweeps the second counts.

    python bench/gpu_sweep.py --seconds 60 --gemm-tflops 790 [--dry-run]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
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


@dataclass
class Texts:
    """A GPT-2-shaped net, its queries' steps, and a sweep over windows that ran once before it was timed: the same
    windows, for what is compiled is compiled for their shapes."""

    device: torch.device
    dry: bool

    def __post_init__(self):
        from transformers import GPT2Config, GPT2LMHeadModel

        self.Q, S, self.length = (2, 2, 8) if self.dry else (4, 1024, 512)
        small = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 97, "n_positions": self.length}
        model = GPT2LMHeadModel(GPT2Config(**small)) if self.dry else bench_sweep.gpt2()
        self.model = model.eval().bfloat16().float().to(self.device)
        drawn = torch.randint(0, model.config.vocab_size, (S + self.Q, self.length))
        self.ids, queries = drawn[:S], [drawn[S + q : S + q + 1] for q in range(self.Q)]
        self.updates = steps(self.model, queries, "causal_lm")
        self.seconds, self.scores = self.swept()

    def swept(self, engine: str = "delta") -> tuple[float, ff.Scores]:
        for _ in range(2):
            corpus = ff.open_corpus(self.ids)
            found = seconds_of(self.model, self.updates, corpus, "causal_lm", engine)
        return found

    def row(self, seconds: float, how: str = "") -> dict[str, Any]:
        return {"case": f"gpt2 T={self.length} Q={self.Q} bf16{how}", "samples": len(self.ids), "ms": 1e3 * seconds}


def language(device: torch.device, dry: bool, peak: float) -> dict[str, Any]:
    texts = Texts(device, dry)
    products = (1 + texts.Q) * len(texts.ids) * flop_of(texts.model, texts.ids[:1], "causal_lm")
    tflops = products / texts.seconds / 1e12
    return {
        **texts.row(texts.seconds),
        "tflops": tflops,
        "percent_of_gemm": 100 * tflops / peak,
        "notes": {"plan": texts.scores.plan, "time": where_to(texts.scores)},
    }


def first_order(device: torch.device, dry: bool, peak: float) -> dict[str, Any]:
    texts = Texts(device, dry)
    seconds, scores = texts.swept("dot")
    times, notes = {"carried": texts.seconds / seconds}, {"plan": scores.plan, "scores": apart(scores, texts.scores)}
    return {**texts.row(seconds, " to first order"), "times": times, "notes": notes}


def with_graphs(device: torch.device, dry: bool, peak: float) -> dict[str, Any]:
    """The last of all: a recording that fails may take the device with it."""
    texts = Texts(device, dry)
    os.environ["FINF_GRAPHS"] = "1"
    seconds, scores = texts.swept()
    said = f"{scores.record.get('graphs', 'none on this device')}"
    times, notes = {"without": texts.seconds / seconds}, {"graphs": said, "scores": apart(scores, texts.scores)}
    return {**texts.row(seconds, " with graphs"), "times": times, "notes": notes}


def where_to(scores: ff.Scores) -> str:
    """What a sweep's time went to, in percent, and how many batches crossed ahead of it."""
    stages = ", ".join(f"{stage} {share}" for stage, share in scores.record["percent_of_time"].items())
    return f"{stages} %; {scores.record.get('batches_sent_ahead', 0)} batches sent ahead"


def apart(scores: ff.Scores, plain: ff.Scores) -> str:
    return f"scores {np.linalg.norm(scores.delta - plain.delta) / np.linalg.norm(plain.delta):.1e} apart"


def images(device: torch.device, dry: bool, peak: float) -> dict[str, Any]:
    Q, S = (2, 4) if dry else (16, 8192)
    model = bench_sweep.ResNet18().eval().bfloat16().float().to(device)
    data, held_out = bench_sweep.Images(S), bench_sweep.Images(S + Q).corpus()
    updates = steps(model, [held_out.read(S + q, S + q + 1) for q in range(Q)], "cross_entropy")
    for _ in range(2):  # as for texts
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
        "notes": {"plan": scores.plan, "time": where_to(scores), "released loop": "float32, torch's own TF32"},
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--seconds", type=float, required=True, help="after which no further case is begun")
    options.add_argument("--gemm-tflops", type=float, required=True, help="the device's peak, for the percentages")
    options.add_argument("--dry-run", action="store_true")
    options = options.parse_args()
    until = time.monotonic() + options.seconds
    device = torch.device("cpu" if options.dry_run else "cuda")
    for work in (language, images, first_order, with_graphs):
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
