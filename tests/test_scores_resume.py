"""Interrupted sweeps: what is kept, what a resumed run takes over, and the order of writes that makes it safe."""

from __future__ import annotations

import errno
import json
import os
import sys

import numpy as np
import pytest

from finf_fast.records import DamagedFile, Plan
from finf_fast.scores import Scores, files, folder, store
from scores_cases import BLOCK, PLAN, SAMPLES, START, STOP, TOKENS, finished, numbers, put, start


@pytest.fixture(params=["memory", "folder"])
def out(request, tmp_path):
    return None if request.param == "memory" else tmp_path / "deep" / "result"


@pytest.fixture
def done(tmp_path):
    finished(tmp_path / "result")
    return tmp_path / "result"


# Interrupted and resumed


def test_exception_keeps_what_was_scored(tmp_path):
    with pytest.raises(KeyboardInterrupt), start(tmp_path / "r") as writer:
        put(writer, [0, 1, 4])
        raise KeyboardInterrupt
    with start(tmp_path / "r") as writer:
        assert writer.missing() == [2, 3, 5, 6]
        assert writer.scored == 3 * BLOCK
        put(writer)
        scores = writer.finish()
    assert np.array_equal(scores.delta.T, numbers()[1][START:STOP])


def test_resumed_run_takes_the_plan_of_the_manifest(tmp_path):
    with start(tmp_path / "r") as writer:
        put(writer, [0])
        writer.halve(2, 4)
        writer.halve(3, 1)
    other = Plan(START, STOP, 16, threads=9, reason="another machine")
    with start(tmp_path / "r", other) as writer:
        assert writer.plan.block == BLOCK
        assert writer.plan.reason == PLAN.reason
        assert [writer.plan.forward_size(number) for number in range(5)] == [8, 8, 4, 1, 1]


def test_halving_an_earlier_block_does_not_grow_a_later_one():
    with start(None) as writer:
        writer.halve(4, 2)
        writer.halve(1, 4)
        assert [writer.plan.forward_size(number) for number in range(7)] == [8, 4, 4, 4, 2, 2, 2]


def test_halving_is_durable_before_the_block(tmp_path):
    with start(tmp_path / "r") as writer:
        writer.halve(0, 3)
        found = json.loads((tmp_path / "r" / "manifest.json").read_text())
        assert found["plan"]["halvings"] == [[0, 3]]


@pytest.mark.parametrize(("number", "size"), [(0, 4), (1, 8), (1, 0), (7, 4), (-1, 4)])
def test_halving_refuses(number, size, out):
    with start(out) as writer:
        put(writer, [0])
        with pytest.raises(ValueError, match=r"number: wanted|size: wanted"):
            writer.halve(number, size)
        assert writer.plan == PLAN


def test_complete_folder_gives_its_scores_at_once(done):
    before = (done / "manifest.json").read_bytes()
    with start(done) as writer:
        assert writer.missing() == []
        scores = writer.finish()
    assert np.array_equal(scores.delta.T, numbers()[1][START:STOP])
    assert (done / "manifest.json").read_bytes() == before


def test_record_of_the_real_run_survives_an_empty_one(tmp_path):
    finished(tmp_path / "r", record={"seconds": 9})
    assert finished(tmp_path / "r", record={"seconds": 0}).record == {"seconds": 9}


@pytest.mark.parametrize("step", ["save_manifest", "flag"])
def test_counts_stand_with_the_blocks_that_are_done(tmp_path, monkeypatch, step):
    """An end before the note, or between it and the flag that it belongs to, takes both back."""
    monkeypatch.setattr(store, "SYNC_EVERY", 0.0)
    base, delta = numbers()

    def write(writer, number, count):
        rows = slice(*writer.plan.rows(number))
        writer.write(number, base[rows], delta[rows], counted={"count": count})

    def stop(*_):
        raise KeyboardInterrupt

    with start(tmp_path / "r") as writer:
        assert writer.counted == {}
        write(writer, 0, 1)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(folder.Folder, step, stop)
            write(writer, 1, 2)
    with start(tmp_path / "r") as writer:
        assert (writer.missing(), writer.counted) == ([1, 2, 3, 4, 5, 6], {"count": 1})
        write(writer, 1, 1)  # another outcome than the note's, and the one that holds
    with start(tmp_path / "r") as writer:
        assert (writer.missing(), writer.counted) == ([2, 3, 4, 5, 6], {"count": 1})
        put(writer)
        assert writer.finish({"count": 1}).record == {"count": 1}


def test_a_record_that_was_never_finished_is_written_by_a_run_with_nothing_to_do(tmp_path):
    with start(tmp_path / "r") as writer:
        for number in writer.missing():
            rows = slice(*writer.plan.rows(number))
            writer.write(number, numbers()[0][rows], numbers()[1][rows], counted={"count": number + 1})
    with start(tmp_path / "r") as writer:
        assert writer.missing() == [] and writer.counted == {"count": 7}
        assert writer.finish(dict(writer.counted)).record == {"count": 7}


