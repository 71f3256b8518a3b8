"""Mirror steps: torch's optimizers to the last digits, changes of any smallness, and a model that is never touched."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from finf_fast.lowrank import dense
from finf_fast.mirrors import mirror, mirrors_of
from nets import TinyLm, conv_net, mlp

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIMIZERS = {"sgd": (torch.optim.SGD, 1e-2), "adam": (torch.optim.Adam, 5e-3)}


def stepped(model, query, method, direction, steps, mode, **options):
    """A deep copy moved by torch's own optimizer."""
    model = copy.deepcopy(model).train(mode == "train")
    make, lr = OPTIMIZERS[method]
    optimizer = make(model.parameters(), lr=lr, maximize=direction == "ascent", **options)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(query[0]), query[1]).backward()
        optimizer.step()
    return model


def assert_moved_as(model, update, other, bound=1e-12):
    """θ + Δ and the buffers are those of the other model, which has really moved."""
    moved = 0.0
    for name, after in other.named_parameters():
        before = model.get_parameter(name)
        assert (before + dense(update.params[name]) - after).abs().max() <= bound, name
        moved = max(moved, float((after - before).detach().abs().max()))
    assert moved > 1e4 * bound
    for name, after in other.named_buffers():
        assert torch.allclose(update.buffers.get(name, model.get_buffer(name)), after, rtol=bound, atol=bound), name


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}], ids=["", "decayed"])
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("direction", ["ascent", "descent"])
@pytest.mark.parametrize("method", OPTIMIZERS)
def test_the_step_is_that_of_torch(method, direction, steps, mode, options):
    model, (x, y) = conv_net()
    query = x[:5], y[:5]
    if method == "adam" and mode == "train":  # a bias before batch norm has no gradient but rounding, 1e-18,
        options = {**options, "eps": 1e-4}  # which Adam divides by eps: 1e-8 would blow the last digits up to 1e-10
    update = mirror(model, query, method=method, direction=direction, steps=steps, mode=mode, **options)
    assert_moved_as(model, update, stepped(model, query, method, direction, steps, mode, **options))
    assert update.direction == direction
    assert bool(update.buffers) == (mode == "train")


def test_adams_own_settings():
    model, (x, y) = mlp()
    options = {"betas": (0.5, 0.7), "eps": 1e-3}
    update = mirror(model, (x[:5], y[:5]), method="adam", steps=3, **options)
    assert_moved_as(model, update, stepped(model, (x[:5], y[:5]), "adam", "ascent", 3, "eval", **options))


@pytest.mark.parametrize("lr", [1e-12, 1e-25])
def test_a_change_far_below_the_rounding_of_the_weights_is_exact(lr):
    model, (x, y) = mlp()
    model = model.float()
    small, large = (mirror(model, (x[:2], y[:2]), lr=each, steps=1, rank=None) for each in (lr, 1.0))
    for name, change in small.params.items():
        weight = model.get_parameter(name)
        assert torch.equal((weight + change)[weight != 0], weight[weight != 0])
        assert torch.allclose(change.double() / lr, large.params[name].double(), rtol=1e-6, atol=0)
        assert change.abs().max() > 0
    twice = mirror(model, (x[:2], y[:2]), lr=lr, steps=2)
    assert all(torch.equal(twice.params[name], 2 * change) for name, change in small.params.items())


def everything(model):
    """All of a model and of torch's random state that a mirror must leave alone, in a form that compares."""
    return {
        "tensors": [(n, t, t.clone(), t._version) for n, t in (*model.named_parameters(), *model.named_buffers())],
        "grads": [None if p.grad is None else (p.grad, p.grad.clone()) for p in model.parameters()],
        "flags": [(m.training, len(m._forward_hooks)) for m in model.modules()],
        "trainable": [p.requires_grad for p in model.parameters()],
        "leaves": [p.is_leaf for p in model.parameters()],
        "random": torch.get_rng_state(),
    }


def assert_untouched(model, kept):
    now = everything(model)
    for (name, tensor, value, version), (_, same, _, later) in zip(kept["tensors"], now["tensors"], strict=True):
        assert tensor is same and torch.equal(same, value) and version == later, name
    for before, after in zip(kept["grads"], now["grads"], strict=True):
        assert (before is None) == (after is None)
        assert before is None or (before[0] is after[0] and torch.equal(before[1], after[0]))
    assert all(kept[key] == now[key] for key in ("flags", "trainable", "leaves"))
    assert torch.equal(kept["random"], now["random"])


class Trap(torch.autograd.Function):
    """The identity, until a countdown runs out: then it raises, in the forward or in the backward."""

    left, where, error = 0, "", None

    @classmethod
    def spring(cls, here):
        if here == cls.where:
            cls.left -= 1
            if cls.left < 0:
                raise cls.error

    @staticmethod
    def forward(ctx, x):
        Trap.spring("forward")
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        Trap.spring("backward")
        return grad


class Trapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        return self.last(Trap.apply(self.drop(self.norm(self.first(x)))))


@pytest.fixture
def trapped():
    Trap.where = ""
    model = Trapped()
    model.first.bias.requires_grad_(False)
    F.cross_entropy(model(torch.randn(4, 6)), torch.tensor([0, 1, 2, 0])).backward()
    model.norm.eval()  # a mixed mode, which must survive
    return model


@pytest.mark.parametrize("method, mode", [("sgd", "eval"), ("sgd", "train"), ("adam", "train"), ("released", "train")])
def test_the_model_is_untouched(trapped, method, mode):
    kept = everything(trapped)
    steps = 1 if method == "released" else 3
    update = mirror(trapped, (torch.randn(4, 6), [0, 1, 2, 0]), method=method, mode=mode, steps=steps)
    kept["random"] = torch.get_rng_state()  # the query was drawn after it was noted
    assert_untouched(trapped, kept)
    assert "first.bias" not in update.params


@pytest.mark.parametrize("error", [RuntimeError("sprung"), KeyboardInterrupt("sprung")], ids=["error", "ctrl-c"])
@pytest.mark.parametrize("where, left", [("forward", 0), ("forward", 2), ("backward", 0), ("backward", 1)])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_model_is_untouched_by_a_step_that_dies(trapped, mode, where, left, error):
    query = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    kept = everything(trapped)
    Trap.where, Trap.left, Trap.error = where, left, error
    with pytest.raises(type(error), match="sprung"):
        mirror(trapped, query, mode=mode, steps=3, seed=1)
    assert Trap.left == -1
    assert_untouched(trapped, kept)


