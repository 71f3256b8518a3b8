"""Exact, diagonal and optimizer-state steps, the curvature of losses, files, refusals, and what the steps are for."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import finf_fast as ff
from curvature_cases import drawn_gradients
from finf_fast import fitting, ops, regime
from finf_fast import loss as losses
from finf_fast.lowrank import LowRank
from finf_fast.records import ManifestMismatch, NonFiniteLoss
from nets import conv_net, language_model, learn, mlp

pytestmark = pytest.mark.usefixtures("one_thread")


def judged(name):
    """A loss, an output (B, ...) and a batch for it."""
    torch.manual_seed(0)
    if name == "squared_error":
        return losses.SquaredError(), torch.randn(3, 2, 2).double(), (None, torch.randn(3, 2, 2))
    if name == "causal_lm":
        ids = torch.randint(0, 5, (3, 4))
        labels = ids.clone()
        labels[0, 2], labels[1, 1:] = -100, -100
        labels[1, 3] = 2
        return losses.CausalLM(), torch.randn(3, 4, 5).double(), {"input_ids": ids, "labels": labels}
    smoothing = 0.2 if name == "smoothed" else 0.0
    reduction = "sum" if name == "sum" else "mean"
    return losses.CrossEntropy(reduction, smoothing), torch.randn(3, 5).double(), (None, torch.randint(0, 5, (3,)))


@pytest.mark.parametrize("name", ["squared_error", "causal_lm", "smoothed", "sum"])
def test_the_curvature_of_a_loss(name):
    """H t is autograd's second derivative; gradients of drawn labels, or signs, have H as their second moment."""
    loss, value, batch = judged(name)

    def total(z):
        return loss.per_sample(_fixed(z), batch).sum()

    size = value.numel()
    hessian = torch.autograd.functional.hessian(total, value).view(size, size)
    tangent = torch.randn_like(value)
    assert torch.allclose(loss.gauss_newton(value, batch, tangent).flatten(), hessian @ tangent.flatten(), atol=1e-12)
    draws = 4000
    for drawn in (loss.fisher, loss.scattered):
        moment = torch.zeros(size, size).double()
        for draw in range(draws):
            z = value.clone().requires_grad_()
            noise = lambda shape, draw=draw: ops.noise(1, torch.arange(3), draw, shape)  # noqa: E731
            (g,) = torch.autograd.grad(drawn(z, batch, noise).sum(), z)
            moment += torch.outer(g.flatten(), g.flatten()) / draws
        assert (moment - hessian).norm() <= 0.1 * hessian.norm()  # √(n / 4000), n directions: 3 to 6 %


def _fixed(value):
    model = nn.Identity()
    model.forward = lambda *args, **kwargs: value
    return model


def test_the_diagonal_fisher_is_the_mean_of_squares():
    model, (x, y) = conv_net()
    factors = ff.fit_factors(model, (x, y), kind="fisher_diag", batch_size=11)
    found = drawn_gradients(model, losses.CrossEntropy(), (x, y), range(len(x)))
    assert set(factors.diagonals) == set(found) and not factors.left
    for name, gradients in found.items():
        assert torch.allclose(factors.diagonals[name], gradients.square().mean(0), rtol=1e-9, atol=1e-18)
    update = ff.mirror(model, (x[:1], y[:1]), method="fisher_diag", factors=factors, damping=0.5, lr=2.0)
    gradient = ff.mirror(model, (x[:1], y[:1]), lr=2.0, rank=None)
    for name, diagonal in factors.diagonals.items():
        if diagonal.mean() > 0:
            wanted = gradient.params[name] / (diagonal + 0.5 * diagonal.mean())
            assert torch.allclose(update.params[name], wanted, rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "fisher_diag", "cg"])
def test_factors_are_saved_with_what_they_were_fitted_on(kind, tmp_path):
    model, (x, y) = mlp()
    path = tmp_path / "factors.pt"
    factors = ff.fit_factors(model, (x, y), kind=kind, out=path)
    again = ff.Factors.load(path)
    assert again.record == factors.record and again.left == factors.left and again.nbytes == factors.nbytes > 0
    one, other = (ff.mirror(model, (x[:2], y[:2]), method=kind, factors=f) for f in (factors, again))
    assert one.fingerprint == other.fingerprint
    assert one.record["options"]["factors"]["corpus"] == ff.open_corpus((x, y)).fingerprint
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved[0].weight[0, 0] += 1e-3
    with pytest.raises(ManifestMismatch, match="factors: wanted those of this model, .* fit them again"):
        ff.mirror(moved, (x[:2], y[:2]), method=kind, factors=again)
    torch.save({"something": 1}, path)
    with pytest.raises(ValueError, match="path: wanted a file that Factors.save wrote"):
        ff.Factors.load(path)


