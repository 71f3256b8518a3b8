"""What a model may do behind the rules' back: it is seen, or the sweep goes to pairs; and the user's model stays as it
is."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import finf_fast as ff
from finf_fast.delta import NotCarried
from finf_fast.loss import resolve
from nets import plain_losses

X, Y = torch.randn(24, 6, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 5


class Net(nn.Module):
    """Two layers and something between or behind them."""

    def __init__(self, between=lambda h: h, behind=lambda z: z):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(6, 7), nn.Linear(7, 5)
        self.between, self.behind = between, behind

    def forward(self, x):
        return self.behind(self.b(self.between(torch.tanh(self.a(x)))))


def update_of(model, size=0.05):
    draw = torch.Generator().manual_seed(2)
    return ff.Update({n: size * torch.randn(p.shape, generator=draw) for n, p in model.named_parameters()})


def true(model, update):
    loss = resolve("cross_entropy")
    batch = (X.double(), Y)
    return plain_losses(model, update, loss, batch) - plain_losses(model, None, loss, batch)


def agrees(model, engine="auto", rtol=1e-4):
    update = update_of(model)
    found = ff.sweep(model, [update], (X, Y), engine=engine)
    torch.testing.assert_close(torch.as_tensor(found.delta[0]).double(), true(model, update), rtol=rtol, atol=1e-6)
    return found


def filled(z):
    out = z.new_zeros(z.shape[0], z.shape[1])
    out[:] = z
    return out


def filled_by_out(z):
    out = torch.zeros(z.shape[0], z.shape[1], dtype=z.dtype)
    torch.mul(z, 2.0, out=out)
    return out


def filled_by_index(z):
    return torch.zeros(z.shape[0], z.shape[1], dtype=z.dtype).index_add_(0, torch.arange(z.shape[0]), z)


@pytest.mark.parametrize("behind", [filled, filled_by_out, filled_by_index])
def test_a_plain_tensor_that_the_model_fills_and_returns(behind):
    found = agrees(Net(behind=behind), "delta")
    assert found.delta.any()


def test_a_view_of_one_goes_to_pairs():
    def view(z):
        out = torch.zeros(z.shape[0], 8, dtype=z.dtype)
        part = out[:, :5]
        out[:, :5] = z
        return part

    agrees(Net(behind=view))
    with pytest.raises(NotCarried):
        agrees(Net(behind=view), "delta")


def through_data(h):
    h.data = h.data.clamp(min=0)
    return h


def by_overload(h):
    torch.ops.aten.add_.Scalar(h, 1.5)
    return h


def by_strides(h):
    h.as_strided((h.shape[0], 1), (h.shape[1], 1)).zero_()
    return h


@pytest.mark.parametrize("between", [through_data, by_overload, by_strides])
def test_writes_without_a_rule_go_to_pairs(between):
    agrees(Net(between))
    with pytest.raises(NotCarried):
        agrees(Net(between), "delta")


@pytest.mark.parametrize("fill", [-1e9, -1e30, -torch.inf])
def test_a_mask_that_a_query_flips(fill):
    def top_two(z):
        return z.masked_fill(z < z.topk(2, -1)[0][:, -1:], fill).softmax(-1)

    model = Net(behind=top_two)
    update = update_of(model, 0.5)
    found = ff.sweep(model, [update], (X, Y), engine="auto")
    torch.testing.assert_close(torch.as_tensor(found.delta[0]).double(), true(model, update), rtol=1e-4, atol=1e-6)
    assert found.record.get("batches_by_pair") or "cannot be carried" in found.plan


def test_a_mask_of_zeros_that_a_query_flips_is_carried():
    """Routers with 0 for what is not chosen: 0 to z and z to 0 lose nothing."""
    model = Net(behind=lambda z: z.masked_fill(z < z.topk(2, -1)[0][:, -1:], 0.0))
    update = update_of(model, 0.5)
    found = ff.sweep(model, [update], (X, Y), engine="delta")
    torch.testing.assert_close(torch.as_tensor(found.delta[0]).double(), true(model, update), rtol=1e-4, atol=1e-6)


class Scaled(Net):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        z = super().forward(x)
        return z * self.scale if isinstance(self.scale, nn.Parameter) else z

    def named(self):
        return self.get_parameter("a.weight")


def test_a_changed_parameter_still_is_one():
    agrees(Scaled(), "delta")


class Clamping(Net):
    """Writes its own weight in every forward."""

    def forward(self, x):
        with torch.no_grad():
            self.a.weight.data.clamp_(-0.2, 0.2)
        return super().forward(x)


class Merging(Net):
    """As LoRA layers do that add themselves to the weight in eval mode and take themselves off in train mode."""

    def __init__(self):
        super().__init__()
        self.merged = False
        self.low = nn.Parameter(0.1 * torch.ones(7, 1)), nn.Parameter(torch.ones(1, 6))
        self.low = nn.ParameterList(self.low)

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            self.a.weight.data += (-1 if mode else 1) * (self.low[0] @ self.low[1])
            self.merged = not mode
        return self

    def forward(self, x):
        h = self.a(x) if self.merged else self.a(x) + x @ self.low[1].T @ self.low[0].T
        return self.b(torch.tanh(h))


@pytest.mark.parametrize("engine", ["auto", "delta", "pair"])
@pytest.mark.parametrize("changed", ["*", "b.*"])
def test_a_model_that_writes_into_its_weights_has_them_still_after_a_sweep(engine, changed):
    model = Clamping().eval()
    update = update_of(model)
    if changed != "*":
        update = ff.Update({n: c for n, c in update.params.items() if n.startswith("b.")})
    before = copy.deepcopy(model.state_dict())
    assert before["a.weight"].abs().max() > 0.2
    try:
        ff.sweep(model, [update], (X, Y), engine=engine)
    except NotCarried:
        assert engine == "delta" and changed == "*"
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("engine", ["auto", "pair"])
def test_a_model_that_merges_as_its_mode_changes_stays_as_it_is(engine):
    model = Merging().train()
    before = copy.deepcopy(model.state_dict())
    update = update_of(model)
    found = ff.sweep(model, [update], (X, Y), engine=engine, dtype=torch.float64)
    ff.mirror(model, (X[:1], Y[:1]))
    assert model.training and not model.merged
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    plain = copy.deepcopy(model).double()
    with torch.no_grad():
        first = F.cross_entropy(plain(X.double()), Y, reduction="none")
        for name, change in update.params.items():
            plain.get_parameter(name).add_(change)
        second = F.cross_entropy(plain(X.double()), Y, reduction="none")
    torch.testing.assert_close(torch.as_tensor(found.delta[0]), second - first, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gamma", [1e-40, 1e-20, 0.0])
def test_a_channel_that_its_norm_has_all_but_turned_off(gamma):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 5)).eval()
    with torch.no_grad():
        net[1].weight[2] = gamma
    x = torch.randn(9, 1, 4, 4)
    update = ff.Update({"1.weight": 0.1 * torch.ones(4)})
    loss, batch = resolve("cross_entropy"), (x.double(), Y[:9])
    wanted = plain_losses(net, update, loss, batch) - plain_losses(net, None, loss, batch)
    found = ff.sweep(net, [update], (x, Y[:9]), engine="delta")
    torch.testing.assert_close(torch.as_tensor(found.delta[0]).double(), wanted, rtol=1e-4, atol=1e-7)


def test_a_norm_whose_statistics_are_read_past_it_is_not_folded():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.n, self.l = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(16, 5)

        def forward(self, x):
            return self.l(self.n(self.c(x)).flatten(1)) + self.n.running_mean.mean()

    torch.manual_seed(0)
    net, x = Reads().eval(), torch.randn(9, 1, 4, 4)
    update = update_of(net)
    loss, batch = resolve("cross_entropy"), (x.double(), Y[:9])
    wanted = plain_losses(net, update, loss, batch) - plain_losses(net, None, loss, batch)
    for engine in ("delta", "pair"):
        found = ff.sweep(net, [update], (x, Y[:9]), engine=engine)
        torch.testing.assert_close(torch.as_tensor(found.delta[0]).double(), wanted, rtol=1e-3, atol=1e-6)


class ChannelNorm(nn.Module):
    """An RMS norm over the channels of images, which over the last dimension of (B, C) is the usual one."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(6) + 0.5), 1e-6

    def forward(self, x):
        weight = self.weight.view(1, -1, *[1] * (x.dim() - 2))
        return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + self.eps) * weight


