"""attention_delta: every face, dtype and size of change against long double; masks, shared heads, soft caps, teeth."""

from __future__ import annotations

import importlib
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from checks import face_fixture
from finf_fast.ops import attention_delta
from stack_cases import SIZES, apart, at, check, draw, exact, make_stack, sizes

dtype = face_fixture("attention_delta")
page = importlib.import_module("finf_fast.reference.attention_delta")

# At size 10 scores reach a few hundred, and so many units of rounding stand in an exponent of that size.
SLACK = {10.0: 100.0}


def true_attention(q, k, v, *, causal=False, scale=None, mask=None, softcap=None, cu_seqlens=None):
    """(B, H, T, E) and so on in long double, by definition."""
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, group, 1) for x in (k, v))
    s = np.einsum("bhte,bhse->bhts", q, k) * (1 / np.sqrt(np.longdouble(q.shape[-1])) if scale is None else scale)
    s = s if softcap is None else softcap * np.tanh(s / softcap)
    if mask is not None:
        s = np.where(mask.numpy(), s, -np.inf) if mask.dtype == torch.bool else s + exact(mask)
    if causal:
        s = np.where(np.tri(*s.shape[-2:], dtype=bool), s, -np.inf)
    if cu_seqlens is not None:
        text = np.repeat(np.arange(len(cu_seqlens) - 1), np.diff(cu_seqlens.numpy()))
        s = np.where(text[:, None] == text, s, -np.inf)
    top = s.max(-1, keepdims=True)
    e = np.exp(s - np.where(np.isfinite(top), top, 0))
    total = e.sum(-1, keepdims=True)
    return np.einsum("bhts,bhse->bhte", e / np.where(total == 0, 1, total), v)


def stacks(size, dtype, *, Q=(2, 2, 2), B=2, H=4, Hk=2, T=9, Tk=9, E=16, Ev=8, base=1.0):
    """q, k and v; Q says how many changes each has."""
    shapes = (B, H, T, E), (B, Hk, Tk, E), (B, Hk, Tk, Ev)
    return [
        make_stack(n, *s, size=size, dtype=dtype, seed=i, base=base)
        for i, (n, s) in enumerate(zip(Q, shapes, strict=True))
    ]


def held(qkv, dtype, size=0.1, slack=1.0, Q=2, **options):
    """Run and check."""
    out = attention_delta(*qkv, **options)
    check(out, lambda n: true_attention(*(at(x, n) for x in qkv), **options), Q, dtype, size, slack)
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_every_size_of_change(dtype, size, causal):
    if size not in sizes(dtype):
        pytest.skip("float16 cannot hold it")
    held(stacks(size, dtype), dtype, size, SLACK.get(size, 1), causal=causal)


@pytest.mark.parametrize("Q", [(2, 0, 0), (0, 2, 0), (0, 0, 2), (2, 2, 0), (2, 0, 2), (0, 2, 2), (0, 0, 0)])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_any_of_the_three_may_stand_still(dtype, Q, softcap):
    held(stacks(0.1, dtype, Q=Q), dtype, Q=max(Q), softcap=softcap)


@pytest.mark.parametrize("Hk", [1, 2, 6])
def test_shared_heads(dtype, Hk):
    held(stacks(0.1, dtype, H=6, Hk=Hk), dtype, causal=True)


@pytest.mark.parametrize("E, Ev", [(256, 8), (257, 300), (300, 8), (8, 300)])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_wide_heads(dtype, E, Ev, softcap):
    held(stacks(0.1, dtype, B=1, H=2, T=5, Tk=6, E=E, Ev=Ev), dtype, softcap=softcap)


