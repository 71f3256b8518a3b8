"""Fills the table by which dispatch chooses between faces that are rivals on a GPU, from what the GPU suite wrote.

    python bench/gpu_suite.py
    python bench/measured_faces.py bench/results/nvidia-h200-2026-12-01.json

A case measured again on the same device replaces the earlier one; all others stay. Commit what it wrote.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finf_fast.ops import dispatch
from finf_fast.ops.measured_rows import ROWS

TABLE = Path(__file__).parent.parent / "finf_fast" / "ops" / "measured_rows.py"
# What makes two rows measurements of one thing.
WHERE = ("op", "architecture", "device", "form", "dtype", "T", "D", "V", "Q")
HEAD = '''"""Milliseconds of the faces that are rivals on a GPU, a case a row; written by bench/measured_faces.py."""

from __future__ import annotations

from typing import Any

'''


def found(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table out of one file of the suite: cases in which all rivals of an operation ran.

    Raises:
        ValueError: a dry run, which times an interpreter; a record that names no device of CUDA.
    """
    if record["dry_run"]:
        raise ValueError("record: wanted one of a device, got a dry run")
    if "capability" not in record["about"]:
        raise ValueError(f"record: wanted one of a CUDA device, got {record['about'].get('device')!r}")
    about = record["about"]
    place = {"architecture": int(about["capability"].replace(".", "")), "device": about["device"]}
    rows = [(row, times(row)) for row in record["rows"] if row.get("of")]
    return [{"op": row["op"], **place, **row["of"], "ms": ms} for row, ms in rows if complete(row["op"], ms)]


def times(row: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds of each rival that ran; beside our own the suite writes multiples of it."""
    if "ms" not in row:
        return {}
    all_ms = {row["face"]: row["ms"], **{name: row["ms"] * ratio for name, ratio in row["times"].items()}}
    return {face: round(all_ms[face], 4) for face in dispatch.RIVALS[row["op"]] if face in all_ms}


def complete(op: str, ms: Mapping[str, float]) -> bool:
    return set(ms) == set(dispatch.RIVALS[op])


def merged(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """All rows, ordered; of two of one thing the new one."""
    rows = {tuple(row[key] for key in WHERE): row for row in (*old, *new)}
    return [rows[key] for key in sorted(rows)]


def written(rows: Sequence[Mapping[str, Any]]) -> str:
    """The module: a row is two lines, of where and of what."""
    if not rows:
        return f"{HEAD}ROWS: tuple[dict[str, Any], ...] = ()\n"
    lines = [f"    {{{_items(row, WHERE[:5])},\n     {_items(row, (*WHERE[5:], 'ms'))}}},\n" for row in rows]
    return f"{HEAD}# fmt: off\nROWS: tuple[dict[str, Any], ...] = (\n{''.join(lines)})\n"


def _items(row: Mapping[str, Any], keys: Sequence[str]) -> str:
    return ", ".join(f"{json.dumps(key)}: {json.dumps(row[key])}" for key in keys)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("records", type=Path, nargs="+", help="files that bench/gpu_suite.py wrote")
    rows = merged(ROWS, [row for path in options.parse_args().records for row in found(json.loads(path.read_text()))])
    TABLE.write_text(written(rows), encoding="utf-8")
    print(f"{len(rows)} cases in {TABLE}")


if __name__ == "__main__":
    main()
