"""Rules of matrix products, convolutions, norms and attention: changed weights of every form, changed inputs, both."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_cases import IS, WORLDS, C, P, S, case

FORMS = ("dense", "low", "mixed")
X, X3 = S((4, 6), tame=1.0), S((2, 4, 6), tame=1.0)
PLAIN = P((4, 6), tame=1.0)


def weight(*shape, form="dense"):
    return C(shape, form=form, tame=1.0)


def stack(*shape):
    return S(shape, tame=1.0)


def plain(*shape):
    return P(shape, tame=1.0)


INPUTS = {
    "rows": X,
    "batch": X3,
    "one row": stack(6),
    "plain": PLAIN,
    "plain batch": plain(2, 4, 6),
    "changed": weight(4, 6),
}
CASES = [
    case(f"linear {kind} {form}", F.linear, x, weight(5, 6, form=form), weight(5), sums=True)
    for kind, x in INPUTS.items()
    for form in FORMS
]
CASES += [
    case(
        f"linear {kind} plain weight",
        lambda x, w, b: (F.linear(x, w), F.linear(x, w, b)),
        x,
        plain(5, 6),
        weight(5),
        sums=True,
    )
    for kind, x in INPUTS.items()
]
CASES += [
    case(
        "linear names",
        lambda x, w, b: torch.nn.functional.linear(input=x, weight=w, bias=b),
        X,
        plain(5, 6),
        plain(5),
        sums=True,
    ),
    case("linear computed", lambda x, w, b: F.linear(x, w * 2, b), X, weight(5, 6), plain(5), sums=True),
    case("linear plain by a stack", lambda x, w: F.linear(x, w), PLAIN, stack(5, 6), sums=True),
    case("linear of nothing", lambda x, w: F.linear(x, w), stack(0, 6), weight(5, 6)),
    case(
        "addmm",
        lambda b, x, w: (torch.addmm(b, x, w), b.addmm(x, w)),
        weight(5),
        X,
        weight(6, 5, form="low"),
        sums=True,
    ),
    case(
        "addmm plain", lambda b, x, w: torch.addmm(b, x, w, beta=0.5, alpha=2), plain(4, 5), X, plain(6, 5), sums=True
    ),
    case(
        "addmm of a stack",
        lambda b, x, w: (torch.addmm(b, x, w, beta=2), torch.addmm(b, x, w)),
        stack(4, 5),
        plain(4, 6),
        plain(6, 5),
        sums=True,
    ),
    case(
        "addmm of stacks",
        lambda b, x, w: (torch.addmm(b, x, w), b.addmm_(x, w, beta=1, alpha=2)),
        stack(4, 5),
        X,
        stack(6, 5),
        sums=True,
    ),
    case(
        "addmm by changed", lambda b, x, w: torch.addmm(b, x, w), plain(5), PLAIN, weight(6, 5, form="mixed"), sums=True
    ),
    case("matmul", lambda x, y: (x @ y, torch.matmul(x, y), x.mm(y), torch.mm(x, y)), X, stack(6, 5), sums=True),
    case(
        "matmul names",
        lambda x, y: (torch.matmul(input=x, other=y), torch.mm(x, mat2=y), torch.linalg.matmul(x, y)),
        X,
        plain(6, 5),
        sums=True,
    ),
    *(
        case(f"matmul {form}", lambda x, w: (x @ w, x.matmul(w)), X3, weight(6, 5, form=form), sums=True)
        for form in FORMS
    ),
    case("matmul changed first", lambda w, x: (w @ x, w @ x.mT[0].mT), weight(5, 4, form="low"), X3, sums=True),
    case("matmul of changed", lambda v, w: v @ w, weight(5, 4, form="low"), weight(4, 3, form="mixed"), sums=True),
    case(
        "matmul of changed and transposed",
        lambda v, w: (v @ w.T, w.t() @ v.t()),
        weight(5, 4),
        weight(4, 4, form="low"),
        sums=True,
    ),
    case("matmul plain first", lambda x, y: (x @ y, torch.matmul(x, y)), plain(3, 1, 4, 6), stack(2, 6, 5), sums=True),
    case("matmul by plain of more", lambda x, y: x @ y, X, plain(3, 2, 6, 5), sums=True),
    case("matmul of more", lambda x, y: x @ y, stack(2, 1, 4, 6), stack(3, 6, 5), sums=True),
    case("bmm", lambda x, y: (torch.bmm(x, y), x.bmm(y), torch.bmm(x, mat2=y)), X3, stack(2, 6, 3), sums=True),
    case("bmm plain", lambda x, y: (torch.bmm(x, y), y.mT.bmm(x.mT)), X3, plain(2, 6, 3), sums=True),
    case(
        "baddbmm",
        lambda b, x, y: (torch.baddbmm(b, x, y), torch.baddbmm(b, x, y, beta=0, alpha=0.5)),
        stack(2, 4, 3),
        X3,
        stack(2, 6, 3),
        sums=True,
    ),
    case(
        "baddbmm plain",
        lambda b, x, y: (b.baddbmm(x, y, beta=2), b.baddbmm_(x, y)),
        stack(2, 4, 3),
        plain(2, 4, 6),
        plain(2, 6, 3),
        sums=True,
    ),
    case("vectors", lambda x, v: (x @ v, x.mv(v), torch.mv(x, vec=v), v @ x.mT), X, stack(6), sums=True),
    case("vector by plain", lambda x, v: (x @ v, torch.mv(x, v), v @ x.mT), X, plain(6), sums=True),
    case("vector by changed", lambda w, v: (v @ w, w.mT @ v), weight(6, 5, form="low"), stack(6), sums=True),
    case("vector by batch", lambda x, v: x @ v, X3, stack(6), sums=True),
    case(
        "dot",
        lambda u, v: (u @ v, torch.dot(u, v), u.dot(v), torch.dot(input=u, tensor=v)),
        stack(6),
        stack(6),
        sums=True,
    ),
    case(
        "outer",
        lambda u, v: (torch.outer(u, v), u.outer(v), torch.ger(v, u), u.ger(vec2=v)),
        stack(6),
        plain(4),
        sums=True,
    ),
    case(
        "einsum",
        lambda x, y: (torch.einsum("ij,jk->ik", x, y), torch.einsum("ij, jk -> ki", [x, y])),
        X,
        stack(6, 5),
        sums=True,
    ),
    case(
        "einsum plain",
        lambda x, y: (torch.einsum("ij,jk->ik", x, y), torch.einsum("bk,ab->ak", y, x)),
        X,
        plain(6, 5),
        sums=True,
    ),
    case(
        "einsum of one",
        lambda x: (torch.einsum("bij->bji", x), torch.einsum("bij->i", x), torch.einsum("bij->", x)),
        X3,
        sums=True,
    ),
    case("einsum with dots", lambda x, w: torch.einsum("...d,hd->...h", x, w), X3, weight(3, 6, form="low"), sums=True),
    case(
        "einsum without an arrow",
        lambda x, y: (torch.einsum("ij,jk", x, y), torch.einsum("ii", y[:5])),
        X,
        stack(6, 5),
        sums=True,
    ),
    case(
        "einsum of three", lambda x, y, z: torch.einsum("ij,jk,kl->il", x, y, z), X, stack(6, 3), plain(3, 2), slack=10
    ),
    case("einsum to a number", lambda x, y: torch.einsum("ij,ij->", x, y), X, X, sums=True),
    case("bilinear", lambda x, y, w: F.bilinear(x, y, w), X, stack(4, 3), weight(2, 6, 3), slack=10),
    case("routed", lambda i, w: w[i[0]], IS((1,), 4), weight(4, 5, 6)),
]

ONE, TWO, THREE = stack(2, 4, 9), stack(2, 4, 7, 7), stack(1, 2, 4, 4, 4)
CONVOLUTIONS = [
    ("conv1d", F.conv1d, ONE, (6, 4, 3), 6),
    ("conv1d strided", lambda x, w, b: F.conv1d(x, w, b, stride=2, padding=1, dilation=2), ONE, (6, 4, 3), 6),
    ("conv1d grouped", lambda x, w, b: F.conv1d(x, w, b, 1, 0, 1, 2), ONE, (6, 2, 3), 6),
    ("conv2d", F.conv2d, TWO, (6, 4, 3, 3), 6),
    ("conv2d same", lambda x, w, b: F.conv2d(x, w, b, padding="same", groups=4), TWO, (4, 1, 3, 3), 4),
    ("conv2d of one", lambda x, w, b: F.conv2d(x, w, b, padding=(1, 0)), stack(4, 7, 7), (6, 4, 3, 3), 6),
    ("conv3d", F.conv3d, THREE, (3, 2, 3, 3, 3), 3),
    ("conv_transpose1d", lambda x, w, b: F.conv_transpose1d(x, w, b, stride=2, output_padding=1), ONE, (4, 6, 3), 6),
    (
        "conv_transpose2d",
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2, padding=1, groups=2),
        TWO,
        (4, 3, 3, 3),
        6,
    ),
    ("conv_transpose3d", F.conv_transpose3d, THREE, (2, 3, 2, 2, 2), 3),
]
CASES += [
    case(f"{name} {kind}", f, x if "plain" not in kind else P(x.shape, tame=1.0), w, b, sums=True)
    for name, f, x, shape, out in CONVOLUTIONS
    for kind, w, b in (
        ("by plain", plain(*shape), plain(out)),
        ("by changed", weight(*shape), weight(out)),
        ("by changed of low rank", weight(*shape, form="low"), weight(out)),
        ("by changed of all forms", weight(*shape, form="mixed"), plain(out)),
        ("by a stack", stack(*shape), plain(out)),
        ("plain by changed", weight(*shape), plain(out)),
        ("plain by changed of low rank", weight(*shape, form="low"), plain(out)),
        ("plain with a bias", plain(*shape), weight(out)),
    )
    if kind != "by plain" or isinstance(x, S)
]
CASES = [c for c in CASES if not (c.name.startswith("conv") and c.name.endswith("by plain"))] + [
    case(f"{name} by plain", f, x, plain(*shape), plain(out), sums=True) for name, f, x, shape, out in CONVOLUTIONS
]
CASES += [case("conv2d without a bias", lambda x, w: F.conv2d(x, w), TWO, weight(6, 4, 3, 3), sums=True)]


@pytest.mark.parametrize("one", CASES, ids=lambda c: c.name)
@settings(max_examples=6, deadline=None)
@given(st.data())
def test_a_rule_is_the_change_in_float64(one, data):
    one.check(data.draw(WORLDS))
