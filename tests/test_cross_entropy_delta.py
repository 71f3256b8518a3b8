"""cross_entropy_delta on every face and dtype: accuracy, edges of every axis, layouts, errors, compilers, algebra."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import checks
from checks import STEPS, Case, check, exact, make_case, shifted_target, truth
from finf_fast.ops import cross_entropy_delta, cross_entropy_delta_out
from journey import cpu_looks

dtype = checks.face_fixture("cross_entropy_delta")


def same(a: tuple, b: tuple) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Accuracy. A lead of 12, 20, 30 is a memorised target: its loss is about 4e-2, 2e-5, 1e-9; lse's last digit is 2e-6.
@pytest.mark.parametrize("lead", [0, 12, 20, 30])
@pytest.mark.parametrize("step", STEPS)
def test_change_keeps_its_digits_at_every_step(dtype, step, lead):
    check(cross_entropy_delta, make_case(step=step, lead=lead, dtype=dtype))


@pytest.mark.parametrize("lead", [0, 12, 20])
@pytest.mark.parametrize("by", [0, -40, 40])
def test_large_changes(dtype, lead, by):
    """Changes of 30 in every logit; the target's own moved by 40 more either way: learnt or forgotten at once."""
    check(cross_entropy_delta, shifted_target(make_case(step=30, lead=lead, dtype=dtype), by))


@pytest.mark.parametrize("lead", [-12, 0, 12, 20])
@pytest.mark.parametrize("by", [-60, -3, -0.7, 0.7, 3, 60])
def test_target_alone_moves(dtype, lead, by):
    """Both sides of the border between the form for small changes and the one for large, target ahead and behind."""
    check(cross_entropy_delta, shifted_target(make_case(step=1e-4, lead=lead, dtype=dtype), by))


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
@pytest.mark.parametrize("step", [30, 1, *STEPS])
def test_label_smoothing(dtype, step, smoothing):
    check(cross_entropy_delta, make_case(step=step, lead=12, dtype=dtype, label_smoothing=smoothing))


@pytest.mark.parametrize("change", [torch.float32, torch.bfloat16])
def test_value_and_change_of_different_dtype(dtype, change):
    check(cross_entropy_delta, make_case(step=1e-3, lead=5, dtype=dtype, change=change))


@pytest.mark.parametrize("step", [1, 1e-3])
def test_logit_offset(dtype, step):
    case = make_case(step=step, dtype=dtype)
    check(cross_entropy_delta, replace(case, z=(case.z.double() + 1e4).to(dtype)))


RISES = [(60, 25), (60, 55), (60, 75), (110, 100), (300, 295)]


def rising(depth, rise, dtype, **options) -> Case:
    """One column, `depth` below the others, gains `rise` on them while they hardly move."""
    case = make_case(step=1e-3, dtype=torch.float64, **options)
    away = (case.target + 1) % case.z.shape[1]
    case.z[torch.arange(8), away] -= depth
    case.dz[:, torch.arange(8), away] += rise
    return replace(case, z=case.z.to(dtype), dz=case.dz.to(dtype))


@pytest.mark.parametrize("depth, rise", RISES)
@pytest.mark.parametrize("lead", [0, 12])
def test_an_unlikely_column_rises_far(dtype, lead, depth, rise):
    """Past a gain of 20 a face may subtract two losses, each right to its last digits: the error is theirs then.

    An exponent of the size of depth or rise brings half a digit of that size along.
    """
    case = rising(depth, rise, dtype, lead=lead)
    base, delta = truth(case)
    error = np.abs(exact(case.run(cross_entropy_delta)[1]) - delta)
    assert (error <= torch.finfo(case.result).eps * (16 * (base + np.abs(delta)) + (depth + rise) / 2)).all()


@pytest.mark.parametrize("depth, rise", RISES)
@pytest.mark.parametrize("lead", [0, 12])
def test_reference_keeps_the_digits_there_too(lead, depth, rise):
    with checks.forced("reference"):
        check(cross_entropy_delta, rising(depth, rise, torch.float32, lead=lead))


