"""linear_cross_entropy_delta on every face and dtype: every form of change, panels, special rows, errors, teeth."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import checks
from checks import LONG, exact, relative
from finf_fast import ops, reference
from finf_fast.ops import dispatch, linear_cross_entropy_delta, linear_cross_entropy_delta_out
from heads import BOUNDS, FORMS, STEPS, Head, check, logits, make_head, truth
from journey import cpu_looks

dtype = checks.face_fixture("linear_cross_entropy_delta")
face = sys.modules["finf_fast.reference.linear_cross_entropy_delta"]


# Accuracy. A lead of 40 is a memorised target: p_t = 1 - 1e-7 or so.
@pytest.mark.parametrize("lead", [0, 40])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("form", FORMS)
def test_change_keeps_its_digits_at_every_step(dtype, form, step, lead):
    if dtype == torch.float16 and step < 1e-4:
        pytest.skip("the change itself is below what float16 holds")
    # Of memorised rows one outweighs the others; d's 2e-3, of d_v and not of d_v - d_t, then stand alone.
    alone = 3 if lead and dtype == torch.bfloat16 else 1
    # A formed logit of 40 is rounded by 2e-6 of itself, once as a product and once more with its bias.
    formed = 2 if lead and "bias" in form and os.environ["FINF_BACKEND"] == "hybrid" else 1
    check(make_head(form, step=step, lead=lead, dtype=dtype), bound=alone * formed * BOUNDS[dtype])


@pytest.mark.parametrize("lead, low, high", [(0, 4, 12), (20, 1e-3, 1e-1), (40, 1e-9, 1e-5)])
def test_memorised_targets_are_memorised(lead, low, high):
    """That the cases above and below are what they say."""
    base, _ = truth(make_head(lead=lead))
    assert low < np.median(base) < high


@pytest.mark.parametrize("by", [-50, -3, -0.7, 0.7, 3, 50])
@pytest.mark.parametrize("lead", [0, 20])
def test_large_changes(dtype, by, lead):
    """The target's own logit moves far, either way: learnt or forgotten at once."""
    head = make_head("bias", step=1e-3, lead=lead, N=6, Q=2, dtype=dtype)
    head.db[1, head.target] += by
    check(head)


@pytest.mark.parametrize("lead", [0, 20])
def test_all_logits_change_far(dtype, lead):
    # Exponents of changes this large carry their size, and bfloat16's 2e-3 of each, into the sums.
    check(make_head("input and dense", step=30, lead=lead, dtype=dtype), bound=max(BOUNDS[dtype], 1e-12) * 2)


def test_some_rows_large_some_small(dtype):
    """Rows whose change is small are walked once, the others twice: neither disturbs the other."""
    head = make_head("input", step=1e-6, N=9, dtype=torch.float64 if dtype == torch.float16 else dtype)
    head.dx[0, ::2] *= 1e7
    _, delta = head.run()
    _, true_delta = truth(head)
    error = np.abs(exact(delta) - true_delta) - 64 * np.finfo(LONG).eps * 20
    assert relative(error[:, 1::2].clip(0), true_delta[:, 1::2], np.ones(4, bool)) < BOUNDS[head.x.dtype]
    assert relative(error[:, ::2].clip(0), true_delta[:, ::2], np.ones(5, bool)) < 2 * BOUNDS[head.x.dtype]


def formed(head: Head) -> tuple[Tensor, Tensor]:
    """The losses of logits and changes formed at once in float32."""
    z, d = F.linear(head.x, head.W), F.linear(head.dx, head.W)
    return ops.cross_entropy_delta(z, d, head.target)


@pytest.mark.parametrize("step", [1e-1, 1e-3, 1e-6])
@pytest.mark.parametrize("lead", [0, 20])
def test_not_worse_than_logits_formed_whole(step, lead):
    head = make_head(step=step, lead=lead, N=64, D=96)
    _, true = truth(head)
    ours, theirs = (relative(np.abs(exact(d[1]) - true), true, head.kept) for d in (head.run(), formed(head)))
    assert ours <= max(2 * theirs, checks.NOISE * 2**-23)


