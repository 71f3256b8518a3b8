"""Everything there is to ask a GPU, in one command and under nine minutes; needs nothing from a network.

    python bench/gpu_suite.py [--budget 520] [--out bench/results] [--wheels FOLDER]
    python bench/gpu_suite.py --dry-run      # the same on a CPU, tiny: Triton interpreted, compiled faces elsewhere

In this order, as time may run out: builds; a few of each operation's tests, bfloat16 first; the device's own peaks and
every operation beside its peers; the sweep end to end; all of the faces' tests; compute-sanitizer on a few small ones,
where it is installed. Each part is a process of its own and may take what is left less the shares of those after it;
what no longer fits is not run, and said so. Written after each part is <device>-<date>.json, printed last is the table.

Ends with 1 if a part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu_tests import FIRST, SANITIZED, counted, has_passed, judge, named, summary

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "bench"
# Seconds, nine minutes less what ending takes. Shares of it, guessed without a GPU: all that is compiled is built in
# two minutes on two cores; a case is timed in 1 s and compiled in a few; tests mostly compile.
BUDGET = 520.0
SHARES = {"build": 110, "few tests": 50, "operations": 150, "sweep": 60, "all tests": 90, "sanitizer": 60}
# A part that does not end by itself is ended this much later than it was asked to.
GRACE = 10.0
# Operation whose tests a dry run goes through, and which of them it takes for all.
DRY, DRY_TESTS = "rms_norm_delta", "float32 and every_width"
# Enough to keep the cores compiling; more processes would only share the device's memory.
WORKERS = 8
# What would change which face runs where: decided here alone.
DECIDED = ("FINF_BACKEND", "FINF_TEST_DEVICE", "TRITON_INTERPRET")


@dataclass
class Part:
    """What became of a part: "passed", "failed", "not run" or "out of time", and what there is to say of it."""

    name: str
    state: str = "not run"
    seconds: float = 0.0
    note: str = ""
    found: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A process that ended: its exit code, None if it had to be ended, and what it wrote."""

    code: int | None
    out: str
    err: str

    def last_words(self) -> str:
        return " | ".join((self.err or self.out).strip().splitlines()[-3:])


class Suite:
    """The clock, the options and where all parts put what they found."""

    def __init__(self, budget: float, dry: bool, parts: Sequence[str] = tuple(SHARES)):
        self.dry, self.parts, self.rows = dry, [], []
        self.about: dict[str, Any] = {}
        self.peaks: dict[str, float] = {}
        self._paths = [str(ROOT)]
        total = sum(SHARES[name] for name in parts)
        self._until = time.monotonic() + budget
        self._shares = {name: budget * SHARES[name] / total for name in parts}

    def part(self, name: str, work: Callable[[Suite, float, Part], None]) -> None:
        """Runs `work` with the seconds it may take."""
        part, since = Part(name), time.monotonic()
        self.parts.append(part)
        self._shares.pop(name)
        limit = self._until - since - sum(self._shares.values())
        if limit < 1:
            part.note = "no time left"
        else:
            try:
                work(self, limit, part)
            except Exception as error:  # of the suite itself: what the other parts find is written all the same
                part.state, part.note = "failed", f"{type(error).__name__}: {error}"
        part.seconds = round(time.monotonic() - since, 1)
        print(f"{part.name}: {part.state} in {part.seconds} s {part.note}".rstrip(), flush=True)

    def unpack(self, wheels: Path | None, folder: str) -> None:
        """Wheels go where all parts find them; without a network, and without changing what is installed."""
        for wheel in sorted(wheels.glob("*.whl")) if wheels else []:
            with zipfile.ZipFile(wheel) as file:
                file.extractall(folder)
        self._paths = [str(ROOT), folder]

    def python(self, *words: str | Path, limit: float, **more: str) -> Run:
        return self.process([sys.executable, *map(str, words)], limit, **more)

    def process(self, command: list[str], limit: float, **more: str) -> Run:
        """`command` in the checkout, ended after `limit` seconds; what it wrote until then is kept."""
        kept = {key: value for key, value in os.environ.items() if key not in DECIDED}
        kept |= {"PYTHONPATH": os.pathsep.join([*self._paths, *filter(None, [os.environ.get("PYTHONPATH")])]), **more}
        words = {"encoding": "utf-8", "errors": "replace"}  # a process that is ended may leave half a letter
        with tempfile.TemporaryFile("w+", **words) as out, tempfile.TemporaryFile("w+", **words) as err:
            child = subprocess.Popen(command, cwd=ROOT, env=kept, stdout=out, stderr=err, start_new_session=True)
            try:
                code = child.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)  # with the processes that it started
                with suppress(subprocess.TimeoutExpired):  # a driver may hold on to one for good
                    child.wait(GRACE)
                code = None
            out.seek(0), err.seek(0)
            return Run(code, out.read(), err.read())

    def interpreter(self) -> dict[str, str]:
        """In a dry run Triton's kernels are interpreted."""
        return {"TRITON_INTERPRET": "1"} if self.dry else {}

    def record(self) -> dict[str, Any]:
        parts = [asdict(part) for part in self.parts]
        return {"dry_run": self.dry, "about": self.about, "peaks": self.peaks, "parts": parts, "rows": self.rows}