class Restless(nn.Module):
    """Writes to itself in every forward, in eval mode too: an embedding that renormalises its rows, a counter."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 4, max_norm=0.1), nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, ids):
        self.calls += 1
        return self.head(self.embed(ids).sum(1))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_model_that_writes_to_itself_writes_to_the_stand_in(mode):
    model = Restless()
    kept = everything(model)
    update = mirror(model, (torch.tensor([[0, 1, 2]]), [1]), mode=mode, steps=2)
    assert_untouched(model, kept)
    assert {name: int(value) for name, value in update.buffers.items()} == ({"calls": 2} if mode == "train" else {})


@pytest.mark.parametrize("method", ["sgd", "adam"])
def test_dropout_follows_the_seed_and_leaves_the_global_state(trapped, method):
    query = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    before = torch.get_rng_state()
    prints = [mirror(trapped, query, method=method, mode="train", seed=s).fingerprint for s in (1, 1, 2)]
    assert prints[0] == prints[1] != prints[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_surroundings_change_nothing():
    model, (x, y) = mlp()
    model, x = model.float(), x.float()
    wanted = mirror(model, (x[:2], y[:2])).fingerprint
    for around in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with around:
            assert mirror(model, (x[:2].clone(), y[:2])).fingerprint == wanted


def test_a_group_is_the_mean_of_its_rows():
    model, (x, y) = mlp()
    rows = mirrors_of(model, (x[:3], y[:3]))
    (group,) = mirrors_of(model, (x, y), groups={"all three": [0, 1, 2]})
    for name, change in group.params.items():
        mean = sum(dense(update.params[name]) for update in rows) / 3
        assert torch.allclose(dense(change), mean, rtol=1e-12, atol=1e-15)
    assert [update.name for update in rows] == ["query 0", "query 1", "query 2"]
    assert group.name == "all three" and group.record["rows"] == 3


@pytest.mark.parametrize("settings", [{}, {"method": "adam", "steps": 2}, {"mode": "train", "seed": 4}])
def test_many_at_once_are_the_same_as_one_by_one(settings):
    model, (x, y) = conv_net()
    groups, seen = [[0, 1], [2, 3, 4], [0, 5]], []
    many = mirrors_of(model, (x, y), groups, on_done=lambda done, total: seen.append((done, total)), **settings)
    for update, rows in zip(many, groups, strict=True):
        alone = mirror(model, (x[rows], y[rows]), **{**settings, "seed": update.record["seed"]})
        assert alone.fingerprint == update.fingerprint
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_the_record_says_how_it_was_made():
    model, (x, y) = mlp()
    update = mirror(model, (x[:4], y[:4]), method="adam", steps=2, params=["0.*", "3.bias"], name="four", seed=9)
    record = json.loads(json.dumps(dict(update.record)))
    assert {"method": "adam", "lr": 5e-3, "steps": 2, "mode": "eval", "direction": "ascent"}.items() <= record.items()
    assert record["options"] == {"weight_decay": 0.0, "betas": [0.9, 0.999], "eps": 1e-8}
    assert record["params"] == ["0.*", "3.bias"] and record["seed"] == 9 and record["rows"] == 4
    after = {name: p + update.params.get(name, 0) for name, p in model.named_parameters()}
    for key, weights in (("loss_before", {}), ("loss_after", after)):
        wanted = F.cross_entropy(torch.func.functional_call(model, weights, x[:4]), y[:4]).item()
        assert record[key] == pytest.approx(wanted, rel=1e-12)
    assert record["loss_after"] > record["loss_before"]
    norm = math.sqrt(sum(change.square().sum().item() for change in update.params.values()))
    assert record["change_norm"] == pytest.approx(norm, rel=1e-12)
    assert update.name == "four"


@pytest.mark.parametrize(
    "params, wanted",
    [
        (None, {"0.bias", "2.weight", "2.bias", "3.weight", "3.bias"}),  # 0.weight is frozen
        ("*", {"0.weight", "0.bias", "2.weight", "2.bias", "3.weight", "3.bias"}),
        ("0.*", {"0.weight", "0.bias"}),
        (["3.weight", "2.b*"], {"3.weight", "2.bias"}),
        (lambda name: name.endswith("bias"), {"0.bias", "2.bias", "3.bias"}),
    ],
)
def test_which_parameters_move(params, wanted):
    model, (x, y) = mlp()
    model[0].weight.requires_grad_(False)
    assert mirror(model, (x[:2], y[:2]), params=params).params.keys() == wanted


class Odd(nn.Module):
    """A sparse embedding, a recurrent net that keeps its own list of weights, and a layer that is never called."""

    def __init__(self):
        super().__init__()
        self.embed, self.unused = nn.Embedding(7, 4, sparse=True), nn.Linear(4, 4)
        self.rnn, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, ids):
        return self.head(self.rnn(self.embed(ids))[0][:, -1])


def test_unusual_modules_move_and_unused_ones_get_no_entry():
    model, query = Odd().double(), (torch.tensor([[1, 2, 3]]), torch.tensor([2]))
    update = mirror(model, query, steps=2)
    other = stepped(model, query, "sgd", "ascent", 2, "eval")
    assert update.params.keys() == {n for n, _ in model.named_parameters() if not n.startswith("unused")}
    for name, change in update.params.items():
        after = other.get_parameter(name)
        assert change.layout is torch.strided
        assert torch.allclose(model.get_parameter(name) + dense(change), after, rtol=0, atol=1e-12), name
        assert not torch.equal(after, model.get_parameter(name)), name
    with pytest.raises(ValueError, match="depends on none of the 2 parameters to step"):
        mirror(model, query, params="unused.*")


def test_tied_weights_move_once_and_together():
    model = TinyLm().double().eval()
    ids = torch.randint(0, 19, (2, 6))
    update = mirror(model, {"input_ids": ids}, loss="causal_lm")
    assert "embed.weight" in update.params and "head.weight" not in update.params
    F.cross_entropy(model(ids)[:, :-1].reshape(-1, 19), ids[:, 1:].reshape(-1)).backward()
    assert torch.allclose(dense(update.params["embed.weight"]), 1e-2 * model.embed.weight.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_stepped_in_float32(dtype):
    model, (x, y) = conv_net()
    model = model.to(dtype)
    update = mirror(model, (x[:4], y[:4]), mode="train")
    wanted = mirror(copy.deepcopy(model).float(), (x[:4], y[:4]), mode="train")
    assert {change.dtype for change in update.params.values()} == {torch.float32}
    assert all(torch.equal(change, wanted.params[name]) for name, change in update.params.items())
    assert update.record["dtype"] == "float32" and update.record["model_dtypes"] == [str(dtype)[6:]]


@pytest.mark.parametrize(
    "make", [lambda x, y: (x.numpy(), y.numpy()), lambda x, y: [x.numpy()[::-1][::-1], y.tolist()]]
)
def test_arrays_and_lists_are_queries_too(make):
    model, (x, y) = mlp()
    assert mirror(model, make(x[:2], y[:2])).fingerprint == mirror(model, (x[:2], y[:2])).fingerprint


def test_a_loss_of_the_users_own():
    model, (x, y) = mlp()
    own = mirror(
        model, (x[:2], y[:2]), loss=lambda net, batch: F.cross_entropy(net(batch[0]), batch[1], reduction="none")
    )
    assert own.fingerprint == mirror(model, (x[:2], y[:2])).fingerprint
    with pytest.raises(ValueError, match="depends on none of the 6 parameters"):
        mirror(
            model, (x[:2], y[:2]), loss=lambda net, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        )


def test_squared_error_of_a_regression():
    model, (x, _) = mlp()
    y = torch.randn(3, 5)
    update = mirror(model, (x[:3], y), loss="squared_error", lr=1.0)
    F.mse_loss(model(x[:3]), y.double()).backward()
    assert torch.allclose(update.params["3.weight"], model[3].weight.grad, rtol=1e-9, atol=1e-12)
