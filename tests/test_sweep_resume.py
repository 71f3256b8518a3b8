"""A sweep that goes on from its folder: by what was decided when it began, whatever has changed since."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from torch import nn

import finf_fast as ff
from finf_fast import engines, pipeline, planning
from finf_fast.pair import PairEngine
from finf_fast.scores import store
from mixing_models import Late, Sorted
from nets import language_model

Q, SAMPLES, BATCH = 12, 64, 8
PLENTY, FOR_A_CHUNK, FOR_NO_STACK = 1 << 33, 120_000, 4000  # bytes; the second holds part of a stack of 12


@pytest.fixture
def sweep():
    """Sweeps of one model with updates of its own, as often as asked."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 64), nn.GELU(), nn.Linear(64, 3)).eval()
    data = torch.randn(SAMPLES, 50), torch.randint(3, (SAMPLES,))
    updates = ff.mirrors.mirrors_of(model, tuple(part[:Q] for part in data), lr=1e-3)
    return lambda **settings: ff.sweep(model, updates, data, **{"batch_size": BATCH, "progress": False, **settings})


@pytest.fixture
def free(monkeypatch):
    """Sets the memory that is free."""

    def to(count: int) -> None:
        for module in (engines, pipeline):
            monkeypatch.setattr(module, "free_bytes", lambda device: count)

    return to


def cut(sweep, **settings) -> None:
    """A sweep that ends after three blocks."""

    def stop(done: int, total: int) -> None:
        if done >= 3 * BATCH:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(progress=stop, **settings)


def same(one: ff.Scores, other: ff.Scores) -> bool:
    return all(np.array_equal(a, b, equal_nan=True) for a, b in ((one.base, other.base), (one.delta, other.delta)))


@pytest.mark.parametrize("now", [PLENTY, FOR_A_CHUNK, FOR_NO_STACK])
@pytest.mark.parametrize("first", [PLENTY, FOR_A_CHUNK, FOR_NO_STACK])
def test_memory_decides_once(tmp_path, sweep, free, first, now):
    free(first)
    whole = sweep(out=tmp_path / "whole")
    cut(sweep, out=tmp_path / "cut")
    free(now)
    resumed = sweep(out=tmp_path / "cut")
    assert same(resumed, whole) and resumed.plan == whole.plan
    assert resumed.record["engine"] == ("pair" if first == FOR_NO_STACK else "delta")
    assert ("queries in chunks of" in resumed.plan) == (first == FOR_A_CHUNK)
    assert resumed.record.get("queries_at_once") == whole.record.get("queries_at_once")


def test_the_chunk_of_a_folder_holds_for_delta_as_asked(tmp_path, sweep, free):
    free(FOR_A_CHUNK)
    cut(sweep, out=tmp_path, engine="delta")
    free(PLENTY)
    assert sweep(out=tmp_path, engine="delta").record["queries_at_once"] < Q


@pytest.mark.parametrize(
    ("asked", "differs"),
    [
        ({"engine": "pair"}, "engine: wanted 'pair', found 'delta'"),
        ({"dtype": torch.float64}, "dtype: wanted 'float64'"),
    ],
)
def test_what_is_asked_for_is_compared(tmp_path, sweep, asked, differs):
    cut(sweep, out=tmp_path)
    with pytest.raises(ff.ManifestMismatch, match=differs):
        sweep(out=tmp_path, **asked)


def test_shards_of_machines_with_more_and_less_memory_join(sweep, free):
    parts = []
    for number, count in enumerate((PLENTY, FOR_A_CHUNK)):
        free(count)
        parts.append(sweep(shard=(number, 2)))
    assert "chunks" in parts[1].plan and "chunks" not in parts[0].plan
    free(PLENTY)
    np.testing.assert_allclose(ff.Scores.merge(parts).delta, sweep().delta, rtol=1e-4, atol=1e-9)


