"""``method="released"`` against the literal transcription of the published protocol: same ranks, same |delta|."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import finf_fast as ff
from finf_fast.mirrors import mirror, mirrors_of
from finf_fast.update import Update
from released_transcription import tell

pytestmark = pytest.mark.usefixtures("one_thread")

TRAIN = 240  # samples, scored by each of the eight queries twice
# Of |delta|, relative to the largest; and how many ranks must agree: in float32 the smallest scores lie too close.
BOUNDS = [(torch.float32, 1e-5, 20), (torch.float64, 1e-12, TRAIN)]


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels[:TRAIN], dtype=torch.float64).view(-1, 1, 8, 8)
    return (x - x.mean()) / x.std(), torch.tensor(labels[:TRAIN])


@pytest.fixture(scope="module")
def net(digits) -> nn.Module:
    """A batch-norm net that knows many of its samples by heart, some not.

    Trained in float64, so that it is the same net on any machine to many digits.
    """
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.Conv2d(12, 16, 3, stride=2, padding=1, bias=False)]
    norms = [nn.BatchNorm2d(12), nn.BatchNorm2d(16)]
    model = nn.Sequential(
        *(layer for pair in zip(convolutions, norms, strict=True) for layer in (*pair, nn.ReLU())),
        nn.Flatten(),
        nn.Linear(256, 10),
    ).double()
    x, y = digits
    adam = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(12):
        for rows in torch.randperm(TRAIN).split(40):
            adam.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            adam.step()
    return model.float().eval()


@torch.no_grad()
def scores_of(model: nn.Module, update: Update, x: Tensor, y: Tensor, buffers: bool = True) -> Tensor:
    """(S,) |loss after - loss before| in eval mode, by torch's own functional call."""
    model = copy.deepcopy(model).eval()
    after = {name: p + update.params[name] for name, p in model.named_parameters()}
    after |= update.buffers if buffers else {}
    z0, z1 = model(x), torch.func.functional_call(model, after, x)
    return (F.cross_entropy(z1, y, reduction="none") - F.cross_entropy(z0, y, reduction="none")).abs()


@pytest.mark.parametrize("dtype, bound, ranks", BOUNDS)
def test_the_same_scores_and_ranks_as_the_transcription(net, digits, dtype, bound, ranks):
    net, x, y = copy.deepcopy(net).to(dtype), digits[0].to(dtype), digits[1]
    radii = []
    for q in range(8):
        torch.manual_seed(100 + q)
        told = tell(net, x[q : q + 1], y[q : q + 1], x, y)
        update = mirror(net, (x[q : q + 1], y[q : q + 1]), method="released", seed=100 + q)
        scores = scores_of(net, update, x, y)
        assert (scores - told.scores).abs().max() <= bound * told.scores.max()
        assert torch.equal(scores.topk(ranks).indices, told.scores.topk(ranks).indices)
        assert update.record.get("radius") == told.radius
        assert update.record["fallback"] == (told.radius is not None)
        radii.append(told.radius)
    assert None in radii  # the cases are all met: not moved,
    assert 3.0 in radii  # moved once,
    assert any(radius is not None and radius > 3.0 for radius in radii)  # and moved further


@pytest.mark.parametrize("dtype, bound, ranks", BOUNDS)
def test_the_whole_line_gives_the_transcription_too(net, digits, dtype, bound, ranks):
    net, x, y = copy.deepcopy(net).to(dtype), digits[0].to(dtype), digits[1]
    scores = ff.forward_inf(net, (x, y), (x[:4], y[:4]), method="released", seed=100)
    for q, delta in enumerate(torch.tensor(scores.delta)):
        torch.manual_seed(100 + q)
        told = tell(net, x[q : q + 1], y[q : q + 1], x, y).scores
        assert (delta.abs() - told).abs().max() <= bound * told.max()
        assert torch.equal(delta.abs().topk(ranks).indices, told.topk(ranks).indices)


def test_the_statistics_travel_and_matter(net, digits):
    x, y = digits[0].float(), digits[1]
    update = mirror(net, (x[:1], y[:1]), method="released", seed=0)
    assert update.buffers.keys() == dict(net.named_buffers()).keys()
    assert all(int(update.buffers[f"{layer}.num_batches_tracked"]) == 12 * 6 + 1 for layer in (1, 4))  # one forward
    with_them, without = (scores_of(net, update, x, y, buffers) for buffers in (True, False))
    assert (with_them - without).abs().max() > 1e-2 * with_them.max()