def test_a_disk_without_room_for_counts_keeps_the_scores(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    base, delta = numbers()
    with start(tmp_path / "r") as writer:
        rows = slice(*writer.plan.rows(0))
        writer.write(0, base[rows], delta[rows], counted={"count": 1})
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(folder.Folder, "save_manifest", full)
            writer.close()
    with start(tmp_path / "r") as writer:
        assert writer.missing() == [1, 2, 3, 4, 5, 6]


def test_resume_false_refuses_scores_but_not_an_empty_folder(tmp_path):
    (tmp_path / "r").mkdir()
    finished(tmp_path / "r", resume=False)
    with pytest.raises(ValueError, match="resume=False"):
        start(tmp_path / "r", resume=False)


def test_run_stopped_while_the_folder_was_made_starts_again(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(folder.Folder, "_create_done", stop)
        start(tmp_path / "r", tokens=TOKENS)
    assert (tmp_path / "r" / "delta.npy").exists()
    with pytest.raises(DamagedFile, match="holds no scores"):
        Scores.open(tmp_path / "r", partial=True)
    finished(tmp_path / "r", plan=Plan(0, 30, 5), resume=False)
    assert not (tmp_path / "r" / "token_base.npy").exists()
    assert len(Scores.open(tmp_path / "r")) == 30


def test_unfinished_folder_is_refused_unless_partial(tmp_path):
    with start(tmp_path / "r") as writer:
        put(writer, [1, 6])
        with pytest.raises(ValueError, match="5 missing, first 0"):
            writer.finish()
    with pytest.raises(ValueError, match="2 of 7 blocks done"):
        Scores.open(tmp_path / "r")
    on_disk = (tmp_path / "r" / "delta.npy").read_bytes()
    scores = Scores.open(tmp_path / "r", partial=True)
    scored = np.repeat(np.isin(np.arange(7), [1, 6]), BLOCK)[:SAMPLES]
    base, delta = numbers()
    assert not scores.complete
    assert np.array_equal(np.isnan(scores.base), ~scored)
    assert np.array_equal(scores.base[scored], base[START:STOP][scored])
    assert np.array_equal(scores.delta.T[scored], delta[START:STOP][scored])
    assert np.isnan(scores.delta.T[~scored]).all()
    assert len(scores.top(0, SAMPLES)) == scored.sum()
    assert (tmp_path / "r" / "delta.npy").read_bytes() == on_disk
    with pytest.raises(ValueError, match="finished"):
        scores.save(tmp_path / "copy")


# The order of writes, which is what a crash tests


@pytest.fixture
def log(monkeypatch):
    """Every write and sync of a file as (what, name of the file)."""
    events, pwrite, datasync = [], os.pwrite, files.datasync

    def name(fd):
        return os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))

    def logged_write(fd, data, offset):
        events.append(("write", name(fd)))
        return pwrite(fd, data, offset)

    def logged_sync(fd):
        events.append(("sync", name(fd)))
        datasync(fd)

    monkeypatch.setattr(os, "pwrite", logged_write)
    for module in (files, folder):
        monkeypatch.setattr(module, "datasync", logged_sync)
    return events


@pytest.mark.skipif(sys.platform != "linux", reason="names of open files come from /proc")
def test_rows_are_durable_before_their_flag(tmp_path, log, monkeypatch):
    monkeypatch.setattr(store, "SYNC_EVERY", 0.0)
    with start(tmp_path / "r") as writer:
        log.clear()
        put(writer, [0])
    rows = [("write", "base.npy"), ("write", "delta.npy")]
    syncs = [("sync", "base.npy"), ("sync", "delta.npy")]
    assert log == [*rows, *syncs, ("write", "done"), ("sync", "done")]


@pytest.mark.skipif(sys.platform != "linux", reason="names of open files come from /proc")
def test_small_blocks_share_a_sync(tmp_path, log, monkeypatch):
    monkeypatch.setattr(store, "SYNC_EVERY", 1e9)
    with start(tmp_path / "r") as writer:
        log.clear()
        put(writer)
        assert ("write", "done") not in log
    assert log.count(("sync", "delta.npy")) == log.count(("write", "done")) == 1
    assert Scores.open(tmp_path / "r").complete


def test_partial_writes_are_continued(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:7], offset))
    assert np.array_equal(finished(tmp_path / "r").delta.T, numbers()[1][START:STOP])


def test_failed_sync_leaves_the_blocks_missing(tmp_path, monkeypatch):
    """After a failed sync the kernel may drop the rows and report the next sync as good."""
    failures = [OSError(errno.EIO, "input/output error")]
    datasync = files.datasync

    def fail_once(fd):
        if failures:
            raise failures.pop()
        datasync(fd)

    with start(tmp_path / "r") as writer:
        put(writer, [0, 1])
        monkeypatch.setattr(files, "datasync", fail_once)
        with pytest.raises(OSError, match=r"input/output.*base\.npy"):
            writer.close()
        writer.close()
    with start(tmp_path / "r") as writer:
        assert writer.missing() == list(range(7))


def test_failed_write_names_the_file_and_leaves_the_block_missing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with start(tmp_path / "r") as writer:
        put(writer, [0])
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(OSError, match=r"cannot write row 8.*base\.npy") as caught:
                put(writer, [1])
        assert caught.value.errno == errno.ENOSPC
        assert writer.missing() == [1, 2, 3, 4, 5, 6]
