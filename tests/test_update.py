"""Updates of every form: checked, hashed, saved; factors against numpy; attention heads taken out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from finf_fast.lowrank import LowRank, compress, compress_rows, dense, squared_norm
from finf_fast.update import Update
from nets import mlp


def factors(rows=9, cols=6, r=2, dtype=torch.float64):
    return LowRank(torch.randn(rows, r, dtype=dtype), torch.randn(cols, r, dtype=dtype))


def test_factors_stand_for_their_product():
    low = factors()
    assert low.shape == (9, 6) and low.rank == 2 and low.dtype == torch.float64 and low.device.type == "cpu"
    assert low.nbytes == (9 + 6) * 2 * 8
    assert torch.equal(low.dense(), low.u @ low.v.T) and torch.equal(dense(low), low.dense())
    assert torch.allclose(low.t().dense(), low.dense().T)
    assert low.to(dtype=torch.float32).dtype == torch.float32 and low.dense(torch.float32).dtype == torch.float32
    assert torch.allclose(low.scaled(-3.0).dense(), -3 * low.dense())
    plain = torch.ones(2, 3)
    assert dense(plain) is plain and dense(plain, like=low.u).dtype == torch.float64
    assert LowRank(torch.zeros(4, 0), torch.zeros(3, 0)).dense().equal(torch.zeros(4, 3))


def test_half_precision_factors_are_multiplied_in_float32():
    low = factors(64, 64, 48, torch.float32).to(dtype=torch.bfloat16)
    assert torch.equal(low.dense(torch.float32), low.u.float() @ low.v.float().T)
    assert torch.equal(low.dense(), (low.u.float() @ low.v.float().T).bfloat16())


@pytest.mark.parametrize(
    "u, v, error, message",
    [
        (torch.zeros(3), torch.zeros(3, 1), ValueError, r"u: wanted shape \(n, r\), got \(3,\)"),
        (torch.zeros(3, 2), torch.zeros(3, 1), ValueError, "v: wanted rank 2 as u, got 1"),
        (torch.zeros(3, 2), torch.zeros(3, 2).double(), TypeError, "v: wanted dtype torch.float32 as u"),
        (torch.zeros(3, 2), torch.zeros(3, 2).long(), TypeError, "v: wanted a floating-point tensor, got torch.int64"),
        (np.zeros((3, 2)), torch.zeros(3, 2), TypeError, "u: wanted a floating-point tensor, got ndarray"),
        (torch.zeros(3, 2), torch.zeros(3, 2, device="meta"), ValueError, "v: wanted device cpu as u, got meta"),
    ],
)
def test_factors_that_do_not_fit(u, v, error, message):
    with pytest.raises(error, match=message):
        LowRank(u, v)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 30),
    cols=st.integers(1, 30),
    count=st.integers(1, 40),
    rank=st.integers(1, 12),
    decay=st.sampled_from([0.0, 0.3, 2.0]),
    seed=st.integers(0, 99),
)
def test_compression_is_the_best_there_is(rows, cols, count, rank, decay, seed):
    draw = torch.Generator().manual_seed(seed)
    scale = torch.exp(-decay * torch.arange(count, dtype=torch.float64))
    u = torch.randn(rows, count, generator=draw, dtype=torch.float64) * scale
    v = torch.randn(cols, count, generator=draw, dtype=torch.float64)
    low, discarded = compress(u, v, rank)
    true = (u @ v.T).numpy()
    sigma = np.linalg.svd(true, compute_uv=False)
    total, best = (sigma**2).sum(), (sigma[rank:] ** 2).sum()
    error = ((low.dense().numpy() - true) ** 2).sum()
    assert low.shape == (rows, cols) and low.rank <= max(rank, 0)
    assert abs(error - best) <= 1e-12 * total
    wanted = best / total if count > rank else 0.0  # factors of few columns are left alone
    assert abs(discarded - wanted) <= 1e-12
    assert squared_norm(low) == pytest.approx(total - error, rel=1e-9)


def test_compression_shares_singular_values_evenly_and_leaves_thin_factors_alone():
    u, v = torch.randn(50, 20), torch.randn(8, 20)
    low, discarded = compress(u, v, 5)
    sigma = torch.linalg.svdvals(u.double() @ v.double().T)
    for side in (low.u, low.v):
        assert torch.allclose(side.double().square().sum(0), sigma[:5], rtol=1e-5)
    assert low.dtype == torch.float32 and 0 < discarded < 1
    same, nothing = compress(u[:, :5], v[:, :5], 5)
    assert torch.equal(same.u, u[:, :5]) and torch.equal(same.v, v[:, :5]) and nothing == 0
    assert compress(u.bfloat16(), v.bfloat16(), 5)[0].dtype == torch.float32
    zero, nothing = compress(torch.zeros(6, 4), torch.zeros(5, 4), 2)
    assert nothing == 0 and not zero.dense().any() and bool(torch.isfinite(zero.u).all())
    for rank in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="rank: wanted a whole number, at least 1"):
            compress(u, v, rank)


def test_the_rows_of_an_embedding_are_compressed_alone():
    ids, values = torch.tensor([7, 2, 30]), torch.randn(3, 10, dtype=torch.float64)
    whole = torch.zeros(40, 10, dtype=torch.float64).index_copy(0, ids, values)
    low, discarded = compress_rows(ids, values, 40, 2)
    sigma = torch.linalg.svdvals(values)
    assert discarded == pytest.approx((sigma[2] ** 2 / sigma.square().sum()).item(), rel=1e-12)
    assert (low.dense() - whole).norm() == pytest.approx(sigma[2].item(), rel=1e-12)
    assert low.u.any(1).nonzero().flatten().tolist() == [2, 7, 30]


def test_the_norm_is_that_of_the_product():
    low = factors(40, 30, 7)
    assert squared_norm(low) == pytest.approx(low.dense().square().sum().item(), rel=1e-13)
    cancels = LowRank(torch.ones(4, 2), torch.tensor([[1.0, -1.0]]).repeat(3, 1))
    assert squared_norm(cancels) == 0
    assert squared_norm(torch.tensor([3.0, 4.0])) == 25


@pytest.fixture
def mixed():
    return Update(
        {"a.weight": factors(), "a.bias": torch.randn(9)}, {"n": torch.tensor(3)}, name="m", record={"x": [1]}
    )


def test_saved_and_loaded_an_update_is_the_same(mixed, tmp_path):
    mixed.save(tmp_path / "update.pt")
    again = Update.load(tmp_path / "update.pt")
    assert again.fingerprint == mixed.fingerprint and again.nbytes == mixed.nbytes
    assert isinstance(again.params["a.weight"], LowRank) and torch.equal(again.buffers["n"], torch.tensor(3))
    assert (again.name, again.direction, again.record) == ("m", "ascent", {"x": [1]})
    stored = torch.load(tmp_path / "update.pt", weights_only=True)["params"]["a.weight"]
    assert stored.keys() == {"u", "v", "columns"}


def test_the_fingerprint_sees_both_factors(mixed):
    low, rest = mixed.params["a.weight"], {"a.bias": mixed.params["a.bias"]}

    def hashed(change):
        return Update({"a.weight": change, **rest}, mixed.buffers).fingerprint

    nudged = low.v.clone()
    nudged[3, 1] += 1e-12
    square = LowRank(low.u[:6], low.v)
    found = [hashed(c) for c in (low, LowRank(low.u, nudged), LowRank(-low.u, -low.v), low.dense(), square, square.t())]
    assert hashed(LowRank(low.u.clone(), low.v.clone())) == found[0] and len(set(found)) == len(found)
    assert mixed.nbytes == low.nbytes + 9 * 4 + 8


def test_factors_are_checked_against_the_model():
    model = nn.Sequential(nn.Linear(6, 9))
    Update({"0.weight": factors()}).check(model)
    with pytest.raises(ValueError, match=r"parameter '0.weight' wanted shape \(9, 6\), got \(6, 9\)"):
        Update({"0.weight": factors().t()}).check(model)


class Conv1D(nn.Module):
    """A linear layer whose weight is (in, out), as in GPT-2."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width, width)), nn.Parameter(torch.randn(width))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


