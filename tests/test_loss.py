"""Every loss: its plain form against torch's own, its change against two plain evaluations, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from finf_fast import loss as losses
from finf_fast.loss.entropy import _drawn
from finf_fast.records import BadSample

torch.manual_seed(0)


def changed(value, count=3, size=0.1):
    generator = torch.Generator().manual_seed(1)
    return size * torch.randn(count, *value.shape, dtype=value.dtype, generator=generator)


def fixed(output):
    """A model that answers with these logits whatever it is asked."""
    return lambda *args, **kwargs: output


def truth(loss, value, change, batch):
    before = loss.per_sample(fixed(raw(loss, value)), batch)
    after = torch.stack([loss.per_sample(fixed(raw(loss, value + row)), batch) for row in change])
    return before, after - before


def raw(loss, value):
    """The logits as a model gives them: dense classification has its classes in dimension 1."""
    dense = type(loss) is losses.CrossEntropy and value.dim() > 2
    return value.movedim(-1, 1) if dense else value


def cases():
    ids = torch.randint(0, 11, (4, 6))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    few = torch.full_like(ids, -100)
    few[:, 2] = ids[:, 2]
    y, z = torch.tensor([0, 3, -100, 10]), torch.randn(4, 11, dtype=torch.float64)
    tokens = torch.randn(4, 6, 11, dtype=torch.float64)
    image = torch.randint(0, 11, (4, 2, 3))
    yield "classes", losses.CrossEntropy("sum"), z, (z, y)
    yield "smooth", losses.CrossEntropy("sum", label_smoothing=0.2), z, (z, y)
    yield "pixels", losses.CrossEntropy(), torch.randn(4, 2, 3, 11, dtype=torch.float64), (z, image)
    yield "ids", losses.CausalLM(), tokens, ids
    yield "ids in a tuple", losses.CausalLM("sum"), tokens, (ids,)
    yield "padded", losses.CausalLM(), tokens, {"input_ids": ids, "attention_mask": mask}
    yield "labelled", losses.CausalLM(), tokens, {"input_ids": ids, "labels": labels}
    yield "masked", losses.MaskedLM(), tokens, {"input_ids": ids, "labels": few}
    yield "seq2seq", losses.Seq2Seq(), tokens, {"input_ids": ids, "decoder_input_ids": ids, "labels": labels}
    yield "squared", losses.SquaredError(), tokens, (ids, torch.randn(4, 6, 11, dtype=torch.float64))
    yield "squared sum", losses.SquaredError("sum"), z[:, :1], (z, torch.randn(4, dtype=torch.float64))


@pytest.mark.parametrize("name, loss, value, batch", list(cases()), ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_value_and_change_match_two_plain_evaluations(name, loss, value, batch, dtype, bound):
    change = changed(value)
    before, delta = truth(loss, value, change, batch)
    got = loss.finish(value.to(dtype), change.to(dtype), batch)
    assert got.base.dtype == dtype
    torch.testing.assert_close(got.base.double(), before, atol=bound, rtol=0, equal_nan=True)
    torch.testing.assert_close(got.delta.double(), delta, atol=bound, rtol=0, equal_nan=True)
    assert delta.abs().nan_to_num().max() > 1e-3  # the check has something to see


def test_causal_lm_is_hugging_face_s_loss():
    ids, z = torch.randint(0, 11, (1, 6)), torch.randn(1, 6, 11, dtype=torch.float64)
    wanted = F.cross_entropy(z[:, :-1].reshape(-1, 11), ids[:, 1:].reshape(-1))
    got = losses.CausalLM().finish(z, changed(z), ids).base
    torch.testing.assert_close(got[0], wanted, atol=1e-14, rtol=0)


def test_a_small_change_survives_float32():
    """1e-7 of change in logits of size 4: two float32 losses subtracted keep no digit of it."""
    z = 4 * torch.randn(64, 50, dtype=torch.float64)
    change, y = changed(z, 2, 1e-7), torch.randint(0, 50, (64,))
    z, change = z.float().double(), change.float().double()
    loss = losses.CrossEntropy()
    sharp = (
        torch.softmax(z, 1).mul(change - change.gather(2, y.expand(2, -1)[..., None])).sum(2)
    )  # first order: error 1e-14
    got = loss.finish(z.float(), change.float(), (z, y)).delta.double()
    assert (got - sharp).norm() / sharp.norm() < 1e-5


def test_an_empty_sample_is_said_so():
    loss, z = losses.CausalLM(), torch.randn(2, 3, 5)
    labels = torch.tensor([[1, 2, 3], [-100, -100, -100]])
    got = loss.finish(z, changed(z), {"input_ids": labels.clamp(min=0), "labels": labels})
    assert got.empty.tolist() == [False, True]
    assert got.base.isnan().tolist() == [False, True] and got.delta.isnan().any(0).tolist() == [False, True]
    total = losses.CausalLM("sum").finish(z, changed(z), {"input_ids": labels.clamp(min=0), "labels": labels})
    assert total.base[1] == 0 and (total.delta[:, 1] == 0).all()


def test_tokens_add_up_to_the_sample():
    loss, z, ids = losses.CausalLM("sum", per_token=True), torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    got = loss.finish(z, changed(z), ids)
    assert got.token_base.shape == (2, 5) and got.token_delta.shape == (3, 2, 5)
    assert got.token_base[:, -1].isnan().all()  # nothing follows the last token
    torch.testing.assert_close(got.token_base.nan_to_num().sum(1), got.base)
    torch.testing.assert_close(got.token_delta.nan_to_num().sum(2), got.delta)


@pytest.mark.parametrize(
    "loss, batch, row, words",
    [
        (losses.CrossEntropy(), (torch.zeros(3, 2), torch.tensor([0, 4, 9])), 1, r"label wanted in \[0, 4\).*got 4"),
        (losses.CrossEntropy(), (torch.zeros(3, 2), torch.tensor([0, -100, -1])), 2, "got -1"),
        (losses.CausalLM(), torch.tensor([[0, 1], [2, 70]]), 1, r"token id wanted in \[0, 9\), got 70"),
        (
            losses.MaskedLM(),
            {"input_ids": torch.tensor([[9]]), "labels": torch.tensor([[0]])},
            0,
            "input_ids: token id",
        ),
    ],
)
def test_values_out_of_range_name_the_row(loss, batch, row, words):
    with pytest.raises(BadSample, match=words) as caught:
        loss.check(batch, 4 if not isinstance(loss, losses.CausalLM) else 9, 9)
    assert caught.value.row == row


def test_values_in_range_pass():
    losses.CrossEntropy().check((torch.zeros(2, 2), torch.tensor([3, -100])), 4, None)
    losses.CausalLM().check(torch.tensor([[0, 8]]), 9, None)


def test_a_loss_of_one_s_own_may_be_made_of_torch_s():
    class Own(torch.nn.CrossEntropyLoss):
        def forward(self, model, batch):
            return super().forward(model(batch[0]), batch[1])

    assert isinstance(losses.resolve(Own(reduction="none")), losses.Custom)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: losses.resolve("cross_entrpy"), ValueError, "wanted one of cross_entropy"),
        (lambda: losses.resolve(3), TypeError, "loss: wanted a name"),
        (
            lambda: losses.resolve(torch.nn.CrossEntropyLoss(reduction="none")),
            TypeError,
            "loss: .* which takes outputs",
        ),
        (lambda: losses.resolve(F.cross_entropy), TypeError, "loss: .* which takes outputs"),
        (lambda: losses.CrossEntropy("median"), ValueError, "reduction"),
        (lambda: losses.CrossEntropy(label_smoothing=2), ValueError, "label_smoothing"),
        (lambda: losses.SquaredError("x"), ValueError, "reduction"),
        (lambda: losses.CrossEntropy().target((torch.zeros(2), torch.zeros(2))), TypeError, "class indices"),
        (lambda: losses.CrossEntropy().target(torch.zeros(2)), ValueError, "wants a target"),
        (lambda: losses.CausalLM().target(torch.zeros(2, 3)), ValueError, "wants token ids"),
        (lambda: losses.Seq2Seq().output(fixed(None), (torch.zeros(1),)), ValueError, "seq2seq wants a dict"),
        (
            lambda: losses.CrossEntropy().output(fixed("hm"), (torch.zeros(1), 0)),
            TypeError,
            "model: wanted it to return",
        ),
        (
            lambda: losses.CausalLM().output(fixed(torch.zeros(2, 3)), torch.zeros(2, 3).long()),
            ValueError,
            "token logits",
        ),
    ],
)
def test_what_a_loss_refuses(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_callable_must_answer_per_sample():
    with pytest.raises(ValueError, match="one loss per sample"):
        losses.resolve(lambda model, batch: batch[0].sum()).output(None, (torch.ones(3),))
    got = losses.resolve(lambda model, batch: batch[0] * 2).output(None, (torch.ones(3),))
    assert got.tolist() == [2, 2, 2]


def test_no_masked_class_is_drawn_where_the_uniform_number_rounds_to_one():
    z = torch.tensor([[0.0, 1.0, -torch.inf]]).expand(3, 3)
    drawn = _drawn(z, torch.tensor([-9.0, 5.6, 9.0]))
    assert drawn.tolist() == [0, 1, 1]
