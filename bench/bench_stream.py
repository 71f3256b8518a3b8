"""Data on its way to the model: against copying what is delivered, DataLoader, and no loading at all.

DataLoader is given what people write for these files: a Dataset over a memory map, a sample at a time, no workers
(one or two are slower here); of images one Dataset with the arithmetic alone, and where torchvision is installed one
with its transforms. The end-to-end rows are sweeps with a small model over a file, against the same sweep over
tensors that are in memory already. All that with the file in the page cache; the cold row begins without it, against
read(2) of the file, whichever of 1 and 8 MiB a call is faster.

    python bench/bench_stream.py [--save] [--quick]
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import finf_fast as ff
import machine
import measure
import table
from finf_fast.corpus import open_corpus

WINDOW, BATCH = 1024, 256
# Passes of a delivery that are timed as one: for up to 5 ms after torch's copies OpenMP's threads keep their cores busy
# waiting, which is most of a single pass over 40,000 windows, and nothing of one over a corpus.
PASSES = 8
MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]


@dataclass(frozen=True)
class Row:
    """One measured case; a ratio above 1 says how many times faster the corpus is."""

    case: str
    samples_per_s: float
    gb_per_s: float
    percent_of_copy: float | None = None  # of copying as much from memory into a batch's place
    percent_of_cached_copy: float | None = None  # of copying one batch as often, which never leaves the cache
    dataloader_ratio: float | None = None
    torchvision_ratio: float | None = None  # to DataLoader with torchvision's transforms
    percent_of_compute: float | None = None
    percent_of_readv: float | None = None

    def line(self) -> str:
        parts = [f"{self.case:44} | {self.samples_per_s:12,.0f}/s | {self.gb_per_s:5.1f} GB/s delivered"]
        if self.percent_of_copy is not None:
            copies = f"{self.percent_of_copy:4.0f} % of a copy ({self.percent_of_cached_copy:.0f} % inside the cache)"
            parts.append(f"{copies} | {self.dataloader_ratio:5.1f} x DataLoader")
        if self.torchvision_ratio is not None:
            parts.append(f"{self.torchvision_ratio:5.1f} x DataLoader with torchvision")
        if self.percent_of_compute is not None:
            parts.append(f"{self.percent_of_compute:5.1f} % of the speed without loading")
        if self.percent_of_readv is not None:
            parts.append(f"{self.percent_of_readv:5.1f} % of plain reading")
        return " | ".join(parts)


class Windows(Dataset):
    """As in many a training script: a slice of a memory map, to int64."""

    def __init__(self, path: Path):
        self.tokens = np.memmap(path, np.uint16, "r")

    def __len__(self) -> int:
        return len(self.tokens) // WINDOW

    def __getitem__(self, i: int) -> Tensor:
        return torch.from_numpy(self.tokens[i * WINDOW : (i + 1) * WINDOW].astype(np.int64))


class Images(Dataset):
    """Image by image, the arithmetic of ToTensor and Normalize and nothing around it."""

    def __init__(self, path: Path):
        self.pixels = np.load(path, mmap_mode="r")
        self.mean, self.std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> Tensor:
        image = torch.from_numpy(self.pixels[i].transpose(2, 0, 1).copy()).float().div(255)
        return image.sub(self.mean).div(self.std)


class Transformed(Images):
    """The same with torchvision's own ToTensor and Normalize."""

    def __init__(self, path: Path):
        from torchvision import transforms

        self.pixels = np.load(path, mmap_mode="c")  # torchvision warns of memory that may not be written
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    def __getitem__(self, i: int) -> Tensor:
        return self.transform(self.pixels[i])


def transformed(path: Path) -> Transformed | None:
    """None where torchvision is not there, or was built for another torch."""
    try:
        return Transformed(path)
    except (ImportError, RuntimeError) as error:
        print(f"without torchvision: {error}")
        return None


