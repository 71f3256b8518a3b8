"""The whole sweep (pair engine) against the method's released loop: same model, same data, same processor.

The released loop (Forward-INF's data-leakage notebook) opens a one-worker DataLoader for every query and runs two
forwards a batch, autograd on. The sweep reads the data once and runs 1 + Q forwards. Counting forwards alone gives
2Q/(1+Q). The mirror steps are made before either clock starts. Each run is a process of its own, so that peak memory is
its own too; the two alternate.

    python bench/bench_sweep.py [--models resnet18 gpt2 small] [--queries 1 4 16 64] [--rounds 1] [--save] [--quick]

"memory" runs the small model on 1, 4 and 16 times as many samples: the sweep's peak must not follow the corpus, which
lies in a file here.
"""

from __future__ import annotations

import copy
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

import finf_fast as ff
import table
from finf_fast.lowrank import dense
from finf_fast.transfer import to_device


class Block(nn.Module):
    """ResNet's basic block (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if same else shortcut

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Sequential):
    """ResNet-18 in its CIFAR form: 3×3 stem, no first pooling, 100 classes; 11.2 M parameters."""

    def __init__(self):
        shape = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
        shape += [(128, 256, 2), (256, 256, 1), (256, 512, 2), (512, 512, 1)]
        stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
        blocks = [Block(*sizes) for sizes in shape]
        super().__init__(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 100))


class Images(Dataset):
    """Bytes on one side, one normalised float image at a time on the other, as image datasets are usually written."""

    mean, std = torch.tensor([0.5, 0.49, 0.45]).view(3, 1, 1), torch.tensor([0.25, 0.24, 0.26]).view(3, 1, 1)

    def __init__(self, samples: int):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randint(0, 256, (samples, 3, 32, 32), dtype=torch.uint8, generator=generator)
        self.y = torch.randint(0, 10, (samples,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int):
        return (self.x[i].float() / 255 - self.mean) / self.std, int(self.y[i])

    def corpus(self):
        """The same images for the sweep: normalised a batch at a time."""
        return ff.open_corpus((self.x, self.y), transform=normalise)


def normalise(batch):
    x, y = batch
    return (x.float() / 255 - Images.mean) / Images.std, y


class Tokens(Dataset):
    def __init__(self, samples: int):
        self.ids = torch.randint(0, 50257, (samples, 512), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int):
        return self.ids[i]

    def corpus(self):
        return ff.open_corpus(self.ids)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_layer=12, n_embd=768, n_head=12, vocab_size=50257, n_positions=512))


def small() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, 10))


# What is run: model, data, loss, samples for Q queries, batch of the released loop (the notebook's images: 128).
CASES = {
    "resnet18": (ResNet18, Images, "cross_entropy", {1: 1024, 4: 512, 16: 256, 64: 64}, 128),
    "gpt2": (gpt2, Tokens, "causal_lm", {1: 16, 4: 8, 16: 2, 64: 1}, 4),
    "small": (small, Images, "cross_entropy", {1: 60000, 4: 60000, 16: 60000, 64: 20000}, 128),
}


def prepare(case: str, queries: int, samples: int):
    """Model, data and updates. The queries share one random change of all weights, for 64 of GPT-2's would not fit in
    memory; neither side gains by it."""
    build, data, loss, _, batch = CASES[case]
    torch.manual_seed(0)
    model = build().eval()
    change = {name: 1e-3 * torch.randn_like(p) for name, p in model.named_parameters()}
    return model, data(samples), [ff.Update(change) for _ in range(queries)], loss, batch


def ours(model, data, updates, loss, batch):
    ff.sweep(model, updates, data.corpus(), loss=loss, engine="pair")


def released(model, data, updates, loss, batch):
    """Two forwards a batch a query, autograd on, the data read again for each query: (Q, S) changes."""
    found = []
    for update in updates:
        after = copy.deepcopy(model)
        with torch.no_grad():
            for name, p in after.named_parameters():
                p.add_(dense(update.params[name]))
        loader = DataLoader(data, batch_size=batch, num_workers=1)
        scores = []
        for sample in loader:
            sample = to_device(sample, next(model.parameters()).device)
            scores.append((losses(after, sample, loss) - losses(model, sample, loss)).detach())
        found.append(torch.cat(scores))
    return torch.stack(found)


def losses(model, sample, loss):
    if loss == "cross_entropy":
        return F.cross_entropy(model(sample[0]), sample[1], reduction="none")
    z = model(sample).logits[:, :-1]
    return F.cross_entropy(z.flatten(0, 1), sample[:, 1:].flatten(), reduction="none").view(len(sample), -1).mean(1)


def one(case: str, side: str, queries: int, samples: int) -> dict:
    """One run in this process: seconds and peak memory, what both sides hold before the start included."""
    work = prepare(case, queries, samples)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    since = time.perf_counter()
    {"ours": ours, "released": released}[side](*work)
    seconds = time.perf_counter() - since
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "peak_mib": peak / 1024, "extra_mib": (peak - held) / 1024}


def apart(case: str, side: str, queries: int, samples: int) -> dict:
    """One run in a process of its own."""
    command = [sys.executable, __file__, "--one", case, side, str(queries), str(samples)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case} {side} Q={queries} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(case: str, queries: int, rounds: int, samples: int) -> dict:
    """Both sides in turn, `rounds` times: medians, the ratio round by round, the highest peak."""
    runs: dict[str, list[dict]] = {"ours": [], "released": []}
    for _ in range(rounds):
        for side, found in runs.items():
            found.append(apart(case, side, queries, samples))
    seconds = {side: [run["seconds"] for run in found] for side, found in runs.items()}
    ratio = statistics.median(b / a for a, b in zip(seconds["ours"], seconds["released"], strict=True))
    return {
        "case": case,
        "Q": queries,
        "samples": samples,
        "rounds": rounds,
        "ours_s": round(statistics.median(seconds["ours"]), 2),
        "released_s": round(statistics.median(seconds["released"]), 2),
        "ratio": round(ratio, 2),
        "ratio_by_count": round(2 * queries / (1 + queries), 2),
        "ours_peak_mib": round(max(run["peak_mib"] for run in runs["ours"])),
        "released_peak_mib": round(max(run["peak_mib"] for run in runs["released"])),
    }


def on_file(samples: int) -> dict:
    """The small model over ``samples`` images in an .npy file: time, and peak memory over what was held before."""
    with tempfile.TemporaryDirectory() as folder:
        x = np.lib.format.open_memmap(Path(folder) / "x.npy", "w+", np.uint8, (samples, 3, 32, 32))
        np.save(Path(folder) / "y.npy", np.arange(samples) % 10)
        del x  # a hole of zeros: the reading is real, the disk is not filled
        model, _, updates, loss, _ = prepare("small", 4, 1)
        corpus = ff.open_corpus(Path(folder) / "x.npy", labels=Path(folder) / "y.npy", layout="NCHW")
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        since = time.perf_counter()
        ff.sweep(model, updates, corpus, loss=loss, out=Path(folder) / "scores", engine="pair")
        seconds = time.perf_counter() - since
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) / 1024
    return {"case": "memory", "Q": 4, "samples": samples, "ours_s": round(seconds, 2), "extra_mib": round(extra)}


def show(row: dict) -> str:
    return " | ".join(f"{key} {value}" for key, value in row.items())


def main(argv: list[str] | None = None) -> None:
    options = table.parser(__doc__.splitlines()[0])
    options.add_argument("--models", nargs="+", default=[*CASES, "memory"], choices=[*CASES, "memory"])
    options.add_argument("--queries", nargs="+", type=int, default=[1, 4, 16, 64])
    options = options.parse_args(argv)
    rows = []
    for case in options.models:
        for size in [1, 4, 16] if case == "memory" else options.queries:
            if case == "memory":
                rows.append(apart("memory", "ours", 4, (1000 if options.quick else 20000) * size))
            else:
                samples = CASES[case][3].get(size, 128)
                rows.append(
                    compare(case, size, options.rounds or 1, max(2, samples // 100) if options.quick else samples)
                )
            print(show(rows[-1]), flush=True)
    if options.save:
        print(f"saved to {table.append('sweep', rows, table.machine.describe())}")


if __name__ == "__main__":
    if "--one" in sys.argv:
        case, side, queries, samples = sys.argv[2:]
        print(json.dumps(on_file(int(samples)) if case == "memory" else one(case, side, int(queries), int(samples))))
    else:
        main()
