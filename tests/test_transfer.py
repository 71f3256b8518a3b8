"""Batches that cross while others are computed: who waits for what, whose memory is whose, and what an error leaves.

There is no GPU here. The order is proven with lanes that are as late as real ones may be (late_lanes.py); that each
part of the order is needed is shown by leaving it out.
"""

from __future__ import annotations

from contextlib import closing, contextmanager

import numpy as np
import pytest
import torch

import finf_fast as ff
from finf_fast import pipeline, staging, transfer
from finf_fast.corpus import open_corpus
from finf_fast.delta import DeltaEngine
from finf_fast.loss import mapped
from finf_fast.records import Part, Plan
from finf_fast.staging import stage
from finf_fast.transfer import Crossing, CudaLanes, to_device
from journey import needs_gpu
from late_lanes import LateLanes
from nets import conv_net, language_model, mlp

PATIENCE_S = 20
DRAW = np.random.default_rng(0)


def batches(count=8):
    return [{"x": torch.full((50, 3), float(k)), "y": (torch.arange(4) + k, "a word")} for k in range(count)]


def received(crossing, given):
    """The batches through a crossing, two of them on their way at any moment, as computing finds them in its turn."""
    sent, got = [], []
    for k, batch in enumerate(given):
        sent.append(Part(torch.arange(4), batch, crossing.send(batch)))
        if k >= 2:
            got.append(mapped(torch.clone, crossing.receive(sent[k - 2])))
    return [*got, *(mapped(torch.clone, crossing.receive(part)) for part in sent[-2:])]


def same(got, given):
    return all(
        torch.equal(a["x"], b["x"]) and torch.equal(a["y"][0], b["y"][0]) and a["y"][1] == b["y"][1]
        for a, b in zip(got, given, strict=True)
    )


def test_every_batch_arrives_whole():
    with Crossing(LateLanes()) as crossing:
        assert same(received(crossing, batches()), batches())
        assert crossing.record() == {"batches_sent_ahead": 8}


class NoWait(Crossing):
    def receive(self, part):
        return part.sent.batch


class WaitsForTheLast(Crossing):
    def receive(self, part):
        self._lanes.wait(self._held[-1][0], part.sent.batch)
        return part.sent.batch


class LetsGo(Crossing):
    def _sent(self, source):
        sent = super()._sent(source)
        self._held.clear()
        return sent


class MarksFirst(Crossing):
    def _sent(self, source):
        copied = self._lanes.mark()
        return super()._sent(source)._replace(copied=copied)


@pytest.mark.parametrize("wrong", [NoWait, WaitsForTheLast, LetsGo, MarksFirst])
def test_each_part_of_the_order_is_needed(wrong):
    assert not same(received(wrong(LateLanes()), batches()), batches())


def test_slots_are_used_again_when_their_event_has_passed():
    lanes = LateLanes()
    with Crossing(lanes, ahead=2) as crossing:
        received(crossing, batches(20))
        assert lanes.slots <= 2 * 4  # two tensors a batch, of that one and three before it


def test_too_many_on_their_way_are_waited_for():
    """The reader may run ahead of a device that is slower than the disk: never by more than so many batches."""
    lanes = LateLanes()
    with Crossing(lanes, ahead=1) as crossing:
        for batch in batches(4):
            crossing.send(batch)
        assert lanes.log == ["sent 0", "sent 1", "finish 0", "sent 2", "finish 1", "sent 3"]
    assert lanes.log[6:] == ["finish 2", "finish 3"]


def test_what_finds_no_room_stays_and_what_was_begun_is_waited_for():
    lanes = LateLanes(fails=(2, 5))  # the second tensor of the first batch, and of the third
    with Crossing(lanes) as crossing:
        sent = [crossing.send(batch) for batch in batches(4)]
        assert [one is None for one in sent] == [True, False, True, False]
        kept = Part(torch.arange(4), batches(1)[0], None)
        assert crossing.receive(kept) is kept.batch
        assert crossing.record() == {"batches_sent_ahead": 2, "batches_not_sent_ahead": {"OutOfMemoryError": 2}}
    assert all(event.done for event in lanes.events) and len(lanes.events) == 4


def test_an_error_leaves_nothing_on_its_way():
    lanes = LateLanes()
    with pytest.raises(ZeroDivisionError), Crossing(lanes) as crossing:
        for batch in batches(2):
            crossing.send(batch)
        raise ZeroDivisionError
    assert len(lanes.events) == 2 and all(event.done for event in lanes.events)


