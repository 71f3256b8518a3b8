"""``engine="dot"``: the derivative of every sample's loss along every update, against float64 gradients one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import finf_fast as ff
from finf_fast.dot import DotEngine
from finf_fast.dot.changes import packed
from finf_fast.loss import mapped, resolve
from finf_fast.lowrank import LowRank, dense
from finf_fast.order import moves_samples
from mixing_models import Late, Sorted, TimeFirst

B, Q = 6, 3


class Block(nn.Module):
    """A pre-norm decoder layer as nanoGPT writes it."""

    def __init__(self, width: int, norm=nn.LayerNorm):
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class NanoGpt(nn.Module):
    """Positions looked up once for all samples, head tied to the embedding."""

    def __init__(self, length: int = 5, tied: bool = True):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 8), nn.Embedding(length, 8)
        self.block, self.norm, self.head = Block(8), nn.LayerNorm(8), nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        return self.head(self.norm(self.block(x)))


class GemmaNorm(nn.Module):
    """A norm whose weight is stored less one, and cast."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return x * (1.0 + self.weight.to(x.dtype))


class Own(nn.Module):
    """Parameters used by hand: a class token, a table of positions, products with W and Wᵀ, a scale."""

    def __init__(self):
        super().__init__()
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 5, 6))
        self.W, self.V = nn.Parameter(torch.randn(6, 7)), nn.Parameter(torch.randn(6, 7))
        self.norm, self.scale = GemmaNorm(6), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        x = self.scale * self.norm(x)
        return (torch.tanh(x @ self.W) @ self.V.T).mean(1)


class Residual(nn.Module):
    """Convolutions of every kind, batch norm, and sums in place."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False)
        self.dilated = nn.Conv2d(8, 8, 3, padding="same", dilation=2)
        self.bn, self.gn, self.head = nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.Linear(8, 4)
        self.bn.running_mean.normal_(), self.bn.running_var.uniform_(0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.bn(self.first(x)))
        y = self.depthwise(x)
        y += x
        return self.head(F.relu(self.gn(self.dilated(y)), inplace=True).mean((2, 3)))


class Experts(nn.Module):
    """Tokens sent to experts, gathered from all samples of a batch: rows in no known order."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(6, 2), nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        rows, out = x.flatten(0, 1), torch.zeros_like(x.flatten(0, 1))
        chosen = self.gate(rows).argmax(-1)
        for number, expert in enumerate(self.experts):
            out[chosen == number] = torch.tanh(expert(rows[chosen == number]))
        return out.view(x.shape).mean(1)


