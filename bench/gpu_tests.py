"""Which tests the GPU suite runs first and which under compute-sanitizer, and how it reads what came of tests.

They are chosen by name, so that none is left out in silence: tables from an operation to tests of its file. A dry run
collects them, and fails where one is not there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu_suite import Part, Run

__all__ = ["FIRST", "NO_TESTS", "SANITIZED", "counted", "has_passed", "judge", "named", "summary"]

NO_TESTS = 5  # pytest's exit code where nothing was chosen: an operation without a face for GPUs

# bfloat16 before float32, which an interpreter has proven: tensor cores, descriptors and a device's own rounding are
# what no CPU plays.
FIRST: dict[str, tuple[str, ...]] = {
    "activation_delta": (
        "test_every_function_and_size[triton-bfloat16-0.001-gelu]",
        "test_gates[triton-bfloat16-both-silu]",
        "test_every_function_and_size[triton-float32-0.001-gelu]",
    ),
    "attention_delta": (
        "test_edges_of_blocks[triton-bfloat16-True-150-200-16-8]",
        "test_edges_of_blocks[triton-bfloat16-False-5-6-65-72]",
        "test_every_size_of_change[triton-float32-0.001-True]",
    ),
    "cross_entropy_delta": (
        "test_change_keeps_its_digits_at_every_step[cuda-bfloat16-0.001-0]",
        "test_every_axis[cuda-bfloat16-1-50257-1-0.1]",
    ),
    "decode_pixels": ("test_the_bits_of_the_corpus[cuda-bfloat16-NCHW-shape0-8]",),
    "decode_tokens": ("test_every_start_of_rows_of_every_length[cuda-uint16-40]",),
    "group_norm_delta": (
        "test_every_size_of_change[triton-bfloat16-0.001]",
        "test_every_size_of_change[triton-float32-0.001]",
    ),
    "layer_norm_delta": (
        "test_every_size_of_change[triton-bfloat16-0.001]",
        "test_residual_enters_before_rounding[triton-bfloat16-2-2]",
        "test_every_size_of_change[triton-float32-0.001]",
    ),
    "linear_cross_entropy_delta": (
        "test_whole_tiles[triton-bfloat16-1-136]",
        "test_change_keeps_its_digits_at_every_step[triton-bfloat16-input and low rank and bias-0.0001-0]",
        "test_whole_tiles[hybrid-bfloat16-1-136]",
        "test_whole_tiles[triton-float32-1-136]",
    ),
    "linear_delta": (
        "test_every_axis[triton-bfloat16-64-64-64-32-2]",
        "test_change_keeps_its_digits_at_every_step[triton-bfloat16-0.01-dense and bias]",
        "test_every_axis[triton-float32-64-64-64-32-2]",
    ),
    "noise": ("test_the_numbers_are_those_of_the_definition[cuda-int64]",),
    "rms_norm_delta": (
        "test_every_size_of_change[triton-bfloat16-0.001]",
        "test_every_size_of_change[triton-float32-0.001]",
    ),
    "segment_sum": ("test_every_length[cuda-float32-lengths6-3]",),
    "squared_error_delta": ("test_every_axis[cuda-bfloat16-1-2049-4]",),
    "topk_merge": ("test_every_size[cuda-float32-1000-64]",),
}

# Small launches; the sanitizer slows a kernel by one to two orders of magnitude. Rows of 50257 logits take the way that
# only wide ones do.
SANITIZED: dict[str, tuple[str, ...]] = {
    "activation_delta": ("test_every_width[triton-bfloat16-True-2053]",),
    "attention_delta": ("test_edges_of_blocks[triton-bfloat16-True-65-65-16-8]",),
    "cross_entropy_delta": (
        "test_every_axis[cuda-bfloat16-3-33-3-0.1]",
        "test_every_axis[cuda-bfloat16-1-50257-1-0.1]",
    ),
    "decode_pixels": ("test_every_run_of_every_channel[cuda-bfloat16-17-3]",),
    "decode_tokens": ("test_every_start_of_rows_of_every_length[cuda-uint16-40]",),
    "group_norm_delta": ("test_every_width[triton-bfloat16-True-65]",),
    "layer_norm_delta": ("test_every_width[triton-bfloat16-True-127]",),
    "linear_cross_entropy_delta": ("test_whole_tiles[triton-bfloat16-1-136]",),
    "linear_delta": ("test_every_axis[triton-bfloat16-64-64-64-32-2]",),
    "noise": ("test_same_bits_for_any_number_of_threads[cuda-int64]",),
    "rms_norm_delta": ("test_every_width[triton-bfloat16-65]",),
    "segment_sum": ("test_every_length[cuda-float32-lengths6-3]",),
    "squared_error_delta": ("test_every_width[cuda-bfloat16-4099]",),
    "topk_merge": ("test_every_size[cuda-float32-65-64]",),
}


def named(tests: Mapping[str, Sequence[str]]) -> list[str]:
    """Tests of operations' files, as pytest is told them."""
    return [f"tests/test_{op}.py::{test}" for op, names in tests.items() for test in names]


