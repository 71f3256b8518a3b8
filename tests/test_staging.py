"""Staging: order, a bounded look ahead, errors at the block they belong to, and no thread left behind."""

from __future__ import annotations

import gc
import sys
import threading
import traceback
import weakref

import pytest
import torch

import finf_fast as ff
from finf_fast.corpus import open_corpus
from finf_fast.records import Plan
from finf_fast.staging import MOST, stage

PATIENCE_S = 20  # an upper limit for things that must happen; reached only when they do not


class Counted:
    """A corpus of its own row numbers that says when each block is begun, and may be held back or fail."""

    def __init__(self, samples=100, fails_at=None):
        self.samples, self.fails_at = samples, fails_at
        self.begun = threading.Semaphore(0)
        self.reads = []
        self.gate = threading.Event()
        self.gate.set()

    def read(self, start, stop):
        self.reads.append((start, stop))
        self.begun.release()
        assert self.gate.wait(PATIENCE_S)
        if start == self.fails_at:
            raise OSError(f"row {start} is gone")
        return torch.arange(start, stop)

    def await_reads(self, count):
        for _ in range(count):
            assert self.begun.acquire(timeout=PATIENCE_S)


def readers():
    return [thread for thread in threading.enumerate() if thread.name == "finf-fast-staging"]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    gc.collect()
    assert readers() == []


def test_blocks_come_in_order_with_their_rows():
    blocks = list(stage(Counted(), Plan(5, 98, 10), range(10)))
    assert [(b.number, b.start, b.stop) for b in blocks] == [(n, 5 + 10 * n, min(15 + 10 * n, 98)) for n in range(10)]
    assert torch.equal(torch.cat([block.parts[0].batch for block in blocks]), torch.arange(5, 98))
    assert len(blocks[-1]) == 3


def test_only_the_numbers_asked_for_are_read_from_any_iterable():
    corpus = Counted()
    assert [block.number for block in stage(corpus, Plan(0, 100, 10), iter([7, 2, 2]))] == [7, 2, 2]
    assert corpus.reads == [(70, 80), (20, 30), (20, 30)]
    assert list(stage(corpus, Plan(0, 100, 10), [])) == []


def test_every_kind_of_corpus_goes_through():
    class Squares(torch.utils.data.Dataset):
        def __len__(self):
            return 7

        def __getitem__(self, index):
            return torch.tensor([float(index)]), index**2

    for source in (Squares(), (torch.arange(7.0)[:, None], torch.arange(7) ** 2)):
        corpus = open_corpus(source)
        blocks = list(stage(corpus, Plan(0, len(corpus), 3), range(3)))
        assert torch.cat([block.parts[0].batch[1] for block in blocks]).tolist() == [0, 1, 4, 9, 16, 25, 36]


FEW = [(1, 1, 0, 1), (2, 1, 0, 2), (5, 1, 0, 5)]  # whatever their size: depth, bytes of a block, room, most
SMALL = [(2, 1, 100, MOST), (2, 20, 100, 5), (2, 34, 100, 2), (2, 1000, 100, 2), (5, 30, 100, 5)]


@pytest.mark.parametrize(("given", "size", "room", "depth"), FEW + SMALL)
def test_the_reader_is_never_more_than_depth_ahead(given, size, room, depth):
    """Unless all that wait fit in the room."""
    corpus, asked, ahead = Counted(1000), 0, []
    read = corpus.read

    def watched(start, stop):
        ahead.append(len(corpus.reads) + 1 - asked)
        read(start, stop)
        return torch.zeros(size, dtype=torch.uint8)

    corpus.read = watched
    blocks = stage(corpus, Plan(0, 1000, 10), range(100), given, room=room)
    assert corpus.reads == [], "nothing is read before the first block is asked for"
    for taken in range(100):
        asked += 1
        next(blocks)
        corpus.await_reads(depth + 1 if taken == 0 else taken < 100 - depth)
    assert len(ahead) == 100 and max(ahead) == depth
    blocks.close()


def test_a_sweep_reads_small_blocks_well_ahead():
    """All the blocks that may wait are read while the first has not been given back."""
    far_read = threading.Event()

    def seen(batch):
        if (batch[0] == MOST * 8).any():
            far_read.set()
        return batch

    corpus = open_corpus((torch.arange(100.0)[:, None], torch.zeros(100, dtype=torch.int64)), transform=seen)
    model = torch.nn.Linear(1, 2)
    update = ff.Update({"bias": torch.ones(2)})
    waited = []

    def wait(done, total):
        if done and not waited:
            waited.append(far_read.wait(PATIENCE_S))

    ff.sweep(model, [update], corpus, batch_size=8, progress=wait)
    assert waited[0]


