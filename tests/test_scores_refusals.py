"""What the result folder refuses: no room, another writer, another run, damage, wrong arguments; each by name."""

from __future__ import annotations

import errno
import json
import os
import resource
import sys

import numpy as np
import pytest

from finf_fast.records import DamagedFile, ManifestMismatch, Plan
from finf_fast.scores import Scores, files, open_store
from scores_cases import BLOCK, IDENTITY, PLAN, QUERIES, SAMPLES, START, STOP, finished, numbers, put, start


@pytest.fixture(params=["memory", "folder"])
def out(request, tmp_path):
    return None if request.param == "memory" else tmp_path / "deep" / "result"


@pytest.fixture
def done(tmp_path):
    finished(tmp_path / "result")
    return tmp_path / "result"


# What cannot be written


def test_two_writers(tmp_path):
    with start(tmp_path / "r") as writer:
        put(writer, [0])
        with pytest.raises(ValueError, match="locked by another"):
            start(tmp_path / "r")
        put(writer, [1])
    with start(tmp_path / "r") as writer:
        assert writer.missing() == [2, 3, 4, 5, 6]


def test_refused_folder_is_not_left_locked(done):
    with pytest.raises(ManifestMismatch):
        start(done, identity={})
    start(done).close()


def test_out_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="wanted a folder, got the file"):
        start(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="cannot make the result folder"):
        start(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, where not even root makes folders")
def test_out_cannot_be_made():
    with pytest.raises(OSError, match=r"cannot make the result folder.*/proc/finf"):
        start("/proc/finf")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_out_cannot_be_written(number, tmp_path, monkeypatch):
    """Simulated: root, who runs many test machines, may write everywhere."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "open", refuse)
    with pytest.raises(OSError, match="out: cannot write in the result folder") as caught:
        start(tmp_path)
    assert caught.value.errno == number
    assert caught.value.filename == str(tmp_path)


def test_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "base.npy").write_text("mine")
    with pytest.raises(ValueError, match=r"other files \(base\.npy\)"):
        start(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["base.npy"]


def test_full_disk_is_found_at_the_start(tmp_path, monkeypatch):
    def full(fd, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full, raising=False)
        with pytest.raises(OSError, match=f"the result needs {4 * SAMPLES * (1 + QUERIES)} bytes") as caught:
            start(tmp_path / "r")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "r")
    assert [entry.name for entry in (tmp_path / "r").iterdir()] == ["lock"]
    assert finished(tmp_path / "r").complete


def test_file_system_that_cannot_reserve(tmp_path, monkeypatch):
    def unsupported(fd, offset, size):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported, raising=False)
    assert np.array_equal(finished(tmp_path / "r").delta.T, numbers()[1][START:STOP])


def test_limit_on_file_size_is_found_at_the_start(tmp_path):
    """A real refusal by the system, of the 12 MB that the result needs."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(OSError, match="the result needs 12000000 bytes") as caught:
            open_store(tmp_path / "r", {}, Plan(0, 1_000_000, 1000), 2, np.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(tmp_path / "r")


# Arguments


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"queries": 0}, ValueError, "queries: wanted at least 1, got 0"),
        ({"plan": Plan(3, 3, 8)}, ValueError, "plan: wanted"),
        ({"plan": Plan(0, 3, 0)}, ValueError, "plan: wanted"),
        ({"dtype": np.float16}, TypeError, "dtype: wanted float32 or float64, got float16"),
        ({"tokens": 0}, ValueError, "tokens: wanted"),
        ({"directions": ["ascent"]}, ValueError, "directions: wanted 3"),
        ({"directions": ["ascent", "descent", "up"]}, ValueError, "directions: wanted 3"),
        ({"names": ["a", "b", "a"]}, ValueError, "names: wanted 3 different"),
        ({"corpus_samples": STOP - 1}, ValueError, "corpus_samples: wanted at least"),
        ({"identity": {"model": object()}}, TypeError, "identity: wanted values that JSON can hold"),
    ],
)
def test_bad_arguments_leave_no_trace(change, error, message, tmp_path):
    arguments = {"identity": IDENTITY, "plan": PLAN, "queries": QUERIES, "dtype": np.float32, **change}
    with pytest.raises(error, match=message):
        open_store(tmp_path / "r", **arguments)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"number": 7}, ValueError, "number: wanted a block from 0 to 6, got 7"),
        ({"number": 0}, ValueError, "already written"),
        ({"base": np.zeros(7, np.float32)}, ValueError, r"base: wanted shape \(8,\), got \(7,\)"),
        ({"base": np.zeros(8)}, TypeError, "base: wanted float32, got float64"),
        ({"delta": np.zeros((3, 8), np.float32)}, ValueError, r"delta: wanted shape \(8, 3\), got \(3, 8\)"),
        ({"token_base": np.zeros((8, 5), np.float32)}, ValueError, "token_base: wanted none"),
    ],
)
def test_bad_block_is_not_written(change, error, message, out):
    good = {"number": 1, "base": np.zeros(8, np.float32), "delta": np.zeros((8, 3), np.float32)}
    with start(out) as writer:
        put(writer, [0])
        with pytest.raises(error, match=message):
            writer.write(**{**good, **change})
        assert writer.missing() == [1, 2, 3, 4, 5, 6]