def counted(run: Run | None) -> dict[str, Any]:
    """How many tests passed, failed, were skipped; the first failures by name; faces of which all tests were skipped;
    whether all came to their end."""
    if run is None:
        return {"ended": "not run"}
    ends = re.findall(r"^(\S+::.+) (PASSED|FAILED|ERROR|SKIPPED)\b", run.out, re.M)
    found: dict[str, Any] = dict(Counter(word.lower() for _, word in ends))
    broken = [name for name, word in ends if word in ("FAILED", "ERROR")]
    if broken:
        found["broken"] = broken[:20]
    if unseen := all_skipped(ends):
        found["all skipped"] = unseen
    if run.code not in (0, 1, NO_TESTS):
        found["ended"] = "out of time" if run.code is None else f"code {run.code}: {run.last_words()}"
    return found


def all_skipped(ends: Sequence[tuple[str, str]]) -> list[str]:
    """A file's faces of which no test was anything but skipped: a face that is not there, which nothing else tells."""
    words: dict[str, set[str]] = {}
    for name, word in ends:
        face = re.search(r"\[.*?\b(triton|cuda|hybrid)\b", name)
        words.setdefault(f"{name.partition('::')[0]} {face[1] if face else ''}".strip(), set()).add(word)
    return sorted(face for face, seen in words.items() if seen == {"SKIPPED"})


def judge(part: Part, runs: Mapping[str, Run | None]) -> None:
    """Passed means: some of every face did, none failed, and all came to their end."""
    totals = Counter()
    for found in part.found.values():
        totals.update({word: n for word, n in found.items() if isinstance(n, int)})
    short = [name for name, run in runs.items() if run is None or run.code is None]
    without = [name for name, run in runs.items() if run is not None and run.code == NO_TESTS]
    skipped = [face for found in part.found.values() for face in found.get("all skipped", [])]
    broken = totals["failed"] or totals["error"] or any(r and r.code not in (0, None, NO_TESTS) for r in runs.values())
    failed = broken or skipped or not (totals["passed"] or short)
    part.state = "failed" if failed else "out of time" if short else "passed"
    said = [f"{totals[word]} {word}" for word in ("passed", "failed", "error", "skipped") if totals[word]]
    said += [f"all skipped: {', '.join(skipped)}"] if skipped else []
    said += [f"not finished: {', '.join(short)}"] if short else []
    said += [f"no face for a GPU: {', '.join(without)}"] if without else []
    part.note = "; ".join(said) or "nothing ran"


def summary(run: Run) -> list[str]:
    """What the tool counted in the end, in its words."""
    return re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.+)", run.out + run.err)


def has_passed(run: Run, op: str) -> bool:
    return re.search(rf"^tests/test_{op}\.py::.+ PASSED\b", run.out, re.M) is not None
