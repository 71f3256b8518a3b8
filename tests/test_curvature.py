"""Curvature factors against their definition, and the steps made with them against dense algebra."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import finf_fast as ff
from curvature_cases import drawn_gradients, second_moment
from finf_fast import loss as losses
from finf_fast import ops
from finf_fast.lowrank import dense
from finf_fast.mirrors.watch import Watch, patches
from finf_fast.skeleton import Skeleton
from nets import conv_net, language_model, mlp, plain_losses

pytestmark = pytest.mark.usefixtures("one_thread")


def test_factors_of_an_mlp_are_their_definition():
    model, (x, y) = mlp()
    factors = ff.fit_factors(model, (x, y), batch_size=7)
    found = drawn_gradients(model, losses.CrossEntropy(), (x, y), range(len(x)))
    inputs = {"0.weight": x, "3.weight": model[2](model[1](model[0](x))).detach()}
    for name, a in inputs.items():
        block = factors.blocks[name]
        assert block.bias == name.replace("weight", "bias")
        ones = torch.cat([a, torch.ones(len(a), 1).double()], 1)
        assert torch.allclose(block.cols.values, second_moment(ones), rtol=1e-10)
        assert torch.allclose(block.rows.values, second_moment(found[block.bias]), rtol=1e-9, atol=1e-14)
    assert set(factors.left) == {"2.weight", "2.bias"}


def dense_step(block, gradient, bias, damping):
    """(R + r I)⁻¹ [G g] (C + c I)⁻¹ with the inverses written out."""
    whole = gradient.flatten(1)
    if block.bias is not None:
        whole = torch.cat([whole, bias[None]]) if block.turned else torch.cat([whole, bias[:, None]], 1)
    sides = []
    for side in (block.rows, block.cols):
        matrix = torch.diag(side.values) if side.is_diagonal else side.values
        shift = damping**0.5 * matrix.trace() / len(matrix)
        sides.append(torch.linalg.inv(matrix + shift * torch.eye(len(matrix), dtype=matrix.dtype)))
    step = sides[0] @ whole @ sides[1]
    if block.bias is None:
        return step.view(gradient.shape), None
    weight, last = (step[:-1], step[-1]) if block.turned else (step[:, :-1], step[:, -1])
    return weight.reshape(gradient.shape), last


def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=23, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    model = transformers.GPT2LMHeadModel(config).double().eval()
    ids = torch.randint(0, 23, (20, 9))
    return model, {"input_ids": ids}


def cases():
    model, data = language_model()
    rows = {key: torch.stack([data[i][key][:4] for i in (3, 9, 10)]) for key in data[0]}
    return {
        "mlp": (*mlp(), "cross_entropy"),
        "conv": (*conv_net(), "cross_entropy"),
        "lm": (model, rows, "causal_lm"),
        "gpt2": (*gpt2(), "causal_lm"),
    }


@pytest.mark.parametrize("case", ["mlp", "conv", "lm", "gpt2"])
@pytest.mark.parametrize("limit", [8192, 12])
def test_the_low_rank_step_is_the_dense_one(case, limit):
    model, batch, loss = cases()[case]
    factors = ff.fit_factors(model, batch, loss=loss, limit=limit)
    query = {k: v[:2] for k, v in batch.items()} if isinstance(batch, dict) else tuple(v[:2] for v in batch)
    update = ff.mirror(model, query, loss=loss, method="kfac", factors=factors, damping=1e-2, lr=1.0)
    named = dict(model.named_parameters())
    total = losses.resolve(loss).per_sample(model, query).mean()
    gradients = dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))
    assert len(factors.blocks) >= 2
    for name, block in factors.blocks.items():
        weight, bias = dense_step(block, gradients[name], gradients.get(block.bias), 1e-2)
        assert (dense(update.params[name]) - weight).norm() <= 1e-9 * weight.norm(), name
        if block.bias is not None:
            assert (dense(update.params[block.bias]) - bias).norm() <= 1e-9 * bias.norm(), name
    assert not set(update.params) & set(factors.left)


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
@pytest.mark.parametrize("case", ["mlp", "conv", "lm"])
def test_the_predicted_change_is_the_change(case, method):
    model, batch, loss = cases()[case]
    factors = ff.fit_factors(model, batch, loss=loss, kind="ekfac")
    query = {k: v[:1] for k, v in batch.items()} if isinstance(batch, dict) else tuple(v[:1] for v in batch)
    for direction in ("ascent", "descent"):
        options = {"size": 1e-5, "factors": factors, "direction": direction}
        update = ff.mirror(model, query, loss=loss, method=method, **options)
        resolved = losses.resolve(loss)
        after, before = (plain_losses(model, u, resolved, query).item() for u in (update, None))
        assert after - before == pytest.approx(update.record["predicted_change"], rel=2e-2)
        assert (after > before) == (direction == "ascent")
        json.dumps(dict(update.record))


def test_convolutions_by_their_definition():
    model, (x, y) = conv_net()
    factors = ff.fit_factors(model, (x, y), batch_size=9)
    block = factors.blocks["b.weight"]
    rows = F.unfold(torch.relu(model.norm_a(model.a(x))).detach(), 3, padding=1).transpose(1, 2).reshape(-1, 72)
    ones = torch.cat([rows, torch.ones(len(rows), 1).double()], 1)
    assert torch.allclose(block.cols.values, second_moment(ones), rtol=1e-10)
    biases = drawn_gradients(model, losses.CrossEntropy(), (x, y), range(len(x)))["norm_head.bias"]
    assert biases.abs().max() > 0 and factors.blocks["head.weight"].rows.size == 6


@pytest.mark.parametrize("stride, padding, dilation", [(1, 0, 1), (2, 1, 1), (1, "same", 2), (3, (2, 1), (1, 2))])
def test_patches_are_what_a_convolution_multiplies(stride, padding, dilation):
    x, kernel = torch.randn(3, 4, 9, 8).double(), torch.randn(5, 4, 3, 2).double()
    found = patches(x, kernel.shape[2:], stride, padding, dilation) @ kernel.flatten(1).T
    wanted = F.conv2d(x, kernel, None, stride, padding, dilation)
    assert torch.allclose(found.view(3, -1, 5).mT.reshape(wanted.shape), wanted, atol=1e-12)


def test_tokens_expanded_and_reduced():
    """A linear layer over (B, R, D), with a mask: R positions a sample, of which some are padding."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(6, 5), nn.Linear(5, 4)

        def forward(self, x, attention_mask):
            here = attention_mask[..., None].to(x.dtype)
            return self.head((torch.tanh(self.layer(x)) * here).sum(1))

    torch.manual_seed(0)
    model, x = Tokens().double(), torch.randn(12, 7, 6).double()
    mask = (torch.arange(7) < torch.randint(2, 8, (12, 1))).long()
    batch = {"x": x, "attention_mask": mask, "labels": torch.randint(0, 4, (12,))}
    hidden = torch.tanh(model.layer(x)).detach().requires_grad_()
    value = model.head((hidden * mask[..., None]).sum(1))
    noise = ops.noise(0, torch.arange(12), 0, (1,))
    (g,) = torch.autograd.grad(losses.CrossEntropy().fisher(value, batch, lambda shape: noise).sum(), hidden)
    g = g * (1 - hidden.detach().square())
    ones = torch.cat([x, torch.ones(12, 7, 1).double()], 2)
    kept = mask.bool()
    for convention in ("expand", "reduce"):
        block = ff.fit_factors(model, batch, convention=convention, batch_size=5).blocks["layer.weight"]
        if convention == "expand":
            inputs, outputs = second_moment(ones[kept]), g[kept].T @ g[kept] / 12
        else:
            means = (ones * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            inputs, outputs = second_moment(means), second_moment((g * mask[..., None]).sum(1))
        assert torch.allclose(block.cols.values, inputs, rtol=1e-10)
        assert torch.allclose(block.rows.values, outputs, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("case", ["mlp", "conv", "gpt2"])
def test_the_spectrum_is_that_of_samples_gradients(case):
    model, batch, loss = cases()[case]
    factors = ff.fit_factors(model, batch, loss=loss, kind="ekfac", batch_size=6)
    whole = batch if isinstance(batch, dict) else {"": batch[0]}
    found = drawn_gradients(model, losses.resolve(loss), batch, range(len(next(iter(whole.values())))))
    exact = [name for name, block in factors.blocks.items() if "embedding" not in block.uses]
    assert len(exact) >= 2
    for name in exact:
        block = factors.blocks[name]
        gradients = found[name].flatten(2)
        if block.bias is not None:
            last = found[block.bias]
            gradients = torch.cat(
                [gradients, last[:, None] if block.turned else last[..., None]], 1 + (not block.turned)
            )
        left, right = block.eigenbasis()
        turned = left.T @ gradients @ right
        assert torch.allclose(turned.square().mean(0), block.spectrum, rtol=1e-7, atol=1e-12 * block.spectrum.max())
        both = torch.kron(left, right)
        flat = gradients.flatten(1)
        assert torch.allclose((flat @ both).square().mean(0).view(turned.shape[1:]), block.spectrum, atol=1e-10)


def test_an_ekfac_step_is_the_dense_one():
    model, (x, y) = mlp()
    factors = ff.fit_factors(model, (x, y), kind="ekfac")
    update = ff.mirror(model, (x[:2], y[:2]), method="ekfac", factors=factors, damping=0.05, lr=1.0)
    named = dict(model.named_parameters())
    total = F.cross_entropy(model(x[:2]), y[:2])
    gradients = dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))
    for name, block in factors.blocks.items():
        whole = torch.cat([gradients[name], gradients[block.bias][:, None]], 1)
        vectors = torch.kron(*block.eigenbasis())
        matrix = vectors @ torch.diag(block.spectrum.flatten() + 0.05 * block.spectrum.mean()) @ vectors.T
        step = torch.linalg.solve(matrix, whole.flatten()).view(whole.shape)
        assert torch.allclose(update.params[name], step[:, :-1], rtol=1e-8, atol=1e-12 * step.abs().max())
        assert torch.allclose(update.params[block.bias], step[:, -1], rtol=1e-8, atol=1e-12 * step.abs().max())


