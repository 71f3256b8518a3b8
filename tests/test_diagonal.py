"""Steps by the statistics of a real Adam, and by the diagonal Fisher where it says nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import finf_fast as ff
from nets import learn, mlp


def trained(model, x, y, parameters=None, **settings):
    """AdamW after some steps of the model."""
    return learn(model, x, y, torch.optim.AdamW(parameters or model.parameters(), lr=1e-3, **settings), 5)


def test_the_state_of_a_real_adamw():
    model, (x, y) = mlp()
    optimizer = trained(model, x, y)
    update = ff.mirror(model, (x[:1], y[:1]), method="adamw_state", state=optimizer.state_dict(), lr=1.0)
    gradient = ff.mirror(model, (x[:1], y[:1]), lr=1.0, rank=None)
    for name, parameter in model.named_parameters():
        root = (optimizer.state[parameter]["exp_avg_sq"] / (1 - 0.999**5)).sqrt()
        wanted = gradient.params[name] / (root + 1e-8 + 0.1 * root.mean())
        assert torch.allclose(update.params[name], wanted, rtol=1e-10)
    given = {name: optimizer.state[p]["exp_avg_sq"] for name, p in model.named_parameters() if name != "0.bias"}
    update = ff.mirror(model, (x[:1], y[:1]), method="adamw_state", state=given)
    assert update.record["left_still"] == ["0.bias"] and "0.bias" not in update.params
    assert "state" not in update.record["options"]


@pytest.mark.parametrize(
    "state, error, message",
    [
        (None, TypeError, "state: method='adamw_state' wants the optimizer, its state_dict"),
        ({}, TypeError, "state: .*, got an empty one"),
        ({"nobody": torch.zeros(1)}, ValueError, "state: the model has no parameter 'nobody'"),
        ({"0.bias": torch.zeros(1)}, ValueError, r"state: '0.bias' wanted shape \(16,\), got \(1,\)"),
        ({"state": {}, "param_groups": [{"params": [0]}]}, ValueError, "state: wanted param_names in its 1 groups"),
        ({"state": {}, "param_groups": [{"params": list(range(6))}]}, ValueError, "state: wanted exp_avg_sq of"),
    ],
)
def test_states_that_do_not_fit(state, error, message):
    model, (x, y) = mlp()
    with pytest.raises(error, match=message):
        ff.mirror(model, (x[:1], y[:1]), method="adamw_state", state=state)


def square():
    """Two layers of one shape, and data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).double().eval()
    return model, torch.randn(40, 8).double(), torch.randint(0, 8, (40,))


def steps_of(model, x, y, state):
    return ff.mirror(model, (x[:1], y[:1]), method="adamw_state", state=state, lr=1.0)


def test_an_optimizer_knows_its_parameters_in_whatever_order():
    model, x, y = square()
    named = dict(model.named_parameters())
    optimizer = trained(model, x, y, [*list(named.values())[2:], *list(named.values())[:2]])
    by_name = steps_of(model, x, y, {n: optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**5) for n, p in named.items()})
    found = steps_of(model, x, y, optimizer)
    for name in named:
        assert torch.allclose(found.params[name], by_name.params[name], rtol=1e-12)
    assert found.record["options"]["told_by"] == "the optimizer's own parameters"
    assert steps_of(model, x, y, optimizer.state_dict()).record["options"]["told_by"] == "their order in the model"
    with pytest.raises(ValueError, match="state: the optimizer steps none of the model's parameters"):
        steps_of(*square(), optimizer)


def test_weights_that_decay_and_biases_that_do_not():
    model, x, y = square()
    weights, biases = ([p for n, p in model.named_parameters() if n.endswith(end)] for end in ("weight", "bias"))
    optimizer = trained(model, x, y, [{"params": weights}, {"params": biases, "weight_decay": 0.0}])
    one, other = (steps_of(model, x, y, state) for state in (optimizer, optimizer.state_dict()))
    assert one.fingerprint == other.fingerprint and set(one.params) == {n for n, _ in model.named_parameters()}
    mixed = trained(model, x, y, [{"params": [weights[0], biases[0]]}, {"params": [weights[1], biases[1]]}])
    with pytest.raises(ValueError, match="state: wanted param_names in its 2 groups, .*state=optimizer, the object"):
        steps_of(model, x, y, mixed.state_dict())
    assert set(steps_of(model, x, y, mixed).params) == set(one.params)


def test_a_weight_that_training_never_moved_does_not_take_the_step():
    """A dead pixel that only the query lights."""
    model, (x, y) = mlp()
    x[:, 0] = 0.0
    optimizer = trained(model, x, y)
    assert (optimizer.state[model[0].weight]["exp_avg_sq"][:, 0] == 0).all()
    lit = x[:1].clone()
    lit[:, 0] = 0.5
    plain, dead = (ff.mirror(model, (q, y[:1]), method="adamw_state", state=optimizer) for q in (x[:1], lit))
    assert dead.record["change_norm"] < 5 * plain.record["change_norm"]
    moved = dead.record["loss_after"] - dead.record["loss_before"]
    assert moved == pytest.approx(dead.record["predicted_change"], rel=0.05)


class Keys(nn.Module):
    """Attention whose keys have a bias, as in BERT and ViT, and a bias before an instance norm: neither is felt."""

    def __init__(self):
        super().__init__()
        self.queries, self.keys, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.last = nn.Linear(4, 4)

    def forward(self, x):
        x = F.scaled_dot_product_attention(self.queries(x), self.keys(x), x)
        return self.last(F.instance_norm(self.head(x).mT).amax(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["fisher_diag", "adamw_state"])
def test_parameters_that_no_loss_can_feel_do_not_run_away(method, dtype):
    torch.manual_seed(0)
    model, x, y = Keys().to(dtype).eval(), torch.randn(40, 5, 6, dtype=dtype), torch.randint(0, 4, (40,))
    options = {"state": trained(model, x, y)}
    if method == "fisher_diag":
        options = {"factors": ff.fit_factors(model, (x, y), kind=method, progress=False)}
    update = ff.mirror(model, (x[:1], y[:1]), method=method, **options)
    sizes = {name: change.abs().mean().item() for name, change in update.params.items()}
    for name in ("keys.bias", "head.bias"):
        assert sizes[name] < 3 * sizes["queries.bias"], sizes
