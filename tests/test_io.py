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
from finf_fast.corpus.reading import MAP, MAP_WHAT_IS_THERE, READ, TRIAL_BYTES, TRIALS, Reading, adopting
from finf_fast.corpus.slots import KEPT, SMALL, Slots
from finf_fast.records import DamagedFile

WAYS = pytest.mark.parametrize("io", ["read", "map"])
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def array_in(path: Path, values: np.ndarray, io: str, before: int = 0) -> MappedArray:
    """The values in a file of their own, after as many other bytes."""
    path.write_bytes(bytes(range(before)) + values.tobytes())
    with adopting(Reading(io)):
        return MappedArray(MappedFile(path), before, values.dtype, values.shape)


def reading_by(io: str, path: Path) -> MappedFile:
    with adopting(Reading(io)):
        return MappedFile(path)


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
        monkeypatch.setattr(delivery, "_is_compiled", lambda array: False)
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


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_halves_between_two_bfloat16_go_to_the_even_one(tmp_path, layout):
    """By this spread pixel 5 becomes 1.01953125, which lies halfway: the loop of pairs would round it up."""
    spread, stored = 0.019232215359807014, np.arange(768, dtype=np.uint16).astype(np.uint8).reshape(3, 1, 256, 1)
    half = np.float32(5) / np.float32(255) / np.float32(spread)
    assert half == 1.01953125 and torch.tensor(half).to(torch.bfloat16) == 1.015625
    stored = np.ascontiguousarray(np.broadcast_to(stored, (3, 1, 256, 3)) if layout == "NHWC" else stored[..., 0, None])
    array = array_in(tmp_path / "x", stored, "read")
    pixels = Pixels(stored.shape, stored.dtype, 0.0, spread, layout, "bfloat16")
    truth = torch.from_numpy(stored.astype(np.float32) / np.float32(255) / np.float32(spread)).to(torch.bfloat16)
    truth = truth.permute(0, 3, 1, 2) if layout == "NHWC" else truth
    assert torch.equal(pixels.rows(array, 0, 3), truth)


@pytest.mark.parametrize(
    "layout, shape", [("NCHW", (5, 3, 0, 4)), ("NHWC", (5, 4, 3, 0)), ("NHWC", (5, 0, 4, 3)), (None, (5, 0))]
)
def test_pixels_of_which_a_sample_has_none(tmp_path, layout, shape):
    corpus = open_corpus(write(tmp_path / "x.npy", npy_bytes(shape, "|u1", b"")), layout=layout)
    kept = [shape[1], shape[2], shape[3]] if layout else [0]
    kept = [kept[2], *kept[:2]] if layout == "NHWC" else kept
    assert list(corpus.read(1, 3).shape) == [2, *kept] and list(corpus.take([4, 0, 0]).shape) == [3, *kept]


def test_an_array_that_reaches_beyond_its_file(tmp_path):
    array = MappedArray(reading_by("read", write(tmp_path / "x", bytes(1000))), 0, np.dtype(np.uint8), (2000,))
    with pytest.raises(DamagedFile, match="x, byte 1000: the file ends there, wanted bytes up to 1100"):
        delivery.as_stored(array, range(900, 901), 200)


def test_a_mapping_that_the_system_refuses(tmp_path):
    """Asked for, it is an error; on trial the file is read, and nothing learnt."""
    if "asan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("a sanitizer maps memory of its own, without end")
    code = """
import resource, sys
import numpy as np
from finf_fast.corpus import open_corpus
from finf_fast.records import DamagedFile
sizes = {"window": 1 << 17, "dtype": "uint16"}
asked, free = open_corpus(sys.argv[1], io="map", **sizes), open_corpus(sys.argv[1], **sizes)
asked.reading.threads = free.reading.threads = 1
free.read(0, 1)
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
print(all(not free.read(i, i + 1).any() for i in range(1, 100)), free.describe()["io"])
try:
    asked.read(0, 1)
except DamagedFile as error:
    print(error)
"""
    with open(tmp_path / "x.bin", "wb") as file:
        file.truncate(1 << 30)
    done = run_python(code, str(tmp_path / "x.bin"))
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "True auto" and "cannot be read: Cannot allocate memory" in second


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
    monkeypatch.setattr(delivery, "_is_compiled", lambda array: False)
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


def reader_of(path: Path, **other: object) -> _C.Reader:
    known = {"size": os.path.getsize(path), "numbered": True, "path": os.fsencode(path)}
    return _C.Reader(os.open(path, os.O_RDONLY), **{**known, **other})


