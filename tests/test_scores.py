"""Scores: what is written is what is read, in memory and in a folder, whole, in shards, or as a table."""

from __future__ import annotations

import itertools
import pickle
import shutil
import sys
import tracemalloc

import numpy as np
import pytest
import torch

from finf_fast.records import DamagedFile, ManifestMismatch, Plan
from finf_fast.scores import Scores, folder, open_store
from scores_cases import (
    BLOCK,
    CORPUS,
    DIRECTIONS,
    IDENTITY,
    PLAN,
    QUERIES,
    SAMPLES,
    START,
    STOP,
    TOKENS,
    finished,
    numbers,
    put,
    start,
)


@pytest.fixture(params=["memory", "folder"])
def out(request, tmp_path):
    return None if request.param == "memory" else tmp_path / "deep" / "result"


@pytest.fixture
def done(tmp_path):
    finished(tmp_path / "result")
    return tmp_path / "result"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_written_is_read(out, dtype):
    scores = finished(out, dtype=dtype, record={"seconds": 1.5})
    base, delta = numbers(dtype)
    assert scores.base.dtype == scores.delta.dtype == dtype
    assert np.array_equal(scores.base, base[START:STOP])
    assert np.array_equal(scores.delta, delta[START:STOP].T)
    assert np.array_equal(scores.influence, delta[START:STOP].T * np.array([[1], [-1], [1]]))
    assert scores.influence.dtype == dtype
    assert np.array_equal(scores.indices, np.arange(START, STOP))
    assert len(scores) == SAMPLES
    assert scores.complete
    assert scores.names == ("q0", "q1", "q2")
    assert scores.directions == DIRECTIONS
    assert scores.record == {"seconds": 1.5}
    assert scores.plan == "pair: 8 samples fill the cache"
    assert f"{SAMPLES} samples, 3 queries, {np.dtype(dtype)}, complete" in repr(scores)


def test_influence_of_ascent_only_is_no_copy(out):
    scores = finished(out, directions=("ascent",) * 3)
    assert np.shares_memory(scores.influence, scores.delta)


def test_blocks_come_in_any_order_and_as_tensors(out):
    base, delta = (torch.from_numpy(array) for array in numbers())
    with start(out) as writer:
        for number in reversed(writer.missing()):
            rows = slice(*writer.plan.rows(number))
            writer.write(number, base[rows], delta.T.contiguous()[:, rows].T)
        scores = writer.finish()
    assert np.array_equal(scores.base, base[START:STOP].numpy())
    assert np.array_equal(scores.delta.T, delta[START:STOP].numpy())


def test_tokens_are_padded_with_nan(out):
    rng = np.random.default_rng(0)
    with start(out, tokens=TOKENS) as writer:
        for number in writer.missing():
            rows = range(*writer.plan.rows(number))
            length = 1 + number % TOKENS
            tokens = rng.normal(size=(len(rows), length, QUERIES)).astype(np.float32)
            writer.write(number, tokens[:, 0, 0], tokens[:, 0], tokens[..., 0], tokens)
        scores = writer.finish()
    assert scores.token_base.shape == (SAMPLES, TOKENS)
    assert scores.token_delta.shape == (QUERIES, SAMPLES, TOKENS)
    assert np.array_equal(scores.token_base[:, 0], scores.base)
    assert np.array_equal(scores.token_delta[:, :, 0], scores.delta)
    lengths = np.repeat(1 + np.arange(PLAN.blocks) % TOKENS, BLOCK)[:SAMPLES]
    assert np.array_equal(np.isnan(scores.token_base), np.arange(TOKENS) >= lengths[:, None])
    assert np.array_equal(np.isnan(scores.token_delta[2]), np.isnan(scores.token_base))


def test_arrays_are_read_only_maps_of_plain_npy_files(done):
    scores = Scores.open(done)
    for array in (scores.base, scores.delta):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    base, delta = numbers()
    assert np.array_equal(np.load(done / "base.npy", mmap_mode="r"), base[START:STOP])
    assert np.array_equal(np.load(done / "delta.npy", mmap_mode="r"), delta[START:STOP])


def test_a_finished_folder_that_is_cut_is_refused_not_looked_at(tmp_path, done):
    """A look at a mapping beyond the end of its file would end the process."""
    scores = Scores.open(tmp_path / "result")
    (tmp_path / "result" / "delta.npy").write_bytes(b"")
    for look in (lambda: scores.delta, lambda: scores.top(0, 1), lambda: scores.normalized("absolute")):
        with pytest.raises(DamagedFile, match=r"delta\.npy: wanted \d+ bytes, got 0"):
            look()