class Heads(nn.Module):
    def __init__(self, width=24):
        super().__init__()
        self.one, self.two, self.plain = nn.Linear(width, 16), Conv1D(width), nn.LayerNorm(width)


@pytest.mark.parametrize("numbers", [[1], [5, 0], range(6)])
@pytest.mark.parametrize("layer", ["one", "two"])
def test_masking_takes_the_columns_of_the_heads_out(layer, numbers):
    model = Heads().bfloat16()
    before = {name: p.clone() for name, p in model.named_parameters()}
    update = Update.masking(model, {layer: numbers}, 4, direction="descent", name="no heads")
    assert update.params.keys() == {f"{layer}.weight"} and (update.direction, update.name) == ("descent", "no heads")
    change = update.params[f"{layer}.weight"]
    pays = 2 * 4 * len(numbers) < min(model.get_submodule(layer).weight.shape)
    assert isinstance(change, LowRank) is pays and change.dtype == torch.float32
    update.check(model)
    x = torch.randn(5, 24)
    masked = x.clone().view(5, 6, 4)
    masked[:, list(numbers)] = 0
    wanted = model.float().get_submodule(layer)(masked.view(5, 24))
    after = {"weight": model.get_submodule(layer).weight + dense(change)}
    assert torch.allclose(torch.func.functional_call(model.get_submodule(layer), after, x), wanted, atol=1e-5)
    zeroed = after["weight"] if layer == "two" else after["weight"].T
    assert not zeroed.view(6, 4, -1)[list(numbers)].any()
    assert all(torch.equal(p, before[name].float()) for name, p in model.named_parameters())


