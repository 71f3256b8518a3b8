"""Factors do not depend on how samples are batched, however a model lays out their positions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import finf_fast as ff
from finf_fast.mirrors.passes import Passes, _same
from mixing_models import Sorted, TimeFirst
from nets import language_model

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = [{}, {"convention": "reduce"}, {"kind": "ekfac"}]
INF, NAN = float("inf"), float("nan")


class Flattened(TimeFirst):
    """Samples second, and then no dimension of their own."""

    def forward(self, x):
        t = x.transpose(0, 1)
        return self.head(torch.tanh(self.first(t.reshape(-1, 6))).view(*t.shape[:2], 5).mean(0))


class Encoder(nn.Module):
    """torch's own layer as it comes, time first."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.layer(x.transpose(0, 1)).mean(0))


class SortedTexts(Sorted):
    """Of texts (B, T, 6)."""

    def forward(self, x):
        return super().forward(x.mean(1))


class Late(TimeFirst):
    """Time first behind a gate that only large inputs open, which the first batches have none of."""

    def forward(self, x):
        t = x.transpose(0, 1)
        return self.head((torch.tanh(self.first(t)) * (t.abs().amax((0, 2)) > 50)[:, None]).mean(0) + t[0, :, :5])


class Shared(nn.Module):
    """What a layer makes of positions, for all samples at once."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(2, 6), nn.Linear(6, 4)

    def forward(self, x):
        places = torch.linspace(-1, 1, 2 * x.shape[1], dtype=x.dtype).view(-1, 2)
        return self.head((x * torch.tanh(self.first(places))).mean(1))


class LateShared(Shared):
    """The same layer reads each sample's own, and what all share reaches large samples only."""

    def forward(self, x):
        places = torch.linspace(-1, 1, 2 * x.shape[1], dtype=x.dtype).view(-1, 2)
        own, shared = (torch.tanh(self.first(t)) for t in (x[..., :2], places))
        large = x.abs().amax((1, 2)) > 50
        return self.head((x.sign() * (own + shared * large[:, None, None])).mean(1))


class Routed(nn.Module):
    """Experts, each for as many positions as chose it."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(6, 3), nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        t = x.reshape(-1, 6)
        share, chosen = self.gate(t).softmax(-1).max(-1)
        out = torch.zeros_like(t)
        for n, expert in enumerate(self.experts):
            at = (chosen == n).nonzero()[:, 0]
            out = out.index_add(0, at, share[at, None] * torch.tanh(expert(t[at])))
        return self.head(out.view_as(x).mean(1))


class LateSilent(Shared):
    """Of large samples a layer reads one row more than there are samples, and nothing comes of it."""

    def forward(self, x):
        t = torch.tanh(x).mean(1)
        if x.abs().max() > 50:
            t = t + 0 * self.first(torch.cat([t, t[:1]])[:, :2])[: len(t)]
        return self.head(t)


class Placed(nn.Module):
    """Time first, with an embedding of positions that fits another order too where there are as many samples."""

    def __init__(self):
        super().__init__()
        self.places, self.head = nn.Embedding(8, 6), nn.Linear(6, 4)

    def forward(self, x):
        t = x.transpose(0, 1) * self.places(torch.arange(x.shape[1])[None]).mT.mT[0][:, None]
        return self.head(torch.tanh(t).mean(0))


def data(samples=28):
    torch.manual_seed(0)
    x = torch.randn(samples, 8, 6).double()
    x[20:] *= 100
    return x, torch.randint(0, 4, (samples,))


def numbers(factors):
    """Name -> what a block holds, but for eigenvectors' signs."""
    return {f"{n} {key}": t for n, block in factors.blocks.items() for key, t in block.tensors.items()}


def fitted(model, corpus, size, **settings):
    return ff.fit_factors(model, corpus, batch_size=size, progress=False, **settings)


def alike(factors, other):
    mine, theirs = numbers(factors), numbers(other)
    assert mine.keys() == theirs.keys() and mine
    for name, values in theirs.items():
        assert (mine[name] - values).norm() <= 1e-9 * values.norm(), name


MODELS = [TimeFirst, Flattened, Encoder, SortedTexts, Late, Shared, Routed]


@pytest.mark.parametrize("size", [4, 8, 11, 28])  # time has 8 steps
@pytest.mark.parametrize("model", [*MODELS, LateShared, LateSilent])
def test_samples_that_a_model_mixes_are_taken_one_by_one(model, size):
    torch.manual_seed(0)
    model = model().double().eval()
    for settings in ({"kind": "ekfac"}, {"kind": "kfac", "convention": "reduce"}):
        alone, batched = (fitted(model, data(), n, **settings) for n in (1, size))
        alike(batched, alone)
        assert batched.record["one_sample_at_a_time"] and not alone.record["one_sample_at_a_time"]