def test_the_compiled_loops_name_what_is_wrong(tmp_path):
    reader, lengths = reader_of(write(tmp_path / "x", bytes(100))), np.array([2])
    where = {
        "way": 0,
        "known": (0,) * 5,
        "begin": 0,
        "end": 6,
        "starts": 0,
        "first": 0,
        "step": 1,
        "lengths": 0,
        "R": 1,
        "length": 6,
    }
    raw = {**where, "threads": 1, "item": 1, "fill": 0, "out": 1}
    for change, words in [
        ({"out": 0}, "out: wanted the address of its first element"),
        ({"threads": 0}, "threads: wanted at least 1, got 0"),
        ({"first": -1}, "starts: wanted at least 0, got -1"),
        ({"begin": -1}, "begin: wanted at least 0, got -1"),
        ({"end": -1}, "end: wanted at least 0, got -1"),
        ({"way": 3}, "way: wanted a code from 0 to 2, got 3"),
        (
            {"lengths": lengths.ctypes.data, "item": 3},
            "item: wanted 1, 2, 4 or 8 bytes where rows are filled up, got 3",
        ),
    ]:
        with pytest.raises(ValueError, match=words):
            reader.deliver_raw(**{**raw, **change})
    with pytest.raises(ValueError, match="stored: wanted a code from 0 to 6, got 7"):
        reader.deliver_integers(**where, threads=1, stored=7, fill=0, out=1)
    table = np.zeros((1, 256), np.float32)
    pixels = {"tables": table.ctypes.data, "word": 4, "C": 1, "run": 1, "mean": 0, "std": 0}
    for change, words in [
        ({"word": 3}, "word: wanted 2 or 4 bytes, got 3"),
        ({"C": 0}, "C: wanted at least 1, got 0"),
        ({"run": 0}, "run: wanted at least 1, got 0"),
        ({"tables": 0}, "tables: wanted the address of its first element"),
    ]:
        with pytest.raises(ValueError, match=words):
            _C.Shades(**{**pixels, **change})
    with pytest.raises(ValueError, match="length: wanted a multiple of C run, got 6"):
        reader.deliver_pixels(**where, threads=1, shades=_C.Shades(**{**pixels, "run": 4}), out=1)
    with pytest.raises(ValueError, match="descriptor: wanted at least 0, got -1"):
        _C.Reader(-1, b"x", 0, True)


# Which way


def tried_until_chosen(reading: Reading, seconds) -> list[bool]:
    """Whether each trial was asked to be mapped; `seconds` says how long it took."""
    tried = []
    while reading.describe()["io"] == "auto":
        tried.append(reading.way(TRIAL_BYTES) == MAP_WHAT_IS_THERE)
        reading.note(tried[-1], TRIAL_BYTES, seconds(tried[-1]))
    return tried


def test_auto_takes_the_way_that_is_faster_by_enough():
    for speed, way in [(0.5, "map"), (0.95, "read"), (2.0, "read")]:
        reading = Reading()
        tried = tried_until_chosen(reading, lambda mapped, speed=speed: 1e-3 * (speed if mapped else 1))
        assert tried == [False, True] * TRIALS
        words = reading.describe()
        assert words["io"] == way and reading.way(1 << 30) == (MAP_WHAT_IS_THERE if way == "map" else READ)
        assert f"read 0.3 GB/s, map {0.262144 / speed:.1f} GB/s" in words["io_reason"]
        assert reading.way(TRIAL_BYTES - 1) == READ  # what is small is ruled by other costs
    assert (Reading("map").way(1), Reading("read").way(1 << 30)) == (MAP, READ)


@pytest.mark.parametrize("fast", ["read", "map"])
def test_a_few_fast_readings_are_chance(fast):
    reading, seen = Reading(), {"read": 0, "map": 0}

    def seconds(mapped: bool) -> float:
        way = "map" if mapped else "read"
        seen[way] += 1
        return 1e-6 if way == fast and seen[way] <= 3 else 2e-3 if way == fast else 1e-3

    tried_until_chosen(reading, seconds)
    assert reading.describe()["io"] != fast


def test_what_is_brought_in_ahead_is_no_trial(tmp_path):
    """It comes from a disk; memory is no faster by the other way for that."""
    file = MappedFile(write(tmp_path / "x.bin", bytes(4 << 20)))
    for no_trial, chosen in [(True, "auto"), (False, "map")]:
        for trial in range(2 * TRIALS):
            file.hear((0, 0, trial % 2 == 1, no_trial, True, 1e-3 / (1 + trial % 2)), 0, 1 << 20, 1 << 20)
        assert file.reading.describe()["io"] == chosen


def test_small_readings_prove_nothing():
    reading = Reading()
    for mapped in [False, True] * 100:
        assert reading.way(TRIAL_BYTES - 1) == READ
        reading.note(mapped, TRIAL_BYTES - 1, 1e-6)
    assert reading.describe()["io_reason"].startswith("fewer than 16 readings of 256 KiB and more by each way")


