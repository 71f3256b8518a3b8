"""sgd steps as factors: equal to the dense step, and never a dense gradient on the way."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import finf_fast as ff
from finf_fast.lowrank import LowRank, dense
from finf_fast.mirrors import mirror
from finf_fast.mirrors.body import Body
from finf_fast.records import NonFiniteLoss
from nets import TinyLm

BOUND = {torch.float32: 1e-6, torch.float64: 1e-12}


def deep_mlp():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(50, 70), nn.ReLU(inplace=True), nn.Linear(70, 60, bias=False), nn.Tanh(), nn.Linear(60, 55)
    )
    return net, (torch.randn(12, 50), torch.randint(0, 55, (12,))), {}


def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=64, vocab_size=200, n_positions=20)
    ids = torch.randint(0, 30, (2, 9))
    return transformers.GPT2LMHeadModel(config).eval(), {"input_ids": ids, "labels": ids}, {"loss": "causal_lm"}


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=150,
        pad_token_id=3,
    )
    ids = torch.randint(0, 9, (2, 6))
    return transformers.LlamaForCausalLM(config).eval(), {"input_ids": ids, "labels": ids}, {"loss": "causal_lm"}


NETS = {"mlp": deep_mlp, "gpt2": gpt2, "llama": llama}


def assert_equal_changes(low, plain, bound):
    assert low.params.keys() == plain.params.keys()
    for name, change in plain.params.items():
        error = (dense(low.params[name]) - change).norm() / change.norm().clamp(min=1e-30)
        assert error <= bound, f"{name}: {error:.1e}"


def factored(update):
    return {name for name, change in update.params.items() if isinstance(change, LowRank)}


@pytest.mark.parametrize("direction", ["ascent", "descent"])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("net", NETS)
def test_factors_are_the_dense_step(net, dtype, direction):
    model, query, options = NETS[net]()
    model = model.to(dtype)
    low, plain = (mirror(model, query, rank=rank, direction=direction, **options) for rank in (1000, None))
    assert_equal_changes(low, plain, BOUND[dtype])
    assert {"mlp": 3, "gpt2": 9, "llama": 12}[net] <= len(factored(low)) == low.record["low_rank_tensors"]
    assert not factored(plain) and low.nbytes < plain.nbytes
    assert low.record["discarded"] == 0 and low.record["discarded_by_tensor"] == {}
    assert low.record["change_norm"] == pytest.approx(plain.record["change_norm"], rel=BOUND[dtype])
    for key in ("loss_before", "loss_after"):
        assert low.record[key] == pytest.approx(plain.record[key], rel=BOUND[dtype])


@pytest.mark.parametrize("net", NETS)
def test_compression_discards_what_the_record_says(net):
    model, query, options = NETS[net]()
    low, plain = (mirror(model.double(), query, rank=rank, **options) for rank in (4, None))
    assert max(change.rank for name, change in low.params.items() if name in factored(low)) == 4
    shares = low.record["discarded_by_tensor"]
    assert shares and low.record["discarded"] == max(shares.values()) and shares.keys() <= factored(low)
    for name in factored(low):
        sigma = torch.linalg.svdvals(plain.params[name]).square()
        assert shares.get(name, 0.0) == pytest.approx((sigma[4:].sum() / sigma.sum()).item(), rel=1e-6, abs=1e-14)
        error = (low.params[name].dense() - plain.params[name]).square().sum()
        assert error <= sigma[4:].sum() * (1 + 1e-6) + 1e-24 * sigma.sum()


class Shapes(TorchDispatchMode):
    """Which operations made a new tensor of one of these shapes."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes, self.seen = set(shapes), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        fresh = not any(result.alias_info is not None for result in func._schema.returns)
        if fresh:
            self.seen += [str(func) for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.shape in self.shapes]
        return out


@pytest.mark.parametrize("net", NETS)
def test_no_dense_gradient_of_a_factored_weight_is_formed(net, monkeypatch):
    """Watched from θ being in place to the finished change; only the loss after the step needs the moved weights."""
    model, query, options = NETS[net]()
    names = factored(mirror(model, query, rank=8, **options))
    shapes = {model.get_parameter(name).shape for name in names}
    watch, begin = Shapes(shapes | {shape[::-1] for shape in shapes}), Body.begin
    monkeypatch.setattr(Body, "begin", lambda body: (begin(body), watch.seen.clear()))  # its leaves are copies of θ
    monkeypatch.setattr(Body, "loss_after", lambda *_: 0.0)
    seen = {}
    for rank in (8, 1000, None):
        with watch:
            mirror(model, query, rank=rank, **options)
        seen[rank] = list(watch.seen)
    assert seen[8] == seen[1000] == []
    assert len(seen[None]) >= len(names)