def test_closed_store_takes_nothing(out):
    with start(out) as writer:
        pass
    with pytest.raises(ValueError, match="closed"):
        put(writer, [0])


# Another run's folder


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (
            {"identity": {**IDENTITY, "fingerprints": {"model": "ff", "updates": ["cd", "ef", "01"]}}},
            ["identity.fingerprints.model: wanted 'ff', found 'ab12'"],
        ),
        (
            {"identity": {**IDENTITY, "settings": {"loss": "mse", "seed": 1}}},
            [
                "identity.settings.engine: wanted 'nothing', found 'pair'",
                "identity.settings.loss: wanted 'mse', found 'cross_entropy'",
                "identity.settings.seed: wanted 1, found 'nothing'",
            ],
        ),
        ({"dtype": np.float64}, ["dtype: wanted 'float64', found 'float32'"]),
        ({"plan": Plan(START, STOP - 1, BLOCK)}, ["shape.samples: wanted 52, found 53", "shape.stop: wanted 59"]),
        ({"directions": ["ascent"] * 3}, ["directions: wanted ['ascent', 'ascent', 'ascent']"]),
        ({"names": ["a", "b", "c"]}, ["names: wanted ['a', 'b', 'c'], found ['q0', 'q1', 'q2']"]),
        ({"tokens": 4}, ["shape.tokens: wanted 4, found None"]),
    ],
)
def test_folder_of_another_run_is_refused(change, lines, done):
    before = {entry.name: entry.read_bytes() for entry in done.iterdir()}
    with pytest.raises(ManifestMismatch) as caught:
        start(done, **change)
    for line in lines:
        assert line in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1 + len(lines)
    assert {entry.name: entry.read_bytes() for entry in done.iterdir()} == before


def test_identity_equal_but_for_tuples_and_nan_is_the_same(tmp_path):
    identity = {"shape": (1, 2), "limit": float("nan")}
    finished(tmp_path / "r", identity=identity)
    assert finished(tmp_path / "r", identity=identity).manifest["identity"]["shape"] == [1, 2]


# Damage


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def grow(path):
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


@pytest.mark.parametrize("name", ["base.npy", "delta.npy", "done"])
@pytest.mark.parametrize("harm", [cut, grow, empty, remove])
def test_damaged_file_is_named(name, harm, done):
    harm(done / name)
    for attempt in (lambda: Scores.open(done), lambda: Scores.open(done, partial=True), lambda: start(done)):
        with pytest.raises(DamagedFile, match=f"{name}: "):
            attempt()


@pytest.mark.parametrize("position", [0, 1, 0.5, -2])
def test_truncated_manifest_is_named(position, done):
    text = (done / "manifest.json").read_text()
    (done / "manifest.json").write_text(text[: int(position * len(text)) if isinstance(position, float) else position])
    for attempt in (lambda: Scores.open(done), lambda: start(done)):
        with pytest.raises(DamagedFile, match=r"manifest\.json: not a whole JSON file"):
            attempt()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "zarr"}, "another kind of file"),
        ({"version": 1}, "wanted version 2, got 1"),
        ({"dtype": "int8"}, "dtype: wanted"),
        ({"names": ["a"]}, "names: wanted 3"),
        ({"plan": {"start": 0, "stop": 5, "block": 2, "halvings": []}}, "disagree"),
        ({"plan": {"start": "x"}}, "KeyError"),
        ({"shape": {}}, "without shape.samples"),
        ({"shape": None}, "TypeError"),
    ],
)
def test_inconsistent_manifest_is_named(change, message, done):
    manifest = json.loads((done / "manifest.json").read_text())
    (done / "manifest.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(DamagedFile, match=message):
        Scores.open(done)


def test_array_of_another_shape_is_named(done):
    np.save(done / "delta.npy", np.zeros((QUERIES, SAMPLES), np.float32))
    with pytest.raises(DamagedFile, match=r"delta\.npy: wanted .*\(53, 3\).* got .*\(3, 53\)"):
        Scores.open(done)


def test_flag_that_is_no_flag_is_named(done):
    (done / "done").write_bytes(b"\1\1\1\7\1\1\1")
    with pytest.raises(DamagedFile, match="got 7 at block 3"):
        Scores.open(done)


def test_no_folder_is_no_damage(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        Scores.open(tmp_path)
