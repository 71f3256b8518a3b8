"""`kill -9` in the middle of a sweep, resumed: the same bytes as a run that nobody disturbed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = ("base.npy", "delta.npy", "done")


def start(folder: Path, pause: float) -> subprocess.Popen:
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "interrupted_sweep.py"), str(folder), str(pause)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert process.stdout.readline().strip() == "ready"
    return process


def finish(folder: Path) -> None:
    process = start(folder, 0)
    assert process.stdout.readline().strip() == "done"
    assert process.wait() == 0


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def wait_until_opened(folder: Path, process: subprocess.Popen) -> None:
    while not (folder / "done").exists() and process.poll() is None:
        time.sleep(0.01)


def flags(folder: Path) -> int:
    """Blocks flagged as done."""
    return sum((folder / "done").read_bytes()) if (folder / "done").exists() else 0


def kill_and_resume(tmp_path: Path, kills: int, seed: int) -> None:
    """Kills sweeps at random moments, resumes each until it is whole, compares every byte with an undisturbed one."""
    chance = random.Random(seed)
    finish(tmp_path / "undisturbed")
    inside = 0  # kills that left a sweep half-way
    for number in range(5 * kills):
        process = start(tmp_path / "killed", 0.06)  # 60 blocks: about four seconds if left alone
        if number % 4:  # one in four falls anywhere from the very start, the rest after the folder was opened
            wait_until_opened(tmp_path / "killed", process)
        time.sleep(chance.uniform(0.0, 2.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        inside += 0 < flags(tmp_path / "killed") < 60
        if flags(tmp_path / "killed") == 60:
            assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")
            (tmp_path / "killed").rename(tmp_path / f"whole {number}")
        if number + 1 >= kills and inside:
            break
    finish(tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")
    assert inside, "no kill fell into a sweep"


def test_three_kills(tmp_path):
    kill_and_resume(tmp_path, 3, seed=0)


@pytest.mark.prove
def test_twenty_kills(tmp_path):
    kill_and_resume(tmp_path, 20, seed=1)
