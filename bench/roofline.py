"""The roofline of the machine the results were measured on, and every operation's saved rows under it, as a picture.

A row's place: operations a byte that has to be moved, each input read once and each result written once, and operations
a second. Only rows of the newest machine row's processor, number of threads and instruction set are drawn.

    python bench/machine.py --save         # the roof
    python bench/roofline.py docs/roofline.png
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import table

__all__ = ["Point", "points", "roof"]

SIZES = {"fp32": 4, "bf16": 2}
KINDS = {"float32": "fp32", "bfloat16": "bf16"}

# Additions and multiplications for each number that is moved in or out, counted in the loops of csrc/cpu/tiles: half of
# what a change takes, which is read once and written once; for the losses, which only read, all of it.
WORK = {
    "activation_delta": 5,  # a series of four terms, value + change
    "cross_entropy_delta": 18,  # an exponential, and expm1 by polynomial, a logit and a change
    "group_norm_delta": 5,
    "layer_norm_delta": 5,  # two sums, c and dc centred, scaled and shifted
    "rms_norm_delta": 4,
    "squared_error_delta": 3,
}
WORK_IN_BF16 = {**WORK, "activation_delta": 4}  # three terms


@dataclass(frozen=True)
class Point:
    op: str
    kind: str  # fp32 or bf16
    intensity: float  # operations a byte
    gflops: float


def rows(name: str) -> Iterator[dict]:
    path = table.RESULTS / f"{name}.jsonl"
    if path.exists():
        yield from map(json.loads, path.read_text().splitlines())


def roof() -> dict:
    """The newest saved row of bench/machine.py."""
    found = list(rows("machine"))
    if not found:
        raise FileNotFoundError("bench/results/machine.jsonl: wanted a row, got none: python bench/machine.py --save")
    return found[-1]


def points(where: dict) -> list[Point]:
    """A point for each operation and case, its newest row on the machine of this row."""
    makers = {"linear_cross_entropy_delta": _head, "linear_delta": _linear, "attention_delta": _attention}
    makers |= dict.fromkeys(WORK, _streamed)
    newest: dict[tuple[str, str], Point] = {}
    for op, maker in makers.items():
        for row in rows(op):
            if all(row[said] == where[said] for said in ("processor", "threads", "isa")):
                newest[op, row["case"]] = maker(op, row)
    return list(newest.values())


def _head(op: str, row: dict) -> Point:
    T, D, V, Q, kind = _said(r"T=(\d+) D=(\d+) V=(\d+) Q=(\d+) (\w+)", row)
    return _product(op, kind, row["gflops"], 2 * T * D * V * (1 + Q), (1 + Q) * T * D + V * D)


def _linear(op: str, row: dict) -> Point:
    Q, N, D, E, kind = _said(r"Q=(\d+) N=(\d+) (\d+) to (\d+) (\w+)", row)
    return _product(op, kind, row["gflops"], 2 * (1 + Q) * N * D * E, (1 + Q) * N * (D + E) + D * E)


def _attention(op: str, row: dict) -> Point:
    T, H, E, Q, kind = _said(r"T=(\d+) H=(\d+) E=(\d+) Q=(\d+) (\w+)", row)
    seen = T * (T + 1) // 2 if "causal" in row["case"] else T * T
    return _product(op, KINDS[kind], row["gflop_per_s"], 4 * H * seen * E * (1 + 2 * Q), 4 * (1 + Q) * T * H * E)


def _product(op: str, kind: str, gflops: float, work: int, numbers: int) -> Point:
    return Point(op, kind, work / (SIZES[kind] * numbers), gflops)


def _streamed(op: str, row: dict) -> Point:
    kind = KINDS[_said(r"(float32|bfloat16)", row)[0]]
    intensity = {"fp32": WORK, "bf16": WORK_IN_BF16}[kind][op] / SIZES[kind]
    return Point(op, kind, intensity, intensity * row["gb_per_s"])


def _said(pattern: str, row: dict) -> list:
    found = re.search(pattern, row["case"])
    if not found:
        raise ValueError(f"case: wanted {pattern}, got {row['case']!r}")
    return [int(word) if word.isdigit() else word for word in found.groups()]


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    where = roof()
    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    colours = {"fp32": "tab:blue", "bf16": "tab:red"}
    found = points(where)
    across = [0.5, 2 * max(point.intensity for point in found)]
    for kind, colour in colours.items():
        peak, slope = where[f"{kind}_gflops"], where["copy_gb_per_s"]
        axes.plot([across[0], peak / slope, across[1]], [across[0] * slope, peak, peak], color=colour, lw=1)
        axes.annotate(f"{kind}: {peak:.0f} GFLOP/s", (across[1], peak), ha="right", va="bottom", color=colour)
    for op, marker in zip(sorted({point.op for point in found}), "osD^vP*Xh", strict=False):
        for kind, colour in colours.items():
            mine = [point for point in found if (point.op, point.kind) == (op, kind)]
            xy = [p.intensity for p in mine], [p.gflops for p in mine]
            axes.scatter(*xy, marker=marker, color=colour, s=28, alpha=0.8, label=op if kind == "fp32" else None)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GFLOP/s")
    axes.set_title(f"{where['processor']}, {where['threads']} threads: copying {where['copy_gb_per_s']:.0f} GB/s")
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