def through(corpus) -> Callable[[], None]:
    """A pass over a corpus in batches, each let go before the next but one is asked for, as a model would."""

    def run() -> None:
        batch = None
        for start in range(0, len(corpus), BATCH):
            batch = corpus.read(start, min(start + BATCH, len(corpus)))
        del batch

    return run


def several(way: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(PASSES):
            way()

    return run


def loaded(dataset: Dataset) -> Callable[[], None]:
    def run() -> None:
        for _ in DataLoader(dataset, batch_size=BATCH, num_workers=0):
            pass

    return run


def copied(like: Tensor, samples: int) -> Callable[[], None]:
    """Copies as many bytes as are delivered, each from a place of its own, batch by batch into memory that is there."""
    source = torch.ones(like.nbytes // BATCH * samples, dtype=torch.uint8)
    to = torch.empty(like.nbytes, dtype=torch.uint8)

    def run() -> None:
        for batch in source.split(len(to)):
            to[: len(batch)].copy_(batch)

    return run


def copied_inside_cache(like: Tensor, samples: int) -> Callable[[], None]:
    to = torch.empty_like(like)

    def run() -> None:
        for _ in range(0, samples, BATCH):
            to.copy_(like)

    return run


def delivery(case: str, corpus, dataset: Dataset, rounds: int, peer: Dataset | None = None) -> Row:
    batch = corpus.read(0, BATCH)
    ours = through(corpus)
    for _ in range(3):
        ours()  # the way of reading is chosen on the first blocks
    ways = {
        "ours": ours,
        "copy": copied(batch, len(corpus)),
        "cached": copied_inside_cache(batch, len(corpus)),
        "loader": loaded(dataset),
        **({} if peer is None else {"torchvision": loaded(peer)}),
    }
    seconds = measure.interleaved({name: several(way) for name, way in ways.items()}, rounds)
    spent = measure.median_ms(seconds["ours"]) / 1e3 / PASSES
    copy, cached, loader = (measure.ratio(seconds[way], seconds["ours"]) for way in ("copy", "cached", "loader"))
    size = batch.nbytes / BATCH * len(corpus) / spent / 1e9
    beside = None if peer is None else measure.ratio(seconds["torchvision"], seconds["ours"])
    return Row(case, len(corpus) / spent, size, 100 * copy, 100 * cached, loader, beside)


def sweeping(case: str, model: nn.Module, from_file, in_memory, rounds: int, **settings) -> Row:
    """A sweep with one query and a small model, data from a file against the same data in memory."""
    first = from_file.read(0, 1)
    loss = settings.get("loss", "cross_entropy")
    update = ff.mirror(model, first, loss=loss, lr=1e-2)
    ways = {
        name: lambda data=data: ff.sweep(model, [update], data, **settings)
        for name, data in (("file", from_file), ("memory", in_memory))
    }
    seconds = measure.interleaved(ways, rounds)
    spent = measure.median_ms(seconds["file"]) / 1e3
    share = 100 * measure.ratio(seconds["memory"], seconds["file"])
    samples = len(from_file) // settings.get("shard", (0, 1))[1]
    size = _sample_bytes(first) * samples / spent / 1e9
    return Row(f"sweep, {case}", samples / spent, size, percent_of_compute=share)


def _sample_bytes(batch) -> int:
    parts = batch.values() if isinstance(batch, dict) else batch
    return sum(part.nbytes for part in parts)


def small_net(hidden: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, hidden), nn.GELU(), nn.Linear(hidden, 10)).eval()


def small_conv_net() -> nn.Module:
    torch.manual_seed(0)
    pairs = [(3, 32), (32, 64), (64, 128)]
    layers = [layer for i, o in pairs for layer in (nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 10)).eval()


def small_text_model() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=64, n_head=2, n_positions=WINDOW)).eval()