@pytest.mark.parametrize("T, Tk", [(5, 11), (11, 5), (1, 7), (7, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_other_lengths_of_keys(dtype, T, Tk, causal):
    held(stacks(0.1, dtype, T=T, Tk=Tk), dtype, causal=causal)


@pytest.mark.parametrize(
    "options", [{"scale": 1.0}, {"scale": 0.0}, {"softcap": 0.5}, {"softcap": 30.0, "causal": True}]
)
def test_scale_and_softcap(dtype, options):
    held(stacks(0.1, dtype), dtype, **options)


MASKS = {
    "padding": lambda: (torch.arange(9) < torch.tensor([[9], [4]]))[:, None, None],
    "shared": lambda: draw(9, 9) > -1,
    "each": lambda: draw(2, 4, 9, 9) > 0,
    "additive": lambda: draw(4, 9, 9),
    "closed": lambda: torch.zeros(9, 9).masked_fill(draw(9, 9) > 0, -torch.inf),
    "lowest": lambda: torch.zeros(9, 9).masked_fill(draw(9, 9) > 1, torch.finfo(torch.float32).min),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("causal", [False, True])
def test_masks(dtype, name, causal):
    mask = MASKS[name]()
    mask = mask if mask.dtype == torch.bool else mask.float()
    held(stacks(0.1, dtype), dtype, mask=mask, causal=causal)


@pytest.mark.parametrize("boolean", [True, False])
def test_rows_that_see_nothing(dtype, boolean):
    """0 and no change, as in torch; the other rows as ever."""
    mask = torch.ones(9, 9, dtype=torch.bool)
    mask[3] = False
    mask = mask if boolean else torch.zeros(9, 9).masked_fill(~mask, -torch.inf)
    qkv = stacks(0.1, dtype)
    out = held(qkv, dtype, mask=mask)
    assert not out[:, :, :, 3].any()
    heads = [x[0].repeat_interleave(4 // x.shape[2], 1).float() for x in qkv]
    torch.testing.assert_close(
        out[0].float(), F.scaled_dot_product_attention(*heads, attn_mask=mask), rtol=1e-2, atol=1e-2
    )


def test_what_is_masked_may_change_without_bound(dtype):
    """A padded key that jumps by 1e3 neither counts nor costs the others their digits."""
    qkv = stacks(1e-3, dtype, Q=(2, 2, 2))
    qkv[1][1:, :, :, 6:] += 1000
    qkv[2][1:, :, :, 6:] += 1000
    held(qkv, dtype, 1e-3, mask=torch.arange(9) < 6)
    causal = stacks(1e-3, dtype, Q=(2, 2, 2))
    causal[1][1:, :, :, 8] += 1000
    out = attention_delta(*causal, causal=True)[:, :, :, :8]
    wanted = attention_delta(*(x[:, :, :, :8] for x in causal), causal=True)
    torch.testing.assert_close(out, wanted, rtol=1e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-5, atol=0)


@pytest.mark.parametrize("lead", [10.0, 20.0])
def test_rows_that_look_at_one_key(dtype, lead):
    """The change of p there is that of what little is left of the others; its digits survive."""
    if dtype == torch.float16:
        pytest.skip("the result is below what float16 holds")
    q, k, v = stacks(1e-3, dtype, Q=(2, 2, 0), H=1, Hk=1, B=1)
    k[0, :, :, 4] = lead / 4 * q[0].mean(2)
    mask = torch.zeros(9)
    mask[4] = lead
    held([q, k, v], dtype, 1e-3 * math.exp(-lead), slack=10, mask=mask)


def test_leaps_of_scores(dtype):
    """A key that had no chance takes the whole row, and the other way round."""
    q, k, v = stacks(0.1, dtype, Q=(2, 2, 2), base=1.0)
    k[1, :, :, 3] = 64
    k[2, :, :, 5] = -64
    out = held([q, k, v], dtype, slack=100)
    assert out.isfinite().all()
    mask = torch.zeros(9)
    mask[3] = -60
    held([q, k, v], dtype, slack=100, mask=mask)


@pytest.mark.parametrize("piece", [1, 3 * 2 * 9 * 2, 3 * 2 * 9 * 4, 3 * 2 * 9 * 9])
@pytest.mark.parametrize("causal", [False, True])
def test_pieces_meet(dtype, monkeypatch, piece, causal):
    """One row of queries a piece, two, four with a ragged end, all."""
    monkeypatch.setattr(page, "_PIECE", piece)
    held(stacks(0.1, dtype), dtype, causal=causal, mask=MASKS["each"]())


# The compiled loops: blocks of 64 rows in vectors of 4, 8 or 16; tiles of 64 keys in fours; heads in vectors. One
# under, exactly one, one over, several.
EDGES = [(T, Tk, 16, 8) for T in (1, 15, 16, 17, 33, 63, 64, 65, 129) for Tk in (1, 63, 64, 65)] + [(150, 200, 16, 8)]
EDGES += [(5, 6, E, Ev) for E, Ev in [(1, 1), (3, 5), (4, 17), (15, 16), (16, 15), (17, 4), (65, 72)]]


@pytest.mark.parametrize("T, Tk, E, Ev", EDGES)
@pytest.mark.parametrize("causal", [False, True])
def test_edges_of_blocks(dtype, T, Tk, E, Ev, causal):
    # Sixteen numbers are too few for the bound of many: a weight rounded to bfloat16 weighs 4.1e-3 of them.
    few = 2 if T * Ev < 64 else 1
    held(stacks(0.1, dtype, B=1, H=2, Hk=1, T=T, Tk=Tk, E=E, Ev=Ev), dtype, causal=causal, slack=few)


@pytest.mark.parametrize("Q", [(2, 0, 0), (0, 2, 0), (0, 0, 2), (2, 2, 2)])
@pytest.mark.parametrize("options", [{"softcap": 3.0}, {"softcap": 3.0, "causal": True}, {"scale": 0.5}])
def test_options_from_tile_to_tile(dtype, Q, options):
    held(stacks(0.1, dtype, Q=Q, T=70, Tk=140), dtype, **options)


LONG_MASKS = {
    "rising": lambda: torch.linspace(0, 30, 200),  # a new leader in every tile
    "falling": lambda: torch.linspace(0, -200, 200),
    "right padding": lambda: (torch.arange(200) < 70)[None],
    "left padding": lambda: (torch.arange(200) > 130)[None],
    "stripes": lambda: (torch.arange(200) // 64 % 2 == 0)[None],
    "triangle": lambda: torch.ones(90, 200, dtype=torch.bool).tril(),
    "lowest": lambda: torch.zeros(90, 200).masked_fill(~torch.ones(90, 200).tril().bool(), -3.4028234663852886e38),
    "each": lambda: draw(2, 4, 90, 200) > 1,
    "each added": lambda: draw(2, 4, 90, 200),
}


@pytest.mark.parametrize("name", LONG_MASKS)
@pytest.mark.parametrize("size", [1e-6, 0.1])
def test_masks_from_tile_to_tile(dtype, name, size):
    """Hidden tiles first, last and between; leaders that come late."""
    if size not in sizes(dtype):
        pytest.skip("float16 cannot hold it")
    mask = LONG_MASKS[name]()
    mask = mask if mask.dtype == torch.bool else mask.float()
    held(stacks(size, dtype, T=90, Tk=200), dtype, size, mask=mask, slack=4 if name == "rising" else 1)


def test_rows_to_which_a_mask_gives_the_lowest_number_alone(dtype):
    """They look at all keys alike, as in torch: what hides a key is another that is seen, and there is none."""
    mask = torch.zeros(90, 200)
    mask[3] = mask[70] = torch.finfo(torch.float32).min
    mask[5:40, :128] = torch.finfo(torch.float32).min
    held(stacks(0.1, dtype, Q=(0, 0, 2), T=90, Tk=200), dtype, mask=mask)


# Texts of no length; inside a block of rows, as long as one, across blocks; beginning and ending at edges and off them.
TEXTS = (
    [0, 9],
    [0, 3, 9],
    [0, 0, 1, 1, 8, 9, 9],
    [0, 64, 128],
    [0, 5, 64, 64, 70, 200],
    [0, 150, 190],
    list(range(71)),
)


@pytest.mark.parametrize("edges", TEXTS, ids=lambda edges: f"{len(edges) - 1}-of-{edges[-1]}")
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "softcap": 3.0}])
def test_texts_behind_each_other(dtype, edges, options):
    T = edges[-1]
    held(stacks(0.1, dtype, T=T, Tk=T), dtype, cu_seqlens=torch.tensor(edges), **options)


@pytest.mark.parametrize("size", [1e-6, 1e-3, 10.0])
@pytest.mark.parametrize("Q", [(2, 0, 0), (0, 2, 2), (2, 2, 2)])
def test_texts_at_every_size_of_change(dtype, size, Q):
    if size not in sizes(dtype):
        pytest.skip("float16 cannot hold it")
    edges = torch.tensor([0, 30, 100, 140], dtype=torch.int32)
    held(stacks(size, dtype, Q=Q, T=140, Tk=140), dtype, size, SLACK.get(size, 1), cu_seqlens=edges)


@pytest.mark.parametrize("name", ["right padding", "each", "each added"])
def test_texts_behind_a_mask(dtype, name):
    mask = LONG_MASKS[name]()[..., :90]
    mask = mask if mask.dtype == torch.bool else mask.float()
    held(stacks(0.1, dtype, T=90, Tk=90), dtype, mask=mask, cu_seqlens=torch.tensor([0, 40, 90]), causal=True)


def test_a_text_is_as_it_is_alone(dtype):
    """What lies before and behind it weighs nothing at all, however large it is."""
    q, k, v = stacks(0.1, dtype, T=140, Tk=140)
    for x in (k, v):
        x[:, :, :, :50] *= 100
        x[:, :, :, 90:] *= 100
    out = attention_delta(q, k, v, cu_seqlens=torch.tensor([0, 50, 90, 140]), causal=True)[:, :, :, 50:90]
    alone = attention_delta(*(x[:, :, :, 50:90] for x in (q, k, v)), causal=True)
    near = {"rtol": 1e-2, "atol": 1e-2} if dtype in (torch.bfloat16, torch.float16) else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(out, alone, **near)


def test_a_text_far_from_the_first(dtype, tmp_path):
    """2^31 numbers behind it, of a file that is nearly all holes."""
    q, k, v = stacks(0.1, dtype, Q=(2, 0, 2), B=1, H=1, Hk=1, T=130, Tk=130)
    step = 2**24
    memory = torch.from_file(str(tmp_path / "k"), shared=True, size=129 * step + 16, dtype=dtype)
    far = memory.as_strided(k.shape, (0, 0, 0, step, 1)).copy_(k)
    held([q, far, v], dtype, cu_seqlens=torch.tensor([0, 128, 130]))


@pytest.mark.parametrize("hides", ["bool", "added", "lowest", "texts"])
def test_keys_that_nobody_sees_are_passed_by(dtype, hides):
    """A whole tile of them is not even read: what is there, NaN, would spread by 0 NaN."""
    compiled_only()
    q, k, v = stacks(0.1, dtype, T=256, Tk=256)
    k[:, :, :, 64:192], v[:, :, :, 64:192] = math.nan, math.nan
    mask, edges = (torch.arange(256) < 64) | (torch.arange(256) >= 192), None
    if hides in ("added", "lowest"):
        mask = torch.zeros(256).masked_fill(~mask, -torch.inf if hides == "added" else -3.4028234663852886e38)
    if hides == "texts":
        mask, edges = None, torch.tensor([0, 64, 192, 256])
    out = attention_delta(q, k, v, mask=mask, cu_seqlens=edges)
    wanted = torch.ones(256, dtype=torch.bool)
    if hides == "texts":
        wanted[64:192] = False
    assert out[:, :, :, wanted].isfinite().all() and not out[:, :, :, ~wanted].isfinite().any()


@pytest.mark.parametrize("size", [1e-6, 1e-3])
def test_leaders_that_move_more_than_all_others(dtype, size):
    """Changes are counted from the leader's: one of another size, in an early tile or a late one, costs nothing."""
    if size not in sizes(dtype):
        pytest.skip("float16 cannot hold it")
    for key in (0, 100):
        q, k, v = stacks(size, dtype, T=70, Tk=140)
        k[1:, :, :, key] *= 100
        mask = torch.zeros(140)
        mask[key] = 5
        held([q, k, v], dtype, size, mask=mask, slack=2)


@pytest.mark.parametrize("size", [1e-3, 0.1])
def test_values_far_from_zero(dtype, size):
    """What all values have in common does not change, however scores do; of 140 nearly equal weights little is left."""
    if size not in sizes(dtype):
        pytest.skip("float16 cannot hold it")
    q, k, v = stacks(size, dtype, Q=(2, 2, 0), T=70, Tk=140, base=0.5)
    v[0] += 3
    # Twice the units that the values' distance from zero costs in any order of sums.
    held([q, k, v], dtype, size, slack=6)


@pytest.mark.parametrize("gain", [10, 25, 50, 65, 100])
@pytest.mark.parametrize("key", [0, 10, 100])
@pytest.mark.parametrize("before", [0.0, -40.0])
def test_one_key_takes_all(dtype, gain, key, before):
    """Below and above what the sums of a change hold, in the first tile and in a later one; and back again."""
    q, k, v = stacks(1e-2, dtype, Q=(0, 2, 2), T=70, Tk=140, base=0.1)
    q[0, ..., 0], k[0, ..., 0] = 4, 0
    k[1:, ..., 0] = 0
    k[1, :, :, key, 0], k[2, :, :, key, 0] = gain, -gain  # the scale is 1/4
    mask = torch.zeros(140)
    mask[key] = before
    options = {"mask": mask}
    out = attention_delta(q, k, v, **options)
    assert out.isfinite().all()
    held([q, k, v], dtype, slack=20, **options)


@pytest.mark.parametrize("gain", [25, 45, 55])
@pytest.mark.parametrize("last", [0, 90])
def test_gains_on_leaders_multiply(dtype, gain, last):
    """A key gains on the leader of its tile, which gains as much on the next one's: together more than a sum holds."""
    q, k, v = stacks(1e-2, dtype, Q=(0, 2, 2), T=70, Tk=200, base=0.1)
    q[0, ..., 0], k[..., 0] = 4, 0
    k[0, :, :, 0, 0], k[0, :, :, 100, 0], k[0, :, :, 190, 0] = 2, 4, last  # the scale is 1/4
    k[1, :, :, 1, 0], k[1, :, :, 100, 0] = gain, -gain
    assert attention_delta(q, k, v).isfinite().all()
    held([q, k, v], dtype, slack=20)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("causal", [False, True])
def test_a_late_key_leaps(dtype, softcap, causal):
    """In the last tile of several, for some rows only."""
    q, k, v = stacks(1e-2, dtype, B=1, H=2, Hk=1, T=50, Tk=200)
    k[1, :, :, 190] = 12
    held([q, k, v], dtype, slack=100, softcap=softcap, causal=causal)


def compiled_only():
    if os.environ["FINF_BACKEND"] != "cpp":
        pytest.skip("the plain face leaves it to torch")


def test_a_nan_stays_in_its_row(dtype):
    q, k, v = stacks(0.1, dtype, T=70, Tk=140)
    q[0, 0, 1, 50, 3], q[1, 1, 2, 7, 0] = math.nan, math.nan
    out = attention_delta(q, k, v)
    broken = torch.zeros_like(out, dtype=torch.bool)
    broken[:, 0, 1, 50], broken[1, 1, 2, 7] = True, True
    assert torch.equal(out.isnan(), broken)
    clean = attention_delta(q.nan_to_num(0), k, v)
    torch.testing.assert_close(out[~broken], clean[~broken], rtol=2e-2, atol=1e-5)  # its neighbours take longer forms


@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 2.0}])
def test_the_same_bits_from_any_number_of_threads(dtype, options):
    compiled_only()
    qkv, before = stacks(0.1, dtype, T=200, Tk=200), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(attention_delta(*qkv, **options))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)


