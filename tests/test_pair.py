"""The pair engine against plain forwards of plainly changed copies, and what it may not touch."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from finf_fast import fold
from finf_fast.loss import resolve
from finf_fast.pair import PairEngine
from finf_fast.planning import free_bytes, make_plan, out_of_memory, probe
from finf_fast.skeleton import Skeleton
from finf_fast.update import Update
from nets import conv_net, plain_scores

CPU = torch.device("cpu")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 5), nn.Linear(5, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)))


def updates_of(model, count=3, size=1e-2):
    generator = torch.Generator().manual_seed(5)
    draw = lambda t: size * torch.randn(t.shape, dtype=t.dtype, generator=generator)  # noqa: E731
    made = [Update({n: draw(p) for n, p in model.named_parameters()}) for _ in range(count)]
    moved = {n: b + draw(b).abs() for n, b in model.named_buffers() if b.is_floating_point()}
    last = list(dict(model.named_parameters()).items())[-1]
    return [*made, Update({last[0]: draw(last[1])}, moved), Update({})]


def check(model, updates, loss, batch, dtype, bound):
    base, delta = plain_scores(model, updates, loss, [batch])
    got = PairEngine(model, updates, loss, CPU, dtype).score(batch)
    assert (got.base - base).abs().max() <= bound * max(1, float(base.max()))
    assert (got.delta - delta).abs().max() <= bound * max(1, float(base.max()))
    assert delta[0].abs().max() > 1e-4
    return got


BOUNDS = [(torch.float64, 1e-12), (torch.float32, 1e-5)]


@pytest.mark.parametrize("dtype, bound", BOUNDS)
def test_a_conv_net_with_batch_norm(dtype, bound):
    model, batch = conv_net()
    got = check(model, updates_of(model), resolve("cross_entropy"), batch, dtype, bound)
    assert (got.delta[-1] == 0).all()  # an update that changes nothing, after ones that did


@pytest.mark.parametrize("dtype, bound", BOUNDS)
def test_tied_weights_move_together(dtype, bound):
    torch.manual_seed(0)
    model, ids = Tied().double(), torch.randint(0, 9, (4, 7))
    check(model, updates_of(model), resolve("causal_lm"), ids, dtype, bound)


@pytest.mark.parametrize("dtype, bound", BOUNDS)
def test_hugging_face_gpt2_with_padding(dtype, bound):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).double()
    ids, mask = torch.randint(0, 50, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:] = 0
    check(model, updates_of(model), resolve("causal_lm"), {"input_ids": ids, "attention_mask": mask}, dtype, bound)
    assert model.config.use_cache is True  # switched off in the engine's body only


@pytest.mark.parametrize("dtype, bound", BOUNDS)
def test_hugging_face_bert_and_t5(dtype, bound):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**small)).double()
    ids = torch.randint(0, 40, (3, 8))
    labels = torch.where(torch.rand(3, 8) < 0.4, ids, -100)
    labels[:, 0] = ids[:, 0]
    check(bert, updates_of(bert), resolve("masked_lm"), {"input_ids": ids, "labels": labels}, dtype, bound)
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0)).double()
    labels = torch.randint(1, 40, (3, 5))
    labels[1, 3:] = -100
    check(t5, updates_of(t5), resolve("seq2seq"), {"input_ids": ids, "labels": labels}, dtype, bound)


def test_folding_takes_the_norms_it_can_prove_and_no_other():
    model, _ = conv_net()
    pairs = fold.find(Skeleton(model, CPU))
    assert [(p.layer, p.norm) for p in pairs] == [("a", "norm_a"), ("b", "norm_b")]


@pytest.mark.parametrize(
    "build",
    [
        lambda a, n: nn.Sequential(a, nn.ReLU(), n),  # something in between
        lambda a, n: nn.Sequential(a, n, a, n),  # called twice
        lambda a, n: nn.Sequential(a, nn.BatchNorm2d(3, track_running_stats=False)),  # norm of the batch itself
    ],
)
def test_folding_leaves_the_rest(build):
    assert fold.find(Skeleton(build(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), CPU)) == []


def test_folding_leaves_models_that_cannot_be_traced():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.n = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.n(self.a(x)) if x.sum() > 0 else x

    assert fold.find(Skeleton(Branch(), CPU)) == []


def test_weights_made_for_every_batch_are_the_kept_ones():
    model, batch = conv_net()
    updates, loss = updates_of(model), resolve("cross_entropy")
    kept = PairEngine(model, updates, loss, CPU, torch.float32).score(batch)
    made = PairEngine(model, updates, loss, CPU, torch.float32, keep=0).score(batch)
    assert torch.equal(kept.delta, made.delta) and torch.equal(kept.base, made.base)


def test_many_queries_come_in_chunks(monkeypatch):
    from finf_fast.pair import engine

    model, batch = conv_net()
    updates, loss = updates_of(model), resolve("cross_entropy")
    whole = PairEngine(model, updates, loss, CPU, torch.float64).score(batch)
    monkeypatch.setattr(engine, "CHANGE_BYTES", 1)
    parts = PairEngine(model, updates, loss, CPU, torch.float64).score(batch)
    torch.testing.assert_close(parts.delta, whole.delta, atol=1e-14, rtol=0)


@pytest.mark.parametrize("dtype, bound", BOUNDS)
def test_a_masked_vocabulary_counts_for_nothing(dtype, bound):
    torch.manual_seed(0)
    model, x = nn.Linear(4, 6).double(), torch.randn(5, 4).double()
    model.bias.data[3:5] = float("-inf")
    updates = [Update({"weight": 0.1 * torch.randn(6, 4).double()}) for _ in range(2)]
    check(model, updates, resolve("cross_entropy"), (x, torch.tensor([0, 1, 2, 5, 0])), dtype, bound)


def test_the_user_s_model_is_not_touched():
    model, batch = conv_net()
    model.train()
    model.a.weight.grad = torch.ones_like(model.a.weight)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    identities = [id(t) for t in (*model.parameters(), *model.buffers())]
    engine = PairEngine(model, updates_of(model), resolve("cross_entropy"), CPU, torch.float64)
    engine.score(batch)
    with pytest.raises(RuntimeError):
        engine.score((batch[0][:, :2], batch[1]))
    assert model.training and model.a.weight.grad is not None and model.norm_a.training
    assert identities == [id(t) for t in (*model.parameters(), *model.buffers())]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_an_embedding_that_rescales_itself_rescales_a_copy():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 5, max_norm=0.5), nn.Linear(5, 9))
    before = model[0].weight.detach().clone()
    engine = PairEngine(model, [Update({"1.bias": torch.ones(9)})], resolve("causal_lm"), CPU, torch.float32)
    engine.score(torch.arange(9)[None])
    assert torch.equal(model[0].weight, before) and before.norm(dim=1).max() > 0.5


def test_the_weights_are_shared_not_copied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    body = Skeleton(model, CPU)
    assert body.slots["0.weight"].tensor.data_ptr() == model[0].weight.data_ptr()


def test_a_callable_sees_the_changed_model():
    model, batch = conv_net()
    loss = resolve(lambda net, b: net(b[0]).square().sum(1))
    check(model, updates_of(model), loss, batch, torch.float64, 1e-12)


def test_a_model_that_cannot_be_copied_says_so():
    model = nn.Linear(2, 2)
    model.stream = (i for i in range(3))
    with pytest.raises(TypeError, match="model: wanted modules whose structure can be copied"):
        Skeleton(model, CPU)


def test_the_probe_bounds_what_a_sample_needs():
    model, (x, y) = conv_net()
    engine = PairEngine(model, updates_of(model), resolve("cross_entropy"), CPU, torch.float64)
    one = probe(engine.output, (x[:1], y[:1]))
    two = probe(engine.output, (x[:2], y[:2]))
    assert one.outputs == 6 and one.tokens == 1
    largest = 8 * 6 * 6 * 8  # one activation map of the net, bytes
    assert one.bytes > 4 * largest and one.bytes < two.bytes <= 2 * one.bytes


def test_the_plan_follows_memory_and_the_user():
    model, (x, y) = conv_net()
    found = probe(PairEngine(model, [Update({})], resolve("cross_entropy"), CPU, torch.float64).output, (x[:1], y[:1]))
    chosen = make_plan(found, 0, 10**9, CPU, None)
    assert 1 <= chosen.block * found.bytes <= free_bytes(CPU) / 4
    assert make_plan(found, 0, 100, CPU, 7).block == 7
    with pytest.raises(ValueError, match="batch_size"):
        make_plan(found, 0, 100, CPU, 0)


def test_out_of_memory_is_told_from_other_errors():
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert out_of_memory(caught.value)
    assert not out_of_memory(RuntimeError("shapes do not fit"))


class Shifts(nn.Module):
    """Normalises its input in place: a second forward on the same memory would normalise it again."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x):
        x.sub_(0.5).div_(0.25)
        return self.head(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize("dtype, bound", BOUNDS)
def test_a_model_that_shifts_its_input_in_place(dtype, bound):
    torch.manual_seed(0)
    model, batch = Shifts().double(), (torch.rand(6, 3, 8, 8).double(), torch.randint(0, 5, (6,)))
    updates, loss = updates_of(model), resolve("cross_entropy")
    base, delta = plain_scores(model, updates, loss, [batch])
    engine = PairEngine(model, updates, loss, CPU, dtype)
    engine.output(batch)  # as planning does
    got = engine.score(batch)
    assert (got.base - base).abs().max() <= bound * max(1, float(base.max()))
    assert (got.delta - delta).abs().max() <= bound * max(1, float(base.max()))


def test_batch_norm_behind_a_linear_layer_stays():
    """Behind a linear layer it may normalise dimension 1 of three, which is not the layer's output dimension."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(16, 3)).double()
    model.train()(torch.randn(16, 4, 6).double())
    batch = (torch.randn(5, 4, 6).double(), torch.randint(0, 3, (5,)))
    check(model, updates_of(model), resolve("cross_entropy"), batch, torch.float64, 1e-12)


class Counts(nn.Module):
    """Keeps a running buffer that its answer depends on, even in eval mode."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(1, dtype=torch.float64))

    def forward(self, x):
        self.calls += 1
        return self.line(x) * (1 + self.calls)


def test_a_buffer_that_moves_is_the_engine_s_own_and_starts_anew():
    torch.manual_seed(0)
    model, batch = Counts().double(), (torch.randn(5, 4).double(), torch.randint(0, 3, (5,)))
    updates = [Update({"line.weight": torch.randn(3, 4).double()})]
    check(model, updates, resolve("cross_entropy"), batch, torch.float64, 1e-12)
    assert model.calls == 0


def test_autocast_of_the_user_s_does_not_reach_the_engine():
    model, batch = conv_net()
    engine = PairEngine(model, updates_of(model), resolve("cross_entropy"), CPU, torch.float32)
    outside = engine.score(batch)
    with torch.autocast("cpu", torch.bfloat16):
        inside = engine.score(batch)
    assert torch.equal(outside.delta, inside.delta)


def test_a_function_that_holds_the_model_is_refused():
    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.apply_scale = lambda h: h * self.scale

    with pytest.raises(TypeError, match="apply_scale is a function that refers to the model itself"):
        Skeleton(Holds(), CPU)
    model = nn.Sequential(nn.Linear(3, 2))
    forward = model[0].forward  # that method's own model, one step on
    model[0].forward = functools.wraps(forward)(lambda x: 2 * forward(x))
    with pytest.raises(TypeError, match="0.forward is a function that refers to the model itself"):
        Skeleton(model, CPU)


def test_a_vision_model_of_hugging_face_without_token_embeddings():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3, "layer_type": "basic"}
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes)).double()
    batch = {"pixel_values": torch.randn(4, 3, 16, 16).double(), "labels": torch.randint(0, 3, (4,))}
    from finf_fast.skeleton import vocabulary

    assert vocabulary(model) is None
    check(model, updates_of(model), resolve("cross_entropy"), batch, torch.float64, 1e-12)
