"""Corpora of IDX files, the MNIST family: big-endian headers, archives unpacked once, and every way to be wrong."""

from __future__ import annotations

import gzip
import os

import numpy as np
import pytest
import torch

from corpus_files import idx_bytes, npy_bytes, state, write
from finf_fast.corpus import open_corpus, unpack
from finf_fast.corpus.files import MappedFile
from finf_fast.records import DamagedFile

DIGITS = np.random.default_rng(0).integers(0, 256, (6, 28, 28), np.uint8)
IMAGES, LABELS = idx_bytes(DIGITS.shape, DIGITS.tobytes()), idx_bytes((6,), bytes([5, 0, 4, 1, 9, 2]))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "finf_fast"


def mnist(folder, ending=""):
    folder.mkdir()
    images = write(folder / f"train-images-idx3-ubyte{ending}", IMAGES)
    return images, write(folder / f"train-labels-idx1-ubyte{ending}", LABELS)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_images_and_labels_as_a_model_wants_them(tmp_path, cache, ending):
    images, labels = mnist(tmp_path / "mnist", ending)
    for corpus in (open_corpus(images, labels=labels), open_corpus((images, labels)), open_corpus(images.parent)):
        assert (corpus.format, len(corpus)) == ("idx", 6)
        x, y = corpus.read(1, 5)
        assert torch.equal(x, torch.from_numpy(DIGITS[1:5, None]).float().div(255))
        assert y.tolist() == [0, 4, 1, 9] and y.dtype == torch.int64
    assert corpus.describe()["paths"] == [str(images), str(labels)]
    assert cache.exists() == (ending == ".gz")


def test_mean_and_std_follow(tmp_path):
    images, _ = mnist(tmp_path / "mnist")
    x = open_corpus(images, mean=0.1307, std=0.3081).read(0, 6)
    assert torch.equal(x, torch.from_numpy(DIGITS[:, None]).float().div(255).sub(0.1307).div(0.3081))


@pytest.mark.parametrize("code, descr", [(9, "i1"), (11, ">i2"), (12, ">i4"), (13, ">f4"), (14, ">f8")])
def test_other_element_types_are_big_endian(tmp_path, code, descr):
    values = np.array([[1, 2], [3, -4]]).astype(descr)
    x = open_corpus(write(tmp_path / "x-idx2", idx_bytes((2, 2), values.tobytes(), code))).read(0, 2)
    assert x.tolist() == values.tolist() and x.is_floating_point() == (code > 12)


def test_an_archive_is_unpacked_once_and_keyed_by_content(tmp_path):
    path, cache = write(tmp_path / "x-idx3-ubyte.gz", IMAGES), tmp_path / "cache"
    before = state(path)
    first = open_corpus(path, cache=cache)
    (copy,) = cache.iterdir()
    made = os.stat(copy).st_ctime_ns
    again = open_corpus(path, cache=cache)
    assert list(cache.iterdir()) == [copy] and os.stat(copy).st_ctime_ns == made and copy.read_bytes() == IMAGES
    assert first.fingerprint == again.fingerprint and state(path) == before
    write(path, idx_bytes((1, 28, 28), bytes(784)))
    assert len(open_corpus(path, cache=cache)) == 1 and len(list(cache.iterdir())) == 2


def test_an_archive_and_its_content_have_one_fingerprint(tmp_path):
    packed, plain = write(tmp_path / "x.gz", IMAGES), write(tmp_path / "x-idx3-ubyte", IMAGES)
    assert open_corpus(packed, cache=tmp_path / "cache").fingerprint == open_corpus(plain).fingerprint


def test_the_default_cache_is_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    archive = MappedFile(write(tmp_path / "x.gz", IMAGES))
    assert unpack.unpacked(archive).parent == tmp_path / ".cache" / "finf_fast"


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b[:40] + bytes([b[40] ^ 255]) + b[41:]])
def test_a_broken_archive_leaves_nothing_behind(tmp_path, damage):
    path, cache = tmp_path / "x.gz", tmp_path / "cache"
    path.write_bytes(damage(gzip.compress(IMAGES)))
    with pytest.raises(DamagedFile, match=r"x\.gz: gzip archive cannot be unpacked"):
        open_corpus(path, cache=cache, format="idx")
    assert not any(cache.iterdir())


@pytest.mark.parametrize("unseen", [False, True])
def test_an_archive_that_changes_before_it_is_unpacked(tmp_path, monkeypatch, unseen):
    """Other images under this one's key would be taken for it as long as the cache lasts."""
    path, cache, other = tmp_path / "x.gz", tmp_path / "cache", idx_bytes(DIGITS.shape, DIGITS[::-1].tobytes())
    write(path, IMAGES)
    key = unpack._content_key

    def meddle(*archive):
        found = key(*archive)
        write(tmp_path / "other.gz", other)
        os.replace(tmp_path / "other.gz", path)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(unpack, "_content_key", meddle)
        if unseen:  # as where a file system's clock is too coarse for a write to show
            patch.setattr(MappedFile, "require_same", lambda *_: None)
            patch.setattr(MappedFile, "opened", lambda file, _: MappedFile(file.path)._opened)
        with pytest.raises(DamagedFile, match=r"x\.gz: was (replaced|written to)"):
            open_corpus(path, cache=cache, format="idx")
    assert not any(cache.iterdir())
    write(path, IMAGES)
    assert torch.equal(open_corpus(path, cache=cache).read(0, 6), torch.from_numpy(DIGITS[:, None]).float().div(255))


