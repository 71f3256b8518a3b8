"""What a mirror refuses, and how it says so: the argument, what was wanted, what was got."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from finf_fast.mirrors import mirror, mirrors_of
from finf_fast.records import NonFiniteLoss
from nets import TinyLm, conv_net, mlp


@pytest.mark.parametrize(
    "params, error, message",
    [
        ("body.*", ValueError, r"'body.\*' matches none of the model's parameters '0.weight', .*6 in all"),
        (["0.*", "4.*"], ValueError, r"'4.\*' matches none"),
        (lambda name: False, ValueError, "the filter picks none of the model's parameters '0.weight'"),
        (3, TypeError, "params: wanted a callable"),
        ([], TypeError, "params: wanted a callable"),
    ],
)
def test_a_filter_that_picks_nothing(params, error, message):
    model, (x, y) = mlp()
    with pytest.raises(error, match=message):
        mirror(model, (x[:2], y[:2]), params=params)


def test_a_frozen_model_says_how_to_step_it():
    model, (x, y) = mlp()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"every parameter of the model is frozen .* params='\*'"):
        mirror(model, (x[:2], y[:2]))
    assert len(mirror(model, (x[:2], y[:2]), params="*").params) == 6


X, Y = torch.zeros(2, 12), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    "query, error, message",
    [
        (
            (X[0], 3),
            ValueError,
            r"query: wanted a batch, .* got a single unbatched value 3; .* \(x\[None\], \[label\]\)",
        ),
        ((X, Y[0]), ValueError, "got a single unbatched value 0"),
        ((X, Y[:1]), ValueError, r"query: wanted one leading dimension B for all tensors, got \[1, 2\]"),
        ((X[:0], Y[:0]), ValueError, r"query: wanted at least one row, got none \(B = 0\)"),
        ((), ValueError, "query: wanted a batch of tensors, got an empty tuple"),
        ((X, torch.tensor([0, 5])), ValueError, r"query, row 1: label wanted in \[0, 5\).*, got 5"),
        ((X, torch.tensor([-1, 0])), ValueError, r"query, row 0: label wanted .*, got -1"),
        ((X, Y.double()), TypeError, "query: target: wanted class indices"),
        ((X,), ValueError, "query: cross_entropy wants a target"),
        ((X, np.array(["a", "b"])), TypeError, "query: wanted numbers, got an array of <U1"),
        ("text", TypeError, "query: wanted tensors, arrays, .* got str"),
        ((X, torch.tensor([0, -100])), NonFiniteLoss, "query: wanted a finite loss, got nan at row 1"),
        ((X + math.inf, Y), NonFiniteLoss, "query: wanted a finite loss, got nan at row 0"),
    ],
)
def test_a_query_that_cannot_be_read(query, error, message):
    model, _ = mlp()
    with pytest.raises(error, match=message):
        mirror(model, query)


def test_a_bad_query_of_many_is_named():
    model, (x, y) = mlp()
    y = y.clone()
    y[2] = 17
    with pytest.raises(ValueError, match=r"query 2, row 0: label wanted in \[0, 5\)"):
        mirrors_of(model, (x[:4], y[:4]))
    with pytest.raises(ValueError, match="query 'cats', row 1: label wanted"):
        mirrors_of(model, (x, y), groups={"cats": [1, 2]})


@pytest.mark.parametrize(
    "groups, message",
    [
        ({}, "groups: wanted at least one group"),
        ([[0], []], "groups: 'query 1' wanted at least one row"),
        ([[0, 4]], r"groups: 'query 0' wanted rows in \[0, 4\), got \[0, 4\]"),
        ({"a": [-1]}, r"groups: 'a' wanted rows in \[0, 4\)"),
    ],
)
def test_groups_that_are_none(groups, message):
    model, (x, y) = mlp()
    with pytest.raises(ValueError, match=message):
        mirrors_of(model, (x[:4], y[:4]), groups)


@pytest.mark.parametrize("found", [19, 40])
def test_a_token_outside_the_vocabulary(found):
    ids = torch.tensor([[1, 2, found]])
    with pytest.raises(ValueError, match="query: wanted token ids inside the model's embedding"):
        mirror(TinyLm(), {"input_ids": ids}, loss="causal_lm")


def test_one_row_through_batch_norm_says_what_to_do():
    model, (x, y) = conv_net()
    with pytest.raises(
        ValueError, match=r"query: batch norm in train mode .* use method='released', .* or mode='eval'"
    ):
        mirror(model, (x[:1], y[:1]), mode="train")
    assert mirror(model, (x[:1], y[:1]), method="released").buffers


class Root(nn.Module):
    """Finite loss, infinite slope: the square root at 0."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, 3))

    def forward(self, x):
        return x[:, :1] * self.w.sqrt()


