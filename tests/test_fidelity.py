"""The fidelity bench: its measures against plain definitions, many models at once against one after the other."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

from fidelity import brittleness, data, ensemble, facts, judging, leakage, mislabel, models, ways

N, D = 24, 5
RECIPE = ensemble.Recipe(epochs=2, batch=4, weight_decay=1e-2)


def make():
    return nn.Sequential(nn.Linear(D, 6), nn.ReLU(), nn.Linear(6, 3)).double()


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (N,), generator=generator)


def one_by_one(x, y, own, seed, left=None):
    """A plain loop: the same start, order, schedule and loss."""
    torch.manual_seed(seed)
    model, generator = make(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), RECIPE.lr, RECIPE.momentum, weight_decay=RECIPE.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, RECIPE.epochs * (len(own) // RECIPE.batch))
    for _ in range(RECIPE.epochs):
        order = own[torch.randperm(len(own), generator=generator)]
        for rows in order[: len(own) // RECIPE.batch * RECIPE.batch].split(RECIPE.batch):
            each = nn.functional.cross_entropy(model(x[rows]), y[rows], reduction="none")
            optimizer.zero_grad()
            (each * (rows != left)).mean().backward() if left is not None else each.mean().backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return nn.functional.cross_entropy(model(x), y, reduction="none")


def test_many_models_at_once_are_each_its_own(samples):
    x, y = samples
    members = torch.stack([torch.arange(12), torch.arange(12, 24), torch.arange(0, 24, 2)])
    weights = ensemble.train(make, x, y, members, [3, 4, 5], RECIPE)
    found = ensemble.losses(make, weights, x, y)
    for own, seed, losses in zip(members, [3, 4, 5], found, strict=True):
        torch.testing.assert_close(losses, one_by_one(x, y, own, seed))
    torch.testing.assert_close(
        nn.functional.cross_entropy(ensemble.unstack(make, weights, 1)(x), y, reduction="none"), found[1]
    )


def test_a_sample_left_out_counts_nothing_and_moves_nothing_else(samples):
    x, y = samples
    members = torch.arange(N).expand(2, N)
    weights = ensemble.train(make, x, y, members, [3, 3], RECIPE, torch.tensor([[-1], [7]]))
    found = ensemble.losses(make, weights, x, y)
    torch.testing.assert_close(found[0], one_by_one(x, y, members[0], 3))
    torch.testing.assert_close(found[1], one_by_one(x, y, members[0], 3, left=7))
    changed = x.clone()
    changed[7] = 100.0  # whatever it is
    again = ensemble.train(make, changed, y, members, [3, 3], RECIPE, torch.tensor([[-1], [7]]))
    torch.testing.assert_close(ensemble.losses(make, again, x, y)[1], found[1])
    assert not torch.allclose(ensemble.losses(make, again, x, y)[0], found[0])


def test_rank_correlations_are_spearman_s():
    draw = np.random.default_rng(0)
    predicted, true = draw.integers(0, 6, (5, 40)).astype(float), draw.standard_normal((5, 40))
    predicted[4] = 1.0
    found = judging.correlations(predicted, true)
    for k in range(4):
        assert found[k] == pytest.approx(spearmanr(predicted[k], true[k]).statistic)
    assert found[4] == 0.0  # one that says the same of all says nothing


def test_sums_over_subsets():
    scores, members = np.arange(12.0).reshape(2, 6), np.array([[0, 5], [1, 1], [2, 4]])
    assert judging.sums_over_subsets(scores, members).tolist() == [[5, 2, 6], [17, 14, 18]]


def test_first_means_alone_before_all_others():
    scores = np.array([[1.0, 3, 2], [3, 3, 2], [np.nan, 1, 2], [np.nan] * 3])
    assert judging.first(scores, np.array([1, 1, 0, 0])).tolist() == [True, False, False, False]


def test_an_interval_holds_the_mean_and_narrows():
    draw = np.random.default_rng(0)
    few, many = (judging.Estimate.of(draw.random(n)) for n in (20, 2000))
    for found in (few, many):
        assert found.low < found.mean < found.high
    assert many.high - many.low < 0.2 * (few.high - few.low)
    assert judging.Estimate.of(np.array([1.0, np.nan])).mean == 0.5


def test_altered_images_are_near_their_own():
    x = torch.rand(10, 1, 28, 28)
    x = nn.functional.avg_pool2d(x, 5, 1, 2)
    found = leakage.altered(x, 0)
    assert torch.equal(found, leakage.altered(x, 0)) and not torch.equal(found, leakage.altered(x, 1))
    distances = torch.cdist(found.flatten(1), x.flatten(1))
    assert torch.equal(distances.argmin(1), torch.arange(10)) and (distances.diagonal() > 0).all()


def test_every_way_scores_every_sample(samples):
    x, y = samples
    torch.manual_seed(0)
    model = make().float().eval()
    asked = ways.Asked(model, x.float(), y, x[:9].float(), y[:9])
    found = ways.all_ways(asked, leave=("random",))
    assert set(found) == {*ways.OURS, *ways.TRIVIAL} - {"random"}
    for name, scored in found.items():
        assert scored.raw.shape == scored.rms.shape == (9, N) and np.isfinite(scored.raw).all(), name
    assert (found["nearest in the input"].raw.argmax(1) == np.arange(9)).all()
    np.testing.assert_allclose(np.square(found["K-FAC"].rms).mean(0), 1.0)


def test_samples_that_count_nothing_are_as_good_as_given_other_labels():
    torch.manual_seed(0)
    x, y = torch.randn(20, 4), torch.randint(3, (20,))
    recipe = ensemble.Recipe(epochs=3, batch=5)
    members, without = torch.arange(20).expand(2, 20), torch.tensor([[3, 7, 11], [-1, -1, -1]])
    make = functools.partial(models.mlp, 4, 3)
    other = y.clone()
    other[[3, 7, 11]] = (other[[3, 7, 11]] + 1) % 3
    mine, theirs = (ensemble.train(make, x, labels, members, [1, 1], recipe, without) for labels in (y, other))
    assert all(torch.equal(mine[name][0], theirs[name][0]) for name in mine)
    assert not all(torch.equal(mine[name][1], theirs[name][1]) for name in mine)


def test_groups_are_spoiled_from_none_to_all():
    images = data.Images(torch.zeros(1205, 1, 2, 2), torch.arange(1205) % 10, torch.zeros(1, 1, 2, 2), torch.zeros(1))
    found = mislabel.spoiled(images)
    wrong = (found.y != images.y[:1200]).view(mislabel.GROUPS, -1).double().mean(1).numpy()
    assert len(found.x) == 1200 and wrong[0] == 0 and wrong[-1] == 1
    assert np.abs(wrong - mislabel.wrong_shares()).max() <= 0.5 / 40 + 1e-9


def test_pearson_has_an_interval_around_it():
    rng = np.random.default_rng(0)
    a = rng.standard_normal(30)
    b = a + rng.standard_normal(30)
    found = judging.pearson(a, b)
    assert found.mean == pytest.approx(pearsonr(a, b).statistic)
    assert found.low < found.mean < found.high < 1


def test_brittleness_takes_the_queries_own_samples_away(monkeypatch, tmp_path):
    """A way that names the samples of the query's class makes it lose more than one that names others."""
    monkeypatch.setattr(brittleness, "RECIPE", ensemble.Recipe(epochs=4, lr=0.2))
    monkeypatch.setattr(brittleness, "TAKEN", (80,))

    def both(asked, leave):
        same = (asked.y[None] == asked.labels[:, None]).double().numpy()
        return {"own class": ways.Scored(same, same, 0.0), "others": ways.Scored(-same, -same, 0.0)}

    monkeypatch.setattr(brittleness, "all_ways", both)
    own, others = brittleness.rows(tmp_path, quick=True)
    assert own["rise, 80 gone"].mean > others["rise, 80 gone"].mean + 0.1
    assert own["wrong, 80 gone"].mean >= others["wrong, 80 gone"].mean


