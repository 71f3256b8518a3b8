"""Pixels that are staged as stored and decoded where they are read: the bits of the corpus' own decoding, always."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import finf_fast as ff
from corpus_files import idx_bytes, write
from finf_fast import pipeline, transfer
from finf_fast.corpus import open_corpus
from finf_fast.corpus.joined import JoinedCorpus
from finf_fast.ops import dispatch
from finf_fast.transfer import Crossing, to_device
from journey import needs_gpu
from late_lanes import LateLanes
from nets import Mlp

DRAW = np.random.default_rng(0)
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
COUNT = 37


def npy(folder, shape, name="x.npy"):
    np.save(folder / name, DRAW.integers(0, 256, (COUNT, *shape), np.uint8))
    return folder / name


def nchw(folder):
    return open_corpus(npy(folder, (3, 5, 7)), mean=MEAN, std=STD, layout="NCHW")


def nhwc(folder):
    return open_corpus(npy(folder, (5, 7, 3)), mean=MEAN, std=STD, layout="NHWC", dtype="bfloat16")


def flat(folder):
    return open_corpus(npy(folder, (33,)), labels=DRAW.integers(0, 9, COUNT), mean=0.5)


def idx(folder):
    pixels, labels = DRAW.integers(0, 256, (COUNT, 4, 6), np.uint8), DRAW.integers(0, 9, COUNT, np.uint8)
    write(folder / "train-images-idx3-ubyte", idx_bytes(pixels.shape, pixels.tobytes()))
    write(folder / "train-labels-idx1-ubyte", idx_bytes(labels.shape, labels.tobytes()))
    return open_corpus(folder, std=0.3)


def cifar(folder):
    for k in range(3):
        write(folder / f"data_batch_{k}.bin", DRAW.integers(0, 10, (COUNT, 3073), np.uint8).tobytes())
    return open_corpus(folder, mean=MEAN, std=STD)


@pytest.mark.parametrize("opened", [nchw, nhwc, flat, idx, cifar])
def test_the_same_bits_by_either_way(tmp_path, opened):
    corpus = opened(tmp_path)
    stored, decode, kind, _ = corpus.undecoded()
    places = DRAW.permutation(len(corpus))[:20]
    assert kind == "pixels"
    for raw, wanted in [(stored.read(3, 31), corpus.read(3, 31)), (stored.take(places), corpus.take(places))]:
        each = (batch if isinstance(batch, tuple) else (batch,) for batch in (raw, decode(raw), wanted))
        for k, (before, got, x) in enumerate(zip(*each, strict=True)):
            assert before.dtype == (torch.int64 if k else torch.uint8)
            assert (got.dtype, got.stride()) == (x.dtype, x.stride()) and torch.equal(got, x)
    assert stored.fingerprint == corpus.fingerprint and len(stored) == len(corpus)


def test_what_is_decoded_as_it_is_read(tmp_path):
    pixels, _ = npy(tmp_path, (3, 4)), npy(tmp_path, (3, 4), "y.npy")
    np.save(tmp_path / "floats.npy", np.zeros((4, 3), np.float32))
    np.save(tmp_path / "nothing.npy", np.zeros((4, 0), np.uint8))
    for corpus in [
        open_corpus(pixels, transform=lambda x: x),
        open_corpus(tmp_path / "[xy].npy", transform=lambda x: x),
        JoinedCorpus([open_corpus(pixels, mean=0.5), open_corpus(tmp_path / "y.npy")]),
        open_corpus(tmp_path / "floats.npy"),
        open_corpus(tmp_path / "nothing.npy"),
        open_corpus(torch.zeros(4, 3, 3, dtype=torch.uint8)),
    ]:
        assert corpus.undecoded() is None, corpus


@pytest.fixture
def pictures(tmp_path):
    """A model and 12 pixels a picture, with what is stored of them."""
    torch.manual_seed(0)
    corpus = open_corpus(npy(tmp_path, (12,)), labels=DRAW.integers(0, 5, COUNT), mean=0.4, std=0.2)
    model, (x, y) = Mlp(), corpus.read(0, 2)
    return model, [ff.mirror(model, (x, y), loss="cross_entropy", lr=0.1)], corpus


def test_a_sweep_that_decodes_on_the_device_has_the_same_bits(monkeypatch, pictures):
    plain, lanes, sent = ff.sweep(*pictures, batch_size=8), LateLanes(), []
    monkeypatch.setattr(lanes, "pinned", lambda tensor, real=lanes.pinned: sent.append(tensor.dtype) or real(tensor))
    monkeypatch.setattr(pipeline, "crossing_to", lambda device: Crossing(lanes))
    monkeypatch.setattr(pipeline, "decodes", lambda device, kind: kind == "pixels")
    scores = ff.sweep(*pictures, batch_size=8)
    assert np.array_equal(scores.base, plain.base) and np.array_equal(scores.delta, plain.delta)
    assert sent == 5 * [torch.uint8, torch.int64]
    assert scores.record["pixels_decoded"] == "on the device" and "pixels_decoded" not in plain.record


def test_a_loss_that_looks_at_pixels_sees_them_decoded(monkeypatch, pictures):
    model, updates, corpus = pictures
    seen = []

    class Looks(ff.loss.CrossEntropy):
        def check(self, batch, outputs, vocabulary):
            seen.append(batch[0].dtype)

    monkeypatch.setattr(pipeline, "decodes", lambda device, kind: kind == "pixels")
    ff.sweep(model, updates, corpus, loss=Looks(), batch_size=64)
    assert seen == [torch.float32]


@needs_gpu
@pytest.mark.parametrize("opened", [nchw, nhwc, flat, idx, cifar])
def test_a_gpu_decodes_to_the_same_bits(tmp_path, opened):
    corpus = opened(tmp_path)
    stored, decode, _, _ = corpus.undecoded()
    got, wanted = decode(to_device(stored.read(0, COUNT), torch.device("cuda"))), corpus.read(0, COUNT)
    for a, b in zip(*(batch if isinstance(batch, tuple) else (batch,) for batch in (got, wanted)), strict=True):
        assert a.is_cuda and (a.dtype, a.stride()) == (b.dtype, b.stride()) and torch.equal(a.cpu(), b)


@needs_gpu
def test_a_sweep_on_a_gpu_has_the_same_bits_by_either_way(monkeypatch, pictures):
    scores = ff.sweep(*pictures, batch_size=8, device="cuda")
    monkeypatch.setattr(pipeline, "decodes", lambda device, kind: False)
    plain = ff.sweep(*pictures, batch_size=8, device="cuda")
    assert np.array_equal(scores.base, plain.base) and np.array_equal(scores.delta, plain.delta)
    assert scores.record["batches_sent_ahead"] == 5 and "transfer" in scores.record["percent_of_time"]
    assert ("pixels_decoded" in scores.record) == transfer.decodes(torch.device("cuda"), "pixels")


@pytest.mark.parametrize("kind, dtype", [("pixels", torch.float32), ("tokens", torch.uint8)])
def test_where_what_is_stored_is_decoded(monkeypatch, kind, dtype):
    gpu, found = torch.device("cuda"), []

    def choose(op, there):
        assert (op, there) == (f"decode_{kind}", dtype)
        return found[-1] if found[-1] else dispatch._decide(op, "triton", None, (), 0)

    monkeypatch.setattr(torch, "empty", lambda *shape, dtype, device: dtype)
    monkeypatch.setattr(dispatch, "choose", choose)
    for face, wanted in [("cuda", True), ("reference", False), ("", False)]:
        found.append(face)
        assert transfer.decodes(gpu, kind) is wanted and not transfer.decodes(torch.device("cpu"), kind)