def test_what_would_not_pay_stays_dense():
    model = deep_mlp()[0]
    for rows in (24, 25, 27, 28, 29, 30):  # the narrower sides are 50, 60 and 55
        query = torch.randn(rows, 50), torch.randint(0, 55, (rows,))
        low, plain = (mirror(model, query, rank=rank) for rank in (1000, None))
        pays = {n for n, p in model.named_parameters() if p.dim() == 2 and 2 * rows < min(p.shape)}
        assert factored(low) == pays and len(pays) == {24: 3, 25: 2, 27: 2, 28: 1, 29: 1, 30: 0}[rows]
        assert_equal_changes(low, plain, 1e-6)
        assert factored(mirror(model, query, rank=24)) == {"0.weight", "2.weight", "4.weight"}


def test_a_small_kernel_stays_dense_and_a_layer_after_it_does_not():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 40)).double()
    query = torch.randn(5, 3, 6, 6), torch.randint(0, 40, (5,))
    low, plain = (mirror(model, query, rank=rank) for rank in (32, None))
    assert factored(low) == {"3.weight"} and low.record["low_rank_tensors"] == 1
    assert_equal_changes(low, plain, 1e-12)


@pytest.mark.parametrize("conv, spatial", [(nn.Conv1d, 1), (nn.Conv2d, 2), (nn.Conv3d, 3)])
def test_the_kernel_of_a_convolution_is_compressed_to_its_best_approximation(conv, spatial):
    torch.manual_seed(0)
    net = nn.Sequential(conv(8, 20, 3), nn.Tanh(), conv(20, 16, 2, groups=2), nn.Flatten(), nn.LazyLinear(9)).double()
    query = torch.randn(3, 8, *(5,) * spatial).double(), torch.randint(0, 9, (3,))
    net(query[0])
    low, plain = (mirror(net, query, rank=rank) for rank in (4, None))
    assert "0.weight" in factored(low) and "2.weight" not in factored(low)
    change, whole = low.params["0.weight"], plain.params["0.weight"]
    sigma = torch.linalg.svdvals(whole.flatten(1))
    assert change.rank == 4 and change.shape == whole.shape
    assert torch.linalg.svdvals(dense(change).flatten(1))[:4].allclose(sigma[:4], rtol=1e-10)
    left_over = (dense(change) - whole).square().sum()
    assert left_over == pytest.approx(sigma[4:].square().sum().item(), rel=1e-9)
    share = (left_over / whole.square().sum()).item()
    assert low.record["discarded_by_tensor"]["0.weight"] == pytest.approx(share, rel=1e-9)


def test_an_update_of_a_kernel_in_factors_is_saved_and_checked(tmp_path):
    change = LowRank(torch.randn(6, 2), torch.randn(36, 2), (4, 3, 3))
    update = ff.Update({"weight": change})
    update.check(nn.Conv2d(4, 6, 3))
    update.save(tmp_path / "update.pt")
    again = ff.Update.load(tmp_path / "update.pt").params["weight"]
    assert again.columns == (4, 3, 3) and torch.equal(dense(again), dense(change))
    assert dense(change).shape == (6, 4, 3, 3) == dense(change.scaled(2.0)).shape
    with pytest.raises(ValueError, match="wanted shape"):
        ff.Update({"weight": LowRank(change.u, change.v)}).check(nn.Conv2d(4, 6, 3))
    with pytest.raises(ValueError, match="columns: wanted sizes whose product is 36"):
        LowRank(change.u, change.v, (4, 3))
    with pytest.raises(ValueError, match="t: wanted a matrix"):
        change.t()


def test_several_steps_and_weight_decay_are_dense_and_say_so():
    model, query, _ = deep_mlp()
    for options, reason in (
        ({"steps": 2}, "steps > 1"),
        ({"weight_decay": 0.1}, "weight_decay"),
        ({"rank": None}, "rank=None"),
    ):
        update = mirror(model, query, **options)
        assert not factored(update) and update.record["rank"] is None and update.record["dense_because"] == reason
    assert mirror(model, query).record["rank"] == 32