def test_a_broken_device_hides_no_error_and_is_one():
    for error in (ZeroDivisionError, None):
        with pytest.raises(error or RuntimeError), Crossing(LateLanes(broken=True)) as crossing:
            crossing.send(batches(1)[0])
            if error:
                raise error


def test_nothing_is_sent_where_nothing_has_to_cross():
    with transfer.crossing_to(torch.device("cpu")) as crossing:
        batch = batches(1)[0]
        assert crossing.send(batch) is None and crossing.receive(Part(torch.arange(4), batch)) is batch
        assert (crossing.record(), crossing.waited(), crossing.crosses) == ({}, 0, False)


def test_blocks_are_sent_while_one_before_them_is_at_work():
    lanes, corpus = LateLanes(), open_corpus((torch.arange(100.0)[:, None], torch.arange(100)))
    with Crossing(lanes) as crossing, closing(stage(corpus, Plan(0, 100, 10), range(10), 2, crossing.send)) as blocks:
        first = next(blocks)
        for _ in range(3):
            assert lanes.sending.acquire(timeout=PATIENCE_S)
        assert not any(event.done for event in lanes.events)
        assert crossing.receive(first.parts[0])[1].tolist() == list(range(10))


def late_sweeps(monkeypatch, **lanes):
    """Sweeps cross by lanes that are late; those that were used."""
    used = []

    def crossing_to(device):
        used.append(LateLanes(**lanes))
        return Crossing(used[-1])

    monkeypatch.setattr(pipeline, "crossing_to", crossing_to)
    return used


def images():
    model, (x, y) = conv_net()
    return model, [ff.mirror(model, (x[:2], y[:2]), loss="cross_entropy", lr=0.01)], (x, y), {"batch_size": 7}


def ragged_texts():
    model, data = language_model(300)
    update = ff.mirror(model, {key: value[None] for key, value in data[0].items()}, loss="causal_lm", lr=0.1)
    return model, [update], data, {"loss": "causal_lm", "batch_size": 4, "per_token": True}


@pytest.mark.parametrize("case", [images, ragged_texts])
@pytest.mark.parametrize("lanes", [{}, {"fails": (2,)}], ids=["room", "little room"])
def test_a_sweep_has_the_same_bits(monkeypatch, case, lanes):
    model, updates, data, settings = case()
    plain = ff.sweep(model, updates, data, **settings)
    used = late_sweeps(monkeypatch, **lanes)
    scores = ff.sweep(model, updates, data, **settings)
    assert np.array_equal(scores.base, plain.base, equal_nan=True)
    assert np.array_equal(scores.delta, plain.delta, equal_nan=True)
    assert scores.record.get("padding_percent") == plain.record.get("padding_percent")
    assert scores.record["batches_sent_ahead"] == sum(line.startswith("wait") for line in used[0].log) > 0
    assert ("batches_not_sent_ahead" in scores.record) == bool(lanes)


def test_a_window_of_several_parts_crosses_part_by_part(tmp_path, monkeypatch):
    """A long text among short ones: padded all to its length they would fill the memory."""
    lengths = [*[3, 5, 4] * 20, 90, *[2] * 9]
    DRAW.integers(0, 19, sum(lengths)).astype("<u2").tofile(tmp_path / "text.ds")
    np.cumsum(lengths).astype("<u8").tofile(tmp_path / "text.ds.index")
    monkeypatch.setattr(staging, "PADDED", 400)
    model, updates, _, settings = ragged_texts()
    plain = ff.sweep(model, updates, open_corpus(tmp_path / "text.ds"), **settings)
    late_sweeps(monkeypatch)
    scores = ff.sweep(model, updates, open_corpus(tmp_path / "text.ds"), **settings)
    assert np.array_equal(scores.delta, plain.delta) and scores.record["batches_sent_ahead"] > 1
    assert np.array_equal(scores.token_delta, plain.token_delta, equal_nan=True)