def build(suite: Suite, limit: float, part: Part) -> None:
    """What runs on the CPU first, without which nothing is measured: nvcc may fail, or take longer than there is."""
    until = time.monotonic() + limit
    for without in [{"FINF_CUDA": "0"}] if suite.dry else [{"FINF_CUDA": "0"}, {}]:
        left = max(until - time.monotonic(), 1)
        done = suite.python("setup.py", "-q", "build_ext", "--inplace", limit=left, **without)
        part.state = {0: "passed", None: "out of time"}.get(done.code, "failed")
        part.note = "" if part.state == "passed" else done.last_words()
        if part.state != "passed":
            return
    # Without nvcc setup.py leaves the CUDA kernels out and says nothing.
    modules = "finf_fast" if suite.dry else "finf_fast, finf_fast._cuda"
    done = suite.python("-c", f"import {modules}", limit=limit)
    if done.code != 0:
        part.state, part.note = "failed", f"{done.last_words()} (--wheels FOLDER brings what is not installed)"


def operations(suite: Suite, limit: float, part: Part) -> None:
    """The child is started again after an operation that took the device with it."""
    until, rest, ends = time.monotonic() + limit, None, []
    while rest is None or (rest and until - time.monotonic() > 2 * GRACE):
        done = timed(suite, until - time.monotonic(), rest or [])
        said = lines(done)
        begun = [line["begin"] for line in said if "begin" in line]
        order = next((line["order"] for line in said if "order" in line), [])
        rest = order[order.index(begun[-1]) + 1 :] if begun else []
        place = begun[-1] if begun else "its start"
        if done.code is None:
            part.state, part.note = "out of time", f"ended in {place}"
            return
        if done.code:
            ends.append(f"ended in {place}: {done.last_words()}")
    part.note, part.state = "; ".join(ends), state_of(suite.rows, bool(ends))


def timed(suite: Suite, limit: float, only: list[str]) -> Run:
    """One run of the child, over all operations where none is named; what it says is taken over."""
    words = ["--seconds", f"{max(limit - GRACE, 1):.0f}", *(["--only", *only] if only else [])]
    words += ["--dry-run"] if suite.dry else []
    done = suite.python(BENCH / "gpu_ops.py", *words, limit=limit, **suite.interpreter())
    for line in lines(done):
        suite.about |= line.get("about", {})
        suite.peaks |= line.get("peaks", {})
        suite.rows += [line["row"]] if "row" in line else []
    return done


def state_of(rows: list[dict[str, Any]], broken: bool) -> str:
    """Of a part whose rows say in a note of their own what failed, has no face here or did not fit."""
    said = [row["notes"].get("ours", "") for row in rows]
    if broken or not rows or any(note.startswith(("failed", "not there")) for note in said):
        return "failed"
    return "out of time" if any(note.startswith("not run") for note in said) else "passed"


