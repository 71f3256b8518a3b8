"""Bytes of files to batches: every kind of item, every order of runs, both ways of reading, and whose memory it is."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch

from corpus_files import npy_bytes, write
from finf_fast import _C
from finf_fast.corpus import delivery, files, open_corpus
from finf_fast.corpus.files import MappedArray, MappedFile
from finf_fast.corpus.pixels import Pixels
from finf_fast.corpus.reading import TRIAL_BYTES, TRIALS, Reading, adopting
from finf_fast.corpus.slots import KEPT, SMALL, Slots
from finf_fast.records import DamagedFile

WAYS = pytest.mark.parametrize("io", ["read", "map"])
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def array_in(path: Path, values: np.ndarray, io: str, before: int = 0) -> MappedArray:
    """The values in a file of their own, after as many other bytes."""
    path.write_bytes(bytes(range(before)) + values.tobytes())
    with adopting(Reading(io)):
        return MappedArray(MappedFile(path), before, values.dtype, values.shape)


def values_of(dtype: str, count: int) -> np.ndarray:
    """Numbers of every size that the dtype has, its ends among them."""
    info = np.iinfo(dtype)
    drawn = np.random.default_rng(0).integers(info.min, info.max, count, info.dtype.newbyteorder("="), endpoint=True)
    drawn[:2] = info.min, info.max
    return drawn.astype(dtype)


@WAYS
@pytest.mark.parametrize("before", [0, 7, 128])
@pytest.mark.parametrize("dtype", ["u1", "i1", "<u2", "<i2", "<u4", "<i4", "<i8", ">u2", ">i4"])
def test_integers_of_every_kind_from_any_byte(tmp_path, io, before, dtype):
    stored = values_of(dtype, 5003)
    array = array_in(tmp_path / "x", stored, io, before)
    truth = stored.astype(np.int64)
    for starts, length in [(range(0, 5000, 100), 100), (range(3, 4000, 7), 33), (range(0, 4000, 500), 1), ([0], 5003)]:
        starts = starts if isinstance(starts, range) else np.array(starts)
        got = delivery.integers(array, starts, length)
        assert got.dtype == torch.int64 and got.tolist() == [truth[s : s + length].tolist() for s in starts]


@WAYS
def test_runs_longer_than_a_piece_and_past_the_cache(tmp_path, io):
    stored = values_of("<u2", (3 << 20) + 5)  # 24 MiB of int64: written past the cache, as the layout of rows allows
    array = array_in(tmp_path / "x", stored, io)
    for starts, length in [(range(0, 3 << 20, 1024), 1024), (range(0, 1 << 20, 512), 4096), (range(1), 3 << 20)]:
        truth = np.lib.stride_tricks.sliding_window_view(stored, length)[starts.start : starts.stop : starts.step]
        assert np.array_equal(delivery.integers(array, starts, length).numpy(), truth[: len(starts)])


@WAYS
def test_runs_in_any_order_repeated_and_ragged(tmp_path, io):
    stored, rng = values_of("<u2", 200_000), np.random.default_rng(1)
    array = array_in(tmp_path / "x", stored, io, before=1)
    lengths = rng.integers(0, 300, 1000)
    starts = rng.integers(0, len(stored) - 300, 1000)
    starts[10] = starts[11]
    got = delivery.integers(array, starts, 300, lengths, fill=-100).numpy()
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        assert np.array_equal(got[row, :length], stored[start : start + length]) and (got[row, length:] == -100).all()
    raw = delivery.as_stored(array, starts, 300, lengths, fill=7).numpy()
    assert raw.dtype == np.uint16 and np.array_equal(raw, np.where(got == -100, 7, got))
    for deliver in (delivery.integers, delivery.as_stored):
        assert deliver(array, starts[:3], 4, [0, 0, 0], fill=9).tolist() == [[9] * 4] * 3
    assert delivery.integers(array, starts[:0], 4).shape == (0, 4)


@WAYS
@pytest.mark.parametrize("dtype", ["<f4", "<f8", "<f2", "|b1", ">f4"])
def test_floats_and_bools_stay_as_they_are(tmp_path, io, dtype):
    stored = np.random.default_rng(0).normal(size=70_001).astype(dtype)
    array = array_in(tmp_path / "x", stored, io, before=3)
    starts = np.array([5, 69_000, 5, 17])
    for runs, length in [(range(0, 70_000, 1000), 1000), (starts, 1001), (range(1), 70_001)]:
        got = delivery.as_stored(array, runs, length).numpy()
        assert got.dtype == stored.dtype.newbyteorder("=")
        assert np.array_equal(got, np.stack([stored[s : s + length] for s in runs]))


@WAYS
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", ["|i1", "<i2", "<i4", "<i8", ">i4"])
def test_short_rows_of_what_stays_stored_are_filled_up(tmp_path, monkeypatch, io, compiled, dtype):
    if not compiled:
        monkeypatch.setattr(delivery, "_loops", lambda array: None)
    stored = np.arange(-60, 60).astype(dtype)
    array, lengths = array_in(tmp_path / "x", stored, io, before=1), [3, 0, 5, 1]
    got = delivery.as_stored(array, np.array([7, 0, 100, 7]), 5, lengths, fill=-100).numpy()
    assert got.dtype == stored.dtype.newbyteorder("=")
    wanted = [[*stored[s : s + n].tolist(), *[-100] * (5 - n)] for s, n in zip([7, 0, 100, 7], lengths, strict=True)]
    assert got.tolist() == wanted


def decoded_plainly(pixels: torch.Tensor, dtype: torch.dtype, mean, std) -> torch.Tensor:
    """(N, C, …) uint8 to what a model eats, as one writes it."""
    column = lambda v: torch.tensor(v, dtype=torch.float32).view(-1, *[1] * (pixels.ndim - 2))  # noqa: E731
    return pixels.float().div(255).sub(column(mean)).div(column(std)).to(dtype)


@WAYS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_pixels_to_the_bit(tmp_path, io, dtype, channels, layout):
    rng = np.random.default_rng(channels)
    stored = rng.integers(0, 256, (300, channels, 29, 31), np.uint8)
    stored[0, :, 0] = 255
    turned = stored.transpose(0, 2, 3, 1) if layout == "NHWC" else stored
    path = write(tmp_path / "x.npy", npy_bytes(turned.shape, "|u1", turned.tobytes()))
    mean, std = rng.uniform(0.1, 0.6, channels).tolist(), rng.uniform(0.1, 0.4, channels).tolist()
    corpus = open_corpus(path, mean=mean, std=std, layout=layout, dtype=dtype, io=io)
    truth = decoded_plainly(torch.from_numpy(stored), getattr(torch, dtype), mean, std)
    assert torch.equal(corpus.read(0, 300), truth) and torch.equal(corpus.read(7, 9), truth[7:9])


def test_means_that_arithmetic_misses_are_looked_up(tmp_path):
    """A subnormal spread has no reciprocal: what the loop computes is not the table, and the table counts."""
    stored = np.arange(256, dtype=np.uint8).reshape(4, 1, 8, 8)
    array = array_in(tmp_path / "x", stored, "read")
    pixels = Pixels(stored.shape, stored.dtype, 0.0, 1e-39)
    with np.errstate(over="ignore"):
        truth = (stored.astype(np.float32) / np.float32(255)) / np.float32(1e-39)
    assert np.array_equal(pixels.rows(array, 0, 4).numpy(), truth)


def test_rows_beside_labels_as_in_cifar(tmp_path):
    """A byte of label before each picture: pictures from any item on, labels too."""
    rng = np.random.default_rng(0)
    labels, stored = rng.integers(0, 10, 50, np.uint8), rng.integers(0, 256, (50, 3, 8, 8), np.uint8)
    rows = np.concatenate([labels[:, None], stored.reshape(50, -1)], 1)
    array = array_in(tmp_path / "x", rows.reshape(-1), "read")
    starts = np.array([49, 0, 0, 17]) * 193
    x = Pixels(stored.shape, stored.dtype, MEAN, STD).runs(array, starts + 1, (3, 8, 8))
    assert torch.equal(x, decoded_plainly(torch.from_numpy(stored[[49, 0, 0, 17]]), torch.float32, MEAN, STD))
    assert delivery.integers(array, starts, 1)[:, 0].tolist() == labels[[49, 0, 0, 17]].tolist()


def test_without_the_compiled_module_the_bits_are_the_same(tmp_path, monkeypatch):
    tokens = write(tmp_path / "t.bin", values_of("<u2", 1000).tobytes())
    images = write(tmp_path / "x.npy", npy_bytes((5, 3, 4, 6), "|u1", values_of("u1", 360).tobytes()))
    floats = write(tmp_path / "f.npy", npy_bytes((5, 6), "<f4", np.arange(30, dtype="<f4").tobytes()))

    def batches():
        for io in ("read", "map"):
            yield open_corpus(tokens, window=10, stride=7, io=io).read(0, 142)
            yield open_corpus(floats, mean=0.5, std=3.0, io=io).read(1, 5)
            for dtype in ("float32", "bfloat16"):
                yield open_corpus(images, mean=MEAN, std=STD, dtype=dtype, io=io).read(1, 5)

    compiled = list(batches())
    monkeypatch.setattr(delivery, "_loops", lambda array: None)
    assert all(torch.equal(a, b) for a, b in zip(compiled, batches(), strict=True))
    array = array_in(tmp_path / "p.bin", values_of("u1", 60), "read")
    assert Pixels((5, 3, 2, 2), array.dtype).runs(array, range(0), (3, 2, 2)).shape == (0, 3, 2, 2)


@pytest.mark.parametrize("deliver", ["float32", "bfloat16"])
def test_pixels_on_their_way_to_another_process_stay_where_they_are(deliver):
    pixels = Pixels((5, 3, 2, 2), np.dtype("u1"), MEAN, STD, deliver=deliver)
    table = pixels.table(torch.device("cpu"))
    copies = [pickle.loads(ForkingPickler.dumps(pixels)), copy.deepcopy(pixels)]
    assert not table.is_shared() and pixels.table(table.device).data_ptr() == table.data_ptr()
    for other in copies:
        assert torch.equal(other.table(table.device), table) and other.table(table.device).dtype == table.dtype


@pytest.mark.parametrize(
    "options, words",
    [
        ({"io": "mmap"}, r"io: wanted one of \('auto', 'map', 'read'\), got 'mmap'"),
        ({"dtype": "float16"}, r"dtype: wanted one of \['bfloat16', 'float32'\], got 'float16'"),
    ],
)
def test_options_that_are_unknown_are_refused(tmp_path, options, words):
    path = write(tmp_path / "x.npy", npy_bytes((2, 3), "|u1", bytes(6)))
    with pytest.raises(ValueError, match=words):
        open_corpus(path, **options)


def test_options_that_do_not_fit_the_source_are_refused(tmp_path):
    path = write(tmp_path / "x.npy", npy_bytes((2, 3), "<f4", bytes(24)))
    with pytest.raises(ValueError, match="dtype: wanted None, for only uint8 pixels are converted, got 'float32'"):
        open_corpus(path, dtype="float32")
    with pytest.raises(ValueError, match="io: wanted 'auto', for the format 'arrays' reads no files, got 'map'"):
        open_corpus(torch.zeros(3), io="map")
    with pytest.raises(ValueError, match="no options beside a corpus that is open already"):
        open_corpus(open_corpus(path), io="read")


def test_runs_outside_the_array_are_refused(tmp_path):
    array = array_in(tmp_path / "x", values_of("<u2", 100), "read")
    for starts, length in [(range(0, 100, 10), 11), (np.array([-1]), 3), (np.array([98]), 3)]:
        with pytest.raises(IndexError, match="starts: wanted runs inside the 100 items of"):
            delivery.integers(array, starts, length)
    with pytest.raises(ValueError, match="lengths: wanted at most `length`, got 5"):
        delivery.integers(array, np.array([0, 1]), 4, [4, 5])


def test_the_compiled_loops_name_what_is_wrong():
    wrong = {"descriptor": 0, "map": 0, "spoilt": 0, "starts": 0, "first": 0, "step": 1, "R": 1, "length": 6}
    wrong["threads"], lengths = 1, np.array([2])
    with pytest.raises(ValueError, match="out: wanted the address of its first element"):
        _C.deliver_raw(**wrong, lengths=0, item=1, fill=0, out=0)
    with pytest.raises(ValueError, match="spoilt: wanted the address of its first element"):
        _C.deliver_raw(**{**wrong, "map": 1}, lengths=0, item=1, fill=0, out=1)
    with pytest.raises(ValueError, match="threads: wanted at least 1, got 0"):
        _C.deliver_raw(**{**wrong, "threads": 0}, lengths=0, item=1, fill=0, out=1)
    with pytest.raises(ValueError, match="starts: wanted at least 0, got -1"):
        _C.deliver_raw(**{**wrong, "first": -1}, lengths=0, item=1, fill=0, out=1)
    with pytest.raises(ValueError, match="item: wanted 1, 2, 4 or 8 bytes where rows are filled up, got 3"):
        _C.deliver_raw(**wrong, lengths=lengths.ctypes.data, item=3, fill=0, out=1)
    for name, value, words in [("word", 3, "2 or 4 bytes, got 3"), ("run", 4, "length: wanted a multiple of C run")]:
        pixels = {"tables": 1, "word": 4, "C": 1, "run": 1, "mean": 0, "std": 0, name: value}
        with pytest.raises(ValueError, match=words):
            _C.deliver_pixels(**wrong, **pixels, out=1)
    with pytest.raises(ValueError, match="stored: wanted a code from 0 to 6, got 7"):
        _C.deliver_integers(**wrong, lengths=0, stored=7, fill=0, out=1)


# Which way


def test_auto_takes_the_way_that_is_faster_by_enough():
    for mapped, way in [(0.5, "map"), (0.95, "read"), (2.0, "read")]:
        reading, tried = Reading(), []
        while reading.describe()["io"] == "auto":
            tried.append(reading.way(TRIAL_BYTES))
            reading.note(tried[-1], TRIAL_BYTES, 1e-3 * (mapped if tried[-1] == "map" else 1))
        assert tried == ["read", "map"] * TRIALS
        words = reading.describe()
        assert words["io"] == way and reading.way(1 << 30) == way
        assert f"read 0.3 GB/s, map {0.262144 / mapped:.1f} GB/s" in words["io_reason"]


@pytest.mark.parametrize("fast", ["read", "map"])
def test_a_few_fast_readings_are_chance(fast):
    reading, seen = Reading(), {"read": 0, "map": 0}
    while reading.describe()["io"] == "auto":
        way = reading.way(TRIAL_BYTES)
        seen[way] += 1
        usual = 2e-3 if way == fast else 1e-3
        reading.note(way, TRIAL_BYTES, 1e-6 if way == fast and seen[way] <= 3 else usual)
    assert reading.describe()["io"] != fast


def test_what_is_brought_in_ahead_is_no_trial(tmp_path, monkeypatch):
    """It comes from a disk; memory is no faster by the other way for that."""
    corpus = open_corpus(write(tmp_path / "x.bin", bytes(4 << 20)), window=1024)
    monkeypatch.setattr(MappedFile, "_run_ahead", lambda *where: True)
    for _ in range(TRIALS):
        corpus.read(0, 1024)
    monkeypatch.undo()
    ways = []
    note = Reading.note
    monkeypatch.setattr(Reading, "note", lambda self, way, *rest: ways.append(way) or note(self, way, *rest))
    for _ in range(4):
        corpus.read(0, 1024)
    assert ways == ["read", "map", "read", "map"]


def test_what_the_disk_still_has_to_bring_is_read_unless_asked_otherwise(tmp_path, monkeypatch):
    reading = Reading()
    while reading.describe()["io"] == "auto":
        way = reading.way(TRIAL_BYTES)
        reading.note(way, TRIAL_BYTES, 1e-6 if way == "map" else 1e-3)
    assert reading.way(TRIAL_BYTES, lambda: True) == "read" and reading.way(TRIAL_BYTES, lambda: False) == "map"
    path, asked = write(tmp_path / "x.bin", bytes(4 << 20)), []
    monkeypatch.setattr(files, "_waits", lambda descriptor, byte: asked.append(byte) or True)
    for io, times in [("map", 0), ("read", 0), ("auto", TRIALS - 1)]:
        corpus = open_corpus(path, window=1024, io=io)
        for _ in range(TRIALS):
            corpus.read(0, 1024)
        assert len(asked) == times, io
    assert set(asked) == {(1 << 21) - 1} and corpus.describe()["io_reason"].startswith("fewer than 16 readings")


def test_it_waits_for_a_disk_only(tmp_path):
    path = write(tmp_path / "x.bin", bytes(4 << 20))
    with open(path, "rb") as file:
        file.read()
        assert not files._waits(file.fileno(), 100) and not files._waits(file.fileno(), 5 << 20)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            os.preadv(file.fileno(), [bytearray(1)], 100, os.RWF_NOWAIT)
        except BlockingIOError:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert files._waits(file.fileno(), 3 << 20)
        except OSError:
            pytest.skip("this file system does not say what is in memory")
        else:
            pytest.skip("this file system keeps what it was asked to let go of")


def test_small_readings_prove_nothing():
    reading = Reading()
    for _ in range(100):
        assert reading.way(TRIAL_BYTES - 1) == "read"
        reading.note("read", TRIAL_BYTES - 1, 1e-6)
    assert reading.describe()["io_reason"].startswith("fewer than 16 readings of 256 KiB and more by each way")


def test_a_network_is_read_unless_asked_otherwise(tmp_path, monkeypatch):
    path = write(tmp_path / "x.bin", bytes(1000))
    monkeypatch.setattr(files, "_on_network", lambda descriptor: True)
    corpus = open_corpus(path, window=10)
    assert corpus.describe()["io"] == "read" and "network" in corpus.describe()["io_reason"]
    assert open_corpus(path, window=10, io="map").describe()["io"] == "map"
    file = corpus._tokens.file
    file._known = (1, 2, *file._known[0][2:]), file._known[1]
    assert corpus.read(0, 3).shape == (3, 10)  # there the number of a file is no proof of another one
    monkeypatch.undo()
    os.replace(write(tmp_path / "y", bytes(1000)), path)
    os.utime(path, ns=(corpus._tokens.file.changed_ns,) * 2)
    for mode in (os.stat(path).st_mode, 0o400):  # where another number may be another file, a mode excuses nothing
        os.chmod(path, mode)
        with pytest.raises(DamagedFile, match="x.bin: changed"):
            corpus.read(0, 3)


def test_a_name_leads_to_the_same_file_or_not(tmp_path):
    path = write(tmp_path / "x.bin", bytes(1000))
    known = files._identity(os.stat(path))

    def leads_to(*known, numbered=True):
        return _C.leads_to(os.fsencode(path), *known, numbered)

    assert leads_to(*known) and leads_to(*known, numbered=False)
    for i in range(len(known)):
        other = [number + (i == j) for j, number in enumerate(known)]
        assert not leads_to(*other)
        assert leads_to(*other, numbered=False) == (i < 2)  # device and inode
    path.unlink()
    assert not leads_to(*known)


@pytest.mark.parametrize("when", [-1, -(2**62), 2**63, 2**64 + 1])
def test_times_that_64_bits_do_not_hold(tmp_path, when):
    """A file system that does not either takes the nearest it does."""
    path = write(tmp_path / "x.bin", bytes(1000))
    os.utime(path, ns=(when, when))
    file = MappedFile(path)
    assert file.head(3) == bytes(3)
    os.utime(path, ns=(0, 0))
    with pytest.raises(DamagedFile, match="x.bin: was written to"):
        file.head(3)


def test_this_machine_is_no_network(tmp_path):
    with open(write(tmp_path / "x", b"1"), "rb") as handle:
        assert _C.on_network(handle.fileno()) is False


def test_the_description_says_what_was_chosen(tmp_path):
    path = write(tmp_path / "x.bin", bytes(64 << 20))
    corpus = open_corpus(path, window=1024)
    mark = corpus.fingerprint
    for start in range(0, len(corpus), 1024):
        corpus.read(start, start + 1024)
    words = corpus.describe()
    assert words["io"] in ("read", "map") and "GB/s" in words["io_reason"] and words["io_threads"] >= 1
    assert open_corpus(path, window=1024, io="read").fingerprint == mark
    assert "io" not in open_corpus(torch.zeros(3)).describe()


# Whose memory


def test_a_batch_that_is_held_is_not_overwritten(tmp_path):
    stored = values_of("<u2", 1 << 19)
    corpus = open_corpus(write(tmp_path / "x.bin", stored.tobytes()), window=1024)
    held = [corpus.read(start, start + 64)[5:9, ::2] for start in range(0, 512, 64)]  # views of views
    truth = stored.reshape(-1, 1024).astype(np.int64)
    for block, view in enumerate(held):
        assert np.array_equal(view.numpy(), truth[64 * block + 5 : 64 * block + 9, ::2])


def test_a_slot_comes_back_when_the_last_view_of_it_is_gone():
    slots, shape = Slots(), (SMALL, 2)
    first = slots.empty(shape, torch.int64)
    place, view = first.data_ptr(), first.flatten()[3:].numpy()
    del first
    other = slots.empty(shape, torch.int64)
    assert other.data_ptr() != place and place % 64 == 0
    del view
    gc.collect()
    again = slots.empty(shape, torch.int64)
    assert again.data_ptr() == place and again.shape == shape
    assert slots.empty((SMALL,), torch.bfloat16).data_ptr() not in (place, other.data_ptr())


def test_only_so_many_slots_are_kept():
    slots = Slots()
    several = [slots.empty((SMALL + n,), torch.uint8) for n in range(3 * KEPT)]
    del several
    gc.collect()
    assert len(slots._lent.waiting()) == KEPT
    huge = slots.empty((300 << 20,), torch.uint8)  # never touched, so not there
    del huge
    assert len(slots._lent.waiting()) == KEPT and max(slots._lent.waiting()) < 300 << 20


@WAYS
def test_a_reused_slot_shows_nothing_of_its_last_batch(tmp_path, io):
    stored = values_of("<u2", 1 << 20)
    corpus = open_corpus(write(tmp_path / "x.bin", stored.tobytes()), window=1024, io=io)
    for start in (0, 128, 256, 640):
        batch = corpus.read(start, start + 128)
        assert np.array_equal(batch.numpy(), stored.reshape(-1, 1024)[start : start + 128])
        batch.fill_(-1)


# Threads, processes and many files


@WAYS
@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda corpus: pickle.loads(pickle.dumps(corpus))])
def test_a_copy_of_a_corpus_opens_its_file_for_itself(tmp_path, io, again):
    """One that closed its original's descriptor would leave that to the next file opened, whose bits it would read."""
    stored = [values_of("<u2", 200_000), values_of("<u2", 200_000)[::-1]]
    paths = [write(tmp_path / f"{k}.bin", values.tobytes()) for k, values in enumerate(stored)]
    first = open_corpus(paths[0], window=1000, io=io)
    first.read(0, 200)
    twin = again(first)
    assert torch.equal(twin.read(0, 200), first.read(0, 200)) and twin.fingerprint == first.fingerprint
    del twin
    gc.collect()
    second = open_corpus(paths[1], window=1000, io=io)
    for corpus, values in zip((first, second), stored, strict=True):
        assert np.array_equal(corpus.read(0, 200).numpy().reshape(-1), values)