def sweeps(images, tokens, rounds: int) -> list[Row]:
    """Two nets of one product, of whose time pixels made on the cores that compute are a tenth and a twentieth, and a
    model each of images and of windows."""
    pixels = images.read(0, len(images))
    rows = [
        sweeping(f"3072-{hidden}-10 net, fp32 images", small_net(hidden), images, pixels, rounds, batch_size=1024)
        for hidden in (128, 512)
    ]
    conv, some = small_conv_net(), {"shard": (0, -(-len(images) // 2000))}
    rows.append(sweeping(f"{_millions(conv)} conv net, fp32 images", conv, images, pixels, rounds, **some))
    ids = tokens.read(0, len(tokens))
    settings = {"loss": "causal_lm", "batch_size": 8, "shard": (0, -(-len(tokens) // 96))}
    model = small_text_model()
    name = f"{_millions(model)} transformer, windows of {WINDOW}"
    return [*rows, sweeping(name, model, tokens, ids, rounds, **settings)]


def _millions(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M"


def evict(path: Path) -> bool:
    """Out of the page cache; False where that cannot be (a disk in memory)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.preadv(descriptor, [bytearray(1)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def plainly_read(path: Path, size: int) -> Callable[[], None]:
    # From the start of a page on: a few bytes behind it, as most allocators give them, a Zen 3 reads at a fifth.
    room = mmap.mmap(-1, size)

    def run() -> None:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(room):
                pass

    return run


def cold(case: str, path: Path, rounds: int) -> Row | None:
    """A pass over a file that is not in the page cache, at least 15 rounds of it: a disk varies."""
    if not evict(path):
        print(f"without a cold row: {path.parent} is kept in memory")
        return None
    corpus = open_corpus(path, window=WINDOW)
    ways = {"ours": through(corpus), **{f"{size} MiB": plainly_read(path, size << 20) for size in (1, 8)}}
    seconds = measure.interleaved(ways, max(rounds, 15), before=lambda: evict(path))
    spent = measure.median_ms(seconds["ours"]) / 1e3
    share = min(measure.ratio(seconds[size], seconds["ours"]) for size in ("1 MiB", "8 MiB"))
    size = 8 * WINDOW * len(corpus) / spent / 1e9
    return Row(case, len(corpus) / spent, size, percent_of_readv=100 * share)


def run(folder: Path, samples: int, rounds: int) -> list[Row]:
    draw = np.random.default_rng(0)
    tokens, images, labels = (folder / name for name in ("train.bin", "images.npy", "labels.npy"))
    draw.integers(0, 50257, samples * WINDOW, np.uint16).tofile(tokens)
    np.save(images, draw.integers(0, 256, (samples, 32, 32, 3), np.uint8))
    np.save(labels, draw.integers(0, 10, samples))
    pixels = {"mean": MEAN, "std": STD, "layout": "NHWC"}
    peer = transformed(images)
    rows = [
        delivery(f"windows of {WINDOW}", open_corpus(tokens, window=WINDOW), Windows(tokens), rounds),
        delivery("32x32 images, fp32", open_corpus(images, **pixels), Images(images), rounds, peer),
        delivery("32x32 images, bf16", open_corpus(images, **pixels, dtype="bfloat16"), Images(images), rounds, peer),
    ]
    rows += sweeps(open_corpus((images, labels), **pixels), open_corpus(tokens, window=WINDOW), 2 * rounds)
    longer = folder / "longer.bin"  # so that how a pass begins counts for little
    longer.write_bytes(tokens.read_bytes() * (3 if samples < 10_000 else 9))
    from_disk = cold(f"windows of {WINDOW}, cold", longer, rounds)
    return rows if from_disk is None else [*rows, from_disk]


def main(argv: list[str] | None = None) -> None:
    options = table.parser(__doc__.splitlines()[0]).parse_args(argv)
    torch.set_num_threads(options.threads)
    about = machine.describe()
    print(f"stream on {about['processor']}, {options.threads} threads, torch {about['torch']}")
    with tempfile.TemporaryDirectory() as folder:
        rows = run(Path(folder), 2048 if options.quick else 40_000, options.rounds or (2 if options.quick else 7))
    print("\n".join(row.line() for row in rows))
    if options.save:
        print(f"saved to {table.append('stream', [asdict(row) for row in rows], about)}")


if __name__ == "__main__":
    main()