@pytest.mark.parametrize("step", [1e-2, 1e-5])
def test_logits_that_stand_far_off(dtype, step):
    """All near -100, and their changes far from 0 together, as in GPT-2: what all share costs no digits."""
    draw = torch.Generator().manual_seed(5)
    common = torch.randn(24, generator=draw)
    head = make_head(step=step, N=16, dtype=torch.float32)
    x, W, dx = head.x + common, head.W - 5 * common, head.dx + step * common
    head = replace(head, x=x.to(dtype), W=W.to(dtype), dx=dx.to(dtype))
    before, after = logits(head)
    assert -200 < before.mean() < -50 and abs((after - before).mean()) > 5 * (after - before).std(2).mean()
    # In bfloat16 W's own rounding is of the size of the offset, and given; a formed d would be 3e-2 off.
    check(head, bound=6e-3 if dtype == torch.bfloat16 else 6e-6 if dtype != torch.float64 else None)


def test_offset_of_the_bias(dtype):
    head = make_head("input and low rank and bias", step=1e-3, dtype=dtype)
    wide = head.bias.float() if dtype != torch.float64 else head.bias
    base, delta = replace(head, bias=(wide * 64).round() / 64).run()
    far, change = replace(head, bias=(wide * 64).round() / 64 + 2.0**13).run()
    assert torch.equal(base, far) and torch.equal(delta, change)


def test_low_rank_and_dense_agree():
    for step in (1e-1, 1e-5):
        head = make_head("input and low rank", step=step)
        U, V = (f.double() for f in head.dW_factors)
        dense = replace(head, dW_factors=None, dW=(U @ V.mT).float())
        got, wanted = head.run()[1], dense.run()[1]
        assert (got - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_label_smoothing(dtype, form, smoothing):
    for step in (30, 1e-2, 1e-6)[: 2 if dtype == torch.float16 else 3]:
        check(make_head(form, step=step, lead=8, dtype=dtype, label_smoothing=smoothing), bound=3 * BOUNDS[dtype])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("softcap", [2.0, 30.0])
def test_softcap(dtype, form, softcap):
    for step in (3, 1e-2, 1e-6)[: 2 if dtype == torch.float16 else 3]:
        check(make_head(form, step=step, lead=12, dtype=dtype, softcap=softcap), bound=2 * BOUNDS[dtype])


# Panels and blocks: one, exactly one, one more, several, ragged; so on a few numbers instead of 64 MiB of them.
@pytest.fixture
def small_panels(monkeypatch):
    def shrink(panel, block):
        monkeypatch.setattr(face, "PANEL_BYTES", panel)
        monkeypatch.setattr(face, "BLOCK_BYTES", block)
        monkeypatch.setattr(face, "NARROWEST", 64)

    return shrink


@pytest.mark.parametrize("V", [1, 2, 63, 64, 65, 128, 190])
@pytest.mark.parametrize("N, panel, block", [(1, 1, 1), (5, 4096, 1), (5, 4096, 2048), (7, 8192, 1 << 20)])
@pytest.mark.parametrize("form", ["input and dense", "input and low rank and bias"])
def test_panels(dtype, small_panels, N, V, panel, block, form):
    small_panels(panel, block)
    few = 5 if dtype == torch.bfloat16 else 1  # one row, one other column: d_v and d_t may cancel, their 2e-3 do not
    check(make_head(form, N=N, V=V, step=1e-3, dtype=dtype), bound=few * BOUNDS[dtype], by_terms=True)
    spread = make_head(form, N=N, V=V, step=30, lead=6, dtype=dtype, label_smoothing=0.1)
    check(spread, bound=few * BOUNDS[dtype], by_terms=True)


# Edges of the compiled tiles. Strips of 12, 24, 48 columns; panels of 384 at most, 768 where all changes are of the
# input, one strip where rows are long;
# parts of the vocabulary from 4096 on. Groups of 8 rows in halves; blocks of 2048 rows of values and changes. Units of
# one number or of two, packed 4, 8 or 16 at a time.
COLUMNS = [11, 12, 13, 24, 25, 47, 48, 49, 97, 383, 384, 385, 800, 4095, 4096, 4097, 6200]
ROWS = [(7, 1), (8, 1), (9, 2), (15, 1), (17, 3), (127, 15), (128, 15), (129, 15), (300, 15)]
DEPTHS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 129, 2731, 2800]
EVERYTHING = "input and low rank and bias"


def few(dtype):
    """As above: with few rows or columns bfloat16's 2e-3 of each d_v stand alone."""
    return (5 if dtype == torch.bfloat16 else 2) * BOUNDS[dtype]


