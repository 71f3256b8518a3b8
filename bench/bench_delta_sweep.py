"""The carried change end to end: time, peak memory and error beside pairs of plain forwards and ``torch.func.jvp``.

Six ways over the same samples, each in a process of its own: the delta engine in bfloat16 and in float32, the pair
engine in float32 with oneDNN's product and with torch's default one, forward-mode differentiation in float32 (query by
query, all it can do), the method's released loop (see bench_sweep.py). Truth is the pair engine in float64. The updates
are plain gradient steps on held-out samples, in factors of rank 32 where these pay. Times are of scoring alone, after
one sample to warm up (the loop's: none); every way takes the batch that the planner gives it, jvp the pair engine's.

    python bench/bench_delta_sweep.py [--models gpt2 resnet18] [--queries 1 4 16] [--save] [--quick]
    python bench/bench_delta_sweep.py --ops gpt2 4      # where the delta engine's time goes, function by function

"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

import bench_sweep
import finf_fast as ff
import table
from bench_delta_accuracy import Called, error
from finf_fast import loss as losses
from finf_fast.delta import DeltaEngine
from finf_fast.delta import engine as delta_engine
from finf_fast.delta.table import name_of
from finf_fast.lowrank import dense
from finf_fast.pair import PairEngine
from finf_fast.planning import free_bytes, make_plan, probe
from finf_fast.reference import product
from finf_fast.transfer import rows

CPU = torch.device("cpu")
RANK = 32
LR = 1e-3  # losses move by 1e-3 (ResNet) or so
HELD_OUT = 2000  # samples drawn; the last are the queries, far past those that are scored
RUN = "FINF_BENCH_RUN"  # names the folder of the updates that the processes of one run share
SAMPLES = {"gpt2": {1: 4, 4: 2, 16: 1}, "resnet18": {1: 256, 4: 128, 16: 64}}
WAYS = ("carried_bf16", "carried_fp32", "pair_fp32", "pair_fp32_default_product", "jvp_fp32", "released_fp32")


def updates_of(case: str, model: nn.Module, queries: int, loss: losses.Loss) -> list[ff.Update]:
    """Steps on held-out samples, taken once and kept on disk for the runs that follow."""
    return [_step(Path(os.environ[RUN]) / f"{case}_{q}.pt", case, model, q, loss) for q in range(queries)]


def _step(path: Path, case: str, model: nn.Module, q: int, loss: losses.Loss) -> ff.Update:
    if not path.exists():
        held_out = bench_sweep.CASES[case][1](HELD_OUT).corpus().read(HELD_OUT - 1 - q, HELD_OUT - q)
        ff.mirror(model, held_out, loss=loss, lr=LR, rank=RANK).save(path)
    return ff.Update.load(path)


def work(case: str, queries: int, samples: int) -> tuple[nn.Module, Any, list[ff.Update], losses.Loss]:
    build, data, loss, _, _ = bench_sweep.CASES[case]
    torch.manual_seed(0)
    model = build().eval().bfloat16().float()  # as checkpoints are kept: every precision is asked about the same net
    corpus = data(samples).corpus()
    loss = losses.resolve(loss)
    return model, corpus.read(0, samples), updates_of(case, model, queries, loss), loss


def engine_of(way: str, model: nn.Module, updates: list[ff.Update], loss: losses.Loss) -> Any:
    kind, word, *plain = way.split("_", 2)
    if plain:
        product.available = lambda: False
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[word]
    if kind == "carried":
        return DeltaEngine(model, updates, loss, CPU, dtype)
    return PairEngine(model, updates, loss, CPU, dtype, keep=free_bytes(CPU) // 4)  # as in a sweep


def one(case: str, way: str, queries: int, samples: int) -> dict[str, Any]:
    """One run in this process: seconds, peak MiB and the scores."""
    model, batch, updates, loss = work(case, queries, samples)
    if way.startswith("released"):
        return released(case, model, updates, loss, samples)
    if way.startswith("jvp"):
        score, size = derivatives(model, updates, loss), 1 if case == "gpt2" else 64
        score(rows(batch, 0, 1))
    else:
        engine = engine_of(way, model, updates, loss)
        found = probe(engine.output, rows(batch, 0, 1))
        size = make_plan(found, 0, samples, CPU, None, rows=engine.rows).block
        score = lambda part: engine.score(part).delta  # noqa: E731
        score(rows(batch, 0, 1))
    since = time.perf_counter()
    delta = torch.cat([score(rows(batch, at, min(at + size, samples))) for at in range(0, samples, size)], 1)
    seconds = time.perf_counter() - since
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "peak_mib": peak, "delta": delta.double().tolist(), "batch": size}


def released(case: str, model: nn.Module, updates: list[ff.Update], loss: losses.Loss, samples: int) -> dict[str, Any]:
    """The method's own loop, its readers started anew for each query as it does; nothing to warm up."""
    _, data, _, _, size = bench_sweep.CASES[case]
    since = time.perf_counter()
    delta = bench_sweep.released(model, data(samples), updates, bench_sweep.CASES[case][2], size)
    seconds = time.perf_counter() - since
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "peak_mib": peak, "delta": delta.double().tolist(), "batch": size}