@pytest.mark.parametrize("left", [0, 3, 10, 4719])
def test_a_damaged_copy_is_unpacked_anew(tmp_path, cache, left):
    images, _ = mnist(tmp_path / "mnist", ".gz")
    wanted = open_corpus(images.parent).read(0, 6)
    for copy in cache.iterdir():
        os.truncate(copy, min(left, os.stat(copy).st_size - 1))
    found = open_corpus(images.parent).read(0, 6)
    assert all(map(torch.equal, found, wanted)) and len(list(cache.iterdir())) == 2


def test_a_pipe_is_refused(tmp_path):
    """To open one waits for whoever writes to it."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="wanted a regular file, got .*pipe"):
        open_corpus(tmp_path / "pipe", format="idx")


@pytest.mark.parametrize(
    "content, words",
    [
        (
            IMAGES[:-1],
            r"wanted 4720 bytes \(header 16, shape \(6, 28, 28\), uint8\), got 4719: the data end at byte 4719",
        ),
        (IMAGES + b"x", "got 4721: bytes are left over at byte 4720"),
        (idx_bytes((7, 28, 28), DIGITS.tobytes()), "the data end"),
        (b"\0\0\x08\x03\0\0\0\x06", "byte 4: wanted 3 lengths of 4 bytes, got a file of 8 bytes"),
        (b"\0\0\x0a\x03" + bytes(12), "byte 0: wanted an IDX magic .*, got '00 00 0a 03'"),
        (b"\x03\x08\0\0" + bytes(12), "byte 0: wanted an IDX magic"),
        (b"", "byte 0: wanted an IDX magic"),
        (idx_bytes((2**32 - 1, 2**32 - 1, 0), b""), "header: wanted lengths with a product below .* got the shape"),
        (idx_bytes((0, 28, 28), b""), "empty corpus, wanted at least 1 sample in .*"),
    ],
)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_files_that_cannot_be_read_are_refused_at_opening(tmp_path, cache, content, words, ending):
    path = write(tmp_path / f"bad-idx3-ubyte{ending}", content)
    with pytest.raises(ValueError, match=words):
        open_corpus(path, format="idx")


@pytest.mark.parametrize(
    "labels, words",
    [
        (idx_bytes((5,), bytes(5)), "labels: wanted 6 labels, one a row of .*, got 5"),
        (idx_bytes((6, 1), bytes(6)), r"labels: wanted integers of shape \(S,\)"),
        (idx_bytes((6,), bytes(24), 13), r"labels: wanted integers of shape \(S,\) .*, got >?f"),
        (LABELS[:-1], "the data end"),
        (npy_bytes((6,), "|u1", bytes(6))[:-1], "the data end"),
    ],
)
def test_wrong_labels_are_refused(tmp_path, labels, words):
    images, path = mnist(tmp_path / "mnist")
    write(path, labels)
    with pytest.raises(ValueError, match=words):
        open_corpus((images, path))
    if b"NUMPY" not in labels:
        with pytest.raises(ValueError, match=words):
            open_corpus(images.parent)


def test_a_label_changes_the_fingerprint(tmp_path):
    images, labels = mnist(tmp_path / "mnist")
    first = open_corpus(images.parent).fingerprint
    assert open_corpus((images, labels)).fingerprint == first
    write(labels, LABELS[:-1] + b"\x03")
    assert open_corpus(images.parent).fingerprint != first


def test_a_folder_without_the_training_pair_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"wanted a folder with data files, got .* holds none known"):
        open_corpus(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"wanted train-images-idx3-ubyte or .*\.gz in the folder"):
        open_corpus(tmp_path, format="idx")
    write(tmp_path / "train-images-idx3-ubyte", IMAGES)
    with pytest.raises(FileNotFoundError, match="wanted train-labels-idx1-ubyte"):
        open_corpus(tmp_path)


def test_an_archive_of_something_else_is_not_recognised(tmp_path):
    with pytest.raises(ValueError, match=r"format: wanted .* starts with '68 65 6c 6c'"):
        open_corpus(write(tmp_path / "x.gz", b"hello"))


def test_a_stream_of_tokens_is_not_taken_for_idx(tmp_path):
    path = write(tmp_path / "train.bin", np.array([0, 0x0308, 1, 2], "<u2").tobytes())
    assert open_corpus(path, window=2).format == "tokens"


def test_a_place_is_a_byte_of_the_file(tmp_path):
    images, _ = mnist(tmp_path / "mnist")
    assert open_corpus(images.parent).locate(2) == f"{images}, byte {16 + 2 * 784}"