@pytest.mark.parametrize("V", COLUMNS)
def test_columns(dtype, V):
    for form in (EVERYTHING, "input and dense"):
        check(make_head(form, N=3, D=8, V=V, step=1e-3, dtype=dtype), bound=few(dtype), by_terms=True)
    head = make_head(EVERYTHING, N=3, D=8, V=V, step=30, lead=6, dtype=dtype, label_smoothing=0.1)
    check(head, bound=few(dtype), by_terms=True)
    last = replace(head, target=torch.full((3,), V - 1))
    check(last, bound=few(dtype), by_terms=True)


@pytest.mark.parametrize("V", [767, 768, 769, 1537, 6200])
@pytest.mark.parametrize("Q", [1, 2])
def test_columns_of_whole_groups(dtype, Q, V):
    """Eight rows, whose first changes are formed with their values, panel by panel and part by part, and a ninth."""
    for form in ("input", "input and low rank and bias"):
        check(make_head(form, N=9, D=8, V=V, Q=Q, step=1e-3, dtype=dtype), bound=few(dtype), by_terms=True)
    for options in ({}, {"softcap": 5.0}, {"label_smoothing": 0.1}):
        head = make_head("input", N=9, D=8, V=V, Q=Q, step=3, lead=6, dtype=dtype, **options)
        check(head, bound=few(dtype), by_terms=True)


@pytest.mark.parametrize("form", ["input", "input and dense", EVERYTHING])
def test_a_query_has_its_bits_alone_and_beside_others(form):
    """The reference uses torch's products."""
    three = make_head(form, N=20, D=16, V=1600, Q=3, step=1e-2)
    parts = {name: getattr(three, name) for name in ("dx", "dW", "db") if getattr(three, name) is not None}
    one = replace(three, **{name: x[:1] for name, x in parts.items()})
    if three.dW_factors is not None:
        one = replace(one, dW_factors=tuple(f[:1] for f in three.dW_factors))
    with checks.forced("cpp"):
        (base, delta), (alone, change) = three.run(), one.run()
    assert torch.equal(base, alone) and torch.equal(delta[:1], change)


def test_no_row_of_no_vocabulary():
    """As the compiled face has it; the public one refuses V = 0."""
    x, dx, W, target, bias, db = (0, 4), (0, 0, 0), (0, 4), (0,), (0,), (0, 0)
    dW, U, R, out = (0, 0, 0, 0), (0, 0, 0, 0), (0, 0), (0, 0, 0)
    sizes, options = (0, 4, 0, 1), (0.0, -100, 0.0, 1)
    given = (0, *x, *dx, *W, *target, *bias, *db, *dW, *U, *R, *out, *sizes, *options)
    assert dispatch.compiled().linear_cross_entropy_delta(*given) is None


@pytest.mark.parametrize("N, Q", ROWS)
def test_rows(dtype, N, Q):
    for form in ("input", "input and dense", "low rank"):
        check(make_head(form, N=N, D=5, V=20, Q=Q, step=1e-3, dtype=dtype), bound=few(dtype), by_terms=True)


@pytest.mark.parametrize("Q, D", [(1, 136), (2, 64)])
def test_whole_tiles(dtype, Q, D):
    """Rows of a multiple of 16 bytes, as descriptors need them: blocks of rows, columns and depth, and more of each."""
    head = make_head("input", N=140, D=D, V=300, Q=Q, step=1e-3, dtype=dtype)
    check(replace(head, x=head.x / (D / 24) ** 0.5), bound=few(dtype), by_terms=True)


@pytest.mark.parametrize("form", ["input", "input and dense", EVERYTHING])
def test_without_tensor_descriptors(dtype, monkeypatch, form):
    """As on GPUs before 9.0, where tiles are loaded by addresses."""
    if os.environ["FINF_BACKEND"] != "triton":
        pytest.skip("no other face has any")
    kernels = importlib.import_module("finf_fast.kernels.linear_cross_entropy_delta")
    monkeypatch.setattr(kernels, "has_descriptors", lambda architecture: False)
    check(make_head(form, D=40, V=90, Q=1, step=1e-3, dtype=dtype), bound=few(dtype), by_terms=True)


