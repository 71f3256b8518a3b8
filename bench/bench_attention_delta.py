"""attention_delta against its reference face: the time of a call, the rate of its products, and the memory it takes.

The heads of q, k and v lie side by side in a row, as a transformer leaves them. Counted are the products of the keys
that a row sees: with the scores q0 k0, dq k0, q1 dk, and with the values p v0, w v0, p1 dv.

    python bench/bench_attention_delta.py [--save] [--quick]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import machine
import measure
import table
from finf_fast.ops import attention_delta
from finf_fast.reference import attention_delta as plain

QUICK_T = 64
# Rows long enough for all their scores and changes, 1280 MiB each, to show if they were kept.
LONG = 8192


@dataclass(frozen=True)
class Case:
    Q: int = 4
    dtype: torch.dtype = torch.float32
    T: int = 512
    H: int = 12
    E: int = 64
    causal: bool = True
    texts: int = 1  # of one length, behind each other
    hides: str = ""  # what says so and hides what lies ahead: "mask", as transformers hands it over, or "cu_seqlens"
    beside: bool = True  # whether the reference runs too

    def name(self) -> str:
        words = f"T={self.T} H={self.H} E={self.E} Q={self.Q} {str(self.dtype).removeprefix('torch.')}"
        texts = f" {self.texts} texts" if self.texts > 1 else ""
        return f"{words}{' causal' if self.causal else ''}{texts}{f' by {self.hides}' if self.hides else ''}"

    def flop(self) -> int:
        length = self.T // self.texts
        seen = self.texts * (length * (length + 1) // 2 if self.causal else length * length)
        return 2 * self.H * seen * self.E * 2 * (1 + 2 * self.Q)

    def options(self) -> dict[str, object]:
        if self.hides == "cu_seqlens":
            return {"causal": self.causal, "cu_seqlens": torch.arange(self.texts + 1) * (self.T // self.texts)}
        if self.hides == "mask":
            text = torch.arange(self.T) // (self.T // self.texts)
            mask = text[:, None] == text
            return {"mask": mask.tril() if self.causal else mask}
        return {"causal": self.causal}


CASES = (
    *(Case(Q, dtype) for dtype in (torch.float32, torch.bfloat16) for Q in (1, 4, 16)),
    Case(causal=False),
    Case(H=6, E=128),
    Case(T=77),
    Case(hides="mask"),
    Case(T=2048, texts=8, hides="mask"),
    Case(T=2048, texts=8, hides="cu_seqlens"),
    Case(T=LONG, H=1, beside=False),
)


@dataclass(frozen=True)
class Row:
    """One measured case: median milliseconds, needed products over that time, and the reference beside it."""

    case: str
    ms: float
    gflop_per_s: float
    reference_ratio: float | None
    peak_mib: float
    reference_peak_mib: float | None

    def line(self) -> str:
        ratio = "" if self.reference_ratio is None else f"{self.reference_ratio:.2f}"
        peak = "" if self.reference_peak_mib is None else f"{self.reference_peak_mib:.0f}"
        numbers = f"{self.ms:9.2f} | {self.gflop_per_s:8.0f} | {ratio:>11} | {self.peak_mib:8.1f} | {peak:>9}"
        return f"{self.case:60} | {numbers}"


def inputs(case: Case) -> list[Tensor]:
    """q, k and v (1+Q, 1, H, T, E), transposed views, with changes a thousandth of the values."""
    draw = torch.Generator().manual_seed(0)
    stacks = [torch.randn(1 + case.Q, 1, case.T, case.H, case.E, generator=draw) for _ in "qkv"]
    for stack in stacks:
        stack[1:] *= 1e-3
    return [stack.to(case.dtype).transpose(2, 3) for stack in stacks]


def run(case: Case, rounds: int) -> Row:
    qkv, options = inputs(case), case.options()
    ways: dict[str, Callable[[], object]] = {"ours": lambda: attention_delta(*qkv, **options)}
    if case.beside:
        ways["reference"] = lambda: plain(*qkv, **options)
    peaks = {name: measure.peak_mib(work) for name, work in ways.items()}
    seconds = measure.interleaved(ways, rounds)
    ms = measure.median_ms(seconds["ours"])
    ratio = measure.ratio(seconds["reference"], seconds["ours"]) if case.beside else None
    return Row(case.name(), ms, case.flop() / ms / 1e6, ratio, peaks["ours"], peaks.get("reference"))


def main(argv: list[str] | None = None) -> None:
    options = table.parser(__doc__.splitlines()[0]).parse_args(argv)
    torch.set_num_threads(options.threads)
    cases = [Case(Q, dtype, QUICK_T) for Q in (1, 4) for dtype in (torch.float32, torch.bfloat16)]
    with torch.inference_mode():
        rows = [
            run(case, options.rounds or (3 if options.quick else 7)) for case in (cases if options.quick else CASES)
        ]
    about = machine.describe()
    print(
        f"attention_delta on {about['processor']}, {about['threads']} threads, {about['isa']}, torch {about['torch']}"
    )
    print(f"{'case':60} | {'ms':>9} | GFLOP/s  | × reference | peak MiB | reference")
    print("\n".join(row.line() for row in rows))
    if options.save:
        print(f"saved to {table.append('attention_delta', [asdict(row) for row in rows], about)}")


if __name__ == "__main__":
    main()