@WAYS
def test_a_corpus_goes_to_a_process_of_its_own(tmp_path, io):
    path = write(tmp_path / "x.bin", values_of("<u2", 200_000).tobytes())
    corpus = open_corpus(path, window=1000, io=io)
    batch = corpus.read(0, 200)
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).read(0, 200).sum().item())"
    paths = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    settings = {"env": {**os.environ, "PYTHONPATH": paths}, "timeout": 100}
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(corpus), capture_output=True, **settings)
    assert done.returncode == 0 and int(done.stdout) == batch.sum(), done.stderr


@WAYS
def test_many_threads_read_at_once(tmp_path, io):
    stored = values_of("<u2", 1 << 20)
    corpus = open_corpus(write(tmp_path / "x.bin", stored.tobytes()), window=512, io=io)
    corpus.reading.threads = 3
    truth, wrong = stored.reshape(-1, 512), []

    def look(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(40):
            start = int(rng.integers(0, 1024))
            stop = int(rng.integers(start + 1, 2049))
            if not np.array_equal(corpus.read(start, stop).numpy(), truth[start:stop]):
                wrong.append((start, stop))

    threads = [threading.Thread(target=look, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_two_threads_that_map_a_file_at_once_share_the_mapping(tmp_path, monkeypatch):
    """The second one's would else take the place of the first one's, which would be unmapped while it is read."""
    path, real, both = write(tmp_path / "x", bytes(1000)), files.mmap.mmap, threading.Barrier(2, timeout=20)

    def at_once(*args, **how):
        both.wait()
        return real(*args, **how)

    monkeypatch.setattr(files.mmap, "mmap", at_once)
    opened, found = MappedFile(path)._open(), []
    mappers = [threading.Thread(target=lambda: found.append(opened.mapping())) for _ in range(2)]
    for thread in mappers:
        thread.start()
    for thread in mappers:
        thread.join()
    assert len(found) == 2 and found[0] == found[1] == opened.mapping()


def test_no_more_files_are_held_open_than_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_OPEN", 5)
    monkeypatch.setattr(files, "_open_files", files.OrderedDict())
    paths = [write(tmp_path / f"{n}", np.full(100, n, "<u2").tobytes()) for n in range(40)]
    opened = [MappedFile(path) for path in paths]
    for n in [*range(40), *range(39, -1, -3), 7, 7, 8]:
        with opened[n].view(20, 40) as raw:
            assert raw.view("<u2").tolist() == [n] * 10
        assert sum(file._opened is not None for file in opened) <= 5
    assert len(files._open_files) <= 5


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    settings = {**os.environ, "PYTHONPATH": paths, **environment}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=settings, capture_output=True, text=True, timeout=120
    )


FORKED = """
import os, sys
from finf_fast.corpus import open_corpus
corpus = open_corpus(sys.argv[1], window=1024, io=sys.argv[2])
corpus.reading.threads = 3
def total():  # by numpy: torch's own sums hang in a child whose parent has summed on several threads
    return int(corpus.read(0, 2048).numpy().sum())
wanted = total()
if os.fork() == 0:
    os._exit(0 if total() == wanted else 1)
assert os.wait()[1] == 0
assert total() == wanted
print("well")
"""


@WAYS
def test_a_forked_child_reads_with_threads_of_its_own(tmp_path, io):
    path = write(tmp_path / "x.bin", values_of("<u2", 1 << 21).tobytes())
    done = run_python(FORKED, str(path), io)
    assert (done.returncode, done.stdout.strip()) == (0, "well"), done.stderr


LOCKED = """
import os, sys
from finf_fast.corpus import files, open_corpus
with files._open_files_lock:
    if (child := os.fork()) == 0:
        os._exit(0 if len(open_corpus(sys.argv[1], window=8).read(0, 4)) == 4 else 1)
assert os.waitpid(child, 0)[1] == 0
print("well")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_while_a_file_is_being_opened(tmp_path):
    path = write(tmp_path / "x.bin", values_of("<u2", 1 << 10).tobytes())
    done = run_python(LOCKED, str(path))
    assert (done.returncode, done.stdout.strip()) == (0, "well"), done.stderr


ENDED = """
import sys
from finf_fast.corpus import open_corpus
from finf_fast.records import Plan
from finf_fast.staging import stage
corpus = open_corpus(sys.argv[1], window=1024, io=sys.argv[2])
corpus.reading.threads = 3
blocks = stage(corpus, Plan(0, 2048, 1024), list(range(2)) * 10000, depth=2)
next(blocks)
held = next(blocks)
if sys.argv[3] == "error":
    raise KeyboardInterrupt
"""


@WAYS
@pytest.mark.parametrize("end", ["quietly", "error"])
def test_the_interpreter_ends_while_threads_read(tmp_path, io, end):
    path = write(tmp_path / "x.bin", values_of("<u2", 1 << 21).tobytes())
    done = run_python(ENDED, str(path), io, end)
    # Python ends itself by its own SIGINT after a KeyboardInterrupt that nobody caught.
    assert done.returncode == (0 if end == "quietly" else -2), done.stderr
