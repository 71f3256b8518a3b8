"""dattri's attributors, each as its examples set it up, on a copy of the model (they load checkpoints into it)."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from dattri.algorithm.influence_function import IFAttributorArnoldi, IFAttributorCG
from dattri.algorithm.logra import LoGraAttributor
from dattri.algorithm.tracin import TracInAttributor
from dattri.algorithm.trak import TRAKAttributor
from dattri.task import AttributionTask
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fidelity import problems

REGULARIZATION = 1e-2


@dataclass(frozen=True)
class Way:
    """How an attributor is made, from a task and a function for the probability of the right answer; and used."""

    make: Callable
    caches: bool = True
    attribute: Callable = lambda attributor, train, asked: attributor.attribute(train, asked)
    judges: str = "loss"  # of (params, rows); "margin" of these; or "plain", a loss of (model, batch, device)


def scored(problem: problems.Problem, way: Way) -> np.ndarray:
    model = copy.deepcopy(problem.model)

    def loss(params, rows):
        x, y = rows
        logits = torch.func.functional_call(model, params, (x[None] if x.dim() == 3 else x,))
        return F.cross_entropy(logits, y.reshape(-1))

    def plain(model, rows, device):
        return F.cross_entropy(model(rows[0]), rows[1], reduction="sum")

    train = DataLoader(TensorDataset(problem.x, problem.y), batch_size=len(problem.x))
    asked = DataLoader(TensorDataset(problem.queries, problem.labels), batch_size=len(problem.queries))
    state = copy.deepcopy(model.state_dict())

    def margin(params, rows):  # TRAK's, its equation 3: log p / (1 - p)
        likelihood = -loss(params, rows)
        return likelihood - torch.log1p(-torch.exp(likelihood))

    what = {"loss": loss, "plain": plain, "margin": margin}[way.judges]
    task = AttributionTask(loss_func=what, model=model, checkpoints=[state])
    attributor = way.make(task, lambda params, rows: torch.exp(-loss(params, rows)))
    if way.caches:
        attributor.cache(train)
    return way.attribute(attributor, train, asked).T.detach().numpy()


def grad_dot(task: AttributionTask, _: Callable) -> TracInAttributor:
    attributor = TracInAttributor(task, weight_list=torch.ones(1), normalized_grad=False)
    attributor.projector_kwargs = None  # else it projects to 512 numbers
    return attributor


WAYS = {
    "dattri GradDot": Way(grad_dot, caches=False),
    "dattri IF-CG": Way(lambda task, _: IFAttributorCG(task, max_iter=10, regularization=REGULARIZATION)),
    "dattri IF-Arnoldi": Way(lambda task, _: IFAttributorArnoldi(task, proj_dim=100)),
    "dattri TRAK": Way(
        lambda task, p: TRAKAttributor(task, p, projector_kwargs={"proj_dim": 512}),
        attribute=lambda attributor, train, asked: attributor.attribute(asked),
        judges="margin",
    ),
    "dattri LoGra": Way(lambda task, _: LoGraAttributor(task, damping=REGULARIZATION), judges="plain"),
}

for found in problems.read(Path(sys.argv[1])):
    for name, how in WAYS.items():
        try:
            problems.answer(Path(sys.argv[1]), found, name, functools.partial(scored, way=how))
        except Exception as error:  # one that cannot take a net must not keep the others from it
            print(f"{found.net}, {name}: left out, {type(error).__name__}: {error}", flush=True)
