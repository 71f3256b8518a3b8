"""Any bytes under any name are a corpus that reads inside its file, or an error that says what is wrong."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corpus_files import damage, idx_bytes, llmc_bytes, megatron_bytes, npy_bytes, write
from finf_fast.corpus import open_corpus
from finf_fast.corpus.base import tree_map
from finf_fast.records import DamagedFile

RAMP = np.arange(256, dtype="<u2")
ONES = np.full(40, 7, "<u4")
INDEX, DATA = megatron_bytes([RAMP[:5], RAMP[5:9]], [0, 1, 2], 8)

# name -> the file's name, a sound content, options; and what lies beside it.
SOUND = {
    "npy": ("x.npy", npy_bytes((4, 3), "<f4", bytes(48)), {"format": "npy"}),
    "npy 2": ("x.npy", npy_bytes((4, 3), "|u1", bytes(12), version=2), {"format": "npy"}),
    "tokens in npy": ("x.npy", npy_bytes((9,), "<u2", RAMP[:9].tobytes()), {"window": 2}),
    "llm.c 1": ("t.bin", llmc_bytes(RAMP[:40], 20240520, 1), {"window": 4}),
    "llm.c 7": ("t.bin", llmc_bytes(ONES, 20240801, 7), {"window": 4}),
    "idx": ("images", idx_bytes((3, 2, 2), bytes(12)), {"format": "idx"}),
    "idx of floats": ("images", idx_bytes((3, 2), bytes(24), code=0x0D), {"format": "idx"}),
    "cifar": ("data_batch_1.bin", bytes(2 * 3073), {}),
    "megatron": ("t.idx", INDEX, {"format": "megatron"}),
    "megatron's sequences": ("t.idx", INDEX, {"format": "megatron", "sample": "sequence"}),
    "datatrove": ("t.ds", DATA, {"format": "datatrove"}),
}
BESIDE = {"t.idx": {"t.bin": DATA}, "t.ds": {"t.ds.index": struct.pack("<2Q", 5, 9)}}


def placed(folder, name):
    file, content, options = SOUND[name]
    for other, beside in BESIDE.get(file, {}).items():
        write(folder / other, beside)
    return folder / file, bytearray(content), options


def look(path, options):
    """Everything that a sweep asks of a corpus, at both ends."""
    corpus = open_corpus(path, **options)
    count = len(corpus)
    for start, stop in ((0, min(count, 8)), (max(0, count - 8), count)):
        tree_map(lambda tensor, rows=stop - start: require(len(tensor) == rows), corpus.read(start, stop))
        tree_map(lambda tensor: require(isinstance(tensor, torch.Tensor)), corpus.take([start, start]))
        lengths = corpus.lengths(start, stop)
        require(lengths is None or (lengths.shape == (stop - start,) and lengths.min() >= 0))
    require(isinstance(corpus.locate(count - 1), str) and len(corpus.fingerprint) == 32 and corpus.describe())


def require(truth):
    if not truth:
        raise AssertionError


@pytest.mark.parametrize("name", SOUND)
def test_the_sound_ones_are_read(tmp_path, name):
    path, content, options = placed(tmp_path, name)
    look(write(path, bytes(content)), options)


@pytest.mark.parametrize("name", SOUND)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_ones_are_read_or_refused(tmp_path, name, data):
    path, content, options = placed(tmp_path, name)
    refused(write(path, data.draw(damage(content))), options)


@pytest.mark.prove
@pytest.mark.parametrize("name", SOUND)
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_many_damaged_ones(tmp_path, name, data):
    path, content, options = placed(tmp_path, name)
    refused(write(path, data.draw(damage(content))), options)


CONTENTS = st.sampled_from([content for _, content, _ in SOUND.values()])
NAMES = ["a.npy", "a.bin", "a.idx", "a.ds", "images", "data_batch_1.bin", "a.arrow", "a.npy.gz"]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.one_of(
        st.binary(max_size=300), st.sampled_from(list(SOUND)).flatmap(lambda n: damage(bytearray(SOUND[n][1])))
    ),
    name=st.sampled_from(NAMES),
    options=st.sampled_from([{}, {"window": 2}, {"labels": np.arange(4)}]),
)
def test_any_bytes_under_any_name(tmp_path, content, name, options):
    for file in tmp_path.iterdir():
        file.unlink()
    refused(write(tmp_path / name, content), options)


def refused(path, options):
    """DamagedFile is a ValueError; FileNotFoundError is what a file without its partner gets. The file is named, unless
    it is of a format that an option is not for."""
    assert issubclass(DamagedFile, ValueError)
    try:
        look(path, options)
    except (ValueError, FileNotFoundError) as error:
        assert path.stem in str(error) or "wanted None, for the format" in str(error)