def test_the_model_is_left_alone():
    model, (x, y) = conv_net()
    model.train()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    for kind in ("ekfac", "cg"):
        ff.fit_factors(model, (x, y), kind=kind)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"kind": "newton"}, ValueError, "kind: wanted one of kfac, ekfac, fisher_diag, cg, got 'newton'"),
        ({"fisher": "false"}, ValueError, "fisher: wanted one of true, empirical"),
        ({"convention": "extend"}, ValueError, "convention: wanted one of expand, reduce"),
        ({"samples": 0}, ValueError, "samples: wanted a whole number, at least 1, got 0"),
        ({"batch_size": 1.5}, ValueError, "batch_size: wanted a whole number"),
        ({"seed": -1}, ValueError, "seed: wanted a whole number, at least 0, got -1"),
        ({"dtype": torch.float16}, ValueError, "dtype: wanted torch.float32 or torch.float64, got torch.float16"),
        ({"params": "2.*"}, ValueError, "model: wanted a layer that has a K-FAC form .* kind='fisher_diag' takes any"),
        ({"loss": lambda m, b: m(b[0]).sum(1)}, ValueError, "names no distribution to draw labels from; the empirical"),
    ],
)
def test_fits_that_are_refused(settings, error, message):
    model, (x, y) = mlp()
    with pytest.raises(error, match=message):
        ff.fit_factors(model, (x, y), **settings)


def test_what_cannot_be_fitted():
    with pytest.raises(TypeError, match=r"model: wanted a torch\.nn\.Module, got dict"):
        ff.fit_factors({}, torch.zeros(3, 2))
    with pytest.raises(ValueError, match="model: wanted at least one parameter"):
        ff.fit_factors(nn.ReLU(), torch.zeros(3, 2))
    model, (x, y) = mlp()
    with pytest.raises(ValueError, match="corpus: wanted a target in one of 60 samples at least"):
        ff.fit_factors(model, (x, torch.full_like(y, -100)), params="0.*", kind="fisher_diag")


def test_bad_samples_are_named():
    model, (x, y) = mlp()
    y = y.clone()
    y[37] = 9
    with pytest.raises(ff.BadSample, match=r"sample 37 \(.*\): label wanted in \[0, 5\)"):
        ff.fit_factors(model, (x, y), batch_size=8)
    x = x.clone()
    x[41] = np.inf
    with pytest.raises(ff.NonFiniteLoss, match="sample 41 .*: wanted a finite loss"):
        ff.fit_factors(model, (x, y.clamp(max=4)), batch_size=8)


def test_steps_that_are_refused():
    model, (x, y) = mlp()
    kfac, cg = (ff.fit_factors(model, (x, y), kind=kind) for kind in ("kfac", "cg"))
    query = x[:1], y[:1]
    for settings, message in (
        ({"method": "ekfac", "factors": kfac}, "factors: method='ekfac' wants kind 'ekfac', got 'kfac'"),
        ({"method": "kfac", "factors": cg}, "wants kind 'kfac' or 'ekfac', got 'cg'"),
        ({"method": "kfac", "factors": kfac, "size": 0.0}, "size: wanted a finite number above 0"),
        ({"method": "kfac", "factors": kfac, "damping": -1.0}, "damping: wanted a finite number"),
        ({"method": "kfac", "factors": kfac, "steps": 2}, "steps: method='kfac' wants 1, got 2"),
        ({"method": "kfac", "factors": kfac, "mode": "train"}, "mode: method='kfac' wants 'eval'"),
        ({"method": "kfac", "factors": kfac, "params": "2.*"}, "wanted those of a parameter that moves"),
        ({"method": "cg", "factors": cg, "loss": losses.CrossEntropy("sum")}, "loss: method='cg' wants that of its"),
    ):
        with pytest.raises(ValueError, match=message):
            ff.mirror(model, query, **settings)
    with pytest.raises(TypeError, match=r"factors: wanted finf_fast.Factors, got dict"):
        ff.mirror(model, query, method="kfac", factors={})