@pytest.mark.parametrize("model", MODELS)
def test_positions_that_stand_for_themselves_stay_together_in_any_order(model):
    """K-FAC by "expand" needs to know no more of a position than that it is one sample's."""
    torch.manual_seed(0)
    model = model().double().eval()
    alone, batched = (fitted(model, data(), n) for n in (1, 8))
    alike(batched, alone)
    assert bool(batched.record["one_sample_at_a_time"]) == isinstance(model, Shared)


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_layer_whose_gradient_is_zero_is_not_checked_again(settings, monkeypatch):
    """As of a low-rank change that has not begun: its second factor is 0, and so is the gradient of its first."""
    checked = []
    alone = Passes._as_alone
    monkeypatch.setattr(Passes, "_as_alone", lambda *args: checked.append(args) or alone(*args))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3), nn.Linear(3, 4)).double().eval()
    nn.init.zeros_(model[2].weight)
    x, y = data(24)
    factors = fitted(model, (x, y), 8, **settings)
    assert len(checked) == 1 and "1.weight" in factors.left


def test_each_use_of_a_layer_is_checked_where_it_first_has_a_gradient():
    torch.manual_seed(0)
    model = LateShared().double().eval()
    alone, batched = (fitted(model, data(), n).blocks["first.weight"].rows.values for n in (1, 8))
    assert (alone - batched).norm() <= 1e-9 * alone.norm()


class Masked(nn.Module):
    def __init__(self, time_first):
        super().__init__()
        self.first, self.head, self.time_first = nn.Linear(6, 5), nn.Linear(5, 4), time_first

    def forward(self, x, attention_mask):
        t = torch.tanh(self.first(x.transpose(0, 1))).transpose(0, 1) if self.time_first else torch.tanh(self.first(x))
        return self.head((t * attention_mask[..., None]).sum(1))


@pytest.mark.parametrize("size", [1, 4, 8])
def test_padding_is_found_wherever_it_lies(size):
    torch.manual_seed(0)
    models = [Masked(True).double(), Masked(False).double()]
    models[1].load_state_dict(models[0].state_dict())
    x, y = data()
    mask = (torch.arange(8) < torch.randint(2, 9, (28, 1))).long()
    corpus = {"x": x, "attention_mask": mask, "labels": y}
    for settings in ({}, {"convention": "reduce"}, {"kind": "ekfac"}):
        found, wanted = (fitted(model, corpus, size, **settings) for model in models)
        alike(found, wanted)
        assert bool(found.record["one_sample_at_a_time"]) == (size > 1)
        assert not wanted.record["one_sample_at_a_time"]


class Unfelt(nn.Module):
    """A layer of which nothing but rounding reaches the loss."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        t = self.first(x)
        return self.head((torch.tanh(x) + 0.1 * t + 0.2 * t - 0.3 * t).mean(1))


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_gradients_of_rounding_alone_mix_nothing(kind):
    torch.manual_seed(0)
    x, y = data()
    factors = fitted(Unfelt().eval(), (x.float(), y), 8, kind=kind)
    assert 0 < factors.blocks["first.weight"].rows.trace < 1e-10 * factors.blocks["head.weight"].rows.trace
    assert not factors.record["one_sample_at_a_time"]


@pytest.mark.parametrize("settings", SETTINGS)
def test_positions_that_samples_share_are_each_ones_own(settings):
    """Embeddings of positions, of ragged texts: together, and as if one by one."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=60, **sizes)).double().eval()
    texts = [{"input_ids": text["input_ids"]} for text in language_model()[1]]
    alone, batched = (fitted(model, texts, n, loss="causal_lm", **settings) for n in (1, 7))
    assert "transformer.wpe.weight" in batched.blocks and not batched.record["one_sample_at_a_time"]
    alike(batched, alone)


def test_positions_of_a_model_that_keeps_samples_elsewhere():
    torch.manual_seed(0)
    model = Placed().double().eval()
    alone, batched = (fitted(model, data(), n) for n in (1, 8))
    alike(batched, alone)
    assert batched.record["one_sample_at_a_time"]


class MaskedClasses(nn.Module):
    """The last of 5 classes is never there; with ``centred`` samples depend on others, in a way no gradient shows."""

    def __init__(self, fill, centred=False):
        super().__init__()
        self.first, self.head, self.fill, self.centred = nn.Linear(6, 5), nn.Linear(5, 5), fill, centred

    def forward(self, x):
        z = self.head(torch.tanh(self.first(x)))
        z = z - 0.1 * z.detach().mean(0) if self.centred else z
        return z.masked_fill(torch.arange(5) == 4, self.fill)


