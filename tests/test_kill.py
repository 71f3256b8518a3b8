"""kill -9 at random moments: a block flagged as done holds its bytes, and a resumed run ends with the same bytes.

The writer here makes up its scores from the block's number and forward size instead of computing them, writes them in
shreds of a few bytes and dawdles between, so that most kills strike in the middle of something.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from finf_fast.records import Plan
from finf_fast.scores import Scores, open_store, store

PLAN = Plan(50, 1253, 8)  # 151 blocks, the last one of 3 samples
QUERIES = 3
KILLS = 20
HALVINGS = {5: 4, 20: 2, 21: 1}  # block: samples per forward from there on


def block_scores(plan: Plan, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Stands for the arithmetic of a block: another forward size rounds another way."""
    start, stop = plan.rows(number)
    rng = np.random.default_rng([number, plan.forward_size(number)])
    return rng.normal(size=stop - start), rng.normal(size=(stop - start, QUERIES))


def sweep(out: Path) -> None:
    with open_store(out, {"model": "ab"}, PLAN, QUERIES, np.float64) as writer:
        counted = dict(writer.counted or {"blocks": 0})
        for number in writer.missing():
            if writer.plan.forward_size(number) > HALVINGS.get(number, PLAN.block):
                writer.halve(number, HALVINGS[number])
            counted["blocks"] += 1
            writer.write(number, *block_scores(writer.plan, number), counted=counted)
        writer.finish(counted)


def sweep_slowly(out: Path) -> None:
    pwrite = os.pwrite

    def pwrite_shred(fd, data, offset):
        time.sleep(0.0005)  # all blocks take about a second, a good deal more than the kills leave
        return pwrite(fd, data[:40], offset)

    os.pwrite = pwrite_shred
    store.SYNC_EVERY = 0.01  # flags every few blocks, or twenty short lives would hardly leave any
    sweep(out)


def nursery() -> None:
    """A process that has imported everything: for each folder it reads, it forks a slow writer and buries it."""
    while line := sys.stdin.readline():
        pid = os.fork()
        if pid == 0:
            sweep_slowly(Path(line.strip()))
            os._exit(0)
        print(pid, flush=True)
        sys.stdin.readline()  # until the kill is out: a process that is waited for gives its number away
        _, status = os.waitpid(pid, 0)
        print(status, flush=True)


def kill_one(parent: subprocess.Popen[str], out: Path, delay: float) -> None:
    """Has a slow writer started and kills it after ``delay`` seconds."""
    print(out, file=parent.stdin, flush=True)
    pid = int(parent.stdout.readline())
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    print("killed", file=parent.stdin, flush=True)
    assert int(parent.stdout.readline()) in (0, signal.SIGKILL)  # 0: it was done before


def check_flagged(out: Path) -> int:
    """Number of blocks flagged as done; each must hold its bytes. Read without the library's own reader."""
    if not (out / "manifest.json").exists():
        return 0
    manifest = json.loads((out / "manifest.json").read_text())
    if not manifest["ready"]:
        return 0
    plan = Plan.from_json(manifest["plan"])
    base, delta = np.load(out / "base.npy"), np.load(out / "delta.npy")
    flagged = np.flatnonzero(np.fromfile(out / "done", np.uint8)).tolist()
    for number in flagged:
        rows = slice(*(row - plan.start for row in plan.rows(number)))
        wanted_base, wanted_delta = block_scores(plan, number)
        assert np.array_equal(base[rows], wanted_base), f"block {number}"
        assert np.array_equal(delta[rows], wanted_delta), f"block {number}"
    return len(flagged)


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in ("base.npy", "delta.npy", "done")}


def test_killed_at_random_moments(tmp_path):
    rng = np.random.default_rng()  # a new draw each run: over time every moment is tried
    interrupted = tmp_path / "interrupted"
    flagged = 0
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    imports = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, __file__], env=imports, **pipes) as parent:
        for attempt in range(KILLS):
            # The first ones strike while the folder is being made.
            kill_one(parent, interrupted, rng.uniform(0, 0.01 if attempt < 5 else 0.1))
            before, flagged = flagged, check_flagged(interrupted)
            assert flagged >= before
    sweep(interrupted)
    sweep(tmp_path / "straight")
    assert check_flagged(interrupted) == PLAN.blocks
    assert contents(interrupted) == contents(tmp_path / "straight")
    assert Scores.open(interrupted).record == {"blocks": PLAN.blocks}
    plans = [Scores.open(folder).manifest["plan"] for folder in (interrupted, tmp_path / "straight")]
    assert plans[0] == plans[1]
    assert len(plans[0]["halvings"]) == len(HALVINGS)


@pytest.mark.parametrize("harm", ["flag", "bytes", "plan"])
def test_the_check_has_teeth(harm, tmp_path):
    with open_store(tmp_path / "r", {}, PLAN, QUERIES, np.float64) as writer:
        for number in range(5):
            writer.write(number, *block_scores(writer.plan, number))
    assert check_flagged(tmp_path / "r") == 5
    if harm == "plan":
        with open_store(tmp_path / "r", {}, PLAN, QUERIES, np.float64) as writer:
            writer.halve(5, 4)
        text = (tmp_path / "r" / "manifest.json").read_text()
        manifest = json.loads(text)
        manifest["plan"]["halvings"] = [[4, 4]]
        (tmp_path / "r" / "manifest.json").write_text(json.dumps(manifest))
    else:
        name, offset = ("done", 5) if harm == "flag" else ("delta.npy", -1 + 128 + 8 * QUERIES * 8 * 5)
        with open(tmp_path / "r" / name, "r+b") as file:
            file.seek(offset)
            file.write(b"\1")
    with pytest.raises(AssertionError, match=r"block [45]"):
        check_flagged(tmp_path / "r")


if __name__ == "__main__":
    nursery()