def test_a_network_is_read_unless_asked_otherwise(tmp_path, monkeypatch):
    path = write(tmp_path / "x.bin", bytes(1000))
    monkeypatch.setattr(files, "_on_network", lambda descriptor: True)
    corpus = open_corpus(path, window=10)
    assert corpus.describe()["io"] == "read" and "network" in corpus.describe()["io_reason"]
    assert open_corpus(path, window=10, io="map").describe()["io"] == "map"
    file = corpus._tokens.file
    file.known = (1, 2, *file.known[0][2:]), file.known[1]
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
    known, out = files._identity(os.stat(path)), np.empty(10, np.uint8)

    def is_same(*known, numbered=True):
        reader = reader_of(path, numbered=numbered) if path.exists() else gone
        return reader.deliver_raw(0, known, 0, 10, 0, 0, 10, 0, 1, 10, 1, 1, 0, out.ctypes.data)[4]

    assert is_same(*known) and is_same(*known, numbered=False)
    for i in range(len(known)):
        other = [number + (i == j) for j, number in enumerate(known)]
        assert not is_same(*other)
        assert is_same(*other, numbered=False) == (i < 2)  # device and inode
    gone = reader_of(path)
    path.unlink()
    assert not is_same(*known)


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


def mappings_of(path: Path) -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]


def test_threads_that_map_a_file_at_once_share_the_mapping(tmp_path):
    """Another one's would else take the place of the first one's, which would be unmapped while it is read."""
    corpora = [open_corpus(write(tmp_path / "x.bin", bytes(1 << 20)), window=1024, dtype="uint16", io="map")]
    start = threading.Barrier(4, timeout=20)

    def look() -> None:
        start.wait()
        corpora[0].read(0, 512)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(mappings_of(tmp_path / "x.bin")) == 1
    corpora.clear()
    gc.collect()
    assert mappings_of(tmp_path / "x.bin") == []


def held_of_files() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssFile"))


def test_what_is_held_of_mappings_does_not_grow_with_their_number(tmp_path):
    """Of all files together: if each could hold as much as one, these would."""
    paths = [write(tmp_path / f"{n}.bin", bytes(12 << 20)) for n in range(8)]
    corpora = [open_corpus(path, window=1024, dtype="uint16", io="map") for path in paths]
    corpora[0].read(0, 512)
    before, held = held_of_files(), []
    for corpus in corpora:
        for start in range(0, len(corpus), 512):
            corpus.read(start, start + 512)
            held.append(held_of_files() - before)
    assert 4 << 20 < max(held) < 32 << 20


def test_what_is_held_of_mappings_does_not_grow_with_a_reading(tmp_path):
    with open(tmp_path / "x.bin", "wb") as file:
        file.truncate(400 << 20)
    array = MappedArray(reading_by("map", tmp_path / "x.bin"), 0, np.dtype(np.uint8), (400 << 20,))
    delivery.as_stored(array, range(1), 1 << 20)
    before, held, done = held_of_files(), [], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            held.append(held_of_files() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    delivery.as_stored(array, range(1), 400 << 20)
    done.set()
    watcher.join()
    assert 1 << 20 < max(held) < 64 << 20


def test_a_file_that_cannot_be_looked_at_is_closed_again(tmp_path, monkeypatch):
    path = write(tmp_path / "x", bytes(10))

    def fail(*_):
        raise OSError("stale")

    before = len(os.listdir("/proc/self/fd"))
    for name, holder in [("fstat", files.os), ("_on_network", files), ("Reader", _C)]:
        with monkeypatch.context() as patched, pytest.raises(OSError, match="stale"):
            patched.setattr(holder, name, fail)
            MappedFile(path)
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == before, name


@WAYS
def test_a_name_that_led_elsewhere_while_it_was_opened_again(tmp_path, io):
    """Back where it was it looks as if nothing had happened; what is open is the other file."""
    one, other, name = (tmp_path / f"{n}.bin" for n in ("one", "other", "name"))
    for n, path in enumerate((one, other), 1):
        write(path, np.full(4096, n, np.uint16).tobytes())
    name.symlink_to(one)
    corpus = open_corpus(name, window=64, dtype="uint16", io=io)
    (file,) = corpus._files()
    real = files.Opened

    def meanwhile(path):
        name.unlink()
        name.symlink_to(other)
        opened = real(path)
        name.unlink()
        name.symlink_to(one)
        return opened

    file._opened = None
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(files, "Opened", meanwhile)
        with pytest.raises(DamagedFile, match="name.bin: led to another file while it was opened again"):
            corpus.read(0, 2)
    assert corpus.read(0, 2).unique().tolist() == [1]


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
