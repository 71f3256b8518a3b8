"""``engine="dot"``: the derivative of every sample's loss along every update, against float64 gradients one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import finf_fast as ff
from dot_cases import CASES, B, NanoGpt, Q, Residual, far, images, mlp, tokens, truth_of, updates_of
from finf_fast.dot import DotEngine
from finf_fast.dot.changes import packed
from finf_fast.loss import resolve
from finf_fast.lowrank import LowRank
from finf_fast.order import moves_samples
from mixing_models import Late, Sorted

# Largest error over samples and queries, of the largest change. In half precision that of the forward's own rounding;
# where a ReLU's mask flips for it, as much as plain autograd in bfloat16 has there.
BOUND = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
KINKED = {"residual": 5e-2}


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("low", [False, True], ids=["dense", "factors"])
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_gradient_of_each_sample(name, low, dtype):
    torch.manual_seed(3)
    make, data, loss, whole = CASES[name]
    model, batch, loss = make().eval(), data(), resolve(loss)
    updates = updates_of(model, low)
    engine = DotEngine(model, updates, loss, torch.device("cpu"), dtype)
    got = engine.score(batch)
    base = loss.per_sample(model, batch).detach()
    truth = truth_of(model, updates, loss, batch)
    half = dtype is torch.bfloat16
    assert far(got.delta, truth) < max(BOUND[dtype], KINKED.get(name, 0) if half else 0)
    torch.testing.assert_close(got.base, base, rtol=3e-2 if half else 1e-5, atol=3e-2 if half else 1e-6)
    assert bool(engine.record()["one_sample_at_a_time"]) == (not whole), engine.record()


@pytest.mark.parametrize("name", ["residual", "upcast"])
def test_norms_that_no_query_changes_in_half_precision(name):
    """Of float32 values, or with float32 statistics, and weights in bfloat16."""
    torch.manual_seed(4)
    make, data, loss, _ = CASES[name]
    model, batch, loss = make().eval(), data(), resolve(loss)
    updates = [
        ff.Update({n: change for n, change in update.params.items() if n.startswith(("first", "head"))})
        for update in updates_of(model, False)
    ]
    got = DotEngine(model, updates, loss, torch.device("cpu"), torch.bfloat16).score(batch)
    assert far(got.delta, truth_of(model, updates, loss, batch)) < BOUND[torch.bfloat16]


@pytest.mark.parametrize("model", [Sorted, Late])
def test_a_later_batch_that_mixes_samples(model):
    torch.manual_seed(4)
    model, loss = model().eval(), resolve("cross_entropy")
    first = (torch.randn(B, 6).sort(0).values, torch.randint(4, (B,)))
    second = (torch.randn(B, 6) * 8, torch.randint(4, (B,)))
    updates = updates_of(model, low=False)
    engine = DotEngine(model, updates, loss, torch.device("cpu"), torch.float32)
    for batch in (first, second):
        assert far(engine.score(batch).delta, truth_of(model.float(), updates, loss, batch)) < 1e-5
        model.float()
    assert engine.record()["one_sample_at_a_time"]


def test_rows_in_place_are_no_reordering():
    x = torch.randn(B, 4)
    places = torch.arange(B)
    still = [(x, (slice(None), places[:2])), (x, (..., 0)), (x, (places, places % 4)), (x, (None, slice(1, 3)))]
    moved = [(x, places.flip(0)), (x, (places.flip(0), 0)), (x, x > 0), (x, [1, 0]), (x.repeat(2, 1), 3)]
    assert [moves_samples(Tensor.__getitem__, call, {}, B) for call in still] == [False] * len(still)
    assert [moves_samples(Tensor.__getitem__, call, {}, B) for call in moved] == [True] * len(moved)
    calls = [(torch.sort, (x,), {}), (torch.sort, (x, 0), {}), (Tensor.flip, (x, 1), {}), (Tensor.flip, (x, 1, 0), {})]
    calls += [
        (torch.roll, (x, 1), {}),
        (torch.roll, (x, 1, 1), {}),
        (torch.gather, (x,), {"dim": -2}),
        (torch.relu, (x,), {}),
    ]
    assert [moves_samples(f, args, kwargs, B) for f, args, kwargs in calls] == [0, 1, 0, 1, 1, 0, 1, 0]


def test_a_narrow_chunk_gives_the_same(monkeypatch):
    torch.manual_seed(0)
    model, batch, loss = Residual().eval(), images(), resolve("cross_entropy")
    for low in (False, True):
        updates = updates_of(model, low)
        whole = DotEngine(model, updates, loss, torch.device("cpu"), torch.float64).score(batch)
        with monkeypatch.context() as patch:
            patch.setattr("finf_fast.dot.changes.ROOM", 1)
            parts = DotEngine(model, updates, loss, torch.device("cpu"), torch.float64).score(batch)
        torch.testing.assert_close(parts.delta, whole.delta, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("positions", [1, 50])
def test_both_forms_of_a_product_agree(positions):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(4, positions, n, generator=generator).double() for n in (5, 7))
    sides = [[torch.randn(n, 2, generator=generator).double() for n in (5, 7)] for _ in range(Q)]
    low = {q: LowRank(*side) for q, side in enumerate(sides)}
    change = packed(low, Q, torch.device("cpu"), torch.float64)
    true = torch.stack([((left.mT @ right) * c.dense()).sum((1, 2)) for c in low.values()], 1)
    torch.testing.assert_close(change.rows(left, right), true)
    torch.testing.assert_close(change.formed(left.mT @ right), true)
    assert change._formed_is_less(positions, 5, 7) == (positions == 50)
    assert packed({1: low[1]}, Q, torch.device("cpu"), torch.float64).rows(left, right)[:, 0].abs().max() == 0


TINY = {torch.float32: 1e-3, torch.bfloat16: 3e-2}  # bfloat16: of the largest, over samples and queries


@pytest.mark.parametrize("dtype", TINY, ids=str)
def test_it_is_the_delta_engine_at_a_tiny_step(dtype):
    torch.manual_seed(1)
    model, ids = NanoGpt(16).eval(), torch.randint(11, (40, 16))
    updates = [ff.mirror(model, ids[q : q + 1], loss="causal_lm", lr=1e-5, rank=4) for q in range(8)]
    settings = {"loss": "causal_lm", "dtype": dtype, "batch_size": 16}
    dot = ff.sweep(model, updates, ids, engine="dot", **settings)
    delta = ff.sweep(model, updates, ids, engine="delta", dtype=torch.float32, loss="causal_lm")
    assert far(dot.delta, np.asarray(delta.delta)) < TINY[dtype]
    assert dot.plan.startswith("dot: first order only, as asked")
    assert "engine='dot' would take" in delta.plan
    assert dot.record["order"] == "first" and dot.record["one_sample_at_a_time"] == ""


def test_padding_and_samples_without_a_target():
    torch.manual_seed(2)
    model = NanoGpt(8).eval()
    ids = torch.randint(11, (5, 8))
    labels = ids.clone()
    labels[1], labels[3, 4:] = -100, -100
    updates = updates_of(model, True)[:1]
    settings = {"loss": "causal_lm", "engine": "dot"}
    delta = np.asarray(ff.sweep(model, updates, (ids, labels), **settings).delta)
    alone = ff.sweep(model, updates, (ids[3:4, :4], labels[3:4, :4]), **settings)
    assert np.isnan(delta[0, 1]) and np.isfinite(np.delete(delta[0], 1)).all()
    assert far(delta[:, 3:4], np.asarray(alone.delta)) < 1e-4


def test_an_interrupted_sweep_goes_on_to_the_same_bytes(tmp_path):
    torch.manual_seed(4)
    model, batch = mlp(), (torch.randn(64, 6), torch.randint(4, (64,)))
    updates = updates_of(model, True)
    whole = ff.sweep(model, updates, batch, engine="dot", batch_size=8, out=tmp_path / "whole")

    def stop(done: int, total: int) -> None:
        if done >= 24:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ff.sweep(model, updates, batch, engine="dot", batch_size=8, out=tmp_path / "cut", progress=stop)
    again = ff.sweep(model, updates, batch, engine="dot", batch_size=8, out=tmp_path / "cut")
    assert np.array_equal(np.asarray(again.delta), np.asarray(whole.delta))
    with pytest.raises(ff.ManifestMismatch, match="engine"):
        ff.sweep(model, updates, batch, engine="delta", batch_size=8, out=tmp_path / "cut")


def test_the_model_stays_as_it_is():
    torch.manual_seed(5)
    model, batch = Residual().eval(), images()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    with torch.inference_mode():
        ff.sweep(model, updates_of(model, False), batch, engine="dot")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags and all(p.grad is None for p in model.parameters())


class Counted(nn.Linear):
    """A layer with a buffer of whole numbers that its forward reads."""

    def __init__(self):
        super().__init__(6, 4)
        self.register_buffer("which", torch.tensor(1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.which


class InPlace(nn.Linear):
    """A layer whose input is written into behind its back."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        out = super().forward(x)
        x.zero_()
        return out


def test_what_it_cannot_do_is_refused_by_name():
    batch = (torch.randn(4, 6), torch.randint(4, (4,)))
    model = Counted()
    update = ff.Update({"weight": torch.randn(4, 6)}, {"which": torch.tensor(2)})
    with pytest.raises(ValueError, match="'which'.*int64"):
        ff.sweep(model, [update], batch, engine="dot")
    model = InPlace(6, 4)
    with pytest.raises(RuntimeError, match="weight: .*written in place.*engine='delta'"):
        ff.sweep(model, [ff.Update({"weight": torch.randn(4, 6)})], batch, engine="dot")
    ids = tokens()
    with pytest.raises(ValueError, match="per_token: .*'dot'"):
        ff.sweep(NanoGpt(), updates_of(NanoGpt(), True), ids, loss="causal_lm", engine="dot", per_token=True)
    with pytest.raises(ValueError, match="dtype: .*float16"):
        ff.sweep(mlp(), [ff.Update({})], batch, engine="dot", dtype=torch.float16)