def test_memory_that_runs_out_in_a_forward_does_not_lose_what_was_sent(monkeypatch):
    model, updates, data, settings = ragged_texts()
    plain, real = ff.sweep(model, updates, data, **settings), DeltaEngine.score

    def tight(self, batch):
        if len(batch["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return real(self, batch)

    late_sweeps(monkeypatch)
    monkeypatch.setattr(DeltaEngine, "score", tight)
    scores = ff.sweep(model, updates, data, **settings)
    np.testing.assert_allclose(scores.delta, plain.delta, atol=1e-14)


def test_a_sweep_that_fails_waits_for_its_copies(monkeypatch):
    model, data = mlp()
    x, y = data[0], data[1].clone()
    update = ff.mirror(model, (x[:2], y[:2]), loss="cross_entropy", lr=0.01)
    y[33] = 99
    used = late_sweeps(monkeypatch)
    with pytest.raises(ValueError, match="sample 33"):
        ff.sweep(model, [update], (x, y), batch_size=5)
    assert used[0].events and all(event.done for event in used[0].events)


def test_the_clock_gives_the_device_s_waits_to_the_transfer(monkeypatch):
    model, updates, data, settings = images()
    assert "transfer" not in ff.sweep(model, updates, data, **settings).record["percent_of_time"]
    late_sweeps(monkeypatch, stood_still=1e-4)
    record = ff.sweep(model, updates, data, **settings).record
    percent, waited = record["percent_of_time"], 100 * 6 * 1e-4 / record["seconds"]
    assert percent["transfer"] == pytest.approx(waited, rel=0.1) and 0 < sum(percent.values()) < 100.1
    late_sweeps(monkeypatch, stood_still=1e4)  # never more than the stage in which they were seen
    percent = ff.sweep(model, updates, data, **settings).record["percent_of_time"]
    assert percent["model"] == 0 < percent["transfer"] and 0 < sum(percent.values()) < 100.1


class Recorded:
    """A stand-in for torch.cuda's streams and events that writes down who was told what."""

    def __init__(self, monkeypatch):
        self.log, log = [], []
        self.log = log

        class Stream:
            def __init__(self, device=None, name="copies"):
                self.name = name

            def wait_event(self, event):
                log.append(f"{self.name} waits for {event.name}")

        class Event:
            made = 0

            def __init__(self, enable_timing=False, blocking=False):
                self.name, self.timed = f"event {Event.made}", enable_timing
                self.way = "sleeps until" if blocking else "waits for"
                Event.made += 1

            def record(self, stream):
                log.append(f"{self.name} in {stream.name}")

            def synchronize(self):
                log.append(f"host {self.way} {self.name}")

            def elapsed_time(self, other):
                assert self.timed and other.timed
                return 250.0

        @contextmanager
        def stream(which):
            log.append(f"{which.name} current")
            yield
            log.append("compute current")

        to = torch.Tensor.to
        compute = Stream(name="compute")
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: False)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, which: log.append(f"for {which.name} too"))

        def copied(tensor, device, non_blocking=False):
            log.append("copy" if non_blocking else "copy and wait")
            return to(tensor, device).clone()

        monkeypatch.setattr(torch.Tensor, "to", copied)


def test_the_lanes_of_a_gpu_tell_its_streams_the_order(monkeypatch):
    told = Recorded(monkeypatch).log
    crossing = Crossing(CudaLanes(torch.device("cpu")))
    part = Part(torch.arange(2), torch.arange(2), crossing.send(torch.arange(2)))
    assert told == ["copies current", "copy", "compute current", "event 0 in copies"]
    del told[:]
    assert crossing.receive(part).tolist() == [0, 1]
    assert told == ["event 1 in compute", "compute waits for event 0", "event 2 in compute", "for compute too"]
    del told[:]
    assert crossing.waited() == 0.25 and told == ["host waits for event 2"]
    with crossing:
        pass
    assert told[-1] == "host sleeps until event 0"


def test_what_is_pinned_has_no_gaps(monkeypatch):
    """A tensor with gaps is copied by way of other memory, which the host waits for."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: False)
    plain, gaps, last = torch.zeros(4, 6), torch.zeros(4, 6)[:, :3], torch.zeros(2, 4, 4, 3).permute(0, 3, 1, 2)
    for tensor in (plain, gaps, last):
        assert torch.equal(transfer._pinned(tensor), tensor)
    assert pinned[0] is plain and pinned[1].is_contiguous() and pinned[2] is last


@needs_gpu
def test_a_gpu_gets_the_same_batches():
    device = torch.device("cuda")
    with transfer.crossing_to(device) as crossing:
        got = received(crossing, batches(20))
        assert all(batch["x"].is_cuda and batch["y"][0].is_cuda for batch in got)
        assert same([to_device(batch, torch.device("cpu")) for batch in got], batches(20))
        assert crossing.waited() >= 0
