"""The command line as a user meets it: real processes, real files, real exit codes."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import finf_fast as ff
from finf_fast.__main__ import main

ROOT = Path(__file__).parent.parent

MODEL = """
import torch
def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
"""


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def run(*words: object) -> Done:
    """The command in this process: what `finf-fast WORDS` prints and exits with."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["finf-fast", *map(str, words)]),
        mock.patch.dict(os.environ, {"COLUMNS": "160"}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        main()
    return Done(end.value.code or 0, out.getvalue(), err.getvalue())


def test_the_command_in_a_process_of_its_own():
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "finf_fast", "audit", "nowhere", "x.npy", "q.npy"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 1 and done.stdout == ""
    assert "FileNotFoundError" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def files(tmp_path):
    (tmp_path / "net.py").write_text(MODEL)
    draw = np.random.default_rng(0)
    x, y = draw.standard_normal((50, 6)).astype(np.float32), draw.integers(0, 3, 50)
    for name, array in {"x": x, "y": y, "xq": x[[4, 9]], "yq": y[[4, 9]]}.items():
        np.save(tmp_path / f"{name}.npy", array)
    return tmp_path


def audit(files, *more):
    words = [f"{files / 'net.py'}:build", files / "x.npy", files / "xq.npy"]
    labels = ["--labels", files / "y.npy", "--query-labels", files / "yq.npy"]
    return run("audit", *words, *labels, *more)


def test_audit_prints_the_strongest_and_leaves_a_folder(files):
    done = audit(files, "--out", files / "run", "--top", 2, "--lr", 1.0)
    assert done.returncode == 0, done.stderr
    scores = ff.Scores.open(files / "run")
    assert scores.delta.shape == (2, 50)
    lines = done.stdout.splitlines()
    for q in range(2):
        for index, influence in zip(*scores.top(q, 2), strict=True):
            assert any(f" {int(index)} " in line and f"{float(influence):+.4g}" in line for line in lines)
    assert done.stderr == ""  # no bar where there is no terminal


def test_audit_takes_one_query_and_a_shard(files):
    done = audit(files, "--out", files / "run", "--rows", 1, "--shard", "1/2")
    assert done.returncode == 0, done.stderr
    scores = ff.Scores.open(files / "run")
    assert scores.delta.shape == (1, 25) and scores.indices[0] == 25


def test_audit_orders_by_what_stands_out(files):
    done = audit(files, "--out", files / "run", "--normalized", "rms", "--background", 10, "--top", 1)
    assert done.returncode == 0, done.stderr
    found = ff.Scores.open(files / "run").top(1, 1, normalized="rms")
    assert "influence, rms" in done.stdout and f"{float(found.influence[0]):+.4g}" in done.stdout
    few = audit(files, "--normalized", "rms", "--out", files / "few")
    assert few.returncode == 1 and "'rms' compares with other queries and wants at least 8, got 2" in few.stderr
    own = audit(files, "--normalized", "relatif", "--out", files / "few")
    assert own.returncode == 1 and "'relatif' wants self_influence" in own.stderr
    assert not (files / "few").exists()  # refused before the sweep


def test_audit_writes_a_page(files):
    done = audit(files, "--report", files / "page.html")
    assert done.returncode == 0, done.stderr
    assert "<html" in (files / "page.html").read_text().lower()


IMAGES = """
import torch
def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))
"""


def test_audit_of_pixels(files):
    (files / "images.py").write_text(IMAGES)
    np.save(files / "pixels.npy", np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3)).astype(np.uint8))
    np.save(files / "classes.npy", np.arange(5) % 3)
    words = [f"{files / 'images.py'}:build", files / "pixels.npy", files / "pixels.npy", "--out", files / "run"]
    labels = ["--labels", files / "classes.npy", "--query-labels", files / "classes.npy"]
    pixels = ["--mean", "0.5,0.4,0.3", "--std", "0.2,0.3,0.4", "--layout", "NHWC"]
    done = run("audit", *words, *labels, *pixels, "--io", "read")
    assert done.returncode == 0, done.stderr
    told = ff.Scores.open(files / "run").record["corpus"]
    assert (told["mean"], told["std"], told["layout"], told["io"]) == ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4], "NHWC", "read")


LANGUAGE = """
import torch
from nets import TinyLm
def build():
    torch.manual_seed(0)
    return TinyLm()
"""


def test_audit_of_texts_in_several_files(files):
    draw = np.random.default_rng(0)
    (files / "lm.py").write_text(LANGUAGE)
    for n in range(2):
        draw.integers(0, 19, 60).astype("<u2").tofile(files / f"{n}.ds")
        np.array([4, 20, 60], "<u8").tofile(files / f"{n}.ds.index")
    words = [f"{files / 'lm.py'}:build", files / "*.ds", files / "0.ds", "--rows", 0]
    done = run("audit", *words, "--loss", "causal_lm", "--max-length", 8, "--out", files / "run")
    assert done.returncode == 0, done.stderr
    told = ff.Scores.open(files / "run").record["corpus"]
    assert (told["samples"], told["max_length"]) == (6, 8)


@pytest.mark.parametrize(
    "more, words",
    [
        (["--mean", "0.1,x"], "mean: wanted numbers with commas between"),
        (["--io", "tape"], "io: wanted"),
        (["--columns", "a,b"], "columns: wanted None, for the format 'npy'"),
        (["--loss", "nope"], "loss: wanted one of"),
        (["--method", "nope"], "method: wanted one of"),
        (["--shard", "x"], "shard: wanted i/n"),
        (["--tail", "sideways"], "tail"),
        (["--window", 3], "window"),
    ],
)
def test_a_mistake_is_one_line_and_exit_1(files, more, words):
    done = audit(files, *more)
    assert done.returncode == 1
    assert words in done.stderr and "Traceback" not in done.stderr


def test_a_model_that_is_not_there(files):
    for spec, words in [("nowhere", "model: wanted"), (f"{files / 'net.py'}:other", "has no function 'other'")]:
        done = run("audit", spec, files / "x.npy", files / "xq.npy")
        assert done.returncode == 1 and words in done.stderr


def test_info_says_which_faces_run():
    done = run("info")
    assert done.returncode == 0, done.stderr
    for word in ("cross_entropy_delta", "segment_sum", "topk_merge", "cpp", "reference", "instruction set"):
        assert word in done.stdout


def test_bench_lists_and_refuses():
    assert "cross_entropy_delta" in run("bench").stdout
    assert run("bench", "nothing_like_it").returncode == 2