# Axes. Vectors hold up to 16 numbers, blocks 2048, tasks some rows: one short, exact, one more, ragged, several. Blocks
# of a GPU share the rows of the last two.
WIDTHS = [(3, V, 2) for V in (1, 2, 15, 16, 17, 31, 33, 1000, 2047, 2048, 2049, 4096)]
HEIGHTS = [(1, 33, 1), (3, 33, 0), (3, 33, 3), (64, 33, 1), (70, 33, 2), (129, 33, 1), (1, 50257, 1), (2, 20001, 6)]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("N, V, Q", WIDTHS + HEIGHTS)
def test_every_axis(dtype, N, V, Q, smoothing):
    check(cross_entropy_delta, make_case(N, V, Q, step=1e-3, dtype=dtype, label_smoothing=smoothing))


@pytest.mark.parametrize("place", [0, 14, 15, 16, 31, 32, -1])
def test_target_in_any_column(dtype, place):
    case = make_case(V=50, lead=12, dtype=dtype)
    check(cross_entropy_delta, replace(case, target=torch.full((8,), place % 50)))


# A processor's blocks hold 2048 columns; what a later one has more than the first is summed as it is up to e^20.
@pytest.mark.parametrize("rise", [-30, 3, 9.9, 10.1, 25, 90])
@pytest.mark.parametrize("step", [30, 1e-3, 1e-7])
@pytest.mark.parametrize("lead", [0, 18, 30])
def test_later_columns_are_larger(dtype, rise, step, lead):
    case = make_case(V=7000, step=step, dtype=torch.float64)
    z = case.z + rise * (torch.arange(7000) // 2048)
    z[torch.arange(8), case.target] = z.amax(1) + lead
    check(cross_entropy_delta, replace(case, z=z.to(dtype), dz=case.dz.to(dtype)))


@pytest.mark.parametrize("place", [0, 2047, 2048, 4095, 4096, 6143, 6144, 6207, 6208, 6975, 6983, 6984, 6999])
@pytest.mark.parametrize("height", [19.5, 100.0])
def test_one_column_towers_above_the_others(dtype, place, height):
    """In every part of a block, the ragged end too: as the target, whose loss is then tiny, and as another column."""
    case = make_case(N=2, V=7000, step=1e-3, dtype=torch.float64)
    z = case.z - 60
    z[:, 5], z[:, place] = 0.0, height
    target = torch.tensor([place if height < 60 else 5, 5])  # e^-100 is no normal number
    check(cross_entropy_delta, replace(case, z=z.to(dtype), dz=case.dz.to(dtype), target=target))


def test_a_tiny_loss_of_a_later_target_keeps_its_digits(dtype):
    """Of a lead of 16 to 20 over one other column the loss is 1e-7 to 2e-9."""
    lead = torch.arange(16, 20, 0.0625).to(dtype)
    z = torch.full((len(lead), 5000), -80.0, dtype=dtype)
    z[:, 5], z[:, 3000] = 0.0, lead
    base, _ = cross_entropy_delta(z, torch.zeros(1, *z.shape, dtype=dtype), torch.full((len(lead),), 3000))
    true = np.log1p(np.exp(-exact(lead)))
    assert (np.abs(exact(base) / true - 1) <= 2 * torch.finfo(base.dtype).eps + 1e-14 * (dtype == torch.float64)).all()


@pytest.mark.parametrize("height", [19.5, 59.0])
def test_a_larger_column_rises_by_as_much_as_counts(dtype, height):
    """What later blocks may have more than the first, and what a change may gain, at once."""
    case = make_case(N=4, V=7000, step=1e-3, dtype=torch.float64)
    case.z[:, 3000], case.dz[:, :, 3000] = case.z[:, :2048].max() + height, 39.0
    check(cross_entropy_delta, replace(case, z=case.z.to(dtype), dz=case.dz.to(dtype)))


@pytest.mark.parametrize("masked", [2047, 2048, 4096, 5000, 6999])
@pytest.mark.parametrize("lowest", [True, False])
def test_first_columns_are_masked(dtype, masked, lowest):
    """By -inf, or as many do by the lowest number there is: what follows stands for itself."""
    case = make_case(N=6, V=7000, step=1e-3, dtype=dtype)
    z = case.z.clone()
    z[:, :masked] = torch.finfo(dtype).min if lowest else -torch.inf
    target = torch.randint(masked, 7000, (6,), generator=torch.Generator().manual_seed(1))
    got = cross_entropy_delta(z, case.dz, target)
    check(lambda *_, **__: got, Case(case.z[:, masked:], case.dz[:, :, masked:], target - masked))


def test_no_rows(dtype):
    base, delta = make_case(0, 7, 3, dtype=dtype).run(cross_entropy_delta)
    assert base.shape == (0,) and delta.shape == (3, 0)


# Special values.
@pytest.mark.parametrize("ignore_index", [-100, -1, 3])
def test_ignored_rows_are_zero_whatever_they_hold(dtype, ignore_index):
    case = make_case(V=20, dtype=dtype, ignore_index=ignore_index)
    case.target[2] = case.target[5] = ignore_index
    case.z[2] = torch.nan
    case.dz[:, 5] = torch.inf
    base, delta = case.run(cross_entropy_delta)
    assert base[2] == base[5] == 0 and not delta[:, [2, 5]].any()
    kept = [i for i in range(8) if case.target[i] != ignore_index]
    part = Case(case.z[kept], case.dz[:, kept], case.target[kept])
    check(cross_entropy_delta, part)
    assert same((base[kept], delta[:, kept]), part.run(cross_entropy_delta))


def test_all_rows_ignored(dtype):
    case = make_case(dtype=dtype)
    base, delta = replace(case, target=torch.full((8,), -100)).run(cross_entropy_delta)
    assert not base.any() and not delta.any()


@pytest.mark.parametrize("change", [0.0, -torch.inf, 5.0])
def test_masked_columns_count_for_nothing(dtype, change):
    case = make_case(V=40, step=1e-3, lead=3, dtype=dtype)
    masked = torch.zeros(40, dtype=torch.bool)
    masked[[1, 7, 20, 39]] = True
    target = torch.arange(40)[~masked][:8]
    z, dz = case.z.masked_fill(masked, -torch.inf), case.dz.masked_fill(masked, change)
    base, delta = cross_entropy_delta(z, dz, target)
    places = torch.searchsorted(torch.arange(40)[~masked], target)
    part = Case(case.z[:, ~masked], case.dz[:, :, ~masked], places)
    check(lambda *_, **__: (base, delta), part)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_nan_stays_in_its_row_and_is_not_hidden(dtype, bad, smoothing):
    clean = make_case(N=70, V=33, Q=2, dtype=dtype, label_smoothing=smoothing)
    case = replace(clean, z=clean.z.clone(), dz=clean.dz.clone())
    case.z[3, 32] = bad
    case.dz[1, 66, 5] = torch.nan
    base, delta = case.run(cross_entropy_delta)
    assert base[3].isnan() and delta[:, 3].isnan().all() and delta[1, 66].isnan()
    clean_base, clean_delta = clean.run(cross_entropy_delta)
    untouched = torch.arange(70) != 3
    assert torch.equal(base[untouched], clean_base[untouched])
    assert torch.equal(delta[0, untouched], clean_delta[0, untouched])
    untouched[66] = False
    assert torch.equal(delta[1, untouched], clean_delta[1, untouched])


def test_target_without_any_chance(dtype):
    """A target at -inf costs inf, as in torch."""
    case = make_case(V=20, dtype=dtype)
    case.z[1, case.target[1]] = -torch.inf
    base, _ = case.run(cross_entropy_delta)
    assert base[1] == torch.inf and base.isfinite().sum() == 7


# Layouts.
def test_rows_any_distance_apart(dtype):
    wide = make_case(8, 50, 3, dtype=dtype)
    case = Case(wide.z[:, 5:38], wide.dz[:, :, 5:38], wide.target % 33)
    packed = Case(case.z.contiguous(), case.dz.contiguous(), case.target)
    assert same(case.run(cross_entropy_delta), packed.run(cross_entropy_delta))
    check(cross_entropy_delta, case)


def test_columns_apart_and_shared_rows(dtype):
    case = make_case(8, 33, 2, dtype=dtype)
    dz = case.dz.transpose(0, 2).contiguous().transpose(0, 2)
    turned = Case(case.z.T.contiguous().T, dz, case.target.repeat_interleave(2)[::2])
    assert same(turned.run(cross_entropy_delta), case.run(cross_entropy_delta))
    shared = Case(case.z[:1].expand(8, 33), case.dz[:1, :1].expand(3, 8, 33), case.target)
    check(cross_entropy_delta, shared)


def test_out_form_writes_into_views(dtype):
    case = make_case(8, 33, 3, dtype=dtype)
    base, delta = case.run(cross_entropy_delta)
    page = torch.full((4, 20), 7.0, dtype=base.dtype)
    cross_entropy_delta_out(case.z, case.dz, case.target, page[3, 4:12], page[:3, 4:12])
    assert torch.equal(page[3, 4:12], base) and torch.equal(page[:3, 4:12], delta)
    assert (page[:, :4] == 7).all() and (page[:, 12:] == 7).all()


def test_same_bits_for_any_number_of_threads(dtype):
    case = make_case(70, 1000, 2, dtype=dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(case.run(cross_entropy_delta))
    finally:
        torch.set_num_threads(threads)
    assert same(results[0], results[1]) and same(results[0], results[2])


# Errors.
@cpu_looks
def test_target_out_of_range_names_the_row(dtype):
    case = make_case(V=10, dtype=dtype)
    for bad in (10, -1, 2**40):
        case.target[6] = bad
        with pytest.raises(IndexError, match=f"target: wanted 0 to 9 or ignore_index -100, got {bad} in row 6"):
            case.run(cross_entropy_delta)


@cpu_looks
def test_nothing_is_written_when_a_target_is_out_of_range(dtype):
    case = make_case(V=10, dtype=dtype)
    case.target[7] = 10
    base, delta = torch.full((8,), 7, dtype=case.result), torch.full((2, 8), 7, dtype=case.result)
    with pytest.raises(IndexError):
        cross_entropy_delta_out(case.z, case.dz, case.target, base, delta)
    assert (base == 7).all() and (delta == 7).all()


@pytest.mark.parametrize(
    "error, message, z, dz, target",
    [
        (ValueError, r"z: wanted shape \(N,V\)", (4,), (1, 4, 5), (4,)),
        (ValueError, r"dz: wanted shape \(Q,N,V\) = \(Q, 4, 5\), got \(1, 4, 6\)", (4, 5), (1, 4, 6), (4,)),
        (ValueError, r"dz: wanted shape", (4, 5), (4, 5), (4,)),
        (ValueError, r"target: wanted shape \(N\) = \(4\), got \(3,\)", (4, 5), (1, 4, 5), (3,)),
        (ValueError, r"z: wanted at least one column", (4, 0), (1, 4, 0), (4,)),
    ],
)
def test_shape_errors(error, message, z, dz, target):
    with pytest.raises(error, match=message):
        cross_entropy_delta(torch.zeros(z), torch.zeros(dz), torch.zeros(target, dtype=torch.int64))


def test_other_errors():
    z, dz, target = torch.zeros(4, 5), torch.zeros(1, 4, 5), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(TypeError, match="target: wanted int64, got int32"):
        cross_entropy_delta(z, dz, target.int())
    with pytest.raises(TypeError, match=r"dz: wanted float32 or .* got int64"):
        cross_entropy_delta(z, dz.long(), target)
    with pytest.raises(ValueError, match=r"label_smoothing: wanted a number in \[0, 1\], got 1.5"):
        cross_entropy_delta(z, dz, target, label_smoothing=1.5)
    with pytest.raises(ValueError, match="dz: wanted on cpu, where z is, got meta"):
        cross_entropy_delta(z, dz.to("meta"), target)


def test_out_errors():
    z, dz, target = torch.zeros(4, 5), torch.zeros(2, 4, 5), torch.zeros(4, dtype=torch.int64)
    base, delta = torch.zeros(4), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"base: wanted shape \(N\) = \(4\), got \(5,\)"):
        cross_entropy_delta_out(z, dz, target, torch.zeros(5), delta)
    with pytest.raises(TypeError, match="delta: wanted float32, got float64"):
        cross_entropy_delta_out(z, dz, target, base, delta.double())
    with pytest.raises(ValueError, match="delta: wanted rows without gaps"):
        cross_entropy_delta_out(z, dz, target, base, torch.zeros(4, 2).T)


# torch's own machinery.
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_opcheck(dtype, smoothing):
    case = make_case(3, 17, 2, dtype=dtype)
    torch.library.opcheck(
        torch.ops.finf_fast.cross_entropy_delta.default, (case.z, case.dz, case.target, -100, smoothing)
    )
    base, delta = case.run(cross_entropy_delta)
    torch.library.opcheck(
        torch.ops.finf_fast.cross_entropy_delta_out.default,
        (case.z, case.dz, case.target, base, delta, -100, smoothing),
    )


def _centred(z, dz, target):
    """A small program around the operation, in both its forms, for compilers to take apart."""
    z = z - z.mean(1, keepdim=True)
    base, delta = cross_entropy_delta(z, 2 * dz, target, label_smoothing=0.1)
    again, change = torch.empty_like(base), torch.empty_like(delta)
    cross_entropy_delta_out(z, 2 * dz, target, again, change, label_smoothing=0.1)
    return base + 1, delta * 2, again + 1, change * 2


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_break(backend):
    case = make_case(5, 17, 2)
    compiled = torch.compile(_centred, fullgraph=True, backend=backend)
    for got, wanted in zip(compiled(case.z, case.dz, case.target), _centred(case.z, case.dz, case.target), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_fake_shapes():
    z, dz = torch.empty(4, 5, device="meta", dtype=torch.bfloat16), torch.empty(3, 4, 5, device="meta")
    base, delta = cross_entropy_delta(z, dz, torch.empty(4, device="meta", dtype=torch.int64))
    assert base.shape == (4,) and delta.shape == (3, 4) and base.dtype == delta.dtype == torch.float32
    assert (
        cross_entropy_delta(z.double(), dz, torch.empty(4, device="meta", dtype=torch.int64))[1].dtype == torch.float64
    )


# Algebra. Inputs are multiples of 1/64 below 10, so that z + dz is exact: what is left is the operation's own rounding.
@st.composite
def small_cases(draw):
    Q, N, V = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 40))
    numbers = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    reach = draw(st.sampled_from([2, 64, 600]))
    z, dz = numbers.integers(-600, 600, (N, V)), numbers.integers(-reach, reach, (Q, N, V))
    target = torch.from_numpy(numbers.integers(0, V, N))
    return Case(torch.from_numpy(z) / 64.0, torch.from_numpy(dz) / 64.0, target)