def derivatives(model: nn.Module, updates: list[ff.Update], loss: losses.Loss) -> Any:
    """Scores of a batch by forward-mode differentiation, one query after another."""
    net = Called(model.requires_grad_(False), loss)
    primals = dict(net.named_parameters())
    tangents = [{f"net.{name}": dense(c) for name, c in update.params.items()} for update in updates]

    def score(batch: Any) -> Tensor:
        found = []
        for tangent in tangents:
            with sdpa_kernel(SDPBackend.MATH):
                call = lambda weights: functional_call(net, weights, (batch,))  # noqa: E731
                found.append(jvp(call, (primals,), (tangent,))[1])
        return torch.stack(found)

    return score


def apart(case: str, way: str, queries: int, samples: int) -> dict[str, Any]:
    """One run in a process of its own."""
    command = [sys.executable, __file__, "--one", case, way, str(queries), str(samples)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case} {way} Q={queries} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(case: str, queries: int, samples: int) -> list[dict[str, object]]:
    """A row a way, the ratios against pairs in float32 of the same run."""
    runs = {way: apart(case, way, queries, samples) for way in (*WAYS, "pair_fp64")}
    true = torch.tensor(runs.pop("pair_fp64")["delta"])
    base = runs["pair_fp32"]["seconds"]
    return [
        {
            "case": case,
            "Q": queries,
            "way": way,
            "samples": samples,
            "batch": run["batch"],
            "seconds": round(run["seconds"], 2),
            "times_pair_fp32": round(run["seconds"] / base, 2),
            "peak_mib": round(run["peak_mib"]),
            "error": float(f"{error(torch.tensor(run['delta']), true):.2g}"),
        }
        for way, run in runs.items()
    ]


def ops(case: str, queries: int) -> list[dict[str, object]]:
    """Milliseconds of one bfloat16 forward by function of torch; what waits (linear layers) is formed at once."""
    model, batch, updates, loss = work(case, queries, 1 if case == "gpt2" else 16)
    engine = engine_of("carried_bf16", model, updates, loss)
    engine.score(batch)
    spent, carry = Counter(), delta_engine.carry

    def timed(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        since = time.perf_counter()
        result = carry(func, args, kwargs)
        if hasattr(result, "form") and result.shape[-1] < delta_engine.FUSED_WIDTH * 8:
            result.form()
        spent[name_of(func)] += time.perf_counter() - since
        return result

    delta_engine.carry = timed
    since = time.perf_counter()
    try:
        engine.score(batch)
    finally:
        delta_engine.carry = carry
    whole = time.perf_counter() - since
    spent["fused modules, head and loss"] = whole - sum(spent.values())
    return [
        {
            "case": f"{case} by function",
            "Q": queries,
            "function": name,
            "ms": round(1e3 * s, 1),
            "%": round(100 * s / whole),
        }
        for name, s in spent.most_common(8)
    ]


def main(argv: list[str] | None = None) -> None:
    options = table.parser(__doc__.splitlines()[0])
    options.add_argument("--models", nargs="+", default=list(SAMPLES), choices=list(SAMPLES))
    options.add_argument("--queries", nargs="+", type=int, default=[1, 4, 16])
    options.add_argument("--ops", nargs=2, metavar=("MODEL", "Q"), help="only where the time goes")
    options = options.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[RUN] = folder
        measure(options)


def measure(options: argparse.Namespace) -> None:
    if options.ops:
        found = ops(options.ops[0], int(options.ops[1]))
    else:
        cases = [(case, q) for case in options.models for q in options.queries]
        found = []
        for case, q in cases[:1] if options.quick else cases:
            found += compare(case, q, 1 if options.quick else SAMPLES[case].get(q, 2))
            for row in found[-len(WAYS) :]:
                print(bench_sweep.show(row), flush=True)
    if options.ops:
        print("\n".join(bench_sweep.show(row) for row in found))
    if options.save:
        print(f"saved to {table.append('delta_sweep', found, table.machine.describe())}")


if __name__ == "__main__":
    if "--one" in sys.argv:
        case, way, queries, samples = sys.argv[2:]
        print(json.dumps(one(case, way, int(queries), int(samples))))
    else:
        main()
