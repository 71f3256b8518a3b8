"""kronfluence's EK-FAC with its own settings: true Fisher, damping a tenth of the mean eigenvalue."""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.task import Task
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fidelity import problems


class Classification(Task):
    def compute_train_loss(self, batch, model, sample=False):
        logits = model(batch[0])
        labels = logits.detach().softmax(1).multinomial(1)[:, 0] if sample else batch[1]
        return F.cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)


def ekfac(problem: problems.Problem) -> np.ndarray:
    task = Classification()
    model = prepare_model(copy.deepcopy(problem.model), task)
    with tempfile.TemporaryDirectory() as folder:
        job = Analyzer("peer", model, task, cpu=True, output_dir=folder, disable_tqdm=True)
        train, asked = TensorDataset(problem.x, problem.y), TensorDataset(problem.queries, problem.labels)
        job.fit_all_factors("ekfac", train, per_device_batch_size=200)
        job.compute_pairwise_scores("scores", "ekfac", asked, train, per_device_query_batch_size=100)
        return job.load_pairwise_scores("scores")["all_modules"].numpy()


for found in problems.read(Path(sys.argv[1])):
    problems.answer(Path(sys.argv[1]), found, "kronfluence EK-FAC", ekfac)