class Recurrent(nn.Module):
    """A recurrent layer, whose weights no rule knows."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(6, 5, batch_first=True), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Computed(nn.Module):
    """Weights and biases that are computed from parameters: normed, with a low-rank part beside, scaled."""

    def __init__(self):
        super().__init__()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 7))
        self.W, self.A, self.B = (nn.Parameter(torch.randn(*s)) for s in ((7, 7), (2, 7), (7, 2)))
        self.bias, self.gain, self.head = *(nn.Parameter(torch.randn(7)) for _ in "ab"), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(torch.tanh(self.normed(x)).mean(1), (7,), torch.exp(self.gain), self.bias)
        x = torch.tanh(F.linear(x, self.W + self.B @ self.A))
        return self.head(torch.tanh(F.linear(x, self.W, 2 * self.bias)))


def _images() -> tuple[Tensor, ...]:
    return torch.randn(B, 3, 8, 8), torch.randint(4, (B,))


def _steps(classes: int = 4, steps: int = 4) -> tuple[Tensor, ...]:
    return torch.randn(B, steps, 6), torch.randint(classes, (B,))


def _ids(length: int = 5) -> Tensor:
    return torch.randint(1, 11, (B, length))  # 0 pads


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(inplace=True), nn.LayerNorm(9), nn.Linear(9, 4))


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True, activation="gelu")
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(1), nn.Linear(24, 4))


def _hugging_face(name: str, **config) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, name + "ForCausalLM" if name != "GPT2" else "GPT2LMHeadModel")(
        getattr(transformers, name + "Config")(vocab_size=11, **config)
    )


LLAMA = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
CASES = {  # model, batch, loss, whether batches go through whole
    "mlp": (_mlp, lambda: (torch.randn(B, 6), torch.randint(4, (B,))), "cross_entropy", True),
    "regression": (_mlp, lambda: (torch.randn(B, 6), torch.randn(B, 4)), "squared_error", True),
    "nanogpt": (NanoGpt, _ids, "causal_lm", True),
    "nanogpt, B = L": (lambda: NanoGpt(B), lambda: _ids(B), "causal_lm", True),
    "nanogpt, L = 2 B": (lambda: NanoGpt(2 * B), lambda: _ids(2 * B), "causal_lm", True),
    "gpt2": (lambda: _hugging_face("GPT2", n_embd=8, n_layer=2, n_head=2, n_positions=8), _ids, "causal_lm", True),
    "llama": (lambda: _hugging_face("Llama", **LLAMA), _ids, "causal_lm", True),
    "gemma": (lambda: _hugging_face("Gemma", head_dim=4, num_key_value_heads=2, **LLAMA), _ids, "causal_lm", True),
    "own": (Own, lambda: _steps(6), "cross_entropy", True),
    "residual": (Residual, _images, "cross_entropy", True),
    "encoder": (_encoder, _steps, "cross_entropy", True),
    "computed": (Computed, _steps, "cross_entropy", False),
    "experts": (Experts, lambda: _steps(6), "cross_entropy", False),
    "recurrent": (Recurrent, _steps, "cross_entropy", False),
    "time first": (TimeFirst, _steps, "cross_entropy", False),
    "time first, B = L": (TimeFirst, lambda: _steps(steps=B), "cross_entropy", False),
}


def _updates(model: nn.Module, low: bool, buffers: bool = True) -> list[ff.Update]:
    """Q of them; two of the three as factors where a tensor is a matrix, the last without half of the parameters."""
    generator, updates = torch.Generator().manual_seed(1), []
    for q in range(Q):
        params = {}
        for number, (name, p) in enumerate(model.named_parameters()):
            if q == Q - 1 and number % 2:
                continue
            change = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if low and p.dim() > 1 and q:
                u, v = change.flatten(1)[:, :1].repeat(1, q), torch.randn(p[0].numel(), q, generator=generator).double()
                change = LowRank(u, v, tuple(p.shape[1:]) if p.dim() > 2 else ())
            params[name] = change
        moved = {n: b + 0.1 for n, b in model.named_buffers() if buffers and b.is_floating_point() and "running" in n}
        updates.append(ff.Update(params, moved))
    return updates


def _truth(model: nn.Module, updates: list[ff.Update], loss, batch) -> np.ndarray:
    """(Q, B): float64 gradients of one sample at a time by plain autograd; of buffers by central differences."""
    model = model.double().eval()
    rows = [
        mapped(lambda t, i=i: t[i : i + 1].double() if t.is_floating_point() else t[i : i + 1], batch) for i in range(B)
    ]
    found = np.zeros((Q, B))
    for i, row in enumerate(rows):
        names, params = zip(*model.named_parameters(), strict=True)
        params = [p.requires_grad_() for p in params]
        gradients = torch.autograd.grad(loss.per_sample(model, row).sum(), params, allow_unused=True)
        for q, update in enumerate(updates):
            for name, gradient in zip(names, gradients, strict=True):
                if name in update.params and gradient is not None:
                    found[q, i] += (gradient * dense(update.params[name]).double()).sum().item()
            found[q, i] += _along_buffers(model, update, loss, row)
    return found


@torch.no_grad()
def _along_buffers(model: nn.Module, update: ff.Update, loss, row, step: float = 1e-5) -> float:
    own = {name: buffer.clone() for name, buffer in model.named_buffers()}
    ends = []
    for sign in (1, -1):
        for name, value in update.buffers.items():
            model.get_buffer(name).add_(sign * step * (value.double() - own[name]))
        ends.append(loss.per_sample(model, row).item())
        for name, buffer in own.items():
            model.get_buffer(name).copy_(buffer)
    return (ends[0] - ends[1]) / (2 * step)


def _far(got, truth) -> float:
    return float(np.abs(np.asarray(got, np.float64) - truth).max() / np.abs(truth).max())


@pytest.mark.parametrize("low", [False, True], ids=["dense", "factors"])
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_gradient_of_each_sample(name, low):
    torch.manual_seed(3)
    make, data, loss, whole = CASES[name]
    model, batch, loss = make().eval(), data(), resolve(loss)
    updates = _updates(model, low)
    engine = DotEngine(model, updates, loss, torch.device("cpu"), torch.float32)
    got = engine.score(batch)
    base = loss.per_sample(model, batch).detach()
    truth = _truth(model, updates, loss, batch)
    assert _far(got.delta, truth) < 1e-5
    torch.testing.assert_close(got.base, base, rtol=1e-5, atol=1e-6)
    assert bool(engine.record()["one_sample_at_a_time"]) == (not whole), engine.record()


@pytest.mark.parametrize("model", [Sorted, Late])
def test_a_later_batch_that_mixes_samples(model):
    torch.manual_seed(4)
    model, loss = model().eval(), resolve("cross_entropy")
    first = (torch.randn(B, 6).sort(0).values, torch.randint(4, (B,)))
    second = (torch.randn(B, 6) * 8, torch.randint(4, (B,)))
    updates = _updates(model, low=False)
    engine = DotEngine(model, updates, loss, torch.device("cpu"), torch.float32)
    for batch in (first, second):
        assert _far(engine.score(batch).delta, _truth(model.float(), updates, loss, batch)) < 1e-5
        model.float()
    assert engine.record()["one_sample_at_a_time"]


def test_rows_in_place_are_no_reordering():
    x = torch.randn(B, 4)
    places = torch.arange(B)
    still = [(x, (slice(None), places[:2])), (x, (..., 0)), (x, (places, places % 4)), (x, (None, slice(1, 3)))]
    moved = [(x, places.flip(0)), (x, (places.flip(0), 0)), (x, x > 0), (x, [1, 0]), (x.repeat(2, 1), 3)]
    assert [moves_samples(Tensor.__getitem__, call, {}, B) for call in still] == [False] * len(still)
    assert [moves_samples(Tensor.__getitem__, call, {}, B) for call in moved] == [True] * len(moved)
    calls = [(torch.sort, (x,), {}), (torch.sort, (x, 0), {}), (Tensor.flip, (x, 1), {}), (Tensor.flip, (x, 1, 0), {})]
    calls += [
        (torch.roll, (x, 1), {}),
        (torch.roll, (x, 1, 1), {}),
        (torch.gather, (x,), {"dim": -2}),
        (torch.relu, (x,), {}),
    ]
    assert [moves_samples(f, args, kwargs, B) for f, args, kwargs in calls] == [0, 1, 0, 1, 1, 0, 1, 0]


def test_a_narrow_chunk_gives_the_same(monkeypatch):
    torch.manual_seed(0)
    model, batch, loss = Residual().eval(), _images(), resolve("cross_entropy")
    for low in (False, True):
        updates = _updates(model, low)
        whole = DotEngine(model, updates, loss, torch.device("cpu"), torch.float64).score(batch)
        with monkeypatch.context() as patch:
            patch.setattr("finf_fast.dot.changes.ROOM", 1)
            parts = DotEngine(model, updates, loss, torch.device("cpu"), torch.float64).score(batch)
        torch.testing.assert_close(parts.delta, whole.delta, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("positions", [1, 50])
def test_both_forms_of_a_product_agree(positions):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(4, positions, n, generator=generator).double() for n in (5, 7))
    sides = [[torch.randn(n, 2, generator=generator).double() for n in (5, 7)] for _ in range(Q)]
    low = {q: LowRank(*side) for q, side in enumerate(sides)}
    change = packed(low, Q, torch.device("cpu"), torch.float64)
    true = torch.stack([((left.mT @ right) * c.dense()).sum((1, 2)) for c in low.values()], 1)
    torch.testing.assert_close(change.rows(left, right), true)
    torch.testing.assert_close(change.formed(left.mT @ right), true)
    assert change._formed_is_less(positions, 5, 7) == (positions == 50)
    assert packed({1: low[1]}, Q, torch.device("cpu"), torch.float64).rows(left, right)[:, 0].abs().max() == 0


TINY = {torch.float32: 1e-3, torch.bfloat16: 3e-2}  # bfloat16: of the largest, over samples and queries


@pytest.mark.parametrize("dtype", TINY, ids=str)
def test_it_is_the_delta_engine_at_a_tiny_step(dtype):
    torch.manual_seed(1)
    model, ids = NanoGpt(16).eval(), torch.randint(11, (40, 16))
    updates = [ff.mirror(model, ids[q : q + 1], loss="causal_lm", lr=1e-5, rank=4) for q in range(8)]
    settings = {"loss": "causal_lm", "dtype": dtype, "batch_size": 16}
    dot = ff.sweep(model, updates, ids, engine="dot", **settings)
    delta = ff.sweep(model, updates, ids, engine="delta", dtype=torch.float32, loss="causal_lm")
    assert _far(dot.delta, np.asarray(delta.delta)) < TINY[dtype]
    assert dot.plan.startswith("dot: first order only, as asked")
    assert "engine='dot' would take" in delta.plan
    assert dot.record["order"] == "first" and dot.record["one_sample_at_a_time"] == ""


def test_padding_and_samples_without_a_target():
    torch.manual_seed(2)
    model = NanoGpt(8).eval()
    ids = torch.randint(11, (5, 8))
    labels = ids.clone()
    labels[1], labels[3, 4:] = -100, -100
    updates = _updates(model, True)[:1]
    settings = {"loss": "causal_lm", "engine": "dot"}
    delta = np.asarray(ff.sweep(model, updates, (ids, labels), **settings).delta)
    alone = ff.sweep(model, updates, (ids[3:4, :4], labels[3:4, :4]), **settings)
    assert np.isnan(delta[0, 1]) and np.isfinite(np.delete(delta[0], 1)).all()
    assert _far(delta[:, 3:4], np.asarray(alone.delta)) < 1e-4


def test_an_interrupted_sweep_goes_on_to_the_same_bytes(tmp_path):
    torch.manual_seed(4)
    model, batch = _mlp(), (torch.randn(64, 6), torch.randint(4, (64,)))
    updates = _updates(model, True)
    whole = ff.sweep(model, updates, batch, engine="dot", batch_size=8, out=tmp_path / "whole")

    def stop(done: int, total: int) -> None:
        if done >= 24:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ff.sweep(model, updates, batch, engine="dot", batch_size=8, out=tmp_path / "cut", progress=stop)
    again = ff.sweep(model, updates, batch, engine="dot", batch_size=8, out=tmp_path / "cut")
    assert np.array_equal(np.asarray(again.delta), np.asarray(whole.delta))
    with pytest.raises(ff.ManifestMismatch, match="engine"):
        ff.sweep(model, updates, batch, engine="delta", batch_size=8, out=tmp_path / "cut")


def test_the_model_stays_as_it_is():
    torch.manual_seed(5)
    model, batch = Residual().eval(), _images()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    with torch.inference_mode():
        ff.sweep(model, _updates(model, False), batch, engine="dot")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags and all(p.grad is None for p in model.parameters())


class Counted(nn.Linear):
    """A layer with a buffer of whole numbers that its forward reads."""

    def __init__(self):
        super().__init__(6, 4)
        self.register_buffer("which", torch.tensor(1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.which


class InPlace(nn.Linear):
    """A layer whose input is written into behind its back."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        out = super().forward(x)
        x.zero_()
        return out


def test_what_it_cannot_do_is_refused_by_name():
    batch = (torch.randn(4, 6), torch.randint(4, (4,)))
    model = Counted()
    update = ff.Update({"weight": torch.randn(4, 6)}, {"which": torch.tensor(2)})
    with pytest.raises(ValueError, match="'which'.*int64"):
        ff.sweep(model, [update], batch, engine="dot")
    model = InPlace(6, 4)
    with pytest.raises(RuntimeError, match="weight: .*written in place.*engine='delta'"):
        ff.sweep(model, [ff.Update({"weight": torch.randn(4, 6)})], batch, engine="dot")
    ids = _ids()
    with pytest.raises(ValueError, match="per_token: .*'dot'"):
        ff.sweep(NanoGpt(), _updates(NanoGpt(), True), ids, loss="causal_lm", engine="dot", per_token=True)
    with pytest.raises(ValueError, match="dtype: .*float16"):
        ff.sweep(_mlp(), [ff.Update({})], batch, engine="dot", dtype=torch.float16)
