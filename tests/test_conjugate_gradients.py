"""The exact step against a dense solve, on nets that know their samples by heart, and what it cannot take."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import finf_fast as ff
from finf_fast import loss as losses
from finf_fast.lowrank import dense
from nets import learn, mlp


def curvature_matrix(model, loss, batch, fisher):
    """(P, P) Gauss-Newton matrix or empirical Fisher of the mean loss, from Jacobians."""
    named = dict(model.named_parameters())

    def output(*weights):
        whole = {name: w for name, w in zip(named, weights, strict=True)}
        value = torch.func.functional_call(model, whole, (batch[0],))
        return value if fisher == "true" else loss.fisher(value, batch, None)

    found = torch.autograd.functional.jacobian(output, tuple(p.detach() for p in named.values()))
    jacobian = torch.cat([j.flatten(1 if fisher == "empirical" else 2) for j in found], -1)
    if fisher == "empirical":
        return jacobian.T @ jacobian / len(jacobian)
    p = model(batch[0]).softmax(-1).detach()
    second = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    return torch.einsum("ncp,ncd,ndq->pq", jacobian, second, jacobian) / len(jacobian)


@pytest.mark.parametrize("fisher", ["true", "empirical"])
def test_conjugate_gradients_against_a_dense_solve(fisher):
    model, (x, y) = mlp()
    factors = ff.fit_factors(model, (x, y), kind="cg", fisher=fisher, batch_size=17)
    matrix = curvature_matrix(model, losses.CrossEntropy(), (x, y), fisher)
    diagonal = torch.cat([factors.diagonals[name].flatten() for name, _ in model.named_parameters()])
    query = x[:2], y[:2]
    named = list(model.parameters())
    g = torch.cat([p.flatten() for p in torch.autograd.grad(F.cross_entropy(model(query[0]), query[1]), named)])
    for damping in (1.0, 1e-2):
        shift = damping * diagonal.mean()
        wanted = torch.linalg.solve(matrix + shift * torch.eye(len(g)).double(), g)
        update = ff.mirror(model, query, method="cg", factors=factors, damping=damping, lr=1.0, tolerance=1e-9)
        found = torch.cat([dense(update.params[name]).flatten() for name, _ in model.named_parameters()])
        assert (found - wanted).norm() <= 1e-6 * wanted.norm()
        assert 0 < update.record["iterations"] <= 1000
    with pytest.raises(ValueError, match="iterations: wanted a residual of 1e-09, got .* after 3"):
        ff.mirror(model, query, method="cg", factors=factors, tolerance=1e-9, iterations=3)


def test_conjugate_gradients_on_what_was_learnt_by_heart():
    """Where drawn labels are all the training set's own, and say nothing of the curvature that is left."""
    model, (x, y) = mlp()
    learn(model, x, y, torch.optim.Adam(model.parameters(), lr=1e-2), 600)
    assert F.cross_entropy(model(x), y) < 1e-3
    factors = ff.fit_factors(model, (x, y), kind="cg", progress=False)
    exact = curvature_matrix(model, losses.CrossEntropy(), (x, y), "true").trace()
    assert sum(d.sum() for d in factors.diagonals.values()).item() == pytest.approx(exact.item(), rel=0.2)
    update = ff.mirror(model, (x[:1], y[:1]), method="cg", factors=factors)
    assert update.record["iterations"] < 200


class MaskedLogits(nn.Module):
    """Of the classes that a model knows the last is never there."""

    def __init__(self, model, fill):
        super().__init__()
        self.model, self.fill = model, fill

    def forward(self, x):
        return F.pad(self.model(x), (0, 1), value=self.fill)


@pytest.mark.parametrize("loss", ["cross_entropy", "masked_lm", "causal_lm"])
def test_classes_masked_by_infinity_count_for_nothing(loss):
    """As with a finite logit so low that its probability is 0 too."""
    torch.manual_seed(0)
    if loss == "cross_entropy":
        model, corpus = mlp()
        query = tuple(part[:2] for part in corpus)
    else:
        model = nn.Sequential(nn.Embedding(7, 5), nn.Tanh(), nn.Linear(5, 7)).double()
        ids = torch.randint(0, 7, (20, 6))
        corpus = ids if loss == "causal_lm" else (ids, ids)
        query = ids[:2] if loss == "causal_lm" else (ids[:2], ids[:2])
    steps = []
    for fill in (float("-inf"), -1e5):
        masked = MaskedLogits(model, fill).eval()
        factors = ff.fit_factors(masked, corpus, kind="cg", loss=loss, progress=False)
        steps.append(ff.mirror(masked, query, method="cg", factors=factors, loss=loss).params)
    for name, step in steps[1].items():
        assert torch.equal(dense(steps[0][name]), dense(step)), name


class Bagged(nn.Sequential):
    def __init__(self):
        super().__init__(nn.EmbeddingBag(10, 6), nn.Tanh(), nn.Linear(6, 3))


class Rounded(nn.Module):
    """A norm in float32, whatever the weights are in."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.norm(x.float()))


@pytest.mark.parametrize(
    "model, message",
    [
        (Bagged, r"method: 'cg' wants a model that torch can differentiate twice \(.*embedding_bag.*'fisher_diag'"),
        (Rounded, r"method: 'cg' wants a model that runs in float64 too.*x.to\(weight.dtype\).*'fisher_diag'"),
    ],
)
def test_models_that_conjugate_gradients_cannot_take(model, message):
    x = torch.randint(0, 10, (20, 6)) if model is Bagged else torch.randn(20, 6)
    model, y = model().eval(), torch.randint(0, 3, (20,))
    factors = ff.fit_factors(model, (x, y), kind="cg", progress=False)
    with pytest.raises(ValueError, match=message):
        ff.mirror(model, (x[:1], y[:1]), method="cg", factors=factors)