def test_batches_dtypes_and_the_seed():
    model, (x, y) = mlp()
    one, other = (ff.fit_factors(model, (x, y), batch_size=size).blocks["0.weight"] for size in (60, 7))
    assert torch.allclose(one.rows.values, other.rows.values, rtol=1e-10)
    again, moved = (ff.fit_factors(model, (x, y), seed=seed).blocks["0.weight"] for seed in (0, 1))
    assert torch.equal(one.rows.values, again.rows.values) and not torch.allclose(one.rows.values, moved.rows.values)
    narrow = ff.fit_factors(model.float(), (x.float(), y)).blocks["0.weight"]
    wide = ff.fit_factors(model, (x.float(), y), dtype=torch.float64).blocks["0.weight"]
    assert narrow.rows.values.dtype == torch.float32 and wide.rows.values.dtype == torch.float64
    assert torch.allclose(narrow.rows.values.double(), wide.rows.values, rtol=1e-4, atol=1e-8)


def test_a_sample_of_the_corpus_is_evenly_drawn():
    model, (x, y) = mlp()
    fitted = ff.fit_factors(model, (x, y), samples=20, kind="cg")
    taken = torch.cat([batch[0] for batch in fitted.batches])
    places = [int((x == row).all(1).nonzero()) for row in taken]
    assert [place // 3 for place in places] == list(range(20)) and len({place % 3 for place in places}) > 1
    assert fitted.record["samples"] == 20 and fitted.record["of"] == 60
    with pytest.raises(ValueError, match="samples: wanted at most the corpus' 60, got 61"):
        ff.fit_factors(model, (x, y), samples=61)


def test_self_attention_is_written_out_as_torch_computes_it():
    torch.manual_seed(0)
    for batch_first in (True, False):
        layer = nn.MultiheadAttention(8, 2, batch_first=batch_first).double().eval()
        x = torch.randn(3, 5, 8).double()
        masks = {"attn_mask": torch.ones(x.shape[1 - (not batch_first)], x.shape[1 - (not batch_first)]).triu(1).bool()}
        body = Skeleton(layer, torch.device("cpu"))
        with Watch(body, [name for name, _ in layer.named_parameters()]) as watch:
            out, weights = body.module(x, x, x, **masks)
        wanted = layer(x, x, x, **masks)
        assert torch.allclose(out, wanted[0], atol=1e-12) and torch.allclose(weights, wanted[1], atol=1e-12)
        assert [use.weight for use in watch.uses] == ["in_proj_weight", "out_proj.weight"]


def test_forward_inf_fits_its_own_factors_and_says_so():
    model, (x, y) = mlp()
    scores = ff.forward_inf(model, (x, y), (x[:3], y[:3]), method="kfac", progress=False)
    assert scores.delta.shape == (3, 60) and abs(scores.delta).max() > 0
    with pytest.raises(ValueError, match=r"factors: method='kfac' wants those of finf_fast.fit_factors.*forward_inf"):
        ff.mirror(model, (x[:1], y[:1]), method="kfac")