def test_queries_do_not_touch_each_other(dtype):
    compiled_only()
    qkv = stacks(0.1, dtype, Q=(3, 3, 3), T=70, Tk=140)
    together = attention_delta(*qkv, causal=True)
    for n in range(3):
        alone = attention_delta(*(x[[0, 1 + n]] for x in qkv), causal=True)
        assert torch.equal(alone[0], together[0])
        assert torch.equal(alone[1], together[1 + n])


def some_of_everything():
    """For a process with an instruction set of its own: the compiled face, held to the same bounds."""
    for taken in (torch.float32, torch.bfloat16):
        for edge in EDGES[::2]:
            test_edges_of_blocks(taken, *edge, True)
        for name in LONG_MASKS:
            test_masks_from_tile_to_tile(taken, name, 0.1)
        for gain in (10, 50, 100):
            test_one_key_takes_all(taken, gain, 100, 0.0)
        for edges in TEXTS:
            test_texts_behind_each_other(taken, edges, {"causal": True, "softcap": 3.0})
        test_options_from_tile_to_tile(taken, (2, 2, 2), {"softcap": 3.0, "causal": True})
        test_the_same_bits_from_any_number_of_threads(taken, {"causal": True})


def test_every_instruction_set():
    from test_isa import ISAS, in_process

    for isa in ISAS:
        code = "import os; os.environ['FINF_BACKEND'] = 'cpp'; import test_attention_delta as t; t.some_of_everything()"
        done = in_process(code, isa)
        assert done.returncode == 0, f"{isa}: {done.stderr[-4000:]}"


