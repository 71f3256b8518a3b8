"""A thousand million samples: indices are arithmetic, and nothing is made for each of them."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest

from corpus_files import npy_bytes
from finf_fast.corpus import open_corpus
from finf_fast.corpus.digest import SAMPLED, WHOLE
from finf_fast.corpus.files import MappedFile

S = 10**9
# What opening and reading a batch may take: a bit a sample would be 119 MiB.
MOST = 8 << 20


def sparse(path, size, *written):
    """A file of so many bytes, nearly all of them a hole; ``written`` are (place, bytes)."""
    with open(path, "wb") as file:
        file.truncate(size)
        for place, content in written:
            file.seek(place)
            file.write(content)
    assert path.stat().st_blocks * 512 < 1 << 20
    return path


def tokens(folder, S):
    return sparse(folder / "t.bin", 2 * S, (2 * S - 2, b"\7\0")), {"window": 1}


def overlapping(folder, S):
    return sparse(folder / "t.bin", 2 * (S + 3), (2 * S + 4, b"\7\0")), {"window": 4, "stride": 1}


def npy(folder, S):
    head = npy_bytes((S, 3), "|u1", b"")
    return sparse(folder / "x.npy", len(head) + 3 * S, (0, head), (len(head) + 3 * S - 1, b"\xff")), {}


def cifar(folder, S):
    return sparse(folder / "data_batch_1.bin", 3073 * S, (3073 * (S - 1), b"\7")), {}


def datatrove(folder, S):
    sparse(folder / "t.ds", 10, (8, b"\7\0"))
    last = struct.pack("<Q", 5)
    return sparse(folder / "t.ds.index", 8 * S, (8 * (S - 1), last)).with_suffix(""), {}


def megatron(folder, S):
    sparse(folder / "t.bin", 10, (8, b"\7\0"))
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, S, 2)
    last = (34 + 4 * (S - 1), struct.pack("<i", 5))
    documents = (34 + 12 * S, struct.pack("<2q", 0, S))
    return sparse(folder / "t.idx", 34 + 12 * S + 16, (0, head), last, documents), {"sample": "sequence"}


KINDS = pytest.mark.parametrize(
    "kind", [tokens, overlapping, npy, cifar, datatrove, megatron], ids=lambda kind: kind.__name__
)


def made(kind, folder, count):
    try:
        return kind(folder, count)
    except OSError as error:
        pytest.skip(f"no sparse file of this size here: {error}")


@KINDS
def test_a_corpus_of_a_thousand_million_samples(tmp_path, kind):
    source, options = made(kind, tmp_path, S)
    tracemalloc.start()
    try:
        corpus = open_corpus(source, **options)
        first, last, middle = corpus.read(0, 64), corpus[-1], corpus.take([S - 1, 0, S // 2])
        assert corpus.fingerprint and corpus.describe()["samples"] == S
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(corpus) == S and most < MOST
    if kind in (datatrove, megatron):
        assert last["input_ids"].tolist() == [0, 0, 0, 0, 7] and middle["attention_mask"].sum() == 5
        assert corpus.lengths(S - 2, S).tolist() == [0, 5]
    elif kind is npy:
        assert last.tolist() == [0, 0, 1] and not middle[1:].any()
    elif kind is cifar:
        assert last[1] == 7 and middle[1].tolist() == [7, 0, 0] and first[0].shape == (64, 3, 32, 32)
    else:
        assert last.tolist()[-1] == 7 and not first.any() and np.count_nonzero(middle) == 1


@pytest.fixture
def work(monkeypatch):
    """Calls that look into a file, and bytes that they ask for."""
    done, hear = np.zeros(2, np.int64), MappedFile.hear

    def heard(self, told, start, stop, count):
        done[:] += 1, count
        return hear(self, told, start, stop, count)

    monkeypatch.setattr(MappedFile, "hear", heard)

    def of(step):
        before = done.copy()
        return step(), tuple((done - before).tolist())

    return of


@KINDS
def test_opening_looks_at_a_bounded_number_of_bytes(tmp_path, work, kind):
    """However many samples: ends, headers, places where the type of a token shows, and Megatron's last lengths."""
    source, options = made(kind, tmp_path, S)
    corpus, (calls, read) = work(lambda: open_corpus(source, **options))
    assert len(corpus) == S and calls <= 16 and read <= 1 << 19
    _, (_, read) = work(lambda: corpus.fingerprint)
    assert 0 < read <= 2 * (WHOLE + SAMPLED)  # of an index and its data


@KINDS
def test_a_sample_costs_the_same_in_any_corpus(tmp_path, work, kind):
    """Calls and bytes, not time, from ten thousand samples to a hundred million."""
    found = []
    for count in (10**4, 10**6, 10**8):
        folder = tmp_path / str(count)
        folder.mkdir()
        source, options = made(kind, folder, count)
        corpus = open_corpus(source, **options)
        steps = (
            lambda corpus=corpus, count=count: corpus.read(count // 2, count // 2 + 64),
            lambda corpus=corpus, count=count: corpus.take(np.arange(64) * (count // 64)),
            lambda corpus=corpus: corpus[-1],
            lambda corpus=corpus, count=count: corpus.lengths(count // 2, count // 2 + 64),
            lambda corpus=corpus, count=count: corpus.locate(count // 2),
        )
        found.append([work(step)[1] for step in steps])
    assert found[0] == found[1] == found[2] and found[0][0][1] > 0
