"""Factors and spectra against those of kronfluence, a library of its own; left out where it is not installed.

`make bench-peers` installs it, and runs this first.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import finf_fast as ff

pytestmark = pytest.mark.prove

NETS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 5)), (12,), {}),
    "conv": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 4, 3, stride=2), nn.GELU()),
            *(nn.Flatten(), nn.Linear(16, 5)),
        ),
        (3, 6, 6),
        {"0": 36, "2": 4},  # output positions a sample: there the outputs' moment is a mean over them, here a sum
    ),
}


def theirs(model, x, y, folder):
    """Sums and counts of kronfluence's EK-FAC with the labels as they are."""
    analyzer = pytest.importorskip("kronfluence.analyzer")
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch, model, sample=False):
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

    task = Classification()
    model = analyzer.prepare_model(model, task)
    job = analyzer.Analyzer("peer", model, task, cpu=True, output_dir=str(folder), disable_tqdm=True)
    data = torch.utils.data.TensorDataset(x, y)
    arguments = FactorArguments(strategy="ekfac", use_empirical_fisher=True)
    job.fit_all_factors("peer", data, per_device_batch_size=32, factor_args=arguments)
    return {**job.load_covariance_matrices("peer"), **job.load_lambda_matrices("peer")}


@pytest.mark.parametrize("net", NETS)
def test_factors_are_those_of_kronfluence(net, tmp_path):
    pytest.importorskip("kronfluence")
    make, shape, positions = NETS[net]
    torch.manual_seed(0)
    model, x, y = make().eval(), torch.randn(60, *shape), torch.randint(0, 5, (60,))
    factors = ff.fit_factors(model, (x, y), kind="ekfac", fisher="empirical", dtype=torch.float64)
    found = theirs(model, x, y, tmp_path)
    for layer in found["activation_covariance"]:
        block = factors.blocks[f"{layer}.weight"]
        for key, count, mine in (
            ("activation_covariance", "num_activation_covariance_processed", block.cols.values),
            ("gradient_covariance", "num_gradient_covariance_processed", block.rows.values / positions.get(layer, 1)),
            ("lambda_matrix", "num_lambda_processed", block.spectrum),
        ):
            other = found[key][layer].double() / found[count][layer]
            assert (mine - other).norm() <= 1e-5 * other.norm(), (layer, key)