@pytest.mark.parametrize("D", DEPTHS)
def test_depths(dtype, D):
    for form in ("input and dense", EVERYTHING):
        head = make_head(form, N=2, D=D, V=60, Q=1, r=17, step=1e-3, dtype=dtype)
        head = replace(head, x=head.x / max(1, D / 24) ** 0.5)
        check(head, bound=few(dtype), by_terms=True)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "input and dense"])
def test_the_compiled_face_rounds_no_change(form):
    """In bfloat16 too products add up exact numbers in float32; only x + dx before a dense change is rounded first."""
    for step in (1, 1e-2, 1e-6, 1e-9):
        with checks.forced("cpp"):
            check(make_head(form, N=32, D=64, step=step, dtype=torch.bfloat16), bound=BOUNDS[torch.float32])


def mixed(dtype, form=EVERYTHING) -> Head:
    """Rows for several blocks, columns for several parts; some rows far, some ignored."""
    head = make_head(form, N=700, D=9, V=4500, Q=3, step=1e-2, dtype=dtype, label_smoothing=0.1)
    head.dx[1, ::50] *= 1e4
    head.target[::7] = -100
    return head


@pytest.mark.parametrize("form", ["input", EVERYTHING])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_face_gives_the_same_bits_for_any_number_of_threads(dtype, form):
    """The reference uses torch's products, whose order of sums is torch's affair."""
    threads, head = torch.get_num_threads(), mixed(dtype, form)
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            with checks.forced("cpp"):
                results.append(head.run())
    finally:
        torch.set_num_threads(threads)
    for base, delta in results[1:]:
        assert torch.equal(base, results[0][0]) and torch.equal(delta, results[0][1])


@pytest.mark.parametrize("form", ["input", EVERYTHING])
def test_blocks_and_parts_at_once(form):
    head = mixed(torch.float32, form)
    with checks.forced("reference"):
        base, delta = head.run()
    with checks.forced("cpp"):
        got_base, got_delta = head.run()
    torch.testing.assert_close(got_base, base, rtol=1e-5, atol=0)
    for row, wanted in zip(got_delta, delta, strict=True):
        assert (row - wanted).norm() <= 4e-6 * wanted.norm()


def test_panels_do_not_change_the_result(small_panels):
    head = make_head("input and low rank and bias", step=1e-2, N=20, dtype=torch.float64)
    whole = head.run()
    small_panels(8192, 2048)
    for got, wanted in zip(head.run(), whole, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)


def test_several_panels_as_they_are():
    """With the sizes of real runs: 20,000 columns in panels of 8192 at most."""
    head = make_head("input and low rank", N=9, D=2048, V=20_000, Q=1, step=1e-3)
    wide = [x.double() for x in (head.x, head.dx, head.W, *head.dW_factors)]
    z, x1 = wide[0] @ wide[2].T, wide[0] + wide[1]
    base, delta = ops.cross_entropy_delta(z, wide[1] @ wide[2].T + x1 @ wide[4] @ wide[3].mT, head.target)
    got_base, got_delta = head.run()
    assert face._panel_size(9, 2048, 20_000, 8, 4) == (8192, 1024)
    torch.testing.assert_close(got_base.double(), base, rtol=2e-5, atol=0)
    assert (got_delta - delta).norm() < 4e-6 * delta.norm()


@pytest.mark.parametrize("form", FORMS)
def test_a_device_that_must_not_be_waited_for(dtype, monkeypatch, form):
    """The way other devices go, on this one: no row left out, small and large changes in one walk."""
    cases = [make_head(form, step=step, lead=lead, dtype=dtype) for step in (1e-2, 30) for lead in (0, 20)]
    for head in cases:
        head.target[3] = -100
    seen = [head.run() for head in cases]
    monkeypatch.setattr(face, "_may_look", lambda x: False)
    for head, results in zip(cases, seen, strict=True):
        for got, wanted in zip(head.run(), results, strict=True):
            torch.testing.assert_close(got, wanted, rtol=2 * BOUNDS[dtype], atol=0)


# Special rows and columns.
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_ignored_rows_are_zero_whatever_they_hold(dtype, ignore_index):
    head = make_head("input and low rank", dtype=dtype, ignore_index=ignore_index)
    head.target[2] = head.target[5] = ignore_index
    head.x[2], head.dx[:, 5] = torch.nan, torch.inf
    base, delta = head.run()
    assert base[2] == base[5] == 0 and not delta[:, [2, 5]].any()
    kept = torch.from_numpy(head.kept)
    part = replace(head, x=head.x[kept], dx=head.dx[:, kept], target=head.target[kept])
    check(part)
    torch.testing.assert_close(base[kept], part.run()[0])
    torch.testing.assert_close(delta[:, kept], part.run()[1])