def near(got, wanted, case, delta):
    size = checks.size_of_terms(case, exact(delta))
    assert (np.abs(exact(got) - exact(wanted)) <= 4 * checks.ROW_BOUND * torch.finfo(got.dtype).eps * size).all()


def exactly(case: Case, dtype) -> Case:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return replace(case, z=case.z.to(wide), dz=case.dz.to(wide))


@settings(max_examples=25, deadline=None)
@given(case=small_cases())
def test_before_and_after_swapped_change_the_sign(dtype, case):
    case = exactly(case, dtype)
    _, delta = case.run(cross_entropy_delta)
    for q, dz in enumerate(case.dz):
        back = replace(case, z=case.z + dz, dz=-dz[None])
        near(-back.run(cross_entropy_delta)[1], delta[q : q + 1], replace(case, dz=dz[None]), delta[q : q + 1])


@settings(max_examples=25, deadline=None)
@given(case=small_cases(), by=st.sampled_from([-4096.0, -1.0, 0.25, 1024.0]))
def test_a_shift_of_all_logits_is_not_felt(dtype, case, by):
    case = exactly(case, dtype)
    base, delta = case.run(cross_entropy_delta)
    for moved in (replace(case, z=case.z + by), replace(case, dz=case.dz + by)):
        base_moved, delta_moved = moved.run(cross_entropy_delta)
        torch.testing.assert_close(base_moved, base, rtol=1e-6, atol=0)
        near(delta_moved, delta, case, delta)


@settings(max_examples=25, deadline=None)
@given(case=small_cases(), smoothing=st.sampled_from([0.0, 0.1]))
def test_no_change_is_exactly_zero(dtype, case, smoothing):
    case = replace(exactly(case, dtype), label_smoothing=smoothing)
    _, delta = replace(case, dz=torch.zeros_like(case.dz)).run(cross_entropy_delta)
    assert torch.equal(delta, torch.zeros_like(delta))


@settings(max_examples=25, deadline=None)
@given(case=small_cases(), smoothing=st.sampled_from([0.0, 0.1, 1.0]))
def test_base_and_change_add_up_to_the_loss_after(dtype, case, smoothing):
    """In float64, against torch's own loss."""
    if dtype != torch.float64:
        pytest.skip("the sum's own rounding hides it")
    case = replace(exactly(case, torch.float64), label_smoothing=smoothing)
    base, delta = case.run(cross_entropy_delta)
    for d, dz in zip(delta, case.dz, strict=True):
        after = F.cross_entropy(case.z + dz, case.target, reduction="none", label_smoothing=smoothing)
        torch.testing.assert_close(base + d, after, rtol=1e-13, atol=1e-13)
