"""Corpora of `.npy` files: pixels as models want them, labels beside, and every way a file can be wrong."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch

from corpus_files import flip_byte, idx_bytes, npy_bytes, state, write
from finf_fast.corpus import open_corpus
from finf_fast.corpus.idx import map_idx
from finf_fast.records import DamagedFile

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 3, 4, 5), np.uint8)


@pytest.fixture
def images(tmp_path):
    return write(tmp_path / "x.npy", npy_bytes(PIXELS.shape, "|u1", PIXELS.tobytes()))


@pytest.fixture
def labels(tmp_path):
    return write(tmp_path / "y.npy", npy_bytes((7,), "|u1", bytes(range(7))))


def test_pixels_become_floats_between_0_and_1(images, labels):
    corpus = open_corpus(images, labels=labels)
    assert (corpus.format, len(corpus)) == ("npy", 7)
    x, y = corpus.read(2, 6)
    assert torch.equal(x, torch.from_numpy(PIXELS[2:6]).float().div(255)) and x.is_contiguous()
    assert y.tolist() == [2, 3, 4, 5] and y.dtype == torch.int64


def test_two_paths_and_a_single_one(images, labels):
    assert torch.equal(open_corpus((str(images), labels))[3][1], torch.tensor(3))
    assert open_corpus(images).read(0, 1).shape == (1, 3, 4, 5)


def test_mean_and_std_are_rounded_as_torchvision_rounds_them(images):
    mean, std = [0.1, 0.2, 0.3], (0.4, 0.5, 0.7)
    x = open_corpus(images, mean=mean, std=std).read(0, 7)
    column = lambda values: torch.tensor(values).view(-1, 1, 1)  # noqa: E731
    assert torch.equal(x, torch.from_numpy(PIXELS).float().div(255).sub(column(mean)).div(column(std)))
    assert torch.equal(open_corpus(images, mean=0.5).read(0, 7), torch.from_numpy(PIXELS).float().div(255).sub(0.5))


def test_channels_last_are_turned_around(tmp_path):
    stored = PIXELS.transpose(0, 2, 3, 1)
    path = write(tmp_path / "x.npy", npy_bytes(stored.shape, "|u1", stored.tobytes()))
    x = open_corpus(path, layout="NHWC", mean=[0.1, 0.2, 0.3], std=0.5).read(1, 4)
    wanted = torch.from_numpy(PIXELS[1:4]).float().div(255).sub(torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)).div(0.5)
    assert torch.equal(x, wanted) and x.is_contiguous(memory_format=torch.channels_last)


def test_grey_pictures_get_a_channel_when_asked(tmp_path):
    path = write(tmp_path / "x.npy", npy_bytes((7, 3, 20), "|u1", PIXELS.tobytes()))
    assert open_corpus(path).read(0, 2).shape == (2, 3, 20)
    assert open_corpus(path, layout="NHW", mean=0.5).read(0, 2).shape == (2, 1, 3, 20)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("descr", ["<f4", ">f4", "<f8", "<f2", "|b1"])
def test_floats_stay_as_they_are_and_are_not_the_file(tmp_path, descr):
    values = np.arange(12).reshape(4, 3).astype(descr)
    path = write(tmp_path / "x.npy", npy_bytes((4, 3), descr, values.tobytes()))
    before = state(path)
    batch = open_corpus(path).read(1, 4)
    assert np.array_equal(batch.numpy(), values[1:]) and batch.numpy().dtype == values.dtype.newbyteorder("=")
    batch.zero_()
    assert state(path) == before


def test_floats_are_shifted_where_that_is_asked(tmp_path):
    path = write(tmp_path / "x.npy", npy_bytes((2, 2), "<f8", np.arange(4.0).tobytes()))
    x = open_corpus(path, mean=[1, 2], std=4).read(0, 2)
    assert x.dtype == torch.float64 and x.tolist() == [[-0.25, -0.25], [0.25, 0.25]]


def test_integers_arrive_as_int64(tmp_path):
    path = write(tmp_path / "x.npy", npy_bytes((2, 3), ">i2", np.arange(6, dtype=">i2").tobytes()))
    x = open_corpus(path).read(0, 2)
    assert x.dtype == torch.int64 and x.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_version_2_headers_are_read(tmp_path):
    path = write(tmp_path / "x.npy", npy_bytes((3,), "<f4", np.arange(3, dtype="<f4").tobytes(), version=2))
    assert open_corpus(path).read(0, 3).tolist() == [0, 1, 2]


def test_what_numpy_saves_is_read(tmp_path):
    np.save(tmp_path / "x.npy", PIXELS)
    np.save(tmp_path / "y.npy", np.arange(7))
    x, y = open_corpus((tmp_path / "x.npy", tmp_path / "y.npy")).read(0, 7)
    assert np.array_equal(np.rint(x.numpy() * 255), PIXELS) and y.tolist() == list(range(7))


def test_labels_may_be_in_memory_or_in_idx(images, tmp_path):
    idx = write(tmp_path / "labels.gz", idx_bytes((7,), bytes(range(7))))
    for labels in (np.arange(7, dtype=np.int8), torch.arange(7)):
        assert open_corpus(images, labels=labels)[5][1].item() == 5
    assert open_corpus((images, write(tmp_path / "plain", idx_bytes((7,), bytes(range(7))))))[5][1].item() == 5
    assert map_idx(idx, tmp_path / "cache").shape == (7,)


@pytest.mark.parametrize(
    "content, words",
    [
        (npy_bytes((6,), "|u1", bytes(6)), "labels: wanted 7 labels, one a row of .*x.npy, got 6"),
        (npy_bytes((7,), "<f4", bytes(28)), r"labels: wanted integers of shape \(S,\) in .*, got float32"),
        (npy_bytes((7, 1), "|u1", bytes(7)), r"labels: wanted integers of shape \(S,\) .* uint8 \(7, 1\)"),
        (b"hello, labels", "labels: wanted an .npy or IDX file, got .*y'"),
    ],
)
def test_wrong_labels_are_refused(images, tmp_path, content, words):
    with pytest.raises(ValueError, match=words):
        open_corpus(images, labels=write(tmp_path / "y", content))


@pytest.mark.parametrize("labels", [torch.zeros(7), torch.zeros(7, 1, dtype=torch.int64), torch.arange(8), "nowhere"])
def test_wrong_labels_in_memory_are_refused(images, labels):
    with pytest.raises((ValueError, FileNotFoundError), match="labels: wanted"):
        open_corpus(images, labels=labels)


@pytest.mark.parametrize(
    "content, error, words",
    [
        (npy_bytes((7, 2), "<f4", bytes(55)), DamagedFile, "wanted 184 bytes .*, got 183: the data end at byte 183"),
        (
            npy_bytes((7, 2), "<f4", bytes(57)),
            DamagedFile,
            "wanted 184 bytes .*, got 185: bytes are left over at byte 184",
        ),
        (npy_bytes((8, 2), "<f4", bytes(56)), DamagedFile, r"\(header 128, shape \(8, 2\), float32\)"),
        (npy_bytes((-1, 2), "<f4", b""), DamagedFile, "byte 10: wanted lengths of 0 or more"),
        (npy_bytes((2**60, 2**60), "<f8", b""), DamagedFile, "the data end at byte 128"),
        (b"", DamagedFile, r"byte 0: wanted the magic b'\\x93NUMPY', got b''"),
        (b"\x93NUMPX\x01\0", DamagedFile, "byte 0: wanted the magic"),
        (b"\x93NUMPY\x03\0\x01\0", DamagedFile, "wanted format version 1.0 or 2.0, got 3.0"),
        (b"\x93NUMPY\x01\0\xff\xff{'descr'", DamagedFile, "byte 6: header of .npy cannot be read"),
        (
            npy_bytes((2**63, 0), "<f4", b""),
            DamagedFile,
            "header: wanted lengths with a product below .* got the shape",
        ),
        (npy_bytes((10**30, 0), "|u1", b""), DamagedFile, "header: wanted lengths with a product below"),
        (npy_bytes((1, 2**63, 0), "<i4", b""), DamagedFile, "header: wanted lengths with a product below"),
        (npy_bytes((1, 2**58, 4, 0), "|u1", b""), DamagedFile, "header: wanted lengths with a product below"),
        (npy_bytes((0, 2), "<f4", b""), ValueError, "empty corpus, wanted at least 1 sample in .*"),
        (npy_bytes((), "<f4", bytes(4)), ValueError, "first dimension in .*, got a single number"),
        (npy_bytes((3, 2), "<f4", bytes(24), fortran=True), ValueError, "wanted C order .* got Fortran order"),
        (npy_bytes((3,), "|O", bytes(24)), ValueError, "wanted floats, integers or bools in .*, got dtype object"),
        (npy_bytes((3,), "<c8", bytes(24)), ValueError, "got dtype complex64"),
        (npy_bytes((3,), "<f16", bytes(48)), ValueError, "got dtype"),
    ],
)
def test_files_that_cannot_be_read_are_refused_at_opening(tmp_path, content, error, words):
    path = write(tmp_path / "bad.npy", content)
    with pytest.raises(error, match=words) as caught:
        open_corpus(path, format="npy")
    assert "bad.npy" in str(caught.value) or "empty" in str(caught.value)


@pytest.mark.parametrize("descr", ["<u8", ">u8"])
@pytest.mark.parametrize("kind", ["labels", "features", "tokens"])
def test_integers_that_int64_cannot_hold_are_named(images, tmp_path, kind, descr):
    """The loops take none of uint64, which numpy would wrap to numbers below 0."""
    values = np.array([1, 2**63 - 1, 2, 3, 4, 2**63, 2**64 - 1], descr)
    path = write(tmp_path / "y.npy", npy_bytes((7,), descr, values.tobytes()))
    options = {"labels": {"labels": path}, "features": {}, "tokens": {"window": 1}}[kind]
    corpus = open_corpus(images if kind == "labels" else path, **options)
    for rows in (range(5), [4, 1]):
        found = corpus.take(rows)
        found = found[1] if kind == "labels" else found.view(-1)
        assert found.tolist() == [int(values[row]) for row in rows]
    for look in (lambda: corpus.read(0, 7), lambda: corpus.take([1, 5, 0])):
        with pytest.raises(DamagedFile, match=rf"y\.npy, byte 168: wanted integers up to {2**63 - 1}, got {2**63}$"):
            look()


@pytest.mark.filterwarnings("ignore:invalid escape")
def test_a_damaged_header_is_always_a_named_error(tmp_path):
    draw = random.Random(0)
    whole = npy_bytes((4, 2), "<f4", bytes(32))
    path = tmp_path / "x.npy"
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            content[draw.randrange(6, 80)] = (
                draw.choice(b"({[,'\"\\\n\0 9-L<>f8OV") if draw.random() < 0.7 else draw.randrange(256)
            )
        path.write_bytes(content)
        try:
            corpus = open_corpus(path, format="npy")
        except ValueError as error:
            assert "x.npy" in str(error) or "empty" in str(error)
        else:
            corpus.read(0, len(corpus))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"layout": "NHW"}, r"layout: wanted \['NCHW', 'NHWC'\] for an array of shape"),
        ({"layout": "CHW"}, "layout: wanted"),
        (
            {"mean": [0.1, 0.2]},
            r"mean: wanted 1 or 3 finite numbers \(channels\), got \[0.1, 0.2\]; layout='NHWC' where",
        ),
        ({"std": 0}, "std: wanted numbers above 0, got 0"),
        ({"std": float("nan")}, "std: wanted 1 or 3 finite numbers"),
        ({"mean": "bright"}, "mean: wanted a number or a sequence of numbers, got 'bright'"),
        ({"stride": 3}, "stride: wanted None, for the format 'npy' takes .*, got 3"),
    ],
)
def test_options_that_do_not_fit_are_refused(images, options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        open_corpus(images, **options)


def test_mean_wants_floats_or_pixels(tmp_path):
    path = write(tmp_path / "x.npy", npy_bytes((2, 3), "<i4", bytes(24)))
    with pytest.raises(ValueError, match="mean, std: wanted pixels or floats"):
        open_corpus(path, mean=1)


def test_reading_leaves_the_files_alone(images, labels):
    before = state(images), state(labels)
    corpus = open_corpus(
        (images, labels), mean=0.5, std=0.5, transform=lambda batch: (batch[0].zero_(), batch[1].add_(1))
    )
    corpus.read(0, 7), corpus[0], corpus.describe(), corpus.fingerprint
    assert (state(images), state(labels)) == before


def test_a_file_that_shrinks_is_an_error_and_no_signal(tmp_path):
    rows = np.zeros((64, 4096), np.uint8)
    path = write(tmp_path / "x.npy", npy_bytes(rows.shape, "|u1", rows.tobytes()))
    corpus = open_corpus(path)
    assert corpus.read(60, 64).shape == (4, 4096)
    os.truncate(path, 128 + 32 * 4096)
    with pytest.raises(DamagedFile, match=r"x\.npy: shrank from 262272 to 131200 bytes while it was read, at byte 24"):
        corpus.read(60, 64)
    with pytest.raises(DamagedFile, match=r"x\.npy: shrank from 262272 to 131200 bytes while it was read, at byte 128"):
        corpus.read(0, 32)  # these rows are still there, but whose they are now nobody knows


def test_a_fingerprint_follows_every_byte_of_both_files(images, labels):
    mark = lambda **options: open_corpus((images, labels), **options).fingerprint  # noqa: E731
    first = mark()
    assert mark() == first
    os.utime(images, (1, 1))
    assert mark() == first, "a small file's content says all"
    others = {mark(mean=0.5), mark(std=0.5), mark(layout="NCHW"), open_corpus(images).fingerprint}
    flip_byte(images, -1)
    others.add(mark())
    flip_byte(images, -1)
    flip_byte(labels, -1)
    others.add(mark())
    assert len(others) == 6 and first not in others


def test_labels_in_memory_are_in_the_fingerprint(images):
    y = torch.arange(7)
    first = open_corpus(images, labels=y).fingerprint
    assert open_corpus(images, labels=y.clone()).fingerprint == first
    assert open_corpus(images, labels=y + 1).fingerprint != first


def test_a_place_is_a_byte_of_the_file(images, labels):
    corpus = open_corpus((images, labels))
    assert corpus.locate(2) == f"{images}, byte {128 + 2 * 60}"
    assert images.read_bytes()[128 + 2 * 60 :][:60] == PIXELS[2].tobytes()


def test_the_description_names_the_files(images, labels):
    words = open_corpus((images, labels), std=0.5).describe()
    assert words["paths"] == [str(images), str(labels)] and words["std"] == [0.5] and words["mean"] is None
    assert words["shapes"] == ([3, 4, 5], []) and words["dtypes"] == ("float32", "int64")