def test_a_gradient_or_a_result_that_is_not_finite():
    with pytest.raises(NonFiniteLoss, match=r"query: wanted a finite gradient, .* 'w'"):
        mirror(Root(), (torch.ones(1, 1), [0]))
    model, (x, y) = mlp()
    with pytest.raises(NonFiniteLoss, match=r"query 'wild': .*, after the step; a smaller lr may help"):
        mirror(model, (x[:2], y[:2]), lr=1e300, name="wild")
    with pytest.raises(NonFiniteLoss, match="query: wanted a finite change"):
        mirror(nn.Linear(2, 2), (torch.zeros(1, 2), [0]), method="adam", eps=0)  # 0/0 where the gradient is 0


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"method": "newton"}, ValueError, "method: wanted one of sgd, adam, released, .*, kfac, .*, got 'newton'"),
        ({"loss": "hinge"}, ValueError, "loss: wanted one of"),
        ({"lr": 0.0}, ValueError, "lr: wanted a finite number above 0, got 0.0"),
        ({"lr": math.nan}, ValueError, "lr: wanted a finite number"),
        ({"steps": 0}, ValueError, "steps: wanted a whole number, at least 1, got 0"),
        ({"steps": 1.5}, ValueError, "steps: wanted a whole number"),
        ({"direction": "up"}, ValueError, "direction: wanted one of ascent, descent, got 'up'"),
        ({"mode": "test"}, ValueError, "mode: method='sgd' wants 'eval' or 'train', got 'test'"),
        ({"seed": "x"}, TypeError, "seed: wanted a whole number or None, got 'x'"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay: wanted a finite number at least 0"),
        ({"momentum": 0.9}, TypeError, "method='sgd' takes weight_decay, rank, got momentum"),
        ({"rank": 0}, ValueError, "rank: wanted a whole number, at least 1, got 0"),
        ({"rank": -3}, ValueError, "rank: wanted a whole number, at least 1, got -3"),
        ({"rank": 2.0}, ValueError, "rank: wanted a whole number"),
        ({"rank": 4, "method": "adam"}, TypeError, "method='adam' takes .*, got rank"),
        ({"method": "adam", "betas": (0.9, 1.0)}, ValueError, r"betas: wanted two numbers in \[0, 1\)"),
    ],
)
def test_settings_out_of_range(settings, error, message):
    model, (x, y) = mlp()
    with pytest.raises(error, match=message):
        mirror(model, (x[:2], y[:2]), **settings)


def test_models_that_cannot_be_stepped():
    query = torch.zeros(1, 2), [0]
    with pytest.raises(ValueError, match="model: wanted at least one parameter"):
        mirror(nn.ReLU(), query)
    with pytest.raises(ValueError, match="model: wanted at least one floating-point parameter"):
        whole = nn.ReLU()
        whole.register_parameter("w", nn.Parameter(torch.zeros(2, dtype=torch.long), requires_grad=False))
        mirror(whole, query)
    with pytest.raises(TypeError, match=r"model: wanted a torch\.nn\.Module, got dict"):
        mirror({}, query)