def test_masking_says_what_it_did_and_what_it_cannot_do():
    model = Heads()
    assert Update.masking(model, {"one": [2, 0, 2]}, 4).record["heads"] == {"one": [0, 2]}
    for heads, size, error, message in (
        ({}, 4, ValueError, "heads: wanted at least one output projection"),
        ({"three": [0]}, 4, ValueError, "heads: the model has no module 'three'"),
        ({"plain": [0]}, 4, TypeError, r"heads: 'plain' wanted nn\.Linear or Conv1D, got LayerNorm"),
        ({"one": []}, 4, ValueError, "heads: 'one' wanted at least one head"),
        ({"one": [0, 6]}, 4, ValueError, r"heads: 'one' wanted heads in \[0, 6\), got \[0, 6\]"),
        ({"two": [-1]}, 4, ValueError, r"heads: 'two' wanted heads in \[0, 6\), got \[-1\]"),
        ({"one": [0.5]}, 4, TypeError, "heads: 'one' wanted whole numbers, got 0.5"),
        ({"one": [0]}, 5, ValueError, "head_size: wanted a divisor of the 24 inputs of 'one', got 5"),
    ):
        with pytest.raises(error, match=message):
            Update.masking(model, heads, size)
    model.more = nn.Linear(24, 16)
    model.more.weight = model.one.weight
    with pytest.raises(ValueError, match="heads: 'more' wanted a weight of its own, got one that one, more share"):
        Update.masking(model, {"more": [0]}, 4)


def test_the_pair_engine_scores_factors_as_it_scores_their_product():
    from finf_fast.loss import CrossEntropy
    from finf_fast.pair import PairEngine

    model, (x, y) = mlp()
    low = Update({"0.weight": factors(16, 12, 3), "3.weight": factors(5, 16, 1)})
    plain = Update({name: change.dense() for name, change in low.params.items()})
    for keep in (1 << 30, 0):
        engine = PairEngine(model, [low, plain], CrossEntropy(), torch.device("cpu"), torch.float64, keep=keep)
        result = engine.score((x, y))
        assert torch.equal(result.delta[0], result.delta[1]) and result.delta.abs().min() > 0
    moved = torch.func.functional_call(
        model, {n: p + plain.params.get(n, 0) for n, p in model.named_parameters()}, (x,)
    )
    wanted = F.cross_entropy(moved, y, reduction="none") - F.cross_entropy(model(x), y, reduction="none")
    assert torch.allclose(result.delta[0], wanted, atol=1e-12)