class Reads(nn.Module):
    """A net that looks at what carries a change where a sample is large, and there only."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = torch.tanh(self.first(x))
        return self.head(z * (1.0 + 0.0 * float(z.sum())) if float(x.abs().max()) > 20 else z)


def odd(make: type[nn.Module]) -> tuple:
    """A model, an update of all of it, and a corpus whose second block of 8 is unlike the others."""
    torch.manual_seed(4)
    model, x = make().eval(), torch.randn(SAMPLES, 6) * 0.5
    x[:8], x[16:] = x[:8].sort(0).values, x[16:].sort(0).values
    x[8:16] *= 60
    update = ff.Update({name: torch.randn(p.shape) * 1e-3 for name, p in model.named_parameters()})
    return model, [update], (x, torch.randint(4, (SAMPLES,)))


def texts() -> tuple:
    """A language model, an update, and texts of about one length, which are padded; one has no target."""
    model, _ = language_model(1)
    ids = [torch.randint(19, (60 + i % 4,)) for i in range(SAMPLES)]
    data = [{"input_ids": x, "labels": x if i != 7 else torch.full_like(x, -100)} for i, x in enumerate(ids)]
    return model, [ff.mirror(model, {k: v[None] for k, v in data[0].items()}, loss="causal_lm", lr=0.1)], data


def told(scores: ff.Scores) -> dict:
    """The record without its times."""
    return {key: value for key, value in scores.record.items() if key not in ("seconds", "percent_of_time")}


@pytest.mark.parametrize(
    ("make", "settings", "counted"),
    [
        (lambda: odd(Reads), {"batch_size": BATCH}, ["batches_by_pair"]),
        (lambda: odd(Late), {"batch_size": BATCH, "engine": "dot"}, ["one_sample_at_a_time"]),
        (lambda: odd(Sorted), {"batch_size": BATCH, "engine": "dot"}, ["one_sample_at_a_time"]),
        (texts, {"batch_size": 4, "loss": "causal_lm"}, ["padding_percent", "samples_without_target"]),
    ],
    ids=["reads", "late", "sorted", "texts"],
)
def test_killed_anywhere_it_ends_with_the_same_bits_and_record(tmp_path, monkeypatch, make, settings, counted):
    """A sweep goes on from its folder as it lay there at every moment of progress, which is what a kill would leave."""
    monkeypatch.setattr(store, "SYNC_EVERY", 0.0)
    monkeypatch.setattr(planning, "FORWARDS", 2)  # a window of texts is a block of 8
    model, updates, data = make()
    moments = []

    def leave(done: int, total: int) -> None:
        if done < total:
            moments.append(shutil.copytree(tmp_path / "whole", tmp_path / f"killed {len(moments)}"))

    whole = ff.sweep(model, updates, data, out=tmp_path / "whole", progress=leave, **settings)
    assert whole.record["samples_scored"] == SAMPLES and all(whole.record[key] for key in counted)
    assert len(moments) >= SAMPLES // BATCH - 1
    for folder in moments:
        resumed = ff.sweep(model, updates, data, out=folder, progress=False, **settings)
        assert same(resumed, whole) and told(resumed) == told(whole)


def test_a_block_that_begins_again_is_counted_once(monkeypatch):
    """The whole block goes by pairs, for which there is no memory; of its halves one does."""
    model, updates, data = odd(Reads)
    real = PairEngine.score

    def tight(self, batch):
        if len(batch[1]) > BATCH:
            raise MemoryError
        return real(self, batch)

    monkeypatch.setattr(PairEngine, "score", tight)
    record = ff.sweep(model, updates, data, batch_size=2 * BATCH, progress=False).record
    assert list(record["batches_by_pair"].values()) == [1]


def test_pairs_of_an_earlier_run_are_told_by_one_that_has_none(tmp_path):
    model, updates, data = odd(Reads)
    settings = {"batch_size": BATCH, "out": tmp_path}
    cut(lambda **more: ff.sweep(model, updates, data, **settings, **more))
    record = ff.sweep(model, updates, data, engine="delta", progress=False, **settings).record
    assert list(record["batches_by_pair"].values()) == [1]