class WholeNorm(ChannelNorm):
    def forward(self, x):
        dims = tuple(range(1, x.dim()))
        return x * torch.rsqrt(x.pow(2).mean(dims, keepdim=True) + self.eps) * self.weight


class TurnedGelu(nn.Module):
    """A bare GELU whose scale its parent sets later."""

    def __init__(self):
        super().__init__()
        self.scale = 1.0

    def forward(self, x):
        return F.gelu(x) * self.scale


class TokenGelu(nn.Module):
    def forward(self, x):
        return F.gelu(x) - x.mean(1, keepdim=True) if x.dim() > 2 else F.gelu(x)


class Picky(nn.Module):
    """Takes images only, and says so in its own way."""

    def forward(self, x):
        assert x.dim() == 4
        b, c, _, _ = x.shape
        return x.mean((2, 3)).reshape(b, c)


class Images(nn.Module):
    def __init__(self, norm, shape, act=None, before=lambda net: None):
        super().__init__()
        torch.manual_seed(0)
        self.shape, self.before = shape, before
        self.a, self.norm, self.act = nn.Linear(6, 36), norm, act or nn.Identity()
        self.b = nn.Linear(36, 5)

    def forward(self, x):
        self.before(self)
        h = self.a(x).view(len(x), *self.shape)
        return self.b(self.act(self.norm(h)).flatten(1))