def test_all_rows_ignored_and_none(dtype):
    head = make_head("input and low rank and bias", dtype=dtype)
    base, delta = replace(head, target=torch.full((8,), -100)).run()
    assert base.shape == (8,) and delta.shape == (2, 8) and not base.any() and not delta.any()
    base, delta = make_head("input and low rank and bias", N=0, dtype=dtype).run()
    assert base.shape == (0,) and delta.shape == (2, 0)


def test_nothing_changes(dtype):
    head = make_head("input", dtype=dtype)
    base, delta = replace(head, dx=None).run()
    assert delta.shape == (0, 8) and torch.equal(base, head.run()[0])
    _, delta = replace(head, dx=torch.zeros_like(head.dx)).run()
    assert not delta.any()


@pytest.mark.parametrize("change", [0.0, -torch.inf, 5.0])
def test_masked_columns_count_for_nothing(dtype, change):
    head = make_head("bias", V=90, lead=3, step=1e-3, dtype=dtype)
    masked = torch.ones(90, dtype=torch.bool)
    masked[head.target] = False
    masked[::3] = False
    full = replace(head, bias=head.bias.masked_fill(masked, -torch.inf), db=head.db.masked_fill(masked, change))
    place = torch.searchsorted(torch.arange(90)[~masked], head.target)
    part = replace(head, W=head.W[~masked], bias=head.bias[~masked], db=head.db[:, ~masked], target=place)
    check(part)
    for got, wanted in zip(full.run(), part.run(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=2 * BOUNDS[dtype], atol=BOUNDS[dtype] * 1e-3)


def test_columns_masked_by_a_large_number_take_no_digits():
    head = make_head("bias", step=1e-3)
    masked = torch.arange(600) % 3 > 0
    masked[head.target] = False
    minus = replace(head, bias=head.bias.masked_fill(masked, -1e9))
    infinite = replace(head, bias=head.bias.masked_fill(masked, -torch.inf))
    for got, wanted in zip(minus.run(), infinite.run(), strict=True):
        assert torch.equal(got, wanted)


def test_target_without_any_chance(dtype):
    """A target at -inf costs inf, as in torch."""
    head = make_head("bias", dtype=dtype)
    head.bias[head.target[1]] = -torch.inf
    base, _ = head.run()
    assert base[1] == torch.inf and base.isfinite().sum() == 7


def test_nan_stays_in_its_row(dtype):
    head = make_head(dtype=dtype)
    clean_base, clean_delta = head.run()
    head.x[3, 0] = torch.nan
    head.dx[1, 5, 1] = torch.nan
    base, delta = head.run()
    assert base[3].isnan() and delta[:, 3].isnan().all() and delta[1, 5].isnan()
    others = torch.tensor([0, 1, 2, 4, 6, 7])
    assert torch.equal(base[others], clean_base[others]) and torch.equal(delta[:, others], clean_delta[:, others])
    assert torch.equal(delta[0, 5], clean_delta[0, 5])


# Layouts and the out form.
def test_layouts(dtype):
    head = make_head("input and dense", dtype=dtype)

    def turned(y):
        return y.transpose(0, -1).contiguous().transpose(0, -1)

    check(replace(head, x=turned(head.x), dx=turned(head.dx), W=turned(head.W), dW=turned(head.dW)))


def test_a_change_that_lies_where_the_weight_does():
    """dW = W doubles the layer: their panels are not the same, the weight's is freed of what its rows share."""
    head = make_head(step=0.1)
    check(replace(head, dW=head.W.expand(2, -1, -1)), bound=2 * BOUNDS[torch.float32])


def test_shared_rows(dtype):
    head = make_head("input", dtype=dtype)
    check(replace(head, x=head.x[:1].expand(8, -1), dx=head.dx[:1, :1].expand(2, 8, -1)))


def test_no_depth(dtype):
    """D = 0: the bias is all there is."""
    head = make_head("bias", step=1e-3, dtype=dtype)
    check(replace(head, x=head.x[:, :0], W=head.W[:, :0]))


def test_out_form_writes_into_views(dtype):
    head = make_head("input and low rank", dtype=dtype)
    base, delta = head.run()
    page = torch.full((4, 20), 7.0, dtype=base.dtype)
    linear_cross_entropy_delta_out(head.x, head.dx, head.W, head.target, page[3, 4:12], page[:2, 4:12], **head.options)
    assert torch.equal(page[3, 4:12], base) and torch.equal(page[:2, 4:12], delta)
    assert (page[:, :4] == 7).all() and (page[:, 12:] == 7).all()


def test_a_model_s_parameters_as_they_come():
    """Parameters that ask for gradients, outside torch.no_grad: the same numbers."""
    head = make_head("input and low rank and bias")
    asking = replace(head, W=torch.nn.Parameter(head.W), bias=torch.nn.Parameter(head.bias))
    for got, wanted in zip(asking.run(), head.run(), strict=True):
        assert torch.equal(got.detach(), wanted)


@pytest.mark.parametrize("other", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_changes_of_another_dtype(dtype, other):
    """A float32 update of a bfloat16 head, and all other pairs."""
    bound = BOUNDS[dtype] * (1 if dtype == torch.bfloat16 else 2)
    db = (torch.randn(2, 600) * 1e-3).to(other)
    dense, low = (make_head(form, step=1e-3, dtype=dtype) for form in ("input and dense", "input and low rank"))
    check(replace(dense, dW=(dense.dW.float() * 1.001).to(other), db=db), bound=bound)
    factors = tuple((factor.float() * 1.001).to(other) for factor in low.dW_factors)
    check(replace(low, dW_factors=factors, db=db), bound=bound)


# Teeth.
def with_(**other):
    """The sound operation on inputs spoilt one by one."""

    def broken(x, dx, W, target, **options):
        given = {"x": x, "dx": dx, "W": W, "target": target, **options}
        given |= {name: spoil(given) for name, spoil in other.items()}
        return reference.linear_cross_entropy_delta(
            given.pop("x"), given.pop("dx"), given.pop("W"), given.pop("target"), **given
        )

    return broken


def halves_the_logits(x, dx, W, target, **options):
    """bfloat16 logits in the base: what design section 2 rules out."""
    base, _ = reference.linear_cross_entropy_delta(x.bfloat16(), None, W.bfloat16(), target)
    return base, reference.linear_cross_entropy_delta(x, dx, W, target, **options)[1]


def subtracts(x, dx, W, target, *, dW_factors, **options):
    losses = [F.cross_entropy(x @ W.T, target, reduction="none")]
    for d, U, V in zip(dx, *dW_factors, strict=True):
        losses.append(F.cross_entropy((x + d) @ (W + U @ V.T).T, target, reduction="none"))
    return losses[0], torch.stack(losses[1:]) - losses[0]


DEFECTS = {
    "shifts the target": (with_(target=lambda g: (g["target"] + 1) % len(g["W"])), 1e-2),
    "drops the last columns": (with_(W=lambda g: g["W"].index_fill(0, torch.arange(584, 600), 0)), 1e-2),
    "changes no weight": (with_(dW_factors=lambda g: None), 1e-6),
    "swaps queries": (with_(dW_factors=lambda g: tuple(f.flip(0) for f in g["dW_factors"])), 1e-6),
    "takes x for the changed x": (
        lambda x, dx, W, target, *, dW_factors, **o: (
            reference.linear_cross_entropy_delta(x, dx, W, target)[0],
            reference.linear_cross_entropy_delta(x, dx, W, target)[1]
            + reference.linear_cross_entropy_delta(x, None, W, target, dW_factors=dW_factors)[1],
        ),
        1e-1,
    ),
    "keeps the change in bfloat16": (with_(dx=lambda g: g["dx"].bfloat16().float()), 1e-6),
    "subtracts": (subtracts, 1e-4),
    "halves the logits": (halves_the_logits, 1e-2),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_broken_one_is_caught(defect):
    broken, step = DEFECTS[defect]
    head = make_head("input and low rank", step=step)
    check(head, reference.linear_cross_entropy_delta)
    with pytest.raises(AssertionError, match="base:|delta:"):
        check(head, broken)


# Errors.
@cpu_looks
def test_target_out_of_range_names_the_row(dtype):
    head = make_head(V=10, dtype=dtype)
    head.target[1] = -100
    for bad in (10, -1, 2**40):
        head.target[6] = bad
        with pytest.raises(IndexError, match=f"target: wanted 0 to 9 or ignore_index -100, got {bad} in row 6"):
            head.run()


@pytest.mark.parametrize(
    "error, message, given",
    [
        (ValueError, r"W: wanted shape \(V,D\) = \(V, 5\), got \(7, 6\)", {"W": torch.zeros(7, 6)}),
        (ValueError, r"W: wanted at least one row", {"W": torch.zeros(0, 5)}),
        (ValueError, r"dx: wanted shape \(Q,N,D\) = \(Q, 4, 5\), got \(4, 5\)", {"dx": torch.zeros(4, 5)}),
        (ValueError, r"target: wanted shape \(N\) = \(4\)", {"target": torch.zeros(3).long()}),
        (ValueError, r"db: wanted Q = 2 queries, as dx has, got 3", {"db": torch.zeros(3, 7)}),
        (ValueError, r"bias: wanted shape \(V\) = \(7\), got \(5,\)", {"bias": torch.zeros(5)}),
        (ValueError, r"dW: wanted shape \(Q,V,D\) = \(2, 7, 5\)", {"dW": torch.zeros(2, 5, 7)}),
        (ValueError, r"dW_factors U: wanted shape", {"dW_factors": (torch.zeros(2, 6, 1), torch.zeros(2, 5, 1))}),
        (
            ValueError,
            r"dW_factors: wanted None where dW",
            {"dW": torch.zeros(2, 7, 5), "dW_factors": (torch.zeros(2, 7, 1), torch.zeros(2, 5, 1))},
        ),
        (ValueError, r"softcap: wanted a number above 0 or None, got 0.0", {"softcap": 0.0}),
        (ValueError, r"softcap: .* got inf .in float32: 1.2e-38 to 3.4e\+38", {"softcap": float("inf")}),
        (ValueError, r"softcap: .* got 1e\+39", {"softcap": 1e39}),
        (ValueError, r"softcap: .* got 1e-46", {"softcap": 1e-46}),
        (ValueError, r"label_smoothing: wanted a number in \[0, 1\], got -1", {"label_smoothing": -1.0}),
        (TypeError, r"W: wanted float32, got bfloat16", {"W": torch.zeros(7, 5).bfloat16()}),
        (TypeError, r"dx: wanted float32, got float64", {"dx": torch.zeros(2, 4, 5).double()}),
        (TypeError, r"target: wanted int64, got int32", {"target": torch.zeros(4).int()}),
    ],
)
def test_refused(error, message, given):
    given = {"dx": torch.zeros(2, 4, 5), "W": torch.zeros(7, 5), "target": torch.zeros(4).long(), **given}
    with pytest.raises(error, match=message):
        linear_cross_entropy_delta(torch.zeros(4, 5), given.pop("dx"), given.pop("W"), given.pop("target"), **given)


def test_out_refused():
    head = make_head()
    with pytest.raises(ValueError, match=r"delta: wanted shape \(Q,N\) = \(2, 8\), got \(3, 8\)"):
        linear_cross_entropy_delta_out(head.x, head.dx, head.W, head.target, torch.zeros(8), torch.zeros(3, 8))
    with pytest.raises(TypeError, match="base: wanted float32, got float64"):
        linear_cross_entropy_delta_out(head.x, head.dx, head.W, head.target, torch.zeros(8).double(), torch.zeros(2, 8))


# torch's own machinery.
@pytest.mark.parametrize("form", FORMS)
def test_opcheck(dtype, form):
    head = make_head(form, N=3, V=20, dtype=dtype)
    rest = (head.bias, head.db, head.dW, *(head.dW_factors or (None, None)), 30.0, -100, 0.1)
    inputs = (head.x, head.dx, head.W, head.target)
    torch.library.opcheck(torch.ops.finf_fast.linear_cross_entropy_delta.default, (*inputs, *rest))
    torch.library.opcheck(torch.ops.finf_fast.linear_cross_entropy_delta_out.default, (*inputs, *head.run(), *rest))


def test_compiles_without_a_break():
    head = make_head("input and low rank and bias")

    def program(x, dx):
        base, delta = linear_cross_entropy_delta(2 * x, 2 * dx, head.W, head.target, **head.options)
        return base + 1, delta * 2

    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(head.x, head.dx), program(head.x, head.dx), strict=True):
        torch.testing.assert_close(got, wanted)