def sweep(suite: Suite, limit: float, part: Part) -> None:
    peak = suite.peaks.get("gemm_tflops")
    if peak is None:
        part.note = "the device's peak is not known"
        return
    words = ["--seconds", f"{max(limit - GRACE, 1):.0f}", "--gemm-tflops", str(peak)]
    done = suite.python(BENCH / "gpu_sweep.py", *words, *(["--dry-run"] if suite.dry else []), limit=limit)
    rows = [line["row"] for line in lines(done) if "row" in line]
    suite.rows += rows
    part.state = "out of time" if done.code is None else state_of(rows, done.code != 0)
    part.note = done.last_words() if done.code else ""


def lines(done: Run) -> list[dict[str, Any]]:
    """The JSON objects that a child printed; the last may be cut short."""
    found = []
    for line in done.out.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in found if isinstance(line, dict)]


def test_files() -> list[Path]:
    """The tests of operations, which run along their faces, and others that need a GPU."""
    words = ("face_fixture(", "@needs_gpu")
    return [path for path in sorted((ROOT / "tests").glob("test_*.py")) if any(w in path.read_text() for w in words)]


def few_tests(suite: Suite, limit: float, part: Part) -> None:
    if not suite.dry or found_all(suite, FIRST, limit, part):
        run_tests(suite, limit, part, {f"test_{op}.py": named({op: FIRST[op]}) for op in FIRST})


def all_tests(suite: Suite, limit: float, part: Part) -> None:
    chosen = "(triton or cuda or hybrid or gpu)" + (f" and {DRY_TESTS}" if suite.dry else "")
    run_tests(suite, limit, part, {path.name: [str(path), "-k", chosen] for path in test_files()})