def turned(net):
    net.act.scale = 3.0


@pytest.mark.parametrize(
    "model",
    [
        lambda: Images(ChannelNorm(), (6, 2, 3)),
        lambda: Images(ChannelNorm(), (6, 6)),
        lambda: Images(WholeNorm(), (6, 6)),
        lambda: Images(nn.Identity(), (6, 6), TokenGelu()),
        lambda: Images(nn.Identity(), (6, 6), TurnedGelu(), turned),
    ],
)
def test_modules_that_are_the_known_ones_only_at_first_sight(model):
    agrees(model(), "delta", rtol=1e-3)


def test_a_module_that_refuses_made_up_inputs_is_left_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.pool, self.b = nn.Linear(6, 24), Picky(), nn.Linear(6, 5)

        def forward(self, x):
            return self.b(self.pool(self.a(x).view(len(x), 6, 2, 2)))

    agrees(Net(), "delta")


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_the_weights_of_multihead_attention_are_carried(average, masked):
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.m, self.b = nn.Linear(6, 24), nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(24, 5)

        def forward(self, x):
            h = self.a(x).view(len(x), 3, 8)
            mask = torch.ones(3, 3, dtype=torch.bool).triu(1) if masked else None
            y, w = self.m(h, h, h, attn_mask=mask, average_attn_weights=average)
            if w is not None:
                y = y + (w if average else w.sum(1)) @ h
            return self.b(y.flatten(1))

    agrees(Attends(), "delta")


@pytest.mark.parametrize(
    "between",
    [
        lambda h: (h[:3].contiguous().mul_(2), h)[1],
        lambda h: (h[0].contiguous().mul_(2), h)[1],
        nn.Softplus(beta=3, threshold=1),
        lambda h: h + h[:, None, :].expand(-1, 7, -1)[:, np.array([0, 1, 2]), :][..., np.array([0, 1, 2])].sum(),
        lambda h: h + h.view(-1, 7, 1)[np.array([0, 0]), :, np.array([0, 0])].sum(),
    ],
)
def test_places_where_torch_shares_memory_or_takes_numpy(between):
    agrees(Net(between), "delta", rtol=1e-3)


@pytest.mark.parametrize("kink", [torch.abs, torch.round, lambda h: h * (h > 0), nn.Hardtanh(), nn.LeakyReLU()])
def test_half_precision_nets_with_kinks_are_carried_in_float32(kink):
    model = Net(kink).bfloat16()
    found = ff.sweep(model, [update_of(model)], (X, Y))
    assert found.record["dtype"] == "float32"
    smooth = Net(torch.sin).bfloat16()
    assert ff.sweep(smooth, [update_of(smooth)], (X, Y)).record["dtype"] == "bfloat16"
