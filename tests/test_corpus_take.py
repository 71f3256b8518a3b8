"""Samples in any order: the same as one by one, from every format and across files."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import torch

from corpus_files import idx_bytes, megatron_bytes, npy_bytes, write
from finf_fast.corpus import delivery, open_corpus
from finf_fast.corpus.base import runs_of, tree_map
from finf_fast.corpus.collate import joined

DRAW = np.random.default_rng(3)
ORDER = [6, 0, 1, 2, 9, 9, 4, 8, 5]


def pixels(*shape):
    return DRAW.integers(0, 256, shape, np.uint8)


def arrays(folder):
    return {"x": DRAW.normal(size=(10, 3)), "y": np.arange(10, dtype=np.int32)}, {}


def npy(folder):
    write(folder / "y.npy", npy_bytes((10,), "<i2", np.arange(10, dtype="<i2").tobytes()))
    path = write(folder / "x.npy", npy_bytes((10, 4, 5, 3), "|u1", pixels(10, 4, 5, 3).tobytes()))
    return path, {"labels": folder / "y.npy", "layout": "NHWC", "mean": [0.1, 0.2, 0.3]}


def labels_in_memory(folder):
    return npy(folder)[0], {"labels": np.arange(10)}


def idx(folder):
    return write(folder / "images", idx_bytes((10, 4, 5), pixels(10, 4, 5).tobytes())), {"format": "idx"}


def tokens(folder):
    return write(folder / "t.bin", DRAW.integers(0, 9, 31).astype("<u2").tobytes()), {"window": 4, "stride": 3}


def cifar(folder):
    return write(folder / "data_batch_1.bin", pixels(10, 3073).tobytes()), {"std": 0.5}


def megatron(folder):
    parts = [DRAW.integers(0, 99, n).astype("<u2") for n in (3, 0, 5, 1, 7, 2, 2, 4, 6, 1)]
    index, data = megatron_bytes(parts, list(range(11)), 8)
    write(folder / "t.idx", index)
    return write(folder / "t.bin", data), {}


def olmo(folder):
    ends = np.cumsum([3, 0, 5, 1, 7, 2, 2, 4, 6, 1]).tolist()
    rows = [f'{start},{end},"id,{end}",src,0\r\n' for start, end in zip([0, *ends], ends, strict=False)]
    (folder / "part-0.csv.gz").write_bytes(gzip.compress("".join(rows).encode()))
    return write(folder / "part-0.npy", DRAW.integers(0, 2**31, ends[-1]).astype("<u4").tobytes()), {}


def arrow(folder):
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"input_ids": [list(range(n)) for n in (3, 0, 5, 1, 7, 2, 2, 4, 6, 1)]})
    with pa.OSFile(str(folder / "t.arrow"), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return folder / "t.arrow", {}


def files(folder):
    for k, count in enumerate((9, 5, 13, 11)):
        write(folder / f"{k}.bin", DRAW.integers(0, 9, count).astype("<u2").tobytes())
    return folder, {"window": 3}


def documents_in_files(folder):
    for k in "ab":
        (folder / k).mkdir()
        megatron(folder / k)
    return folder / "*" / "t.bin", {}


def dataset(folder):
    return [{"input_ids": torch.arange(n)} for n in (3, 1, 5, 1, 7, 2, 2, 4, 6, 1)], {}


KINDS = [arrays, npy, labels_in_memory, idx, tokens, cifar, megatron, olmo, arrow, files, documents_in_files, dataset]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("transformed", [False, True])
def test_as_one_by_one(tmp_path, kind, transformed):
    source, options = kind(tmp_path)
    # Rows that know the size of their batch show whether the transform saw all of it.
    transform = (lambda batch: {"rows": joined([batch]), "of": rows_of(batch)}) if transformed else None
    corpus = open_corpus(source, transform=transform, **options)
    batch = corpus.take(ORDER)
    if transformed:
        assert batch["of"].tolist() == [len(ORDER)] * len(ORDER)
        batch = batch["rows"]
        corpus = open_corpus(source, **options)
    same(batch, joined([corpus.read(i, i + 1) for i in ORDER]))
    same(corpus.take(np.arange(2, 7)), corpus.read(2, 7))
    same(corpus.take(torch.tensor([3])), corpus.read(3, 4))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_same_without_compiled_loops(tmp_path, kind, monkeypatch):
    source, options = kind(tmp_path)
    corpus = open_corpus(source, **options)
    compiled = corpus.take(ORDER), corpus.read(1, 8)
    monkeypatch.setattr(delivery, "_is_compiled", lambda array: False)
    corpus = open_corpus(source, **options)
    same(compiled, (corpus.take(ORDER), corpus.read(1, 8)))


def rows_of(batch):
    first = (
        batch if isinstance(batch, torch.Tensor) else next(iter(batch.values() if isinstance(batch, dict) else batch))
    )
    return torch.full((len(first),), len(first))


def same(found, wanted):
    pairs = []
    tree_map(lambda tensor: pairs.append([tensor]), wanted)
    rest = iter(pairs)
    tree_map(lambda tensor: next(rest).append(tensor), found)
    assert type(found) is type(wanted) and len(pairs) >= 1
    if isinstance(wanted, dict) and "attention_mask" in found and "attention_mask" not in wanted:
        pytest.fail("a mask that is not in every batch")
    for one, other in pairs:
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize(
    ("indices", "error", "words"),
    [
        ([], IndexError, "got none"),
        ([0, 10], IndexError, r"wanted 0 <= index < 10 \(samples\), got 10"),
        ([-1], IndexError, "got -1"),
        ([[0]], TypeError, "one dimension of integers"),
        ([0.5], TypeError, "got float64"),
        ([True], TypeError, "got bool"),
        (3, TypeError, r"got int64 \(\)"),
    ],
)
def test_indices_that_are_refused(tmp_path, indices, error, words):
    source, options = tokens(tmp_path)
    with pytest.raises(error, match=f"indices: .*{words}"):
        open_corpus(source, **options).take(indices)


def test_runs():
    assert runs_of(np.array([5])) == [(5, 6)]
    assert runs_of(np.array([3, 4, 5, 9, 8, 8, 0, 1])) == [(3, 6), (9, 10), (8, 9), (8, 9), (0, 2)]


def test_an_empty_document_has_no_token(tmp_path):
    for kind in (megatron, olmo, arrow):
        (tmp_path / kind.__name__).mkdir()
        source, options = kind(tmp_path / kind.__name__)
        empty, text = open_corpus(source, **options)[1], open_corpus(source, **options)[2]
        assert {key: row.shape for key, row in empty.items()} == {"input_ids": (0,), "attention_mask": (0,)}
        assert text["input_ids"].shape == text["attention_mask"].shape == (5,) and text["attention_mask"].all()


def test_descriptions(tmp_path):
    """A description is written into a manifest: every format's is JSON."""
    for kind in KINDS:
        (tmp_path / kind.__name__).mkdir()
        source, options = kind(tmp_path / kind.__name__)
        found = open_corpus(source, **options).describe()
        assert json.loads(json.dumps(found))["samples"] == len(open_corpus(source, **options))