class Odd(nn.Module):
    """Weights met in several ways at once, and outputs that are written into."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(60, 40, padding_idx=0)
        self.many = nn.Embedding(50, 40, scale_grad_by_freq=True)
        self.norm = nn.Embedding(60, 40, max_norm=0.5)
        self.twice, self.also = nn.Linear(40, 40, bias=False), nn.Linear(40, 45)
        self.turned, self.frozen = nn.Linear(40, 40), nn.Linear(40, 40)
        self.attention = nn.MultiheadAttention(40, 2, batch_first=True)
        self.unused = nn.Linear(40, 40)
        self.frozen.requires_grad_(False)

    def forward(self, ids):
        x = self.embed(ids)
        x += self.norm(ids)
        x.mul_(2).add_(self.many(ids % 7))
        y = self.twice(x)
        y.relu_()
        y = y + self.twice(self.frozen(y))
        y = torch.tanh(y @ self.turned.weight.t() + self.turned(y))
        y = y + self.attention(y, y, y)[0]
        with torch.no_grad():
            aside = self.also(y)
        out = self.also(y)
        out[..., 0] = 0
        out.view(-1)[3:9].mul_(0.5)
        return (out + aside).mean(1) + self.also.weight[:, :1].sum()


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_weights_met_in_several_ways(mode):
    torch.manual_seed(0)
    model = Odd().double()
    query = torch.tensor([[1, 0, 5, 5], [9, 1, 0, 2]]), torch.tensor([3, 40])
    low, plain = (mirror(model, query, rank=rank, mode=mode) for rank in (1000, None))
    assert_equal_changes(low, plain, 1e-12)
    assert factored(low) == {"embed.weight", "norm.weight", "twice.weight"}
    assert "unused.weight" not in low.params and "frozen.weight" not in low.params
    assert not low.params["embed.weight"].dense()[0].any()


def test_dropout_draws_the_same():
    torch.manual_seed(0)
    model = TinyLm(60, 40).double()
    model.block.dropout.p = 0.5
    query = {"input_ids": torch.randint(0, 60, (1, 6))}
    settings = {"loss": "causal_lm", "mode": "train", "seed": 3}
    low, plain = (mirror(model, query, rank=rank, **settings) for rank in (32, None))
    assert_equal_changes(low, plain, 1e-12)
    assert {"embed.weight"} <= factored(low)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(40, 50), nn.Linear(50, 45)

    def forward(self, x):
        return checkpoint(lambda x: self.b(torch.tanh(self.a(x))), x, use_reentrant=False)


def test_layers_that_are_computed_again_in_the_backward_pass():
    model = Checkpointed().double()
    query = torch.randn(4, 40), torch.randint(0, 45, (4,))
    low, plain = (mirror(model, query, rank=rank) for rank in (32, None))
    assert not factored(low)
    assert_equal_changes(low, plain, 1e-12)


def test_functional_use_of_the_weights():
    model = nn.Linear(40, 45).double()
    query = torch.randn(4, 40), torch.randint(0, 45, (4,))

    def called(net, batch):
        return F.cross_entropy(
            torch.func.functional_call(net, dict(net.named_parameters()), batch[0]), batch[1], reduction="none"
        )

    def mapped(net, batch):
        return F.cross_entropy(torch.vmap(net)(batch[0]), batch[1], reduction="none")

    plain = mirror(model, query, rank=None)
    for loss, wanted in ((called, {"weight"}), (mapped, set())):
        low = mirror(model, query, loss=loss)
        assert factored(low) == wanted
        assert_equal_changes(low, plain, 1e-12)


class Overwriting(nn.Module):
    """Writes into what a linear layer has read: its gradient is gone, and no number may be made up for it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(40, 40), nn.Linear(40, 45)

    def forward(self, x):
        x = 2 * self.a(x)
        y = self.b(x)
        x.add_(1)
        return y


@pytest.mark.parametrize("rank, message", [(32, "b.weight: .* written in place"), (None, "by an inplace operation")])
def test_an_input_written_into_after_its_use_is_refused(rank, message):
    with pytest.raises(RuntimeError, match=message):
        mirror(Overwriting(), (torch.randn(2, 40), [0, 1]), rank=rank)
    assert _get_current_function_mode_stack() == []


class Sprung(Exception):
    pass


class Tripping(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise Sprung


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_no_mode_is_left_behind_by_a_step_that_dies(where):
    model = nn.Linear(40, 45)

    def loss(net, batch):
        if where == "forward":
            net(batch[0])
            raise Sprung
        return Tripping.apply(net(batch[0])).sum(1)

    with pytest.raises(Sprung):
        mirror(model, (torch.randn(2, 40), [0, 1]), loss=loss)
    assert _get_current_function_mode_stack() == []
    assert model.weight.grad is None and model.weight.requires_grad and len(model._forward_hooks) == 0


@pytest.mark.parametrize("where", ["input", "gradient"])
def test_a_gradient_that_is_not_finite_is_refused(where):
    model = nn.Linear(40, 45)
    x = torch.randn(2, 40)

    def loss(net, batch):
        out = net(batch[0])
        return (out - out.detach()).sum(1).abs().sqrt() if where == "gradient" else (out * 0).nan_to_num().sum(1)

    if where == "input":
        x[1, 5] = math.inf
    with pytest.raises(NonFiniteLoss, match="query: wanted a finite gradient, .* 'weight'"):
        mirror(model, (x, [0, 1]), loss=loss)


def test_half_precision_weights_have_float32_factors():
    model, query, _ = deep_mlp()
    low = mirror(copy.deepcopy(model).bfloat16(), query)
    assert {low.params[name].dtype for name in factored(low)} == {torch.float32} and len(factored(low)) == 3


def test_a_sweep_takes_factors():
    model, (x, y), _ = deep_mlp()
    model = model.double()
    updates = [mirror(model, (x[:4], y[:4]), rank=rank) for rank in (32, None)]
    assert len(factored(updates[0])) == 3
    scores = ff.sweep(model, updates, (x, y), dtype=torch.float64, engine="pair")
    low, plain = torch.tensor(scores.delta)
    assert plain.abs().min() > 0 and (low - plain).norm() <= 1e-9 * plain.norm()
