"""Corpora of arrays in memory, and what every corpus promises: bounds, samples, transforms, fingerprints, refusals."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from finf_fast.corpus import Corpus, open_corpus
from finf_fast.corpus.digest import WHOLE
from finf_fast.corpus.mappings import MappedRows
from finf_fast.records import DamagedFile


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(10, 3), torch.arange(10)


def test_a_tuple_of_tensors_is_read_as_views(pair):
    corpus = open_corpus(pair)
    assert (corpus.format, len(corpus)) == ("arrays", 10)
    x, y = corpus.read(2, 5)
    assert torch.equal(x, pair[0][2:5]) and torch.equal(y, pair[1][2:5])
    assert x.data_ptr() == pair[0][2:].data_ptr() and y.data_ptr() == pair[1][2:].data_ptr()


def test_numpy_arrays_share_their_memory_too():
    x = np.random.default_rng(0).random((6, 2), np.float32)
    assert open_corpus(x).read(1, 3).data_ptr() == x[1:].ctypes.data


@pytest.mark.parametrize("dtype", ["f4", ">f4", "f2", "u1", "<u2", ">i4", "i8", "?"])
def test_an_array_that_is_mapped_for_reading_is_read_from_its_file(tmp_path, dtype):
    x = np.random.default_rng(0).integers(0, 2 if dtype == "?" else 99, (40, 3, 2)).astype(dtype)
    np.save(tmp_path / "x.npy", x)
    mapped, wanted = np.load(tmp_path / "x.npy", mmap_mode="r"), open_corpus(x)
    corpus = open_corpus(mapped)
    assert isinstance(corpus._arrays["source"], MappedRows) == np.dtype(dtype).isnative
    assert torch.equal(corpus.read(0, 40), wanted.read(0, 40)) and corpus.read(0, 1).dtype == wanted.read(0, 1).dtype
    assert torch.equal(corpus.take([39, 0, 7]), wanted.take([39, 0, 7])) and torch.equal(corpus[5], wanted[5])
    part = open_corpus(mapped[7:21])
    assert torch.equal(part.read(0, 14), wanted.read(7, 21)) and corpus.fingerprint == wanted.fingerprint
    if not np.dtype(dtype).isnative:
        return
    assert isinstance(part._arrays["source"], MappedRows)
    with pytest.raises(DamagedFile, match=r"x\.npy: (shrank|was written)"):
        os.truncate(tmp_path / "x.npy", 200)
        corpus.read(0, 40)


def test_other_mappings_stay_their_owner_s(tmp_path):
    x = np.random.default_rng(0).random((40, 6), np.float32)
    np.save(tmp_path / "x.npy", x)
    for mode in ("r+", "c"):  # whoever writes there sees it in the corpus
        mapped = np.load(tmp_path / "x.npy", mmap_mode=mode)
        corpus = open_corpus(mapped)
        mapped[3] = 5.0
        assert torch.equal(corpus[3], torch.full((6,), 5.0))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    for view in (mapped[::2], mapped[:, 1:], mapped.T, mapped + 1):
        assert torch.equal(open_corpus(view).read(0, len(view)), torch.from_numpy(np.array(view)))
    np.save(tmp_path / "new.npy", x[::-1])
    os.replace(tmp_path / "new.npy", tmp_path / "x.npy")  # the name leads to another file, then to none
    assert torch.equal(open_corpus(mapped).read(0, 40), torch.from_numpy(np.array(mapped)))
    (tmp_path / "x.npy").unlink()
    assert torch.equal(open_corpus(mapped).read(0, 40), torch.from_numpy(np.array(mapped)))


def test_structures_come_back_as_they_were_given(pair):
    x, y = pair
    assert isinstance(open_corpus(x).read(0, 2), torch.Tensor)
    assert isinstance(open_corpus([x, y]).read(0, 2), tuple)
    assert isinstance(open_corpus((x,)).read(0, 2), tuple)
    batch = open_corpus({"input_ids": x, "labels": y.numpy()}).read(0, 2)
    assert list(batch) == ["input_ids", "labels"] and torch.equal(batch["labels"], y[:2])


@pytest.mark.parametrize("dtype", ["u1", "i1", "<u2", ">i2", "u4", ">u4", "i4", "u8", "i8"])
def test_labels_of_any_integer_dtype_arrive_as_int64(dtype):
    y = np.array([0, 1, 5], dtype)
    _, got = open_corpus((np.zeros((3, 2), np.float32), y)).read(0, 3)
    assert got.dtype == torch.int64 and got.tolist() == [0, 1, 5]


def test_torch_labels_arrive_as_int64_and_pixels_stay():
    x, y = torch.zeros(3, 2, 2, dtype=torch.uint8), torch.tensor([1, 2, 3], dtype=torch.int32)
    got_x, got_y = open_corpus((x, y)).read(0, 3)
    assert (got_x.dtype, got_y.dtype) == (torch.uint8, torch.int64)
    assert got_x.data_ptr() == x.data_ptr()


def test_an_integer_too_large_for_int64_is_refused():
    y = np.array([1, 2**64 - 1], np.uint64)
    with pytest.raises(ValueError, match="wanted integers up to 9223372036854775807, got 18446744073709551615"):
        open_corpus(y).read(0, 2)


@pytest.mark.filterwarnings("error")
def test_read_only_reversed_and_foreign_arrays_are_copied():
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    frozen = values.copy()
    frozen.flags.writeable = False
    for array in (frozen, values[::-1], values.astype(">f4"), values[:, ::-1]):
        batch = open_corpus(array).read(1, 3)
        assert torch.equal(batch, torch.tensor(array[1:3].tolist()))
        batch.zero_()
    assert frozen[1, 0] == 3 and values[1, 0] == 3


def test_a_memory_map_is_read_and_never_written(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.arange(8.0).reshape(4, 2))
    before = path.read_bytes()
    corpus = open_corpus((np.load(path, mmap_mode="r"), torch.arange(4)))
    corpus.read(0, 4)[0].add_(1)
    assert corpus[3][0].tolist() == [6.0, 7.0] and path.read_bytes() == before


def test_a_tensor_that_requires_grad_is_read_without_it():
    assert not open_corpus(torch.zeros(3, 2, requires_grad=True)).read(0, 2).requires_grad


def test_a_tensor_dataset_is_read_as_its_tensors(pair):
    corpus = open_corpus(TensorDataset(*pair))
    assert corpus.format == "arrays" and corpus.read(3, 4)[0].data_ptr() == pair[0][3:].data_ptr()
    slow = open_corpus(TensorDataset(*pair), format="dataset")
    assert slow.format == "dataset" and torch.equal(slow.read(3, 6)[0], pair[0][3:6])


def test_labels_join_a_single_array(pair):
    x, y = open_corpus(pair[0], labels=pair[1].numpy().astype(np.int16)).read(0, 2)
    assert torch.equal(x, pair[0][:2]) and y.tolist() == [0, 1]


def test_a_sample_has_no_leading_dimension(pair):
    corpus = open_corpus({"x": pair[0], "y": pair[1]})
    assert torch.equal(corpus[-1]["x"], pair[0][9]) and corpus[-1]["y"].item() == 9
    assert [sample["y"].item() for sample in corpus] == list(range(10))
    assert open_corpus(pair)[4][1].shape == ()


@pytest.mark.parametrize("index", [10, -11])
def test_a_sample_out_of_range_is_an_index_error(pair, index):
    corpus = open_corpus(pair)
    with pytest.raises(IndexError, match=f"index: wanted -10 <= index < 10 .* got {index}"):
        corpus[index]
    with pytest.raises(IndexError, match="index"):
        corpus.locate(index)


@pytest.mark.parametrize("start, stop", [(-1, 2), (0, 11), (5, 5), (6, 5), (10, 12)])
def test_a_range_out_of_bounds_is_an_index_error(pair, start, stop):
    with pytest.raises(IndexError, match="start, stop: wanted 0 <= start < stop <= 10"):
        open_corpus(pair).read(start, stop)


def test_a_place_is_named(pair):
    assert open_corpus(pair).locate(-1) == "sample 9"


def test_a_transform_sees_every_batch_and_cannot_write_into_the_arrays(pair):
    kept = pair[0].clone()
    corpus = open_corpus(pair, transform=lambda batch: (batch[0].mul_(2), batch[1]))
    assert torch.equal(corpus.read(0, 10)[0], 2 * kept) and torch.equal(pair[0], kept)


@pytest.mark.parametrize(
    "transform, error",
    [(lambda batch: batch[0][:1], ValueError), (lambda batch: None, TypeError), (lambda b: b[0].sum(), ValueError)],
)
def test_a_transform_must_give_back_the_same_samples(pair, transform, error):
    with pytest.raises(error, match="transform: wanted"):
        open_corpus(pair, transform=transform).read(0, 3)


def test_a_description_goes_into_json(pair):
    words = json.loads(json.dumps(open_corpus({"x": pair[0], "y": pair[1]}).describe()))
    assert words["samples"] == 10 and words["format"] == "arrays" and words["paths"] == []
    assert words["shapes"] == {"x": [3], "y": []} and words["dtypes"] == {"x": "float32", "y": "int64"}


def plus_one(batch):
    return batch


def test_a_fingerprint_is_of_content_structure_and_settings(pair):
    x, y = pair
    mark = open_corpus((x, y)).fingerprint
    assert mark == open_corpus((x.clone(), y.numpy().copy())).fingerprint and int(mark, 16) > 0
    other_x, other_y = x.clone(), y.clone()
    other_x[9, 2] = torch.nextafter(x[9, 2], torch.tensor(9.0))
    other_y[0] += 1
    others = [
        open_corpus((other_x, y)),
        open_corpus((x, other_y)),
        open_corpus({"x": x, "y": y}),
        open_corpus((x.reshape(10, 3, 1), y)),
        open_corpus((x, y.int())),
        open_corpus(x),
        open_corpus((x, y), transform=plus_one),
    ]
    assert len({mark, *(corpus.fingerprint for corpus in others)}) == 8


def test_a_fingerprint_of_bfloat16_and_of_strided_tensors():
    x = torch.randn(6, 4).to(torch.bfloat16)
    assert open_corpus(x).fingerprint == open_corpus(x.t().contiguous().t()).fingerprint


def test_a_large_array_is_fingerprinted_by_its_ends_and_places_between():
    x = np.zeros(WHOLE // 4 + 1000, np.float32)
    mark = open_corpus(x).fingerprint
    for place in (0, -1):
        x[place] = 1
        assert open_corpus(x).fingerprint != mark
        x[place] = 0
    assert open_corpus(x).fingerprint == mark


@pytest.mark.parametrize(
    "source, error, words",
    [
        ((), ValueError, "source: wanted at least one array, got none"),
        ({}, ValueError, "source: wanted at least one array, got none"),
        ([], ValueError, "empty corpus"),
        (torch.zeros(0, 3), ValueError, "empty corpus, wanted at least 1 sample, got 0"),
        ((torch.zeros(3), torch.zeros(4)), ValueError, r"one leading length, got {'source\[0\]': 3, 'source\[1\]': 4}"),
        ({"a": torch.zeros(3), "b": torch.zeros(2)}, ValueError, "one leading length"),
        ((torch.zeros(3), [1, 2, 3]), TypeError, r"source\[1\]: wanted a tensor or numpy array, got list"),
        ((torch.zeros(3), (torch.zeros(3),)), TypeError, r"source\[1\]: wanted a tensor or numpy array, got tuple"),
        (torch.tensor(1.0), ValueError, "source: wanted samples along a first dimension"),
        (np.array(["a", "b"]), TypeError, "wanted floats, integers or bools, got dtype <U1"),
        (np.array([None, 1]), TypeError, "got dtype object"),
        (np.zeros(3, np.complex64), TypeError, "got dtype complex64"),
        (torch.zeros(3, dtype=torch.complex64), TypeError, "got dtype torch.complex64"),
        (np.ma.masked_array([1.0, 2.0], [0, 1]), TypeError, "without a mask"),
        (torch.zeros(3, device="meta"), TypeError, "dense tensor on the CPU, got torch.strided on meta"),
        (torch.zeros(3, 3).to_sparse(), TypeError, "dense tensor on the CPU, got torch.sparse_coo"),
        (7, TypeError, "source: wanted arrays, a path, or a map-style dataset"),
        (None, TypeError, "source: wanted arrays, a path, or a map-style dataset .* got NoneType"),
        (DataLoader(TensorDataset(torch.zeros(3))), TypeError, "got DataLoader"),
        (type("Stream", (IterableDataset,), {"__iter__": lambda self: iter([])})(), TypeError, "got Stream"),
        (iter([1]), TypeError, "source: wanted arrays"),
    ],
)
def test_sources_that_are_no_arrays_are_refused(source, error, words):
    with pytest.raises(error, match=words):
        open_corpus(source)


@pytest.mark.parametrize(
    "options, error, words",
    [
        (
            {"format": "parquet"},
            ValueError,
            r"format: wanted one of \['arrays', 'arrow', 'cifar', 'dataset', .*'tokens'\]",
        ),
        ({"window": 4}, ValueError, "window: wanted None, for the format 'arrays' takes"),
        ({"mean": 0.5}, ValueError, "mean: wanted None"),
        ({"collate_fn": list}, ValueError, "collate_fn: wanted None"),
        ({"transform": 3}, TypeError, "transform: wanted a callable"),
        ({"labels": torch.arange(10)}, ValueError, "labels: wanted only beside a single array, got .* tuple"),
        ({"format": "npy"}, ValueError, r"source: wanted a path, or the paths \(features, labels\)"),
        ({"format": "tokens"}, TypeError, "source: wanted a path for the format 'tokens', got tuple"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, error, words, pair):
    with pytest.raises(error, match=words):
        open_corpus(pair, **options)


@pytest.mark.parametrize("labels", [torch.zeros(10), torch.zeros(10, 1, dtype=torch.int64), [1] * 10])
def test_labels_must_be_a_row_of_integers(labels):
    with pytest.raises((ValueError, TypeError), match="labels: wanted"):
        open_corpus(torch.zeros(10, 2), labels=labels)


def test_an_open_corpus_is_handed_back(pair):
    corpus = open_corpus(pair)
    assert isinstance(corpus, Corpus) and open_corpus(corpus) is corpus
    with pytest.raises(ValueError, match="no options beside a corpus that is open already"):
        open_corpus(corpus, window=3)
    assert "10 samples" in repr(corpus)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"source: wanted an existing file, got .*nowhere\.npy"):
        open_corpus(tmp_path / "nowhere.npy")


def test_an_unknown_file_is_refused_with_its_first_bytes(tmp_path):
    path = tmp_path / "data.xyz"
    path.write_bytes(b"abcdefgh")
    with pytest.raises(ValueError, match=r"format: wanted 'npy', .* starts with '61 62 63 64'"):
        open_corpus(path)


def test_arrays_in_many_files_come_as_a_list_or_a_pattern(tmp_path):
    parts = [np.full((2, 3), k, np.float32) for k in range(3)]
    for k, part in enumerate(parts):
        np.save(tmp_path / f"{k}.npy", part)
    for source in ([tmp_path / f"{k}.npy" for k in range(3)], str(tmp_path / "*.npy")):
        assert np.array_equal(open_corpus(source).read(0, 6), np.concatenate(parts))
    with pytest.raises(FileNotFoundError, match=r"holds none known; its arrays want a pattern: '.*\*\.npy'"):
        open_corpus(tmp_path)