def test_no_change_is_exactly_zero(dtype):
    assert not attention_delta(*stacks(0.0, dtype), causal=True, softcap=2.0)[1:].any()


def test_layouts_and_empties(dtype):
    q, k, v = stacks(0.1, dtype)
    whole = attention_delta(q, k, v, causal=True)
    torch.testing.assert_close(attention_delta(apart(q), apart(k), apart(v), causal=True), whole)
    assert attention_delta(q[:, :0], k[:, :0], v[:, :0]).shape == (3, 0, 4, 9, 8)
    assert attention_delta(q[:, :, :, :0], k, v).shape == (3, 2, 4, 0, 8)
    none = attention_delta(q, k[:, :, :, :0], v[:, :, :, :0])
    assert none.shape == (3, 2, 4, 9, 8) and not none.any()


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(dtype, masked):
    mask, edges = (MASKS["padding"](), torch.tensor([0, 4, 9])) if masked else (None, None)
    args = (*stacks(0.1, dtype), True, None, mask, 5.0, edges)
    torch.library.opcheck(torch.ops.finf_fast.attention_delta.default, args)


def test_errors():
    q, k, v = stacks(0.1, torch.float32)
    with pytest.raises(ValueError, match="k: wanted a number of heads that divides q's 4, got 3"):
        attention_delta(q, *(torch.zeros(3, 2, 3, 9, 16) for _ in "kv"))
    with pytest.raises(ValueError, match=r"v: wanted shape \(1\+Q,B,H',T',E'\) = .* got \(3, 2, 2, 8, 8\)"):
        attention_delta(q, k, v[:, :, :, :8])
    with pytest.raises(ValueError, match="k: wanted Q = 2 queries, as q has, got 3"):
        attention_delta(q, torch.cat([k, k[:1]]), v)
    with pytest.raises(TypeError, match="v: wanted float32, got float64"):
        attention_delta(q, k, v.double())
    with pytest.raises(
        ValueError, match=r"mask: wanted a shape that broadcasts to .*= \(2, 4, 9, 9\), got \(3, 1, 9, 9\)"
    ):
        attention_delta(q, k, v, mask=torch.zeros(3, 1, 9, 9))
    with pytest.raises(TypeError, match="mask: wanted bool or .* got int64"):
        attention_delta(q, k, v, mask=torch.zeros(9, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match="softcap: wanted a number above 0 or None, got 0"):
        attention_delta(q, k, v, softcap=0.0)
    with pytest.raises(ValueError, match="softcap: .* got 1e-46"):
        attention_delta(q, k, v, softcap=1e-46)
    with pytest.raises(TypeError, match="cu_seqlens: wanted int32 or int64, got float32"):
        attention_delta(q, k, v, cu_seqlens=torch.tensor([0.0, 9.0]))
    with pytest.raises(ValueError, match=r"cu_seqlens: wanted shape \(S\+1\)"):
        attention_delta(q, k, v, cu_seqlens=torch.tensor([[0, 9]]))
    with pytest.raises(ValueError, match="cu_seqlens: wanted as many keys as rows, got T = 9 and T' = 5"):
        attention_delta(q, k[:, :, :, :5], v[:, :, :, :5], cu_seqlens=torch.tensor([0, 9]))
    for edges, got in (([0, 8], "0 to 8"), ([1, 9], "1 to 9"), ([9], "9 to 9")):
        with pytest.raises(ValueError, match=f"cu_seqlens: wanted numbers from 0 to T = 9, got {got}"):
            attention_delta(q, k, v, cu_seqlens=torch.tensor(edges))
    with pytest.raises(ValueError, match=r"cu_seqlens: wanted no number below the one before, got \[5, 4\]"):
        attention_delta(q, k, v, cu_seqlens=torch.tensor([0, 5, 4, 9]))
    with pytest.raises(ValueError, match=r"cu_seqlens: wanted no number below the one before, got \[2147483647, -2\]"):
        attention_delta(q, k, v, cu_seqlens=torch.tensor([0, 2**31 - 1, -2, 9], dtype=torch.int32))
    with pytest.raises(ValueError, match="cu_seqlens: .* got none"):
        attention_delta(q, k, v, cu_seqlens=torch.empty(0, dtype=torch.int64))


# Teeth.
def subtracted(q, k, v):
    def f(n):
        x = [s[0] if n is None else s[0] + s[1 + n] for s in (q, k, v)]
        return F.scaled_dot_product_attention(x[0], *(y.repeat_interleave(2, 1) for y in x[1:]))

    return torch.stack([f(None), *[f(n) - f(None) for n in range(len(q) - 1)]])


def old_values(q, k, v):
    """The product rule without its second order."""
    out = attention_delta(q, k, v[:1])
    out[1:] += attention_delta(q[:1], k[:1], v)[1:]
    return out


def neighbour_heads(q, k, v):
    return attention_delta(q, k.flip(2), v.flip(2))


def causal(q, k, v):
    return attention_delta(q, k, v, causal=True)


@pytest.mark.parametrize("broken, size", [(subtracted, 1e-4), (neighbour_heads, 0.1), (causal, 0.1), (old_values, 0.1)])
def test_broken_operations_are_caught(broken, size):
    qkv = stacks(size, torch.float32)
    with pytest.raises(AssertionError, match="relative error"):
        check(broken(*qkv), lambda n: true_attention(*(at(x, n) for x in qkv)), 2, torch.float32, size)


def test_an_infinite_value_is_infinite_to_every_row_that_sees_it(dtype):
    q, k, v = (draw(1, 1, 2, 80, 24).to(dtype) for _ in range(3))
    v[0, 0, 1, 30, 5] = torch.inf
    y = attention_delta(q, k, v, scale=0.1)
    assert torch.isinf(y[0, 0, 1, :, 5]).all()
    y[0, 0, 1, :, 5] = 0
    assert torch.isfinite(y).all()


def test_a_hidden_key_may_change_by_nearly_the_largest_number(dtype):
    if os.environ["FINF_BACKEND"] != "cpp":
        pytest.skip("in the reference's products, and Triton's, it may become infinite")
    q, k, v = (make_stack(1, 1, 1, 70, 64, size=0.1, dtype=dtype, seed=seed) for seed in range(3))
    k[1, 0, 0, 7] = 1e38
    seen = torch.ones(70, 70, dtype=torch.bool)
    seen[:, 7] = False
    moved = attention_delta(q, k, v, mask=seen)
    k[1, 0, 0, 7] = 0
    assert torch.equal(moved, attention_delta(q, k, v, mask=seen))
