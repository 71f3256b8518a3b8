"""Recorded forwards without a GPU: a stand-in for the recorder that runs what was recorded anew at each replay.

As of a real graph, its results hold nothing before the first replay, are overwritten by the next one, and are made from
the recorded batch's memory alone.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import finf_fast as ff
from finf_fast import engines, graphs, ragged
from finf_fast.delta import DeltaEngine
from finf_fast.graphs import CudaRecorder, Graphed, shape_of
from finf_fast.loss import Result, resolve
from finf_fast.records import Part
from finf_fast.transfer import to_device
from journey import needs_gpu
from nets import language_model

CPU = torch.device("cpu")


class Again:
    """The stand-in. `fails` after so many recordings."""

    def __init__(self, device=CPU, fails=None):
        self.recordings, self._fails = 0, fails

    def record(self, work):
        if self.recordings == self._fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        self.recordings += 1
        room = Result(*(None if x is None else torch.full_like(x, 7) for x in parts_of(work())))

        def replay():
            for mine, x in zip(parts_of(room), parts_of(work()), strict=True):
                if mine is not None:
                    mine.copy_(x)

        return room, replay


def parts_of(result):
    return [getattr(result, field.name) for field in fields(Result)]


def engine(device=CPU, dtype=torch.float64):
    model, data = language_model()
    update = ff.mirror(model, {key: x[None] for key, x in data[5].items()}, loss="causal_lm", lr=0.1)
    return DeltaEngine(model, [update], resolve("causal_lm"), device, dtype)


def batch(seed, rows=3, length=6):
    ids = torch.randint(0, 19, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[seed % rows, : seed % 4] = -100
    return {"input_ids": ids, "labels": labels}


def same(a, b):
    for x, y in zip(parts_of(a), parts_of(b), strict=True):
        assert (x is None and y is None) or torch.equal(x, y)


def test_every_batch_gets_its_own_numbers():
    plain, graphed = engine(), Graphed(engine(), Again())
    batches = [batch(seed, length=6 + seed % 2, rows=2 + seed % 3) for seed in range(24)]
    for given in batches:
        before = {key: x.clone() for key, x in given.items()}
        same(graphed.score(given), plain.score(given))
        assert all(torch.equal(given[key], x) for key, x in before.items())
    assert graphed.record()["graphs"] == {"shapes": 6, "batches": 18}


def test_a_result_stays_when_the_next_batch_comes():
    graphed = Graphed(engine(), Again())
    results = [graphed.score(batch(seed)) for seed in range(5)]
    for seed, result in enumerate(results):
        same(result, engine().score(batch(seed)))


def test_the_first_of_a_shape_runs_as_it_is_and_is_recorded_when_it_comes_again():
    recorder = Again()
    graphed, seen = Graphed(engine(), recorder), []
    for length in (5, 6, 6, 5, 6):
        graphed.score(batch(1, length=length))
        seen.append(recorder.recordings)
    assert seen == [0, 0, 1, 2, 2]


@pytest.mark.parametrize("fails", [0, 1])
def test_what_cannot_be_recorded_runs_plainly_and_the_record_says_why(fails):
    recorder = Again(fails=fails)
    graphed, plain = Graphed(engine(), recorder), engine()
    for seed in range(12):
        given = batch(seed, length=4 + seed % 3)
        same(graphed.score(given), plain.score(given))
    found = graphed.record()["graphs"]
    assert found["ended"] == "RuntimeError: operation not permitted when stream is capturing"
    assert found["shapes"] == recorder.recordings == fails


class Narrow:
    """An engine that runs out of memory at its n-th plain forward."""

    def __init__(self, at):
        self._engine, self._calls, self._at = engine(), 0, at

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def score(self, given):
        self._calls += 1
        if self._calls == self._at:
            raise torch.OutOfMemoryError("no room")
        return self._engine.score(given)


def test_memory_held_by_graphs_is_given_back_when_it_is_needed():
    graphed = Graphed(Narrow(at=5), Again())  # forward, recording and its replay, one more replay, and the fifth
    for _ in range(3):
        graphed.score(batch(0))
    same(graphed.score(batch(0, length=9)), engine().score(batch(0, length=9)))
    assert graphed.record()["graphs"]["ended"] == "their memory was needed"


def test_without_graphs_out_of_memory_is_the_sweep_s_affair():
    with pytest.raises(torch.OutOfMemoryError):
        Graphed(Narrow(at=1), Again()).score(batch(0))


def test_only_so_many_shapes_are_held(monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 2)
    recorder = Again()
    graphed = Graphed(engine(), recorder)
    for _ in range(3):
        for length in (4, 5, 6, 7):
            given = batch(0, length=length)
            same(graphed.score(given), engine().score(given))
    assert recorder.recordings == 2


def test_what_makes_two_batches_one_shape():
    x = torch.zeros(2, 3)
    assert shape_of({"a": x, "b": (x, x)}) == shape_of({"a": x + 1, "b": (x, x)})
    others = [{"a": x}, (x, x), x.T, x.double(), torch.zeros(2, 4), {"b": x}, x.to("meta")]
    assert len({shape_of(x), *map(shape_of, others)}) == 1 + len(others)


@pytest.mark.parametrize("given", [{"a": torch.zeros(2), "text": ["x", "y"]}, (torch.zeros(2), 3), [[None]]], ids=str)
def test_a_batch_of_more_than_tensors_has_no_shape(given):
    assert shape_of(given) is None


def test_who_asks_and_who_does_not(monkeypatch):
    monkeypatch.delenv("FINF_GRAPHS", raising=False)
    gpu = torch.device("cuda")
    assert not graphs.wanted(gpu)
    monkeypatch.setenv("FINF_GRAPHS", "1")
    assert graphs.wanted(gpu) and not graphs.wanted(CPU)
    monkeypatch.setenv("FINF_GRAPHS", "0")
    assert not graphs.wanted(gpu)
    monkeypatch.setenv("FINF_GRAPHS", "yes")
    with pytest.raises(ValueError, match="FINF_GRAPHS: wanted 0 or 1, got 'yes'"):
        graphs.wanted(gpu)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_digits_of_a_recorded_forward_on_cuda(dtype):
    """All of them, of real graphs."""
    device = torch.device("cuda")
    plain, graphed = engine(device, dtype), Graphed(engine(device, dtype), CudaRecorder(device))
    for seed in range(12):
        given = to_device(batch(seed, length=6 + seed % 2), device)
        same(graphed.score(given), plain.score(given))
    assert graphed.record()["graphs"] == {"shapes": 2, "batches": 10}


class FakeCuda:
    """What a recorder asks of torch.cuda; a recording fails at its end where `fails`, as an instruction that it refuses
    makes it, and leaves its stream the current one."""

    def __init__(self, monkeypatch, fails):
        self.stream, self.fails, self.pools, self.closed = "mine", fails, [], []
        for name in ("graph", "current_stream", "set_stream", "graph_pool_handle"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.stream == "recording")
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
        monkeypatch.setattr(
            torch._C, "_cuda_endAllocateToPool", lambda *given: self.closed.append(given), raising=False
        )

    def current_stream(self):
        return self.stream

    def set_stream(self, stream):
        self.stream = stream

    def graph_pool_handle(self):
        self.pools.append((0, len(self.pools)))
        return self.pools[-1]

    @contextmanager
    def graph(self, graph, pool, capture_error_mode):
        self.stream = "recording"
        yield
        if self.fails:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.stream = "mine"


@pytest.mark.parametrize("fails", [False, True])
def test_a_recording_is_rehearsed_and_leaves_nothing_behind_where_it_fails(monkeypatch, fails):
    cuda, asked = FakeCuda(monkeypatch, fails), []
    recorder = CudaRecorder(torch.device("cuda"))

    def work():
        asked.append((torch.cuda.is_current_stream_capturing(), cuda.stream))
        return "result"

    for _ in range(2):
        if fails:
            with pytest.raises(RuntimeError, match="previous error"):
                recorder.record(work)
        else:
            assert recorder.record(work)[0] == "result"
    assert asked == [(True, "mine"), (True, "recording")] * 2
    assert cuda.stream == "mine" and not torch.cuda.is_current_stream_capturing()
    assert cuda.closed == ([(0, (0, 0)), (0, (0, 1))] if fails else []) and len(cuda.pools) == 1 + fails


class Waits(TorchDispatchMode):
    """Calls that a GPU is waited for: values looked at, and tensors made of lists, as an index by a list is."""

    CALLS = ("aten.lift_fresh", "aten._local_scalar_dense", "aten.is_nonzero", "aten.nonzero", "aten.masked_select")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith(self.CALLS):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ranks", [(4, 4, 4), (None, None), (None, 4, None, 4)], ids=str)
def test_a_forward_waits_for_nothing(ranks):
    """Whatever forms the queries' changes have."""
    model, data = language_model()
    updates = [
        ff.mirror(model, {key: x[None] for key, x in data[q].items()}, loss="causal_lm", lr=0.1, rank=rank)
        for q, rank in enumerate(ranks)
    ]
    carried = DeltaEngine(model, updates, resolve("causal_lm"), CPU, torch.bfloat16)
    given = batch(1)
    carried.score(given)
    with Waits() as waits:
        carried.score(given)
        assert not waits.found
        torch.zeros(3)[[0, 1]].sum().item()
    assert len(waits.found) == 2


