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


class Around(nn.Module):
    """An MLP, and what comes before and after it."""

    def __init__(self):
        super().__init__()
        self.net = _mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class OneRow(Around):
    """Refuses more than one."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.view(1, 6))


class Bright(Around):
    """Scales by what the whole batch holds."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x / 255 if x.max() > 1 else x)


class Permuted(Around):
    """Another order inside, by a product; the first and the last stay where they are."""

    def forward(self, x: Tensor) -> Tensor:
        order = F.one_hot(x[:, 0].argsort(), len(x)).to(x)
        return order.mT @ self.net(order @ x)


class SometimesDraws(Around):
    def forward(self, x: Tensor) -> Tensor:
        few = (x[:, :1] > 5).to(x)
        return self.net(x + few * torch.randn_like(x) if few.any() else x)


class Coupled(Around):
    """Every sample feels the others a little."""

    def forward(self, x: Tensor) -> Tensor:
        found = self.net(x)
        return found - 0.01 * found.mean(0)


def _brightness() -> tuple[Tensor, Tensor]:
    x, y = torch.randint(2, 256, (N, 6)).to(torch.float64), torch.randint(4, (N,))
    x[5] = torch.tensor([0, 1, 0, 1, 1, 0])
    return x, y


def _ends_first_and_last() -> tuple[Tensor, Tensor]:
    x, y = _rows()
    x[1, 0], x[Q - 1, 0] = -9, 9
    return x, y


def _one_large() -> tuple[Tensor, Tensor]:
    x, y = _rows()
    x[:, 0] = x[:, 0].clamp(max=4)
    x[5, 0] = 6
    return x, y


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
@pytest.mark.parametrize(
    ("make", "data"),
    [
        (OneRow, _rows),
        (Bright, _brightness),
        (Permuted, _ends_first_and_last),
        (SometimesDraws, _one_large),
        (Coupled, _rows),
    ],
    ids=lambda given: given.__name__.strip("_"),
)
def test_models_whose_samples_are_not_alone_have_their_queries_alone(make, data, method, passes):
    """None of them shows at the two ends of the first joint pass."""
    torch.manual_seed(2)
    model, corpus = make().eval(), data()
    options = {"method": method, "rank": None}
    options["factors"] = ff.fit_factors(model, corpus, kind=method, batch_size=1, progress=False)
    updates = mirrors_of(model, _few(corpus, slice(Q)), seed=3, **options)
    for q, update in enumerate(updates):
        _close(update, ff.mirror(model, _few(corpus, slice(q, q + 1)), seed=3 + q, **options))
    assert passes[:Q] == [1] * Q


def test_numbers_that_have_the_shape_of_positions(passes):
    """As many queries in a pass as a neighbour is wide."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.kinds, self.numbers, self.head = nn.Embedding(10, 6), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, kind: Tensor, number: Tensor) -> Tensor:
            return self.head(torch.tanh(self.kinds(kind) + self.numbers(number)))

    torch.manual_seed(2)
    model = Table().eval()
    rows = {"kind": torch.randint(10, (N,)), "number": torch.randn(N, 6), "labels": torch.randint(4, (N,))}
    options = {"method": "kfac", "factors": ff.fit_factors(model, rows, progress=False)}
    for queries in (6, 7, 8):
        updates = mirrors_of(model, {key: x[:queries] for key, x in rows.items()}, **options)
        for q, update in enumerate(updates):
            _close(update, ff.mirror(model, {key: x[q : q + 1] for key, x in rows.items()}, **options))


class Rows(nn.Module):
    """Images whose rows have places."""

    def __init__(self):
        super().__init__()
        self.up, self.places, self.head = nn.Linear(4, 6), nn.Embedding(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.up(x.flatten(1, 2)) + self.places(torch.arange(5))).mean(1))


class Users(nn.Module):
    """Of which each has a number, and in order."""

    def __init__(self):
        super().__init__()
        self.users, self.head = nn.Embedding(N, 6), nn.Linear(6, 4)

    def forward(self, number: Tensor) -> Tensor:
        return self.head(torch.tanh(self.users(number)))


@pytest.mark.parametrize(("model", "x"), [(Rows, torch.randn(N, 1, 5, 4)), (Users, torch.arange(N))])
def test_ids_that_count_up(model, x, passes):
    torch.manual_seed(2)
    model, rows = model().eval(), (x, torch.randint(4, (N,)))
    factors = ff.fit_factors(model, rows, progress=False)
    assert not factors.record["one_sample_at_a_time"]
    updates = mirrors_of(model, _few(rows, slice(Q)), method="kfac", factors=factors)
    for q, update in enumerate(updates):
        _close(update, ff.mirror(model, _few(rows, slice(q, q + 1)), method="kfac", factors=factors))
    assert passes[:2] == [1, Q - 1]


def test_a_loss_that_couples_the_rows_of_a_group(passes):
    def contrast(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        one, other = (F.normalize(model(x), dim=-1) for x in batch)
        return F.cross_entropy(one @ other.mT / 0.05, torch.arange(len(one)), reduction="none")

    torch.manual_seed(2)
    model, x = _mlp().eval(), torch.randn(N, 6) * 3
    pairs = (x, x + 0.3 * torch.randn_like(x))
    groups = [[2 * q, 2 * q + 1] for q in range(N // 2)]
    options = {"loss": contrast, "method": "kfac"}
    fit = {"fisher": "empirical", "batch_size": 2, "progress": False}
    options["factors"] = ff.fit_factors(model, pairs, loss=contrast, **fit)
    for group, update in zip(groups, mirrors_of(model, pairs, groups, **options), strict=True):
        _close(update, ff.mirror(model, _few(pairs, group), **options))
    assert passes[: len(groups)] == [1] * len(groups)


def test_a_gradient_without_a_factor_that_is_not_finite_is_still_named():
    class Rooted(Around):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + (self.gain * x.clamp(min=0)).sum(-1, keepdim=True).sqrt()

    torch.manual_seed(2)
    model, (x, y) = Rooted().eval(), _rows()
    x[:, 0] = x[:, 0].abs()
    factors = ff.fit_factors(model, (x, y), progress=False)
    x[5] = -x[5].abs()
    with pytest.raises(ff.NonFiniteLoss, match=r"query 5: .*'gain'"):
        mirrors_of(model, (x[:Q], y[:Q]), method="kfac", factors=factors)


def test_a_pass_s_own_results_are_counted_too(passes, monkeypatch):
    """A model may hold much that leaves no piece: a wide layer that stays still."""
    torch.manual_seed(2)
    model, (x, y) = nn.Sequential(nn.Linear(6, 4000), nn.Tanh(), nn.Linear(4000, 4)).eval(), _rows()
    options = {"method": "kfac", "params": ["2.bias", "2.weight"]}
    options["factors"] = ff.fit_factors(model, (x, y), progress=False)
    monkeypatch.setattr("finf_fast.mirrors.joint.RESULTS", 3 * 8 * 2 * 4000 + 49999)
    mirrors_of(model, (x[:Q], y[:Q]), **options)
    assert passes == [1, 3, 3, 2]
