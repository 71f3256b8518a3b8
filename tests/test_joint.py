"""Queries that share a pass: the steps of each alone, and alone where they cannot be told apart."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import finf_fast as ff
from finf_fast.lowrank import dense
from finf_fast.mirrors import mirrors_of
from finf_fast.mirrors.joint import Joint
from mixing_models import Sorted, TimeFirst

N, Q = 24, 9


class Words(nn.Module):
    """An embedding that pads and is tied to the head, a norm between."""

    def __init__(self):
        super().__init__()
        self.tokens, self.norm = nn.Embedding(11, 8, padding_idx=0), nn.LayerNorm(8)
        self.up, self.head = nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.up(self.tokens(ids)))))


class Penalised(nn.Module):
    """A weight that also adds to the loss by itself."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) * (1 + self.head.weight.square().sum())


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5, bias=False), nn.Tanh(), nn.Linear(5, 4))


def _conv() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 3, 2), nn.Flatten(), nn.Linear(6, 4))


def _gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    return transformers.GPT2LMHeadModel(config)


def _rows() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 6), torch.randint(4, (N,))


def _ids() -> Tensor:
    ids = torch.randint(1, 11, (N, 6))
    ids[::3, 4:] = 0
    return ids


CASES = {  # model, corpus, loss, whether queries share passes
    "mlp": (_mlp, _rows, "cross_entropy", True),
    "tied words": (Words, _ids, "causal_lm", True),
    "gpt2": (_gpt2, _ids, "causal_lm", True),
    "sorted": (Sorted, _rows, "cross_entropy", False),
    "penalised": (Penalised, _rows, "cross_entropy", False),
    "time first": (TimeFirst, lambda: (torch.randn(N, Q - 1, 6), torch.randint(4, (N,))), "cross_entropy", False),
    "conv": (_conv, _rows, "cross_entropy", False),
}


def _few(rows, at: slice):
    return tuple(t[at] for t in rows) if isinstance(rows, tuple) else rows[at]


@pytest.fixture(autouse=True)
def doubles():
    """An inverse magnifies float32's rounding, which is another on every machine; a mix-up is as large in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """Queries of every pass, as they go."""
    seen: list[int] = []
    in_turn = Joint.in_turn

    def counted(self, queries):
        for found in in_turn(self, queries):
            seen.append(len(found))
            yield found

    monkeypatch.setattr(Joint, "in_turn", counted)
    return seen


def _close(one: ff.Update, other: ff.Update) -> None:
    assert one.params.keys() == other.params.keys()
    for name, change in one.params.items():
        want = dense(other.params[name])
        assert (dense(change) - want).norm() <= 1e-9 * want.norm() + 1e-30, name
    for key in ("lr", "loss_before", "loss_after", "predicted_change", "rows"):
        assert one.record[key] == pytest.approx(other.record[key], rel=1e-9), key


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
@pytest.mark.parametrize("name", CASES)
def test_each_is_the_step_alone(name, method, passes):
    torch.manual_seed(2)
    make, data, loss, joint = CASES[name]
    model, corpus = make().eval(), data()
    options = {"loss": loss, "method": method, "rank": 4}
    options["factors"] = ff.fit_factors(model, corpus, loss=loss, kind=method, progress=False)
    updates = mirrors_of(model, _few(corpus, slice(Q)), **options)
    for q, update in enumerate(updates):
        _close(update, ff.mirror(model, _few(corpus, slice(q, q + 1)), **options))
    assert passes[: Q if not joint else 2] == ([1, Q - 1] if joint else [1] * Q)


def test_samples_that_a_later_pass_would_move(monkeypatch):
    torch.manual_seed(2)
    model, (x, y) = Sorted().eval(), _rows()
    monkeypatch.setattr("finf_fast.mirrors.joint.MOST", 4)
    x = torch.cat([x[:5][x[:5, 0].argsort()], x[5:][x[5:, 0].argsort(descending=True)]])
    options = {"method": "kfac", "factors": ff.fit_factors(model, (x, y), progress=False)}
    for q, update in enumerate(mirrors_of(model, (x[:Q], y[:Q]), **options)):
        _close(update, ff.mirror(model, (x[q : q + 1], y[q : q + 1]), **options))


def test_groups_and_shapes_that_change(passes):
    torch.manual_seed(2)
    model, (x, y) = _mlp().eval(), _rows()
    options = {"method": "kfac", "factors": ff.fit_factors(model, (x, y), progress=False)}
    groups = {"a": [0, 1], "b": [2], "c": [3, 4], "d": [5, 6], "e": [7, 8], "f": [9], "g": [10], "h": [11]}
    for update, rows in zip(mirrors_of(model, (x, y), groups, **options), groups.values(), strict=True):
        _close(update, ff.mirror(model, (x[rows], y[rows]), **options))
    assert passes[:4] == [1, 1, 3, 3]


def test_frozen_biases_and_a_filter(passes):
    torch.manual_seed(2)
    model, (x, y) = _mlp().eval(), _rows()
    factors = ff.fit_factors(model, (x, y), progress=False)
    options = {"method": "kfac", "factors": factors, "params": ["*.weight", "4.bias"]}
    updates = mirrors_of(model, (x[:Q], y[:Q]), **options)
    assert set(updates[-1].params) == {"0.weight", "2.weight", "4.weight", "4.bias"}
    for q, update in enumerate(updates):
        _close(update, ff.mirror(model, (x[q : q + 1], y[q : q + 1]), **options))
    assert passes[:2] == [1, Q - 1]


def test_a_pass_holds_no_more_than_fits(passes, monkeypatch):
    torch.manual_seed(2)
    model, (x, y) = _mlp().eval(), _rows()
    factors = ff.fit_factors(model, (x, y), progress=False)
    one = 8 * (6 + 9 + 9 + 9 + 5 + 5 + 4 + 4)  # inputs, gradients of outputs and of the two biases
    monkeypatch.setattr("finf_fast.mirrors.joint.ROOM", 3 * one + 1)
    mirrors_of(model, (x[:Q], y[:Q]), method="kfac", factors=factors)
    assert passes == [1, 3, 3, 2]


def test_draws_stay_each_querys_own(passes):
    """A loss that draws: query q draws from seed + q, whoever is asked beside it."""

    def noisy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x + 1e-5 * torch.randn_like(x)), y, reduction="none")

    torch.manual_seed(2)
    model, (x, y) = _mlp().eval(), _rows()
    options = {"method": "kfac", "loss": noisy}
    options["factors"] = ff.fit_factors(model, (x, y), progress=False)
    for q, update in enumerate(mirrors_of(model, (x[:4], y[:4]), seed=5, **options)):
        _close(update, ff.mirror(model, (x[q : q + 1], y[q : q + 1]), seed=5 + q, **options))
    assert passes[:4] == [1] * 4


def test_the_query_at_fault_is_named():
    torch.manual_seed(2)
    model, (x, y) = _mlp().eval(), _rows()
    factors = ff.fit_factors(model, (x, y), progress=False)
    x = x.clone()
    x[5, 0] = torch.nan
    with pytest.raises(ff.NonFiniteLoss, match="query 5"):
        mirrors_of(model, (x[:Q], y[:Q]), method="kfac", factors=factors)