def test_the_record_tells_what_happened(net, digits):
    x, y = digits[0], digits[1]
    update = mirror(net, (x[:1], y[:1]), method="released", seed=3)
    record = json.loads(json.dumps(dict(update.record)))
    assert record["method"] == "released" and record["mode"] == "train" and record["lr"] == 5e-3
    assert record["fallback"] and record["loss_unmoved"] < 0.01 and record["loss_before"] >= 0.02
    assert record["radius"] == pytest.approx(3.0 * 1.1 ** (record["tries"] - 1))
    assert record["loss_after"] > record["loss_before"] and record["seed"] == 3


def test_a_seed_repeats_the_draw_and_leaves_the_global_one_alone(net, digits):
    query = digits[0][:1], digits[1][:1]
    before = torch.get_rng_state()
    first, again, other = (mirror(net, query, method="released", seed=seed) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    torch.manual_seed(7)
    assert mirror(net, query, method="released").fingerprint == first.fingerprint


def test_query_q_of_many_is_repeated_alone_by_the_seed_in_its_record(net, digits):
    x, y = digits[0][:3], digits[1][:3]
    for q, update in enumerate(mirrors_of(net, (x, y), method="released", seed=20)):
        assert update.record["seed"] == 20 + q
        alone = mirror(net, (x[q : q + 1], y[q : q + 1]), method="released", seed=20 + q)
        assert alone.fingerprint == update.fingerprint


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"mode": "eval"}, "mode: method='released' wants 'train', got 'eval'"),
        ({"direction": "descent"}, "direction: method='released' wants 'ascent'"),
        ({"steps": 2}, "steps: method='released' wants 1, got 2"),
        ({"weight_decay": 0.1}, "weight_decay: method='released' wants 0.0"),
        ({"betas": (0.5, 0.9)}, "betas: method='released' wants"),
        ({"params": "*"}, "params: method='released' steps every parameter"),
        ({"loss": "squared_error"}, "loss: method='released' wants a cross-entropy, got 'squared_error'"),
        ({"tries": 0}, "tries: wanted a whole number, at least 1, got 0"),
    ],
)
def test_what_the_protocol_fixes_stays_fixed(net, digits, settings, message):
    with pytest.raises(ValueError, match=message):
        mirror(net, (digits[0][:1], digits[1][:1]), method="released", **settings)


class Sure(nn.Module):
    """Always right and always certain, whatever it reads."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([30.0, 0.0, 0.0]))

    def forward(self, x):
        return self.bias + 0 * x.flatten(1).float().sum(1, keepdim=True)


def test_a_loss_that_never_grows_ends_in_an_error():
    with pytest.raises(ValueError, match=r"query 'calm': wanted a loss of at least 0.02 .* 5 tries, at radius 4.39"):
        mirror(Sure(), (torch.ones(1, 4), [0]), method="released", tries=5, name="calm")


def test_token_ids_cannot_be_moved():
    with pytest.raises(ValueError, match=r"wanted one that is floating-point, got \['torch.int64'\]"):
        mirror(Sure(), (torch.ones(1, 4, dtype=torch.long), [0]), method="released")


class Steep(nn.Module):
    """Knows x = 1 by heart, and nothing else; called as Hugging Face calls an image model."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, pixel_values):
        far = (pixel_values - 1).flatten(1).norm(dim=1)
        return torch.stack([self.scale * (1 - far / 2), torch.zeros_like(far)], 1)


def test_a_dict_of_pixels_is_moved_row_by_row():
    batch = {"pixel_values": torch.ones(2, 1, 2, 2), "labels": [0, 0]}
    update = mirror(Steep(), batch, method="released", seed=0)
    assert update.record["fallback"] and update.record["radius"] == 3.0
    z = 10 * (1 - 3.0 / 2)  # every row stands exactly 3 away
    assert update.record["loss_before"] == pytest.approx(F.softplus(torch.tensor(-z)).item(), rel=1e-5)