def test_a_loss_without_gradient_has_no_step():
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(20, 3).double(), torch.randint(0, 2, (20,))
    factors = ff.fit_factors(model, (x, y))
    with pytest.raises(NonFiniteLoss, match="query: wanted a gradient to step on"):
        ff.mirror(model, (x[:1], y[:1]), loss=lambda m, b: 0.0 * m(b[0]).sum(1), method="kfac", factors=factors)


def test_long_queries_are_compressed_to_a_rank_that_is_told():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(90, 80), nn.GELU(), nn.Linear(80, 70)).double()
    x, y = torch.randn(60, 90).double(), torch.randint(0, 70, (60,))
    factors = ff.fit_factors(model, (x, y), kind="ekfac")
    for method in ("kfac", "ekfac"):
        whole = ff.mirror(model, (x[:40], y[:40]), method=method, factors=factors, rank=None, lr=1.0)
        low = ff.mirror(model, (x[:40], y[:40]), method=method, factors=factors, rank=4, lr=1.0)
        for name in ("0.weight", "2.weight"):
            assert isinstance(low.params[name], LowRank) and low.params[name].rank == 4
            lost = (low.params[name].dense() - whole.params[name]).norm() ** 2 / whole.params[name].norm() ** 2
            assert 1e-6 < lost == pytest.approx(low.record["discarded_by_tensor"][name], rel=1e-6)
        assert low.record["low_rank_tensors"] == 2 and low.record["change_bytes"] < whole.record["change_bytes"]


@pytest.mark.parametrize("method, damping, within", [("kfac", 1e-3, 3), ("ekfac", 1e-2, 3), ("adamw_state", 0.1, 10)])
def test_training_losses_move_by_the_size_asked_for(method, damping, within):
    """In root mean square: what the step's length means; of Adam's state, whose metric is no curvature, about."""
    model, (x, y) = mlp()
    optimizer = learn(model, x, y, torch.optim.Adam(model.parameters(), lr=1e-2), 60)
    settings = {"options": {"size": 1e-4, "damping": damping}, "progress": False}
    if method == "adamw_state":
        settings["options"]["state"] = optimizer
    scores = ff.forward_inf(model, (x, y), (x[:8], y[:8]), method=method, **settings)
    wanted = 1e-4 * (scores.base.mean() if method != "adamw_state" else 1.0)
    assert np.all(np.abs(np.log(np.sqrt((scores.delta**2).mean(1)) / wanted)) < np.log(within))


@pytest.mark.parametrize("how", [{}, {"engine": "dot"}, {"engine": "dot", "dtype": torch.bfloat16}], ids=str)
def test_the_linear_regime_is_looked_at_and_told(how):
    """By finite changes whatever the engine: a dot product is linear in the step by construction."""
    (model, (x, y)), found = mlp(), {}
    for size in (1e-5, 1.0):
        settings = {"method": "kfac", "options": {"size": size}, "progress": False, **how}
        scores = ff.forward_inf(model, (x, y), (x[:20], y[:20]), **settings)
        found[size] = scores.record["mirror"]["linear_regime"]
        assert found[size]["samples"] == 60 and found[size]["queries"][-1] == "query 19"
        assert scores.record["mirror"]["options"]["factors"]["samples"] == 60
    assert found[1e-5]["departure"] < 1e-3 < 0.05 < found[1.0]["departure"]
    assert found[1.0]["rank_agreement"] < found[1e-5]["rank_agreement"] <= 1.0 + 1e-12
    assert "linear_regime" not in ff.forward_inf(model, (x, y), (x[:2], y[:2]), progress=False).record["mirror"]