def test_scores_in_hand_stay_wherever_their_folder_goes(tmp_path, done, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scores = Scores.open("result")
    wanted = scores.delta.copy()
    monkeypatch.chdir("/")
    assert np.array_equal(scores.delta, wanted)
    (tmp_path / "result").rename(tmp_path / "other")
    assert np.array_equal(scores.delta, wanted)
    carried = pickle.dumps(scores)
    shutil.rmtree(tmp_path / "other")
    assert np.array_equal(scores.delta, wanted) and np.array_equal(pickle.loads(carried).delta, wanted)


def test_opening_reads_no_array(tmp_path):
    plan = Plan(0, 1 << 20, 1 << 16)
    with open_store(tmp_path / "big", {}, plan, 2, np.float64) as writer:
        for number in writer.missing():
            writer.write(number, np.zeros(plan.block), np.zeros((plan.block, 2)))
        writer.finish()
    tracemalloc.start()
    scores = Scores.open(tmp_path / "big")
    assert scores.delta.nbytes == 1 << 24
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


# Shards


def shards(tmp_path, cuts=(0, 30, 35, CORPUS), kept=slice(None), **options):
    ranges = list(itertools.pairwise(cuts))[kept]
    return [finished(tmp_path / f"{a}-{b}", Plan(a, b, BLOCK), record={"part": a}, **options) for a, b in ranges]


@pytest.mark.parametrize("as_paths", [False, True])
def test_merged_shards_are_the_whole(tmp_path, out, as_paths):
    parts = shards(tmp_path)
    parts = [part.path for part in parts[::-1]] if as_paths else parts[::-1]
    scores = Scores.merge(parts, out)
    base, delta = numbers()
    assert np.array_equal(scores.base, base)
    assert np.array_equal(scores.delta.T, delta)
    assert np.array_equal(scores.indices, np.arange(CORPUS))
    assert scores.directions == DIRECTIONS
    assert scores.complete
    assert [part["record"]["part"] for part in scores.record["merged"]] == [0, 30, 35]
    assert scores.path == out


def test_merged_memory_and_folder(tmp_path):
    left = finished(None, Plan(0, 10, 3))
    right = finished(tmp_path / "right", Plan(10, 31, 4))
    assert np.array_equal(Scores.merge([right, left]).base, numbers()[0][:31])


def test_merging_copies_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("finf_fast.scores.joining.COPY_BYTES", 40)
    assert np.array_equal(Scores.merge(shards(tmp_path)).delta.T, numbers()[1])


def test_merged_part_keeps_its_corpus_indices(tmp_path):
    scores = Scores.merge(shards(tmp_path, kept=slice(1, None)))
    assert scores.indices[0] == 30
    assert scores.top(0, 1).indices[0] == 30 + np.argmax(numbers()[1][30:, 0])


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (Plan(31, 40, 4), "a gap: .*a ends before sample 30, .*b begins with sample 31"),
        (Plan(29, 40, 4), "an overlap: .*a ends before sample 30, .*b begins with sample 29"),
        (Plan(0, 30, 4), "an overlap"),
    ],
)
def test_merge_refuses_gaps_and_overlaps(second, message, tmp_path):
    parts = [finished(tmp_path / "a", Plan(0, 30, 8)), finished(tmp_path / "b", second)]
    with pytest.raises(ValueError, match=message):
        Scores.merge(parts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"identity": {**IDENTITY, "versions": {}}}, "identity.versions.torch"),
        ({"directions": ["descent"] * 3}, "directions"),
        ({"corpus_samples": 101}, "shape.corpus_samples"),
    ],
)
def test_merge_refuses_other_runs(change, message, tmp_path):
    parts = [finished(tmp_path / "a", Plan(0, 30, 8)), finished(tmp_path / "b", Plan(30, 40, 8), **change)]
    with pytest.raises(ManifestMismatch, match=message):
        Scores.merge(parts)


def test_merge_refuses_nothing_unfinished_and_full_folders(tmp_path, done):
    with pytest.raises(ValueError, match="at least one shard"):
        Scores.merge([])
    with start(tmp_path / "half") as writer:
        put(writer, [0])
    with pytest.raises(ValueError, match="1 of 7 blocks done"):
        Scores.merge([tmp_path / "half"])
    with pytest.raises(ValueError, match="merge: wanted finished"):
        Scores.merge([Scores.open(tmp_path / "half", partial=True)])
    with pytest.raises(ValueError, match="with scores in it"):
        Scores.merge([done], done)


def test_merge_stopped_half_way_can_be_repeated(tmp_path, monkeypatch):
    parts = shards(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(folder.Folder, "flag", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        Scores.merge(parts, tmp_path / "out")
    with pytest.raises(DamagedFile, match="holds no scores"):
        Scores.open(tmp_path / "out")
    assert np.array_equal(Scores.merge(parts, tmp_path / "out").base, numbers()[0])


def test_memory_is_saved_and_read(tmp_path):
    memory = finished(None, record={"seconds": 2})
    saved = memory.save(tmp_path / "r")
    for scores in (saved, Scores.open(tmp_path / "r")):
        assert np.array_equal(scores.base, memory.base)
        assert np.array_equal(scores.delta, memory.delta)
        assert scores.manifest == memory.manifest
    with pytest.raises(ValueError, match="with scores in it"):
        memory.save(tmp_path / "r")
    assert start(tmp_path / "r").missing() == []


# Tables


def test_pandas_and_arrow_hold_the_same(out):
    pandas, arrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    scores = finished(out, names=("first", "second", "a third"))
    frame, table = scores.to_pandas(), scores.to_arrow()
    columns = ["index", "base"]
    columns += [f"{kind}_{name}" for name in scores.names for kind in ("delta", "influence")]
    assert isinstance(frame, pandas.DataFrame)
    assert isinstance(table, arrow.Table)
    assert list(frame.columns) == table.column_names == columns
    assert np.array_equal(frame["index"], scores.indices)
    assert np.array_equal(frame["base"], scores.base)
    assert frame["base"].dtype == np.float32
    for query, name in enumerate(scores.names):
        assert np.array_equal(frame[f"delta_{name}"], scores.delta[query])
        assert np.array_equal(frame[f"influence_{name}"], scores.influence[query])
        assert np.array_equal(table[f"delta_{name}"].to_numpy(), scores.delta[query])
    pandas.testing.assert_frame_equal(table.to_pandas(), frame)


@pytest.mark.parametrize(("module", "method"), [("pandas", "to_pandas"), ("pyarrow", "to_arrow")])
def test_missing_table_library_names_the_extra(module, method, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{method} needs {module}: .*\[frame\]"):
        getattr(finished(None), method)()