FILLS = [float("-inf"), torch.finfo(torch.float32).min, -1e9, -1e4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("settings", [{"convention": "reduce"}, {"kind": "ekfac"}])
def test_masked_classes_neither_mix_samples_nor_hide_that_others_do(settings, fill, dtype):
    torch.manual_seed(0)
    x, y = data()
    corpus = x[:20].mean(1).to(dtype), y[:20]
    for centred in (False, True):
        model = MaskedClasses(fill, centred).to(dtype).eval()
        alone, batched = (fitted(model, corpus, n, dtype=torch.float64, **settings) for n in (1, 8))
        assert bool(batched.record["one_sample_at_a_time"]) == centred
        if dtype == torch.float64:
            alike(batched, alone)


@pytest.mark.parametrize("one, other", [([1.0, -INF], [1.0, INF]), ([1.0, 2.0], [1.0, INF]), ([NAN, 1.0], [NAN, 1.0])])
def test_infinities_of_another_sign_and_nans_are_not_alike(one, other):
    one, other = torch.tensor([one]), torch.tensor([other])
    assert not _same(one, other, torch.cat([other, one]))
    assert not _same(other, one, torch.cat([other, one]))


def test_a_sample_whose_one_number_is_near_zero_is_judged_by_those_of_others():
    among = torch.tensor([[1e-6], [1.0], [-2.0], [0.5]])
    assert _same(torch.tensor([[2e-6]]), among[:1], among)
    assert not _same(torch.tensor([[1e-2]]), among[:1], among)


class Patches(nn.Module):
    """Images, whose patches and one token more have places."""

    def __init__(self):
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, 6, 4, 4), nn.Parameter(torch.randn(1, 1, 6))
        self.places, self.head = nn.Embedding(7, 6), nn.Linear(6, 4)

    def forward(self, x):
        t = torch.cat([self.token.expand(len(x), 1, 6), self.patch(x).flatten(2).mT], 1)
        return self.head(torch.tanh(t + self.places(torch.arange(5) + 2)).mean(1))


class Prototypes(nn.Module):
    """Classes that have an embedding each; as many copies of it would make logits of another shape."""

    def __init__(self):
        super().__init__()
        self.first, self.classes = nn.Linear(192, 6), nn.Embedding(4, 6)

    def forward(self, x):
        return torch.tanh(self.first(x.flatten(1))) @ self.classes(torch.arange(4)).mT


class Numbered(nn.Module):
    """Words of all samples in one row, which may count up."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(90, 6), nn.Linear(6, 4)

    def forward(self, ids):
        return self.head(torch.tanh(self.words(ids.reshape(-1))).view(len(ids), -1, 6).mean(1))


@pytest.mark.parametrize("size", [5, 8])  # there are 5 places
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("model", [Patches, Prototypes])
def test_places_of_images_are_each_ones_own_where_a_model_can_take_them_so(model, settings, size):
    torch.manual_seed(0)
    model, corpus = model().double().eval(), (torch.randn(28, 3, 8, 8).double(), torch.randint(0, 4, (28,)))
    alone, batched = (fitted(model, corpus, n, **settings) for n in (1, size))
    assert bool(batched.record["one_sample_at_a_time"]) == isinstance(model, Prototypes)
    alike(batched, alone)


@pytest.mark.parametrize("words", [1, 3])
@pytest.mark.parametrize("settings", SETTINGS)
def test_words_that_count_up_in_a_later_batch_are_no_places(settings, words):
    torch.manual_seed(0)
    model, ids = Numbered().double().eval(), torch.arange(28 * words).view(28, words)
    ids[:8] = ids[:8].flip(0)
    alone, batched = (fitted(model, (ids, torch.arange(28) % 4), n, **settings) for n in (1, 8))
    alike(batched, alone)
    assert not batched.record["one_sample_at_a_time"]
    assert batched.record["mean_loss"] == pytest.approx(alone.record["mean_loss"], rel=1e-12)


@pytest.mark.parametrize("settings", [{}, {"kind": "ekfac"}])  # reduced gradients of attention's keys are rounding
def test_a_weight_that_samples_share_can_be_left_out(settings):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=30, **sizes)).double().eval()
    corpus = {"input_ids": torch.randint(1, 30, (20, 6)), "labels": torch.randint(1, 30, (20, 4))}
    for params in (None, lambda name: "relative_attention_bias" not in name):
        options = {"loss": "seq2seq", "params": params, **settings}
        alone, batched = (fitted(model, corpus, n, **options) for n in (1, 7))
        assert ("relative_attention_bias" in batched.record["one_sample_at_a_time"]) == (params is None)
        assert bool(batched.record["one_sample_at_a_time"]) == (params is None)
        alike(batched, alone)
