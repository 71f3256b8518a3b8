"""Files that are whole or not there: what a failed writing found is there after it, and the error names the file."""

from __future__ import annotations

import errno
import os
import stat
import threading
from contextlib import contextmanager

import pytest
import torch

import finf_fast as ff
from finf_fast import disk
from finf_fast.records import Plan
from finf_fast.scores import open_store
from nets import mlp

needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the device that is always full is Linux's")


@pytest.fixture
def full(monkeypatch):
    """Whatever is written to take the place of a file finds no room."""

    @contextmanager
    def filled():
        def without_room(path, there):
            temporary = path.with_name("temporary")
            temporary.symlink_to("/dev/full")
            return temporary

        with monkeypatch.context() as patch:
            patch.setattr(disk, "_new_beside", without_room)
            yield

    return filled


def refused(path):
    return pytest.raises(OSError, match=rf"No space left on device.*{path.name}'$")


@needs_full
@pytest.mark.parametrize("size", [1, 1000, 100_000])
def test_tensors_on_a_full_disk(tmp_path, full, size):
    """torch's writer sees the end of a disk at its first piece or its last, and would say something of positions."""
    path = tmp_path / "x.pt"
    disk.save_tensors(path, {"a": torch.ones(3)})
    with full(), refused(path) as caught:
        disk.save_tensors(path, {"a": torch.zeros(size), "b": torch.zeros(size)})
    assert caught.value.errno == errno.ENOSPC and [entry.name for entry in tmp_path.iterdir()] == ["x.pt"]
    assert torch.equal(torch.load(path)["a"], torch.ones(3))


@needs_full
def test_factors_and_updates_on_a_full_disk(tmp_path, full):
    model, data = mlp()
    update = ff.mirror(model, (data[0][:1], data[1][:1]), lr=0.1)
    for saved in (ff.fit_factors(model, data, progress=False), update):
        with full(), refused(tmp_path / "x.pt"):
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
def test_a_manifest_on_a_full_disk(tmp_path, full):
    """The rows are on the disk before it: they are kept, and the run can be ended later."""
    plan = Plan(0, 4, 4)
    with open_store(tmp_path, {}, plan, 1, "float32") as store:
        store.write(0, torch.zeros(4), torch.ones(4, 1))
        with full(), refused(tmp_path / "manifest.json"):
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


def write(path, text):
    with disk.replacing(path) as temporary:
        temporary.write_text(text)


def test_no_name_beside_a_file_is_ours(tmp_path):
    """Neither a user's own file nor that of another writer."""
    (tmp_path / "x.tmp").write_text("mine")
    disk.require_writable(tmp_path / "x", "out")
    with disk.replacing(tmp_path / "x") as first, disk.replacing(tmp_path / "x") as second:
        first.write_text("first")
        second.write_text("second")
        assert first != second and disk.leftovers(tmp_path / "x") in ([first, second], [second, first])
    assert (tmp_path / "x").read_text() == "first" and (tmp_path / "x.tmp").read_text() == "mine"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["x", "x.tmp"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_written_through(tmp_path, there):
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "x", tmp_path / "link"
    if there:
        target.write_text("old")
    link.symlink_to(target)
    disk.require_writable(link, "out")
    write(link, "new")
    assert link.is_symlink() and target.read_text() == "new" and list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("mode", [0o600, 0o444, 0o666, 0o640])
def test_who_may_read_a_file_may_read_the_next(tmp_path, mode):
    path = tmp_path / "x"
    path.touch()
    path.chmod(mode)
    with disk.replacing(path) as temporary:
        assert stat.S_IMODE(temporary.stat().st_mode) & ~0o600 & ~mode == 0
        temporary.write_text("new")
    assert stat.S_IMODE(path.stat().st_mode) == mode and path.read_text() == "new"


def test_a_new_file_has_the_mode_of_any_other(tmp_path):
    (tmp_path / "other").touch()
    write(tmp_path / "x", "new")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_pipe_is_written_and_stays_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    disk.require_writable(tmp_path / "pipe", "out")
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_text()), daemon=True)
    reader.start()
    write(tmp_path / "pipe", "new")
    reader.join(60)
    assert got == ["new"] and [entry.name for entry in tmp_path.iterdir()] == ["pipe"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="pipes are reached by such names on Linux")
def test_a_pipe_without_a_name_is_written(tmp_path):
    """As /dev/stdout is one; a link of our own stands for it, which a mistake may replace without harm to others."""
    reading, writing = os.pipe()
    (tmp_path / "out").symlink_to(f"/proc/self/fd/{writing}")
    disk.require_writable(tmp_path / "out", "out")
    write(tmp_path / "out", "new")
    os.close(writing)
    with open(reading) as pipe:
        assert pipe.read() == "new" and (tmp_path / "out").is_symlink()


@pytest.mark.parametrize("name", ["a" * 255, "a" * 248 + ".pt", "\U0001f600" * 63])
def test_names_as_long_as_a_disk_takes_them(tmp_path, name):
    disk.require_writable(tmp_path / name, "out")
    write(tmp_path / name, "new")
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_a_name_that_is_empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, data = mlp()
    with pytest.raises(ValueError, match="out: wanted a file name, got ''"):
        ff.fit_factors(model, data, out="", progress=False)
    with pytest.raises(FileNotFoundError, match="cannot save: No such file"):
        disk.save_tensors("", {"a": torch.ones(3)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "saved"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_a_file_system_without_a_call_for_folders(tmp_path, monkeypatch, number, saved):
    fsync = os.fsync

    def refuse_folders(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(fd)

    monkeypatch.setattr(disk.os, "fsync", refuse_folders)
    if saved:
        return disk.save_tensors(tmp_path / "x.pt", {"a": torch.ones(3)})
    with pytest.raises(OSError, match="cannot save: Input/output error"):
        disk.save_tensors(tmp_path / "x.pt", {"a": torch.ones(3)})


@pytest.mark.parametrize("ready", [True, False])
def test_what_a_killed_writer_of_a_manifest_left_is_taken_away(tmp_path, ready):
    plan, left = Plan(0, 4, 4), disk._new_beside(tmp_path / "manifest.json", None)
    if ready:
        with open_store(tmp_path / "made", {}, plan, 1, "float32"):
            os.rename(left, tmp_path / "made" / left.name)
    folder = tmp_path / "made" if ready else tmp_path
    assert disk.leftovers(folder / "manifest.json") == [folder / left.name]
    with open_store(folder, {}, plan, 1, "float32"):
        assert disk.leftovers(folder / "manifest.json") == []