# In a sweep.
@pytest.fixture
def asked(monkeypatch):
    """Graphs as on a GPU, by the stand-in; the recorders made."""
    made = []
    monkeypatch.setattr(graphs, "wanted", lambda device: True)
    monkeypatch.setattr(engines, "CudaRecorder", lambda device: made.append(Again()) or made[-1])
    monkeypatch.setattr(Graphed, "columns", 4)
    return made


@pytest.mark.parametrize("kind", ["auto", "delta"])
def test_a_sweep_over_texts(asked, monkeypatch, kind):
    model, data = language_model(60)
    updates = [ff.mirror(model, {k: x[None] for k, x in data[q].items()}, loss="causal_lm", lr=0.1) for q in (4, 5)]
    how = {"loss": "causal_lm", "batch_size": 3, "nonfinite": "keep", "progress": False, "engine": kind}
    found = ff.sweep(model, updates, data, **how)
    assert "CUDA graphs as asked" in found.plan and asked[0].recordings >= 1
    monkeypatch.setattr(graphs, "wanted", lambda device: False)
    plain = ff.sweep(model, updates, data, **how)
    np.testing.assert_allclose(found.delta, plain.delta, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(found.base, plain.base, rtol=1e-12)


def test_queries_in_chunks_are_not_recorded(asked, monkeypatch):
    """What one chunk hands to the next is found by where it lies."""
    model, data = language_model()
    updates = [ff.mirror(model, {k: x[None] for k, x in data[5].items()}, loss="causal_lm", lr=0.1)] * 2
    narrow = DeltaEngine(model, updates, resolve("causal_lm"), CPU, torch.float64, chunk=1)
    monkeypatch.setattr(engines, "_carried", lambda *given: (narrow, None, "narrow"))
    how = {"device": CPU, "dtype": None, "engine": "delta", "keep": 1 << 30, "sample": None}
    assert engines.choose_engine(model, updates, resolve("causal_lm"), **how).engine is narrow


# Columns that are cut at a multiple.
def cut(found, columns, size=100, tokens=None, multiple=8):
    mask = (torch.arange(columns) < torch.tensor(found)[:, None]).long()
    read = Part(torch.arange(len(found)), {"input_ids": mask, "attention_mask": mask})
    parts = ragged.parts(read, resolve("causal_lm"), size, tokens, multiple)
    return [tuple(part.batch["input_ids"].shape) for part in parts]


def test_lengths_count_as_rounded_up():
    assert cut([3, 5, 8, 9, 15, 16], 16, size=3) == [(3, 8), (3, 16)]
    assert cut([3, 5, 8, 9], 16, tokens=24) == [(3, 8), (1, 16)]  # with the padding that comes with it


def test_no_further_than_what_was_read():
    assert cut([3, 9, 11], 11, size=1) == [(1, 8), (1, 11), (1, 11)]
