"""Corpora of flat token files: headers, windows, strides, tails, sizes past 2³¹ tokens, and every way to be wrong."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from corpus_files import flip_byte, llmc_bytes, npy_bytes, state, write
from finf_fast.corpus import open_corpus
from finf_fast.records import DamagedFile

STREAM = np.random.default_rng(0).integers(0, 50257, 103).astype("<u2")
V1, V7 = (20240520, 1), (20240801, 7)


@pytest.fixture
def flat(tmp_path):
    return write(tmp_path / "train.bin", STREAM.tobytes())


def test_windows_cut_the_stream_end_to_end(flat):
    corpus = open_corpus(flat, window=10)
    assert (corpus.format, len(corpus)) == ("tokens", 10)
    ids = corpus.read(3, 7)
    assert ids.dtype == torch.int64 and ids.tolist() == STREAM[30:70].reshape(4, 10).tolist()
    assert corpus[-1].tolist() == STREAM[90:100].tolist()


@pytest.mark.parametrize("window, stride", [(10, 3), (10, 10), (10, 25), (103, 1), (1, 1), (102, 1), (1, 50)])
def test_any_stride_reads_what_slicing_reads(flat, window, stride):
    corpus = open_corpus(flat, window=window, stride=stride)
    starts = range(0, len(STREAM) - window + 1, stride)
    assert len(corpus) == len(starts)
    assert corpus.read(0, len(corpus)).tolist() == [STREAM[s : s + window].tolist() for s in starts]
    assert corpus.read(len(corpus) - 1, len(corpus)).tolist() == [STREAM[starts[-1] : starts[-1] + window].tolist()]


def test_a_stride_beyond_the_end_leaves_one_window(flat):
    corpus = open_corpus(flat, window=10, stride=2**60 - 1)
    assert corpus.read(0, 1).tolist() == corpus.take([0]).tolist() == [STREAM[:10].tolist()]


def test_the_description_counts_what_no_window_holds(flat):
    words = json.loads(json.dumps(open_corpus(flat, window=10).describe()))
    assert (words["tokens"], words["tokens_dropped_at_tail"], words["tokens_skipped_between"]) == (103, 3, 0)
    words = open_corpus(flat, window=10, stride=25).describe()
    assert (words["samples"], words["tokens_dropped_at_tail"], words["tokens_skipped_between"]) == (4, 18, 45)
    assert words["paths"] == [str(flat)] and words["shapes"] == [10] and words["dtypes"] == "int64"
    assert open_corpus(flat, window=103).describe()["tokens_dropped_at_tail"] == 0


@pytest.mark.parametrize("kind, dtype", [(V1, "<u2"), (V7, "<u4")])
def test_llmc_headers_are_recognised(tmp_path, kind, dtype):
    stream = STREAM.astype(dtype) * (1 if dtype == "<u2" else 80_000)
    corpus = open_corpus(write(tmp_path / "shard.xyz", llmc_bytes(stream, *kind)), window=10)
    assert corpus.read(0, 10).flatten().tolist() == stream[:100].tolist()
    assert corpus.locate(2) == f"{tmp_path / 'shard.xyz'}, byte {1024 + 20 * stream.itemsize}"


def test_a_headerless_file_of_uint32_says_so(tmp_path):
    stream = STREAM.astype("<u4") + 4_000_000_000
    path = write(tmp_path / "raw.npy", stream.tobytes())
    ids = open_corpus(path, window=5, dtype="uint32").read(0, 2)
    assert ids.flatten().tolist() == stream[:10].tolist()
    with pytest.raises(ValueError, match=r"dtype: wanted one of \('uint16', 'uint32'\), which .*raw.npy does not tell"):
        open_corpus(path, window=5)


@pytest.mark.parametrize("vocabulary", [65, 50257, 65536, 128256, 1 << 20])
@pytest.mark.parametrize("count", [64, 100, 5000, 100_000])
def test_uint32_read_as_uint16_is_seen(tmp_path, vocabulary, count):
    # As in text, few tokens are frequent and they are the low ones: half of all are below the vocabulary's 1/16.
    stream = (np.random.default_rng(count).random(count) ** 4 * vocabulary).astype("<u4")
    path = write(tmp_path / "train.bin", stream.tobytes())
    with pytest.raises(ValueError, match=r"dtype: wanted 'uint32', or 'uint16' all the same, for .*train"):
        open_corpus(path, window=10)
    for dtype, item in [("uint32", "<u4"), ("uint16", "<u2")]:
        wanted = np.frombuffer(stream.tobytes(), item)[:10].tolist()
        assert open_corpus(path, window=10, dtype=dtype)[0].tolist() == wanted
    write(path, b"head" + stream.tobytes())
    with pytest.raises(ValueError, match="dtype: wanted 'uint32'"):
        open_corpus(path, window=10, header=4)


@pytest.mark.parametrize("vocabulary", [65, 50257])
@pytest.mark.parametrize("count", [32, 101, 5000, 100_001])
def test_int64_read_as_uint16_is_seen(tmp_path, vocabulary, count):
    """What numpy makes of a list of tokens, if nobody says otherwise."""
    stream = (np.random.default_rng(count).random(count) ** 4 * vocabulary).astype(np.int64)
    for header in (b"", b"head"):
        path = write(tmp_path / "train.bin", header + stream.tobytes())
        with pytest.raises(ValueError, match=r"train\.bin, got what looks like int64: save them with"):
            open_corpus(path, window=10, header=len(header))
    np.save(tmp_path / "train.npy", stream)
    assert open_corpus(tmp_path / "train.npy", window=10)[1].tolist() == stream[10:20].tolist()


@pytest.mark.parametrize("vocabulary", [1, 5, 17, 65, 50257, 65536])
@pytest.mark.parametrize("count", [64, 103, 128, 5000, 100_000])
def test_uint16_is_not_taken_for_uint32(tmp_path, vocabulary, count):
    draw = np.random.default_rng(count)
    for stream in (
        draw.integers(0, vocabulary, count),
        (draw.random(count) ** 4 * vocabulary).astype(int),
        np.where(np.arange(count) < count // 3, draw.integers(0, vocabulary, count), 0),  # padded with zeros
    ):
        corpus = open_corpus(write(tmp_path / "train.bin", stream.astype("<u2").tobytes()), window=10)
        assert corpus[1].tolist() == stream[10:20].tolist()


def test_a_header_of_another_kind_is_skipped(tmp_path):
    path = write(tmp_path / "train.bin", b"seven b" + STREAM.tobytes())
    corpus = open_corpus(path, window=103, header=7)
    assert corpus[0].tolist() == STREAM.tolist() and corpus.locate(0).endswith("byte 7")
    llmc = write(tmp_path / "llmc.bin", llmc_bytes(STREAM, *V1))
    assert open_corpus(llmc, window=1, header=0)[0].item() == 20240520 & 0xFFFF


@pytest.mark.parametrize("descr", ["<u2", "<i4", ">u4", "<i8"])
def test_a_stream_saved_by_numpy_is_read_when_a_window_is_given(tmp_path, descr):
    path = write(tmp_path / "x.npy", npy_bytes((103,), descr, STREAM.astype(descr).tobytes()))
    corpus = open_corpus(path, window=10)
    assert corpus.format == "tokens" and corpus[4].tolist() == STREAM[40:50].tolist()


@pytest.mark.parametrize(
    "content, options, error, words",
    [
        (STREAM.tobytes()[:-1], {}, DamagedFile, "whole uint16 tokens, got 205 bytes.*inside the token at byte 204"),
        (STREAM.tobytes(), {"header": 1}, DamagedFile, "got 205 bytes"),
        (STREAM.tobytes()[:-4], {"dtype": "uint32"}, DamagedFile, "inside the token at byte 200"),
        (llmc_bytes(STREAM, *V1)[:-2], {}, DamagedFile, "wanted 1230 bytes .*, got 1228: the data end at byte 1228"),
        (llmc_bytes(STREAM, *V1) + b"xx", {}, DamagedFile, "got 1232: bytes are left over at byte 1230"),
        (llmc_bytes(STREAM, *V1, count=102), {}, DamagedFile, "left over"),
        (llmc_bytes(STREAM, *V1, count=104), {}, DamagedFile, "the data end"),
        (llmc_bytes(STREAM, *V1, count=-5), {}, DamagedFile, "byte 8: wanted a number of tokens, got -5"),
        (llmc_bytes(STREAM, 20240520, 2), {}, DamagedFile, "byte 4: wanted version 1 after the magic 20240520, got 2"),
        (llmc_bytes(STREAM, 20240801, 1), {}, DamagedFile, "wanted version 7"),
        (llmc_bytes(STREAM, *V1)[:6], {}, DamagedFile, "wanted 1024 bytes .*, got 6"),
        (llmc_bytes(STREAM, *V1)[:4], {}, DamagedFile, "byte 4: wanted version 1 .*, got 0"),
        (llmc_bytes(STREAM, *V1), {"dtype": "uint32"}, ValueError, "dtype: wanted 'uint16' or None"),
        (b"", {}, ValueError, "empty corpus, wanted tokens after byte 0 of .*, got 0 bytes"),
        (STREAM.tobytes(), {"header": 206}, ValueError, "empty corpus"),
        (STREAM.tobytes(), {"header": -1}, ValueError, "header: wanted a number of bytes to skip, 0 or more, got -1"),
        (STREAM.tobytes(), {"dtype": "int64"}, ValueError, "dtype: wanted one of .* got 'int64'"),
        (STREAM.tobytes(), {"window": 104}, ValueError, r"window: wanted at most 103 \(the tokens in .*, got 104"),
        (STREAM.tobytes(), {"window": 0}, ValueError, "window: wanted 1 or more, got 0"),
        (STREAM.tobytes(), {"window": 2.5}, TypeError, "window: wanted an integer, got 2.5"),
        (STREAM.tobytes(), {"window": None}, ValueError, "window: wanted the tokens a sample for .*, got None"),
        (STREAM.tobytes(), {"stride": 0}, ValueError, "stride: wanted 1 or more, got 0"),
        (STREAM.tobytes(), {"stride": 2**60}, ValueError, f"stride: wanted fewer tokens than {2**60}, .* got {2**60}"),
        (STREAM.tobytes(), {"stride": 10**20}, ValueError, "stride: wanted fewer tokens than .*, got 1000"),
        (STREAM.tobytes(), {"window": 10**20}, ValueError, "window: wanted fewer tokens than .*, got 1000"),
        (STREAM.tobytes(), {"stride": -3}, ValueError, "stride: wanted 1 or more, got -3"),
        (STREAM.tobytes(), {"labels": STREAM}, ValueError, "labels: wanted None, for the format 'tokens' takes"),
        (npy_bytes((2, 3), "<u2", bytes(12)), {}, ValueError, "wanted one dimension of integers as tokens"),
        (npy_bytes((3,), "<f4", bytes(12)), {}, ValueError, "wanted one dimension of integers as tokens"),
    ],
)
def test_files_and_settings_that_do_not_fit_are_refused(tmp_path, content, options, error, words):
    path = write(tmp_path / "train.bin", content)
    with pytest.raises(error, match=words):
        open_corpus(path, **{"window": 10, **options})


def test_a_packed_stream_is_not_read_as_tokens(tmp_path):
    path = tmp_path / "x.bin.gz"
    path.write_bytes(gzip.compress(np.arange(1000, dtype="<u2").tobytes()))
    with pytest.raises(ValueError, match=r"got .*x\.bin\.gz, which is gzipped: unpack it first"):
        open_corpus(path, window=10, dtype="uint16")
    stream = np.array([0x8B1F, 8, *range(100)], "<u2")  # tokens may begin with the same bytes
    stream.tofile(tmp_path / "y.bin")
    assert open_corpus(tmp_path / "y.bin", window=51)[0].tolist() == stream[:51].tolist()


def test_a_stream_of_more_than_two_thousand_million_tokens(tmp_path):
    path, tokens = tmp_path / "train.bin", 2**31 + 5000
    with open(path, "wb") as handle:
        handle.truncate(2 * tokens)
        handle.seek(2 * (tokens - 3))
        handle.write(np.array([7, 8, 9], "<u2").tobytes())
    corpus = open_corpus(path, window=1000)
    assert len(corpus) == tokens // 1000
    assert corpus.locate(-1) == f"{path}, byte {(tokens // 1000 - 1) * 2000}"
    last = open_corpus(path, window=1000, stride=tokens - 1000)
    assert len(last) == 2 and last[1].tolist()[-4:] == [0, 7, 8, 9]
    mark = corpus.fingerprint
    with open(path, "r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        handle.write(b"\1")
    assert open_corpus(path, window=1000).fingerprint != mark


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="resident pages are counted by Linux")
def test_pages_that_were_read_are_let_go(tmp_path):
    def resident_kib():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))

    path, size = tmp_path / "train.bin", 64 << 20
    with open(path, "wb") as handle:
        handle.truncate(size)
    corpus = open_corpus(path, window=1 << 20)
    before = resident_kib()
    for i in range(len(corpus)):
        corpus.read(i, i + 1)
    assert resident_kib() - before < size / 1024 / 4


def test_reading_leaves_the_file_alone_and_bytes_change_the_fingerprint(flat):
    before = state(flat)
    corpus = open_corpus(flat, window=10)
    corpus.read(0, 10).zero_(), corpus.describe()
    mark = corpus.fingerprint
    assert state(flat) == before and open_corpus(str(flat), window=10).fingerprint == mark
    others = {open_corpus(flat, window=9).fingerprint, open_corpus(flat, window=10, stride=9).fingerprint}
    flip_byte(flat, 111)
    others.add(open_corpus(flat, window=10).fingerprint)
    assert len(others) == 3 and mark not in others


def test_a_file_that_shrinks_is_an_error(flat):
    corpus = open_corpus(flat, window=10)
    os.truncate(flat, 100)
    with pytest.raises(DamagedFile, match=r"train\.bin: shrank"):
        corpus.read(4, 6)
    with pytest.raises(DamagedFile, match=r"train\.bin: shrank from 206 to 100 bytes while it was read, at byte 0"):
        corpus.read(0, 5)  # these windows are still there, but whose they are now nobody knows