def test_facts_stand_where_their_sources_say():
    found = facts.planted(60, 8)
    assert found.windows.shape == (60, facts.LENGTH) and len(set(found.sources.ravel().tolist())) == 8 * len(facts.TOLD)
    for told, query, labels in zip(found.sources, found.queries, found.labels, strict=True):
        city = bytes(query[labels != -100].tolist())
        assert city.istitle() and bytes(query.tolist()).rstrip().endswith(city + b".")
        holding = [row for row, window in enumerate(found.windows) if city in bytes(window.tolist())]
        assert sorted(told.tolist()) == holding


def test_ranks_of_sources():
    order, sources = np.array([[4, 2, 0, 1, 3], [0, 1, 2, 3, 4]]), np.array([[0, 1], [0, 4]])
    assert facts.reciprocal_ranks(order, sources).tolist() == [1 / 3, 1.0]
    many = np.stack([np.arange(30), np.arange(30)[::-1]])
    assert facts.recalls(many, np.array([[0, 29], [29, 28]])).tolist() == [0.5, 1.0]


def test_bm25_is_the_formula():
    documents, k, b = ["a a b", "b c", "c c c d"], 1.2, 0.75
    found = facts.bm25(documents, ["a c", "e"])
    rarity = {"a": np.log(1 + 2.5 / 1.5), "c": np.log(1 + 1.5 / 2.5)}

    def term(word, count, length):
        return rarity[word] * count * (k + 1) / (count + k * (1 - b + b * length / 3))

    assert found[0] == pytest.approx([term("a", 2, 3), term("c", 1, 2), term("c", 3, 4)])
    assert found[1].tolist() == [0, 0, 0]
