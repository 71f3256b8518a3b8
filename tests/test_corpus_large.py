"""A thousand million samples: indices are arithmetic, and nothing is made for each of them."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest

from corpus_files import npy_bytes
from finf_fast.corpus import open_corpus

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


def tokens(folder):
    return sparse(folder / "t.bin", 2 * S, (2 * S - 2, b"\7\0")), {"window": 1}


def overlapping(folder):
    return sparse(folder / "t.bin", 2 * (S + 3), (2 * S + 4, b"\7\0")), {"window": 4, "stride": 1}


def npy(folder):
    head = npy_bytes((S, 3), "|u1", b"")
    return sparse(folder / "x.npy", len(head) + 3 * S, (0, head), (len(head) + 3 * S - 1, b"\xff")), {}


def cifar(folder):
    return sparse(folder / "data_batch_1.bin", 3073 * S, (3073 * (S - 1), b"\7")), {}


def datatrove(folder):
    sparse(folder / "t.ds", 10, (8, b"\7\0"))
    last = struct.pack("<Q", 5)
    return sparse(folder / "t.ds.index", 8 * S, (8 * (S - 1), last)).with_suffix(""), {}


def megatron(folder):
    sparse(folder / "t.bin", 10, (8, b"\7\0"))
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, S, 2)
    last = (34 + 4 * (S - 1), struct.pack("<i", 5))
    documents = (34 + 12 * S, struct.pack("<2q", 0, S))
    return sparse(folder / "t.idx", 34 + 12 * S + 16, (0, head), last, documents), {"sample": "sequence"}


@pytest.mark.parametrize("kind", [tokens, overlapping, npy, cifar, datatrove, megatron], ids=lambda kind: kind.__name__)
def test_a_corpus_of_a_thousand_million_samples(tmp_path, kind):
    try:
        source, options = kind(tmp_path)
    except OSError as error:
        pytest.skip(f"no sparse file of this size here: {error}")
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