def test_damping_found_by_planted_duplicates():
    model, (x, y) = mlp()
    settings = {"method": "kfac", "options": {"damping": "auto"}, "progress": False}
    record = ff.forward_inf(model, (x, y), (x[:2], y[:2]), **settings).record["mirror"]
    tried = record["damping_tried"]
    assert list(tried) == ["0.0001", "0.001", "0.01", "0.1", "1"]
    assert tried[f"{record['options']['damping']:g}"] == max(tried.values()) > min(tried.values())
    with pytest.raises(ValueError, match="damping: method='adamw_state' has none to find"):
        ff.forward_inf(model, (x, y), (x[:2], y[:2]), **{**settings, "method": "adamw_state"})
    with pytest.raises(ValueError, match="damping: wanted a finite number above 0, got 'auto'"):
        ff.mirror(model, (x[:2], y[:2]), method="kfac", damping="auto", factors=ff.fit_factors(model, (x, y)))


def test_halves_and_their_comparison():
    update = ff.Update({"w": torch.ones(2, 3), "u": LowRank(torch.ones(2, 1), torch.ones(3, 1))})
    half = regime.with_halves([update])[1]
    assert torch.equal(half.params["w"], torch.full((2, 3), 0.5)) and half.params["u"].dense().eq(0.5).all()
    whole = np.array([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    told = regime.compared(np.concatenate([whole, whole / 2]), ["a", "b"])
    assert told["departure"] == 0.0 and told["rank_agreement"] == pytest.approx(1.0)
    turned = regime.compared(np.array([[1.0, 2.0, 3.0], [0.5, 0.25, -0.5]]), ["a"])
    assert turned["rank_agreement"] == pytest.approx(-1.0)
    assert turned["departure"] == pytest.approx(np.sqrt((1.5**2 + 4**2) / 14))


def test_half_precision_is_fitted_in_single():
    model, (x, y) = mlp()
    model = model.to(torch.bfloat16)
    factors = ff.fit_factors(model, (x.float(), y))
    assert {block.rows.values.dtype for block in factors.blocks.values()} == {torch.float32}
    same = ff.fit_factors(copy.deepcopy(model).float(), (x.float(), y))
    assert all(torch.equal(b.cols.values, same.blocks[name].cols.values) for name, b in factors.blocks.items())
    scores = ff.forward_inf(model, (x.float(), y), (x[:2].float(), y[:2]), method="kfac", progress=False)
    assert np.isfinite(scores.delta).all() and (abs(scores.delta).max(1) > 0).all()


def test_texts_count_by_their_tokens(monkeypatch):
    monkeypatch.setattr(fitting, "TOKENS", 40)
    monkeypatch.setattr(fitting, "FEWEST", 5)
    model, data = language_model()
    length = len(data[0]["input_ids"])
    assert ff.fit_factors(model, data, loss="causal_lm").record["samples"] == max(5, 40 // length) < len(data)


def test_a_ragged_language_model_is_fitted_without_its_padding():
    model, data = language_model()
    whole = ff.fit_factors(model, data, loss="causal_lm", batch_size=30)
    alone = ff.fit_factors(model, data, loss="causal_lm", batch_size=1)
    for name, block in whole.blocks.items():
        for side, other in ((block.rows, alone.blocks[name].rows), (block.cols, alone.blocks[name].cols)):
            assert torch.allclose(side.values, other.values, rtol=1e-9, atol=1e-12), name


def digits():
    """Digits, a net trained on them with 40 test images leaked into the training set, and the leaked images."""
    x, y = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:1040]
    x, y = torch.tensor(x / 16.0, dtype=torch.float32)[order], torch.tensor(y)[order]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0)
    for _ in range(100):
        for rows in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval(), (x, y), (x[1000:], y[1000:])


def found(influence):
    """Share of the leaked images that come first among 1,040, scores over their root mean square over the queries."""
    influence = np.asarray(influence, dtype=np.float64)
    compared = influence / np.sqrt((influence**2).mean(0))
    return float((compared.argmax(1) == 1000 + np.arange(40)).mean())


def test_leaked_digits_are_found_by_kfac():
    """.78 here; plain SGD .05, the released protocol .30 (by its absolute score)."""
    model, corpus, leaked = digits()
    ways = {"sgd": {}, "released": {"seed": 0}, "kfac": {}}
    scores = {m: ff.forward_inf(model, corpus, leaked, method=m, progress=False, **w) for m, w in ways.items()}
    hits = {m: found(abs(s.delta) if m == "released" else s.influence) for m, s in scores.items()}
    assert hits["kfac"] >= 0.6
    assert hits["kfac"] >= 2 * hits["released"] and hits["kfac"] >= hits["sgd"] + 0.4
