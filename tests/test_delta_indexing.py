"""Rules that look up, write and cast: by integers that differ between queries, between numbers and integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_cases import BS, IS, WORLDS, B, C, I, P, S, World, case

X, X3, IMAGE, COUNTS = S((4, 6)), S((2, 3, 4)), S((2, 4, 5, 6)), IS((3, 4), 5)
TABLE = {form: C((7, 5), form=form) for form in ("dense", "low", "mixed")}


def _written(f):
    """The first argument after f has written into it."""

    def run(x, *rest):
        f(x, *rest)
        return x

    return run


CASES = [
    case("getitem", lambda x, i: (x[i], x[:, i], x[i, 1:], x[..., i]), X, IS((3,), 4)),
    case(
        "getitem by two",
        lambda x, i, j: (x[i, j], x[i, [0, 1, 2]], x[j, i], x[i[:, None], j]),
        X,
        IS((3,), 4),
        I((3,), 4),
    ),
    case(
        "getitem by arrays",
        lambda x: (
            x[np.array([0, 1]), :, np.array([2, 3])],
            x[[1, 0], :, [2, 3]],
            x[1, :, np.array([0, 3, 3])],
            x[np.int64(1), :, [0, 3, 3]],
            x[range(2), :, 3],
            x[np.array([[0, 1], [1, 1]])],
            x[:, np.array([True, False, True])],
            x[[]],
        ),
        X3,
    ),
    case("getitem of plain", lambda x, i: (x[i], x[0, i], x[i, :2]), P((4, 6)), IS((2, 3), 4)),
    case("getitem of changed", lambda x, i: x[i], TABLE["mixed"], IS((3,), 7)),
    case(
        "getitem of integers",
        lambda i, j: (i[j], i[0], i[:, 1:], i.reshape(-1), i.flip(0), i[None] + 1),
        COUNTS,
        IS((3,), 3),
    ),
    case("getitem by one number", lambda x, i: (x[i], x[i, 0]), X, IS((), 4)),
    case("index_select", lambda x, i: (x.index_select(0, i), torch.index_select(x, -1, i)), X, IS((3,), 4)),
    case("index_select plain", lambda x, i: torch.index_select(x, 1, i), P((4, 6)), IS((3,), 4)),
    case("gather", lambda x, i: (x.gather(0, i), torch.gather(x, -1, i), x.gather(dim=1, index=i)), X, IS((2, 3), 4)),
    case("gather plain", lambda x, i: (x.gather(0, i), torch.gather(x, -1, i)), P((4, 6)), IS((2, 3), 4)),
    case("gather integers", lambda i, j: (i.gather(0, j), i.gather(1, j)), COUNTS, IS((2, 3), 3)),
    case(
        "take_along_dim",
        lambda x, i: (x.take_along_dim(i, 1), torch.take_along_dim(x, i[:, :1], dim=1)),
        X,
        IS((4, 6), 4),
    ),
    case(
        "scatter",
        lambda x, i, y: (x.scatter(0, i, y), x.scatter_add(1, i, y), x.scatter(1, i, 2.0)),
        X,
        IS((2, 3), 4),
        S((4, 6)),
    ),
    case("scatter of zeros", lambda x, i, y: torch.zeros_like(x).scatter_add(-1, i, y), X, IS((4, 6), 6), S((4, 6))),
    case(
        "scatter with numbers", lambda x, i: (x.scatter(0, i, 1.0), torch.scatter(x, 1, i, value=2.0)), X, I((2, 3), 4)
    ),
    case(
        "scatter integers",
        lambda x, i, j: (x.scatter_add(0, i, j.to(x.dtype)), x.scatter_(1, i, 3)),
        X,
        I((2, 3), 4),
        COUNTS,
    ),
    case(
        "scatter of integers",
        lambda i, j: (i.scatter(0, j, 7), i.scatter_add(1, j, i), i.scatter_(1, j, 1)),
        COUNTS,
        IS((2, 3), 3),
    ),
    case("scatter with a reduction", lambda x, i, y: x.scatter(0, i, y, reduce="multiply"), X, I((2, 3), 4), S((4, 6))),
    case(
        "index_add",
        lambda x, y: (x.index_add(0, torch.tensor([2, 0]), y), x.index_add_(0, torch.tensor([1, 1]), y, alpha=2)),
        X,
        S((2, 6)),
    ),
    case("index_add plain", lambda x, y: torch.index_add(x, 0, torch.tensor([2, 0]), y), X, P((2, 6))),
    case("index_copy", lambda x, i: x.index_copy(0, torch.tensor([2]), i.to(x.dtype)), X, IS((1, 6), 4)),
    case("copy_ of integers", _written(lambda x, i, j: (x[0].copy_(i), x[1].copy_(j))), X, IS((6,), 4), I((6,), 4)),
    case("copy_ to integers", _written(lambda i, x: i.copy_(x)), COUNTS, S((3, 4), near=3.0)),
    case(
        "setitem of integers",
        _written(lambda x, i, j: (x.__setitem__(0, i), x.__setitem__((1, 2), 3), x.__setitem__(2, j))),
        X,
        IS((6,), 4),
        I((6,), 4),
    ),
    case(
        "setitem into integers",
        _written(lambda i, x: (i.__setitem__(0, 7), i.__setitem__((slice(None), 1), i[:, 0]))),
        COUNTS,
        X,
    ),
    case("setitem of flags", _written(lambda x, b: x.__setitem__(0, b)), X, BS((6,))),
    case(
        "cat with integers",
        lambda x, i, j: (torch.cat([x, i]), torch.cat([j, x]), torch.stack([x, j])),
        X,
        IS((4, 6), 5),
        I((4, 6), 5),
    ),
    case(
        "cat integers",
        lambda i, j: (torch.cat([i, j]), torch.stack([j, i], 1), torch.hstack([i, j])),
        COUNTS,
        I((3, 4), 9),
    ),
    case("pad integers", lambda i: (F.pad(i, (1, 1)), F.pad(i, (0, 2), value=3)), COUNTS),
    case("pad with a value", lambda x: (F.pad(x, (1, 2), value=3.0), F.pad(x, (1, 1), "constant", -1.0)), X),
    case("one_hot", lambda i: (F.one_hot(i, 5), F.one_hot(i, num_classes=7).sum(0)), COUNTS),
    case(
        "embedding",
        lambda i, w: (F.embedding(i, w), F.embedding(input=i, weight=w, padding_idx=0)),
        IS((2, 3), 7),
        P((7, 5)),
    ),
    *(case(f"embedding {form}", lambda i, w: F.embedding(i, w), I((2, 3), 7), w) for form, w in TABLE.items()),
    *(case(f"embedding routed {form}", lambda i, w: F.embedding(i, w), IS((2, 3), 7), w) for form, w in TABLE.items()),
    case("embedding of a stack", lambda i, w: (torch.embedding(w, i), F.embedding(i, w)), I((2, 3), 7), S((7, 5))),
    case("embedding_bag", lambda i, w: F.embedding_bag(i, w), I((2, 3), 7), TABLE["dense"], slack=10),
    case("masked_fill by a route", lambda x, i: x.masked_fill(i == 2, 0.5), X, IS((4, 1), 4)),
    case("where by a route", lambda x, i, y: torch.where(i > 1, x, y), X, IS((4, 1), 4), P((6,), tame=1.0)),
    case("masked rows", lambda x, m: (x[m].sum(), x * m, x.masked_fill(~m, 0)), S((4,)), B((4,)), sums=True),
    case(
        "casts to integers",
        lambda x: (x.long(), x.int(), x.bool(), x.to(torch.int64), x.short(), x.type(torch.int32)),
        S((3, 4), tame=1.0),
    ),
    case(
        "casts of integers",
        lambda i: (i.float(), i.to(torch.float64), i.int(), i.bool(), i.double(), i.type_as(i)),
        COUNTS,
    ),
    case("casts of flags", lambda b: (b.float(), b.long(), b.to(torch.int32), b * 1.0), BS((3, 4))),
    case(
        "type_as",
        lambda x, y: (x.type_as(y), y.type_as(x), y.to(x), x.to(y)),
        S((3, 4), dtype=torch.float32),
        P((3, 4), dtype=torch.float64),
    ),
    case(
        "view_as of plain",
        lambda x, y: (x.view_as(y) * y, x.reshape_as(y) + y, x[:, 0].expand_as(y)),
        P((3, 2)),
        S((2, 3)),
    ),
    case(
        "a copy is none",
        _written(lambda x: (x.to(x.dtype, copy=True).add_(1), x.clone().mul_(2), x[:, [0, 1]].add_(1))),
        X,
    ),
    case("casts alias", _written(lambda x: (x.to(x.dtype).add_(1), x.detach().mul_(2), x.data.add_(1))), X),
    case(
        "new ones",
        lambda x: (torch.zeros_like(x), torch.ones_like(x), x.new_zeros(2, 3), x.new_ones((2,)), torch.full_like(x, 2)),
        X,
    ),
    case(
        "new kinds",
        lambda x: (
            x.new_full((2,), 3.0),
            x.new_tensor([1, 2]),
            torch.zeros_like(x, dtype=torch.int64),
            x.new_zeros(size=(2,)),
        ),
        X,
    ),
    case(
        "new and empty",
        lambda x: (torch.empty_like(x).zero_(), x.new_empty(2).zero_(), x.new_empty((2, 3), dtype=torch.int64).zero_()),
        X,
    ),
    case(
        "avg_pool2d",
        lambda x: (F.avg_pool2d(x, 2), F.avg_pool2d(x, 3, stride=2, padding=1), F.adaptive_avg_pool2d(x, (2, 3))),
        IMAGE,
    ),
    case(
        "avg_pool2d names",
        lambda x: (torch._C._nn.adaptive_avg_pool2d(x, 1), F.avg_pool2d(x, kernel_size=2), F.avg_pool2d(x[0], 2)),
        IMAGE,
    ),
    case(
        "avg_pool1d",
        lambda x: (F.avg_pool1d(x, 2), F.adaptive_avg_pool1d(x, 3), torch.avg_pool1d(x, 2, 1)),
        X3,
        sums=True,
    ),
    case(
        "avg_pool3d",
        lambda x: (F.avg_pool3d(x, 2), F.adaptive_avg_pool3d(x, 2), torch._C._nn.adaptive_avg_pool3d(x, 1)),
        S((1, 2, 4, 4, 4), dtype=torch.float32),
        sums=True,
    ),
    case(
        "interpolate",
        lambda x: (F.interpolate(x, scale_factor=2, mode="bilinear"), F.interpolate(x, size=(3, 3), mode="bicubic")),
        IMAGE,
    ),
    case("upsample", lambda x: (F.upsample(x, scale_factor=2), F.interpolate(x, scale_factor=0.5, mode="area")), IMAGE),
    case("fold", lambda x: F.fold(x, (4, 5), 2), S((2, 8, 12))),
    case("fold of one", lambda x: F.fold(x, (4, 5), kernel_size=2), S((8, 12))),
]


# Of these the layout decides what they write into.
LAYOUTS = [
    case(
        "what is contiguous is itself",
        _written(lambda x: (x[1:3].contiguous().mul_(2), x[:2].to(memory_format=torch.preserve_format).add_(1))),
        X,
    ),
    case("what is not is a copy", _written(lambda x: (x.mT.contiguous().mul_(2), x[:, 1:3].contiguous().add_(1))), X),
    case(
        "channels_last itself",
        _written(
            lambda x: (
                x.to(memory_format=torch.channels_last).add_(1),
                x[:, :, 1:3].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last).mul_(3),
                x[1:].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last).mul_(2),
            )
        ),
        IMAGE,
    ),
    case(
        "a clone is none",
        _written(
            lambda x: (
                x.clone(memory_format=torch.contiguous_format).add_(1),
                x.permute(0, 3, 1, 2).clone(memory_format=torch.channels_last).mul_(2),
            )
        ),
        IMAGE,
    ),
]


@pytest.mark.parametrize("one", LAYOUTS, ids=lambda c: c.name)
def test_what_torch_would_not_copy_is_written_into(one):
    one.check(World(torch.float64))


@pytest.mark.filterwarnings("ignore:`nn.functional.upsample` is deprecated")
@pytest.mark.parametrize("one", CASES, ids=lambda c: c.name)
@settings(max_examples=8, deadline=None)
@given(st.data())
def test_a_rule_is_the_change_in_float64(one, data):
    one.check(data.draw(WORLDS))
