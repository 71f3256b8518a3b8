"""linear_cross_entropy_delta against plain torch: two F.linear, two cross-entropies and a difference, all in float32.

Both do two products of the same size for a base and one change. The peak is what all threads together multiply and add
in registers, taken before each call: the clock is not the same at all times. oneDNN: the plain way with oneDNN's
product in place of torch's default. The loss of accuracy of the subtraction is the tests' matter, not this page's.

    python bench/bench_linear_cross_entropy_delta.py [--save] [--quick] [--depths 256 768 2048] [--vocabularies ...]
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import machine
import measure
import table
from finf_fast.ops import linear_cross_entropy_delta
from finf_fast.reference.product import linear

DEPTHS = (256, 768, 2048)
VOCABULARIES = (32_000, 50_257, 128_256)  # Llama 2, GPT-2, Llama 3
TOKENS, QUICK_TOKENS = 2048, 64
KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Row:
    """One measured case.

    Attributes:
        case: what was run, in a few words.
        ms: median milliseconds of a call.
        gflops: 2 T D V (1 + Q) over that time, in GFLOP/s.
        peak_percent: of what the threads multiply and add at their best, median over rounds.
        torch_ratio, onednn_ratio: how many times longer the plain way takes, median over rounds.
        peak_mib, torch_peak_mib: memory held at the highest beyond the inputs.
        logits_percent: peak_mib in percent of one matrix of logits.
    """

    case: str
    ms: float
    gflops: float
    peak_percent: float
    torch_ratio: float
    onednn_ratio: float
    peak_mib: float
    torch_peak_mib: float
    logits_percent: float

    def line(self) -> str:
        return (
            f"{self.case:38} | {self.ms:8.1f} ms | {self.gflops:6.1f} GFLOP/s | {self.peak_percent:4.1f} % of peak | "
            f"{self.torch_ratio:4.1f} x torch | {self.onednn_ratio:4.1f} x oneDNN | "
            f"{self.peak_mib:.1f} MiB, {self.logits_percent:.2f} % of logits (torch {self.torch_peak_mib:.0f})"
        )


def inputs(T: int, D: int, V: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (T,D), dx (1,T,D), W (V,D), target (T): logits of width 2, changes of about 1e-3."""
    draw = torch.Generator().manual_seed(0)
    x, W = torch.randn(T, D, generator=draw), torch.randn(V, D, generator=draw).mul_(2 / D**0.5)
    return x, torch.randn(1, T, D, generator=draw).mul_(1e-3), W, torch.randint(V, (T,), generator=draw)


def plain(product: Callable, x: Tensor, dx: Tensor, W: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    base = F.cross_entropy(product(x, W), target, reduction="none")
    return base, torch.stack([F.cross_entropy(product(x + d, W), target, reduction="none") - base for d in dx])


def run(T: int, D: int, V: int, dtypes: list[torch.dtype], rounds: int) -> list[Row]:
    wide = inputs(T, D, V)
    given = {dtype: [y if y.dtype == torch.int64 else y.to(dtype) for y in wide] for dtype in dtypes}

    def ours(dtype: torch.dtype) -> Callable[[], object]:
        return lambda: linear_cross_entropy_delta(*given[dtype])

    ways = {"torch": lambda: plain(F.linear, *wide), "onednn": lambda: plain(linear, *wide)}
    peaks: dict[str, list[float]] = {KINDS[dtype]: [] for dtype in dtypes}
    for dtype in dtypes:
        kind = KINDS[dtype]
        ways |= {f"peak {kind}": lambda kind=kind: peaks[kind].append(machine.fma_peak(kind, 1)), kind: ours(dtype)}
    held = {name: measure.peak_mib(way) for name, way in ways.items() if not name.startswith("peak")}
    seconds = measure.interleaved(ways, rounds)
    return [row(T, D, V, kind, seconds, held, peaks[kind][1:]) for kind in peaks]


def row(T: int, D: int, V: int, kind: str, seconds: dict, held: dict, peaks: list[float]) -> Row:
    work, ms = 4 * T * D * V / 1e9, measure.median_ms(seconds[kind])
    return Row(
        case=f"T={T} D={D} V={V} Q=1 {kind}",
        ms=ms,
        gflops=1e3 * work / ms,
        peak_percent=100 * statistics.median(work / s / peak for s, peak in zip(seconds[kind], peaks, strict=True)),
        torch_ratio=measure.ratio(seconds["torch"], seconds[kind]),
        onednn_ratio=measure.ratio(seconds["onednn"], seconds[kind]),
        peak_mib=held[kind],
        torch_peak_mib=held["torch"],
        logits_percent=100 * held[kind] * 2**20 / (4 * T * V),
    )


def main(argv: list[str] | None = None) -> None:
    options = table.parser(__doc__.splitlines()[0])
    options.add_argument("--depths", nargs="+", type=int, default=DEPTHS)
    options.add_argument("--vocabularies", nargs="+", type=int, default=VOCABULARIES)
    options.add_argument("--tokens", type=int, default=0, help=f"rows; {TOKENS}, or {QUICK_TOKENS} when quick")
    options.add_argument("--dtypes", nargs="+", choices=KINDS.values(), default=list(KINDS.values()))
    options = options.parse_args(argv)
    torch.set_num_threads(options.threads)
    T, rounds = (QUICK_TOKENS, 1) if options.quick else (TOKENS, 5)
    dtypes = [dtype for dtype, kind in KINDS.items() if kind in options.dtypes]
    about, rows = machine.describe(), []
    print(f"linear_cross_entropy_delta on {about['processor']}, {options.threads} threads, {about['isa']}")
    with torch.inference_mode():
        for D in options.depths:
            for V in options.vocabularies[:1] if options.quick else options.vocabularies:
                rows += run(options.tokens or T, D, V, dtypes, options.rounds or rounds)
                print("\n".join(row.line() for row in rows[-len(dtypes) :]), flush=True)
    if options.save:
        print(f"saved to {table.append('linear_cross_entropy_delta', [asdict(row) for row in rows], about)}")


if __name__ == "__main__":
    main()
