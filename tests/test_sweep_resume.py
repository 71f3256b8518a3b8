"""A sweep that goes on from its folder: by what was decided when it began, whatever has changed since."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import finf_fast as ff
from finf_fast import engines, pipeline

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
    return np.array_equal(one.delta, other.delta) and np.array_equal(one.base, other.base)


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