def found_all(suite: Suite, tests: Mapping[str, Sequence[str]], limit: float, part: Part) -> bool:
    """Whether every one of them is a test when faces are sent to a device, which takes none to collect."""
    files = sorted({test.partition("::")[0] for test in named(tests)})
    words = ("-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *files)
    done = suite.python(*words, limit=limit, FINF_TEST_DEVICE="cuda")
    missing = sorted(set(named(tests)) - set(done.out.splitlines()))
    if missing:
        part.state, part.note = "failed", f"no such tests: {', '.join(missing)}"
    return not missing


def run_tests(suite: Suite, limit: float, part: Part, chosen: Mapping[str, Sequence[str]]) -> None:
    """What is chosen of every file in a process of its own, several at a time: compiling is what takes long, and a file
    whose launch fails takes only itself with it."""
    chosen = {name: words for name, words in chosen.items() if not suite.dry or DRY in name}
    workers = min(WORKERS, max(1, (os.cpu_count() or 1) // 2))
    until = time.monotonic() + limit

    def one(name: str) -> tuple[str, Run | None]:
        left = until - time.monotonic()
        return name, pytest(suite, chosen[name], left) if left > 1 else None

    with ThreadPoolExecutor(workers) as pool:
        runs = dict(pool.map(one, chosen))
    part.found = {name: counted(run) for name, run in runs.items()}
    judge(part, runs)


def pytest(suite: Suite, chosen: Sequence[str], limit: float, before: tuple[str, ...] = (), **more: str) -> Run:
    """The tests chosen, one line a test, so that those that ran are counted in what was ended too."""
    command = [*before, sys.executable, "-m", "pytest", "-v", "--tb=line", "-p", "no:cacheprovider", *chosen]
    # Several files share the cores, and what they compute on them is small.
    where = {"FINF_TEST_DEVICE": "cpu" if suite.dry else "cuda", "OMP_NUM_THREADS": "2", **suite.interpreter(), **more}
    return suite.process(command, limit, **where)


def sanitizer(suite: Suite, limit: float, part: Part) -> None:
    if suite.dry:
        if found_all(suite, SANITIZED, limit, part):
            part.note = "a dry run has no device; its tests are there"
        return
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        part.note = "compute-sanitizer is not installed"
        return
    given = {
        f"{check} {face}": {op: tests for op, tests in SANITIZED.items() if face in tests[0]} for check, face in CHECKS
    }
    with ThreadPoolExecutor(len(CHECKS)) as pool:
        started = {
            name: pool.submit(sanitized, suite, (tool, "--tool", name.split()[0]), tests, limit)
            for name, tests in given.items()
        }
    runs = {name: run.result() for name, run in started.items()}
    part.found = {name: counted(run) | {"errors": summary(run)} for name, run in runs.items()}
    judge(part, runs)
    idle = [f"{name} {op}" for name, tests in given.items() for op in tests if not has_passed(runs[name], op)]
    if idle and part.state == "passed":
        part.state, part.note = "failed", f"{part.note}; nothing passed of {', '.join(idle)}"


# What is looked for, and in whose kernels. Triton's own barriers, between parts of a pipeline, are not known to the
# tools that look for races.
CHECKS = (("memcheck", "cuda"), ("memcheck", "triton"), ("racecheck", "cuda"), ("synccheck", "cuda"))


def sanitized(suite: Suite, tool: tuple[str, ...], tests: Mapping[str, Sequence[str]], limit: float) -> Run:
    before = (*tool, "--target-processes", "all", "--error-exitcode", "99")
    # Of errors only those of kernels: torch and Triton ask what a driver may refuse. torch's own store of memory would
    # hide a kernel that leaves its tensor.
    before += ("--report-api-errors", "no") if "memcheck" in tool else ()
    return pytest(suite, named(tests), limit, before, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


PARTS = dict(zip(SHARES, (build, few_tests, operations, sweep, all_tests, sanitizer), strict=True))


def table(suite: Suite) -> str:
    """The rows, one a line; a time beside ours is said as a multiple of ours."""
    peaks = ", ".join(f"{name} {value:.4g}" for name, value in suite.peaks.items())
    said = [f"{suite.about.get('device', 'no device')}: {peaks or 'peaks unknown'}"]
    return "\n".join(said + [line(row) for row in suite.rows])


def line(row: dict[str, Any]) -> str:
    words = [f"{row['op']} {row['case']}".ljust(78)]
    if "ms" in row:
        words.append(f"{row.get('face', ''):7} {row['ms']:10.3f} ms")
        words += [f"{row['tflops']:7.4g} TFLOP/s {row['percent_of_gemm']:5.1f} % of GEMM"] if "tflops" in row else []
        words += [f"{row['gb_per_s']:7.4g} GB/s {row['percent_of_copy']:5.1f} % of copy"] if "gb_per_s" in row else []
        words += [f"{ratio:.2f} x {name}" for name, ratio in row.get("times", {}).items()]
        words += [f"{row['peak_mib']:.0f} MiB"] if row.get("peak_mib") is not None else []
    return " | ".join(words + [f"{who}: {note}" for who, note in row["notes"].items() if note])


def write(suite: Suite, folder: Path, before: Path | None = None) -> Path:
    """The file, in the place of the one `before`, written when the device's name was not known yet."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", str(suite.about.get("device", "unknown")).lower()).strip("-")
    date = time.strftime("%Y-%m-%d", time.gmtime())
    path = folder / f"{'dry-run-' if suite.dry else ''}{name}-{date}.json"
    path.write_text(json.dumps({"date": date, **suite.record()}, indent=1) + "\n", encoding="utf-8")
    if before not in (None, path):
        before.unlink()
    return path


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--budget", type=float, default=BUDGET, help="seconds for all of it")
    options.add_argument("--out", type=Path, help="folder of the file; bench/results, of a dry run runs")
    options.add_argument("--wheels", type=Path, help="folder of .whl files that the machine lacks (xxhash's, say)")
    options.add_argument("--dry-run", action="store_true", help="go through all of it on a CPU, tiny")
    options.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    options = options.parse_args(argv)
    parts = [name for name in PARTS if name in options.parts]
    suite, path = Suite(options.budget, options.dry_run, parts), None
    with tempfile.TemporaryDirectory() as unpacked:
        suite.unpack(options.wheels, unpacked)
        for name in parts:
            suite.part(name, PARTS[name])
            # At once: whoever lends the device may take it back, and a later part may take the machine with it.
            path = write(suite, options.out or (ROOT / "runs" if suite.dry else BENCH / "results"), path)
    print(table(suite))
    print(f"saved to {path}")
    return int(any(part.state == "failed" for part in suite.parts))


if __name__ == "__main__":
    sys.exit(main())
