"""The paper's convex case: logistic regression, the ten test points of highest loss, each training sample left out.

Ko et al., CVPR 2024, arXiv 2402.08922, section 3: what leaving a training sample out does to a test point's loss,
against its mirror, what a step on the test point does to the training sample's. The objective is strongly convex, so
leaving one out is solved for, to rounding, not trained. Pixels lie in [0, 1], where the decay is strong enough that no
single sample holds the weights: what a mirror says of one that does is its influence to first order.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import finf_fast as ff
from fidelity import judging
from fidelity.data import Images, digits, fashion

__all__ = ["rows"]

DECAY = 0.01  # half of it times the squared weights is added to the mean loss: the paper's C = 1 / (0.01 n)
TRAIN, LEFT_OUT, ASKED = 4900, 500, 10
TOGETHER, STEPS = 100, 200  # samples whose leaving is solved for at once; Newton's steps at most
WAYS = {
    "exact step (cg)": {"method": "cg"},
    "K-FAC": {"method": "kfac"},
    "sgd, step 1e-2": {"method": "sgd", "lr": 1e-2},
}


def rows(folder: Path, quick: bool) -> Iterator[dict[str, object]]:
    """A row for each data set and way: Pearson's correlation over the samples left out, mean over the test points."""
    sets = {"digits": digits(1200)}
    found = None if quick else fashion(folder)
    sets |= {} if found is None else {"Fashion-MNIST": found.as_stored().drawn(TRAIN, len(found.held_x), 0)}
    for data, images in sets.items():
        case = Case(images)
        left = torch.randperm(len(case.x), generator=torch.Generator().manual_seed(0))[: 20 if quick else LEFT_OUT]
        effects = case.left_out(left)
        for way, settings in WAYS.items():
            since = time.perf_counter()
            scores = case.scores(settings)
            seconds = time.perf_counter() - since
            each = [np.corrcoef(a, b)[0, 1] for a, b in zip(scores[:, left], effects, strict=True)]
            found = {"pearson": judging.Estimate.of(np.array(each)), "lowest": float(min(each)), "seconds": seconds}
            yield {
                "task": "convex",
                "data": data,
                "net": "logistic regression",
                "left_out": len(left),
                "way": way,
                **found,
            }


class Case:
    """A fitted model in float64, its Hessian's Cholesky factor, and the test points."""

    def __init__(self, images: Images):
        self.x, self.y = images.x.flatten(1).double(), images.y
        self.weights = self._fitted()
        self.factor = torch.linalg.cholesky(self._hessian())
        self.weights = self._descend(self.weights[None], torch.ones(1, len(self.x), dtype=torch.float64))[0]
        held = images.held_x.flatten(1).double()
        worst = F.cross_entropy(_logits(self.weights, held), images.held_y, reduction="none").topk(ASKED).indices
        self.asked = held[worst], images.held_y[worst]

    def left_out(self, left: Tensor) -> np.ndarray:
        """(Q, M) by how much each test point's loss is higher without a sample."""
        before = self._asked_losses(self.weights[None])
        return torch.cat([self._without(part) - before for part in left.split(TOGETHER)]).T.numpy()

    def _without(self, left: Tensor) -> Tensor:
        """(M, Q) losses of the test points, each of these samples left out by itself."""
        weights, kept = self.weights.repeat(len(left), 1, 1), torch.ones(len(left), len(self.x), dtype=torch.float64)
        kept[torch.arange(len(left)), left] = 0.0
        return self._asked_losses(self._descend(weights, kept))

    def _descend(self, weights: Tensor, kept: Tensor) -> Tensor:
        """Minima (M, 10, D+1) of M objectives by Newton's steps with the one Hessian, until each step is a millionth of
        the way that was gone, or rounding."""
        start, weights = weights, weights.clone()
        under_way = torch.arange(len(weights))
        for _ in range(STEPS):
            mine = weights[under_way]
            gradient = self._gradient(mine, kept[under_way]).flatten(1)
            steps = torch.cholesky_solve(gradient.T, self.factor).T.reshape(mine.shape)
            weights[under_way] -= steps
            gone, length = (weights - start)[under_way].flatten(1).norm(dim=1), mine.flatten(1).norm(dim=1)
            there = steps.flatten(1).norm(dim=1) <= torch.maximum(1e-6 * gone, 1e-14 * length)
            under_way = under_way[~there]
            if not len(under_way):
                return weights
        raise ValueError(f"wanted minima within {STEPS} steps, {len(under_way)} were still on their way")

    def scores(self, settings: dict[str, object]) -> np.ndarray:
        """(Q, N) influence of a way; the exact step is damped by the decay, which is part of the objective."""
        model = nn.Linear(self.x.shape[1], 10).double()
        with torch.no_grad():
            model.weight.copy_(self.weights[:, :-1])
            model.bias.copy_(self.weights[:, -1])
        options = {}
        if settings["method"] == "cg":
            factors = ff.fit_factors(model, (self.x, self.y), kind="cg", samples=len(self.x), progress=False)
            mean = np.concatenate([diagonal.numpy().ravel() for diagonal in factors.diagonals.values()]).mean()
            options = {"factors": factors, "damping": DECAY / mean, "tolerance": 1e-4}
        found = ff.forward_inf(model, (self.x, self.y), self.asked, options=options, progress=False, **settings)
        return np.asarray(found.influence)

    def _fitted(self) -> Tensor:
        """(10, D+1) near the minimum, bias last, by L-BFGS."""
        weights = torch.zeros(10, self.x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(_logits(weights, self.x), self.y) + DECAY / 2 * weights.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return weights.detach()

    def _gradient(self, weights: Tensor, kept: Tensor) -> Tensor:
        """(M, 10, D+1), of sums over n samples whatever is left out: the others then weigh no more."""
        off = _logits(weights, self.x).softmax(-1) - F.one_hot(self.y, 10)
        return (off * kept[..., None]).mT @ _ones(self.x) / len(self.x) + DECAY * weights

    def _hessian(self) -> Tensor:
        x, p = _ones(self.x), _logits(self.weights, self.x).softmax(1)
        rows = []
        for a in range(10):
            blocks = [(x * (p[:, a] * (float(a == b) - p[:, b]))[:, None]).T @ x / len(x) for b in range(10)]
            rows.append(torch.cat(blocks, 1))
        whole = torch.cat(rows)
        return whole + DECAY * torch.eye(len(whole), dtype=whole.dtype)

    def _asked_losses(self, weights: Tensor) -> Tensor:
        """(M, Q) of weights (M, 10, D+1)."""
        x, y = self.asked
        return F.cross_entropy(_logits(weights, x).mT, y.expand(len(weights), -1), reduction="none")


def _ones(x: Tensor) -> Tensor:
    return F.pad(x, (0, 1), value=1.0)


def _logits(weights: Tensor, x: Tensor) -> Tensor:
    return _ones(x) @ weights.mT