def test_decoded_blocks_are_let_go():
    alive, peak = weakref.WeakSet(), []

    class Tracked(Counted):
        def read(self, start, stop):
            batch = super().read(start, stop)
            alive.add(batch)
            return batch

    for block in stage(Tracked(1000), Plan(0, 1000, 10), range(100), depth=3):
        peak.append(len(alive))
        del block
    gc.collect()
    assert max(peak) <= 3 + 1 and len(alive) == 0  # those that wait, and the consumer's own


def test_a_block_is_let_go_before_the_next_is_awaited():
    gone = threading.Event()

    class Waiting(Counted):
        def read(self, start, stop):
            assert start == 0 or gone.wait(PATIENCE_S)
            return super().read(start, stop)

    blocks = stage(Waiting(), Plan(0, 20, 10), range(2), depth=1)
    block = next(blocks)
    weakref.finalize(block, gone.set)
    del block
    assert next(blocks).number == 1
    blocks.close()


def test_an_error_comes_at_its_block_with_its_traceback():
    blocks = stage(Counted(fails_at=30), Plan(0, 100, 10), range(10), depth=5)
    assert [next(blocks).number for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="row 30 is gone") as caught:
        next(blocks)
    assert "read" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert readers() == []
    with pytest.raises(StopIteration):
        next(blocks)


def test_an_error_of_the_numbers_comes_too():
    def numbers():
        yield 1
        raise RuntimeError("the list broke off")

    blocks = stage(Counted(), Plan(0, 100, 10), numbers())
    assert next(blocks).number == 1
    with pytest.raises(RuntimeError, match="the list broke off"):
        next(blocks)


def test_closing_early_ends_a_reader_that_waits_for_a_slot():
    corpus = Counted()
    blocks = stage(corpus, Plan(0, 100, 10), range(10), depth=1)
    next(blocks)
    corpus.await_reads(2)
    (thread,) = readers()
    blocks.close()
    assert not thread.is_alive() and len(corpus.reads) <= 3


def test_closing_early_ends_a_reader_in_the_middle_of_a_block():
    corpus = Counted()
    blocks = stage(corpus, Plan(0, 100, 10), range(10), depth=2)
    next(blocks)
    corpus.await_reads(3)  # as many as may wait, and the one that was taken
    corpus.gate.clear()
    next(blocks)
    corpus.await_reads(1)
    (thread,) = readers()
    threading.Timer(0.1, corpus.gate.set).start()
    blocks.close()
    assert not thread.is_alive() and len(corpus.reads) < 10


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_exception_in_the_consumer_ends_the_reader(error):
    blocks = stage(Counted(), Plan(0, 100, 10), range(10))
    with pytest.raises(error):
        for block in blocks:
            if block.number == 2:
                blocks.throw(error)
    assert readers() == []


def test_an_iterator_that_is_dropped_ends_the_reader():
    blocks = stage(Counted(), Plan(0, 100, 10), range(10))
    next(blocks)
    del blocks
    gc.collect()
    assert readers() == []


@pytest.mark.parametrize("number", [10, -1])
def test_a_block_that_the_plan_does_not_have_is_refused(number):
    with pytest.raises(ValueError, match=f"numbers: wanted blocks 0 to 9, got {number}"):
        list(stage(Counted(), Plan(0, 100, 10), [0, number]))


@pytest.mark.parametrize("depth, error", [(0, ValueError), (-2, ValueError), (1.5, TypeError), (True, TypeError)])
def test_a_depth_that_makes_no_sense_is_refused_at_once(depth, error):
    with pytest.raises(error, match="depth: wanted"):
        stage(Counted(), Plan(0, 100, 10), [0], depth)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="torch's OpenMP is found by its symbol")
def test_reading_takes_no_threads_from_the_model():
    found, before = [], torch.get_num_threads()

    class Asking(Counted):
        def read(self, start, stop):
            found.append((torch.get_num_threads(), threading.current_thread() is threading.main_thread()))
            return super().read(start, stop)

    torch.set_num_threads(3)
    try:
        list(stage(Asking(), Plan(0, 30, 10), range(3)))
        assert found == [(1, False)] * 3
        assert torch.get_num_threads() == 3
        other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert found[-1] == 3
    finally:
        torch.set_num_threads(before)
