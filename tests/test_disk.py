"""Files that are whole or not there: what a failed writing found is there after it, and the error names the file."""

from __future__ import annotations

import errno
import os

import pytest
import torch

import finf_fast as ff
from finf_fast import disk
from finf_fast.records import Plan
from finf_fast.scores import open_store
from nets import mlp

needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the device that is always full is Linux's")


def full(path):
    """Whatever is written to take the place of ``path`` finds no room."""
    path.with_name(path.name + ".tmp").symlink_to("/dev/full")
    return path


def refused(path):
    return pytest.raises(OSError, match=rf"No space left on device.*{path.name}'$")


@needs_full
@pytest.mark.parametrize("size", [1, 1000, 100_000])
def test_tensors_on_a_full_disk(tmp_path, size):
    """torch's writer sees the end of a disk at its first piece or its last, and would say something of positions."""
    path = tmp_path / "x.pt"
    disk.save_tensors(path, {"a": torch.ones(3)})
    with refused(full(path)) as caught:
        disk.save_tensors(path, {"a": torch.zeros(size), "b": torch.zeros(size)})
    assert caught.value.errno == errno.ENOSPC and [entry.name for entry in tmp_path.iterdir()] == ["x.pt"]
    assert torch.equal(torch.load(path)["a"], torch.ones(3))


@needs_full
def test_factors_and_updates_on_a_full_disk(tmp_path):
    model, data = mlp()
    update = ff.mirror(model, (data[0][:1], data[1][:1]), lr=0.1)
    for saved in (ff.fit_factors(model, data, progress=False), update):
        with refused(full(tmp_path / "x.pt")):
            saved.save(tmp_path / "x.pt")
        saved.save(tmp_path / "x.pt")
        assert type(saved).load(tmp_path / "x.pt").record.keys() == saved.record.keys()


def test_a_fit_outlives_its_file(tmp_path, monkeypatch):
    model, data = mlp()

    def fail(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk.os, "fsync", fail)
    with pytest.raises(ff.UnsavedFactors, match=r"No space left .* is not lost: save this error's \.factors") as caught:
        ff.fit_factors(model, data, out=tmp_path / "x.pt", progress=False)
    assert list(tmp_path.iterdir()) == [] and caught.value.filename == str(tmp_path / "x.pt")
    monkeypatch.undo()
    caught.value.factors.save(tmp_path / "x.pt")
    ff.Factors.load(tmp_path / "x.pt").check(model)


@pytest.mark.parametrize(("out", "words"), [("no/x.pt", "No such file"), ("folder", "Is a directory")])
def test_a_place_for_factors_is_tried_before_the_fit(tmp_path, out, words):
    (tmp_path / "folder").mkdir()

    def never(*_):
        raise AssertionError("wanted no work before the error")

    model, data = mlp()
    model.register_forward_pre_hook(never)
    with pytest.raises(OSError, match=rf"out: cannot write there: {words}.*{out}"):
        ff.fit_factors(model, data, out=tmp_path / out, progress=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


@needs_full
def test_a_manifest_on_a_full_disk(tmp_path):
    """The rows are on the disk before it: they are kept, and the run can be ended later."""
    plan = Plan(0, 4, 4)
    with open_store(tmp_path, {}, plan, 1, "float32") as store:
        store.write(0, torch.zeros(4), torch.ones(4, 1))
        with refused(full(tmp_path / "manifest.json")):
            store.finish({"seconds": 1})
    with open_store(tmp_path, {}, plan, 1, "float32") as store:
        assert store.missing() == []
        assert store.finish({"seconds": 2}).record == {"seconds": 2} and store.scored == 4


def test_what_fails_half_way_leaves_what_was(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), disk.replacing(path) as temporary:
        temporary.write_text("new")
        _ = 1 / 0
    assert path.read_text() == "old" and [entry.name for entry in tmp_path.iterdir()] == ["x"]
