"""Rules of whole layers: norms with changed statistics and affine parts, attention with changed projections."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from delta_cases import WORLDS, B, C, P, S, case
from finf_fast.delta.stack import Stack

ROWS, IMAGE = S((2, 4, 6), tame=1.0), S((2, 4, 3, 3), tame=1.0)
W, BIAS = C((6,), near=1.0), C((6,), tame=1.0)
CHANNELS, SHIFTS, MEANS, SPREADS = C((4,), near=1.0), C((4,), tame=1.0), C((4,), tame=1.0), C((4,), near=2.0)


def plain(c):
    return P(c.shape, near=c.near, tame=c.tame)


def normed(f):
    return [
        (f"{f.__name__} {kind}", f, x, *rest)
        for kind, x, *rest in (
            ("of a stack", ROWS, plain(W), plain(BIAS)),
            ("of a stack, changed", ROWS, W, BIAS),
            ("changed only", plain(ROWS), W, BIAS),
            ("bias only", plain(ROWS), plain(W), BIAS),
            ("of changed", C((4, 6), tame=1.0), W, plain(BIAS)),
        )
    ]


def layer_norm(x, w, b):
    return F.layer_norm(x, (6,), w, b), F.layer_norm(x, [6], weight=w), torch.layer_norm(x, (6,), w, b, 1e-3)


def rms_norm(x, w, b):
    return F.rms_norm(x, (6,), w, 1e-5), torch.rms_norm(x, [6], eps=1e-3), F.rms_norm(b, (6,), weight=w, eps=1e-5)


def batch_norm(x, mean, var, w, b):
    return F.batch_norm(x, mean, var, w, b), F.batch_norm(x, mean, var, eps=1e-2), F.batch_norm(x, mean, var, None, b)


def attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)


def masked(q, k, v, m):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=m), F.scaled_dot_product_attention(q, k, v, m)


# Projections are of width 1/sqrt(6), as a model has them: sharper scores would turn roundings of q and k into jumps.
def multi_head(x, w, b, out, key=None, **settings):
    """nn.MultiheadAttention over (T, B, D), without its weights."""
    key = x if key is None else key
    return F.multi_head_attention_forward(
        x, key, key, 6, 2, w, b, None, None, False, 0.0, out, None, training=False, need_weights=False, **settings
    )[0]


def with_weights(x, w, b, out, mask=None, **settings):
    """Output and weights, of all heads together and of each."""
    rest = (6, 2, w, b, None, None, False, 0.0, out, None, False, None, True, mask)
    parts = [F.multi_head_attention_forward(x, x, x, *rest, average_attn_weights=mean) for mean in (True, False)]
    return [part for both in parts for part in both]


def module(batch_first, **settings):
    """torch.nn.MultiheadAttention itself, with the weights it is given."""

    def run(x, w, b, mask):
        m = nn.MultiheadAttention(6, 2, batch_first=batch_first, dtype=x.dtype).eval()
        given = {"in_proj_weight": w, "in_proj_bias": b, "out_proj.weight": b[:6] * w[:6], "out_proj.bias": b[:6]}
        return torch.func.functional_call(
            m, given, (x, x, x), {**settings, "key_padding_mask": mask & (mask != mask[:, :1]), "need_weights": False}
        )

    return run


def grouped(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


HEADS = S((2, 2, 5, 4), tame=1.0)
FLAT = S((5, 4), tame=1.0)
CASES = [case(*one) for f in (layer_norm, rms_norm) for one in normed(f)]
CASES += [
    case(
        "layer_norm of a matrix",
        lambda x: (F.layer_norm(x, (4, 6)), F.layer_norm(input=x, normalized_shape=(6,))),
        ROWS,
    ),
    case("layer_norm of a matrix, changed", lambda x, w: F.layer_norm(x, (4, 6), w), ROWS, C((4, 6), near=1.0)),
    case("layer_norm of one row", lambda x: F.layer_norm(x, (6,)), S((6,), tame=1.0)),
    case("layer_norm of nothing", lambda x, w: F.layer_norm(x, (6,), w), S((0, 6)), W),
    case(
        "group_norm",
        lambda x, w, b: (F.group_norm(x, 2, w, b), torch.group_norm(x, 4), F.group_norm(x, 1, weight=w)),
        IMAGE,
        CHANNELS,
        SHIFTS,
    ),
    case("group_norm changed only", lambda x, w, b: F.group_norm(x, 2, w, b), plain(IMAGE), CHANNELS, plain(SHIFTS)),
    case(
        "instance_norm",
        lambda x, w, b: (F.instance_norm(x, weight=w, bias=b), F.instance_norm(x)),
        IMAGE,
        CHANNELS,
        SHIFTS,
    ),
    case(
        "instance_norm of old",
        lambda x, m, v: F.instance_norm(x, m, v, use_input_stats=False),
        IMAGE,
        plain(MEANS),
        plain(SPREADS),
    ),
    case(
        "torch's names",
        lambda x, w, b: (
            torch.instance_norm(x, w, b, None, None, True, 0.1, 1e-5, False),
            torch.group_norm(x, 2, w, b),
        ),
        IMAGE,
        CHANNELS,
        SHIFTS,
    ),
    case("batch_norm", batch_norm, IMAGE, plain(MEANS), plain(SPREADS), plain(CHANNELS), plain(SHIFTS)),
    case("batch_norm statistics", batch_norm, IMAGE, MEANS, SPREADS, plain(CHANNELS), plain(SHIFTS)),
    case("batch_norm affine", batch_norm, IMAGE, plain(MEANS), plain(SPREADS), CHANNELS, SHIFTS),
    case("batch_norm all", batch_norm, IMAGE, MEANS, SPREADS, CHANNELS, SHIFTS),
    case(
        "batch_norm far from 0",
        batch_norm,
        S((2, 4, 3), near=50.0),
        C((4,), near=50.0),
        SPREADS,
        CHANNELS,
        SHIFTS,
        slack=3,
    ),
    case("batch_norm changed only", batch_norm, plain(IMAGE), MEANS, SPREADS, CHANNELS, SHIFTS),
    case(
        "batch_norm of rows",
        lambda x, m, v: torch.batch_norm(x, None, None, m, v, False, 0.1, 1e-5, False),
        S((5, 4), tame=1.0),
        MEANS,
        SPREADS,
    ),
    case("attention", attention, HEADS, HEADS, HEADS),
    case("attention of queries", attention, HEADS, plain(HEADS), plain(HEADS)),
    case("attention of values", attention, plain(HEADS), plain(HEADS), HEADS),
    case("attention of three", attention, S((3, 5, 4), tame=1.0), S((3, 5, 4), tame=1.0), S((3, 5, 4), tame=1.0)),
    case("attention of two", attention, FLAT, FLAT, FLAT),
    case(
        "attention across",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        HEADS,
        S((2, 2, 3, 4), tame=1.0),
        S((2, 2, 3, 6), tame=1.0),
    ),
    case("attention of groups", grouped, S((2, 4, 5, 4), tame=1.0), HEADS, HEADS),
    case("attention masked", masked, HEADS, HEADS, HEADS, P((5, 5), tame=1.0)),
    case("attention masked by heads", masked, HEADS, HEADS, HEADS, P((1, 2, 5, 5), tame=1.0)),
    case(
        "attention of three masked",
        masked,
        S((3, 5, 4), tame=1.0),
        S((3, 5, 4), tame=1.0),
        S((3, 5, 4), tame=1.0),
        P((3, 5, 5), tame=1.0),
    ),
    case("attention with a changed bias", masked, HEADS, HEADS, HEADS, C((2, 5, 5), tame=1.0)),
    case(
        "multi-head",
        multi_head,
        S((5, 2, 6), tame=1.0),
        C((18, 6), form="low", tame=0.4),
        C((18,), tame=1.0),
        C((6, 6), tame=1.0),
        slack=3,
    ),
    case(
        "multi-head of plain",
        multi_head,
        P((5, 2, 6), tame=1.0),
        C((18, 6), form="mixed", tame=0.4),
        P((18,), tame=1.0),
        P((6, 6), tame=1.0),
        slack=3,
    ),
    case(
        "multi-head across",
        multi_head,
        S((5, 2, 6), tame=1.0),
        C((18, 6), tame=0.4),
        P((18,), tame=1.0),
        P((6, 6), tame=1.0),
        S((3, 2, 6), tame=1.0),
        slack=3,
    ),
    case(
        "multi-head of one",
        multi_head,
        S((5, 6), tame=1.0),
        C((18, 6), tame=0.4),
        C((18,), tame=1.0),
        P((6, 6), tame=1.0),
        slack=6,  # three products and a softmax, each rounded in half precision, of six numbers that nearly cancel
    ),
    *(
        case(
            f"multi-head with its weights, {kind}",
            with_weights,
            *x,
            C((18, 6), form="low", tame=0.4),
            C((18,), tame=1.0),
            P((6, 6), tame=1.0),
            *mask,
            slack=8,  # scores rounded in half precision as well
        )
        for kind, x, mask in (
            ("batch", [S((5, 2, 6), tame=1.0)], []),
            ("masked", [S((5, 2, 6), tame=1.0)], [P((5, 5), tame=1.0)]),
            ("one", [S((5, 6), tame=1.0)], []),
            ("plain", [P((5, 2, 6), tame=1.0)], []),
        )
    ),
    *(
        case(
            f"module {first}",
            module(first),
            S((2, 3, 6) if first else (3, 2, 6), tame=1.0),
            C((18, 6), form="low", tame=0.4),
            P((18,), tame=1.0),
            B((2, 3)),
            slack=4,
        )
        for first in (True, False)
    ),
]


@pytest.mark.parametrize("one", CASES, ids=lambda c: c.name)
@settings(max_examples=8, deadline=None)
@given(st.data())
def test_a_rule_is_the_change_in_float64(one, data):
    one.check(data.draw(WORLDS))


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_weights_that_a_module_returns_are_those_of_torch(mean, first):
    torch.manual_seed(0)
    m = nn.MultiheadAttention(6, 2, batch_first=first, dtype=torch.float64).eval()
    for shape in ((2, 5, 6), (5, 6)):
        x = torch.randn(shape, dtype=torch.float64)
        padding = torch.zeros(shape[:-1] if first or len(shape) == 2 else (5, 2), dtype=torch.bool)
        padding[..., -1] = True
        stack = Stack(torch.stack([x, torch.zeros_like(x)]))
        for mask in ({}, {"key_padding_mask": padding}):
            found, wanted = (m(y, y, y, average_attn_weights=mean, **mask) for y in (stack, x))
            for one, other in zip(found, wanted, strict=True):
                assert one.shape == other.shape and not one.stacked[1].any()
                torch.testing.assert_close(one.stacked[0], other)
