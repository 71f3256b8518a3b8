"""Convolutions with a batch norm inside whose kernels change by factors, and what that costs."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import finf_fast as ff
from finf_fast.delta import DeltaEngine
from finf_fast.loss import resolve
from finf_fast.lowrank import LowRank, dense
from nets import plain_losses

CPU = torch.device("cpu")


def folded_net():
    """A convolution with its norm inside, one with a norm that turns a channel off, and one without a norm."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 14, 3, 2), nn.BatchNorm2d(14), nn.ReLU(), nn.Conv2d(14, 10, 2), nn.Flatten(), nn.LazyLinear(5),
    )  # fmt: skip
    net.train()(3 * torch.randn(32, 3, 7, 7) + 1)
    with torch.no_grad():
        net[4].weight[3] = 0
    return net.double().eval()


def kernel_update(net, name, rank, size=1e-3):
    weight = net.get_parameter(name)
    u, v = torch.randn(len(weight), rank).double(), torch.randn(weight[0].numel(), rank).double()
    return LowRank(size * u, v, tuple(weight.shape[1:]))


def test_kernels_in_factors_under_a_norm_that_moves_too():
    """Factors with the norm's weight, bias and statistics, without them, dense beside them, the norm alone."""
    net = folded_net()
    norms = {n: 1e-2 * torch.randn_like(p) for n, p in net.named_parameters() if n.split(".")[0] in "14"}
    moved = {n: b + 0.01 * b.abs() for n, b in net.named_buffers() if "running" in n}
    kernels = {name: kernel_update(net, name, 2) for name in ("0.weight", "3.weight", "6.weight")}
    updates = [
        ff.Update({**kernels, **norms}, moved),
        ff.Update(kernels),
        ff.Update({"0.weight": dense(kernels["0.weight"]), "1.weight": norms["1.weight"]}, moved),
        ff.Update({"1.weight": norms["1.weight"]}),
        ff.Update({}, moved),
        ff.Update({"3.bias": torch.ones(14).double()}),
    ]
    batch = torch.randn(9, 3, 7, 7).double(), torch.randint(0, 5, (9,))
    loss = resolve("cross_entropy")
    base = plain_losses(net, None, loss, batch)
    for some in (updates, updates[:1], updates[1:2], updates[3:5]):
        found = DeltaEngine(net, some, loss, CPU, torch.float64).score(batch)
        for q, update in enumerate(some):
            after = copy.deepcopy(net)
            after.load_state_dict({**after.state_dict(), **update.buffers})
            true = plain_losses(after, ff.Update(update.params), loss, batch) - base
            torch.testing.assert_close(found.delta[q], true, rtol=1e-9, atol=1e-13)


def test_a_kernel_in_factors_costs_its_filters_only():
    net = folded_net()
    batch = torch.randn(2, 3, 7, 7).double(), torch.randint(0, 5, (2,))
    update = ff.Update({"0.weight": kernel_update(net, "0.weight", 2), "3.weight": kernel_update(net, "3.weight", 2)})
    shapes = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name().startswith("aten::conv"):
                shapes.append((args[0].shape[0], args[1].shape[0]))
            return func(*args, **(kwargs or {}))

    engine = DeltaEngine(net, [update] * 3, resolve("cross_entropy"), CPU, torch.float64)
    with Seen():
        engine.score(batch)
    filters = [(2, 2)] * 3
    assert shapes == [(2, 12), *filters, (8, 14), *filters, (8, 10)]  # (samples and queries, filters) of each
