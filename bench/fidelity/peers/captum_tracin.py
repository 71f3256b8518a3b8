"""captum's TracInCP with the one checkpoint there is: the dot product of gradients."""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from captum.influence import TracInCP
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fidelity import problems


def tracin(problem: problems.Problem) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        torch.save(problem.model.state_dict(), path)
        loader = DataLoader(TensorDataset(problem.x, problem.y), batch_size=200)
        explainer = TracInCP(
            copy.deepcopy(problem.model), loader, [str(path)], loss_fn=nn.CrossEntropyLoss(reduction="sum"),
            batch_size=200, sample_wise_grads_per_batch=True,
        )  # fmt: skip
        return explainer.influence((problem.queries, problem.labels)).detach().numpy()


for found in problems.read(Path(sys.argv[1])):
    problems.answer(Path(sys.argv[1]), found, "captum TracInCP", tracin)
