"""Rules that move numbers: bit by bit the function of each row. Indexing by what differs between queries; casts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from delta_cases import B, C, I, P, S, World, case, moves

X, X3, X4, IMAGE = S((4, 6)), S((2, 3, 4)), S((2, 1, 3, 4)), S((2, 4, 5, 6))
PARTS = (S((2, 3)), P((2, 3)), C((2, 3)))

MOVES = [
    case("view", lambda x: (x.view(6, 4), x.view((-1,)), x.view(2, -1, 3), x.reshape(24), x.reshape((3, 8))), X),
    case(
        "view names", lambda x: (torch.reshape(x, (3, 8)), torch.reshape(input=x, shape=(24,)), x.view(size=(8, 3))), X
    ),
    case(
        "view of one", lambda x: (x.view(1), x.reshape(()), x.view(-1), x.flatten(), x.squeeze(), x.unsqueeze(0)), S(())
    ),
    case("view of nothing", lambda x: (x.view(3, 0), x.view(-1, 3), x.reshape(0, 5), x.flatten()), S((0, 3))),
    case("view_as", lambda x, y: (x.view_as(y), x.reshape_as(y)), S((2, 3)), S((3, 2))),
    case("view_as plain", lambda x, y: x.view_as(y), S((2, 3)), P((3, 2))),
    case(
        "flatten",
        lambda x: (
            x.flatten(),
            torch.flatten(x, 1),
            x.flatten(0, 1),
            x.flatten(-2, -1),
            torch.flatten(x, start_dim=1, end_dim=2),
        ),
        X3,
    ),
    case(
        "unflatten",
        lambda x: (x.unflatten(1, (2, 3)), torch.unflatten(x, -1, (-1, 2)), x.unflatten(dim=0, sizes=(2, 2))),
        X,
    ),
    case(
        "transpose",
        lambda x: (x.transpose(0, 1), torch.transpose(x, -1, 0), x.swapaxes(1, 2), torch.swapdims(x, 0, 2)),
        X3,
    ),
    case(
        "transpose names",
        lambda x: (x.swapdims(0, 1), torch.swapaxes(x, 0, 1), torch.transpose(input=x, dim0=0, dim1=2)),
        X3,
    ),
    case("t", lambda x: (x.t(), x.T, x.mT, torch.t(x), x.mH, torch.adjoint(x), x.adjoint(), x.H), X),
    case("T of three", lambda x: x.T, X3),
    case("t of a row", lambda x: (x.t(), torch.t(x)), S((3,))),
    case("t of changed", lambda x: (x.t() + 0, x.T[0], x.transpose(0, 1)[1]), C((4, 6), form="mixed")),
    case(
        "permute",
        lambda x: (x.permute(2, 0, 1), x.permute((0, -1, 1)), torch.permute(x, (1, 2, 0)), x.permute(dims=(2, 1, 0))),
        X3,
    ),
    case(
        "movedim",
        lambda x: (x.movedim(0, -1), torch.movedim(x, (0, 1), (1, 2)), x.moveaxis(-1, 0), torch.moveaxis(x, 0, 1)),
        X3,
    ),
    case(
        "unsqueeze",
        lambda x: (x.unsqueeze(0), x.unsqueeze(-1), torch.unsqueeze(x, 1), x[None], x[:, None], x[..., None]),
        X,
    ),
    case(
        "squeeze", lambda x: (x.squeeze(), x.squeeze(1), x.squeeze(0), torch.squeeze(x, dim=-3), x.squeeze((1, 0))), X4
    ),
    case(
        "expand",
        lambda x: (
            x.expand(2, 5, 3, 4),
            x.expand(-1, 5, -1, -1),
            x.expand((7, 2, 1, 3, 4)),
            x.broadcast_to((2, 2, 3, 4)),
        ),
        X4,
    ),
    case("expand names", lambda x: (torch.broadcast_to(x, (2, 5, 3, 4)), x.expand(size=(2, 5, 3, 4))), X4),
    case("expand of one", lambda x: x.expand(3, 2), S(())),
    case("expand_as", lambda x, y: (x.expand_as(y), x.expand_as(y + 1)), S((3,)), S((2, 3))),
    case(
        "repeat",
        lambda x: (x.repeat(2, 3), x.repeat((2, 1, 1)), x.repeat(repeats=(1, 2)), x.tile(2), torch.tile(x, (2, 1))),
        X,
    ),
    case(
        "repeat_interleave",
        lambda x: (x.repeat_interleave(2, 0), torch.repeat_interleave(x, 3, dim=-1), x.repeat_interleave(2)),
        X,
    ),
    case("repeat_interleave by counts", lambda x: x.repeat_interleave(torch.tensor([1, 0, 2, 1]), dim=0), X),
    case(
        "contiguous",
        lambda x: (x.contiguous(), x.mT.contiguous(), x.clone(), torch.clone(x), x.detach(), x.data, x.cpu()),
        X,
    ),
    case(
        "channels_last",
        lambda x: (x.contiguous(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)),
        IMAGE,
    ),
    case("channels_last clone", lambda x: x.clone(memory_format=torch.channels_last), IMAGE),
    case("the same", lambda x: (torch.detach(x), torch.real(x), x.real, x.resolve_conj(), x.resolve_neg()), X),
    case(
        "the same twice",
        lambda x: (torch.resolve_conj(x), torch.resolve_neg(x), x.to(x.dtype), x.to(x), x.to("cpu")),
        X,
    ),
    case(
        "dropout off",
        lambda x: (F.dropout(x, 0.5, False), F.dropout(x, 0.0), torch.dropout(x, 0.5, False), F.alpha_dropout(x)),
        X,
    ),
    case(
        "dropout names",
        lambda x: (
            torch.dropout(x, p=0.5, train=False),
            F.feature_alpha_dropout(x),
            F.dropout(x, training=False, inplace=True),
        ),
        X,
    ),
    case(
        "dropouts",
        lambda x: (
            torch.alpha_dropout(x, 0.5, False),
            torch.feature_dropout(x, 0.5, False),
            torch.feature_alpha_dropout(x, 0.5, False),
        ),
        IMAGE,
    ),
    case(
        "dropout of channels", lambda x: (F.dropout2d(x, training=False), torch.native_dropout(x, 0.5, False)[0]), IMAGE
    ),
    case("dropout of more", lambda x: (F.dropout1d(x, training=False), F.dropout3d(x[None], training=False)[0]), X3),
    case(
        "dropout_",
        lambda x: (
            torch.dropout_(x, 0.5, False),
            torch.alpha_dropout_(x, 0.5, False),
            torch.feature_dropout_(x, 0.5, False),
            torch.feature_alpha_dropout_(x, 0.5, False),
        ),
        X,
    ),
    case("detach_", lambda x: (x.clone().detach_(), torch.detach_(x.clone())), X),
    case("cat", lambda x, y, z: (torch.cat([x, y, z]), torch.cat((x, z), dim=-1), torch.concat([y, x], 1)), *PARTS),
    case(
        "cat names",
        lambda x, y, z: (torch.concatenate([x, y], axis=1), torch.cat(tensors=[y, x], dim=0), torch.cat([x])),
        *PARTS,
    ),
    case(
        "cat of nothing", lambda x, y: (torch.cat([torch.empty(0, dtype=x.dtype), x]), torch.cat([x, y])), X, S((0, 6))
    ),
    case(
        "stack",
        lambda x, y, z: (torch.stack([x, y, z]), torch.stack((x, z), dim=-1), torch.stack(tensors=[y, x], dim=1)),
        *PARTS,
    ),
    case(
        "hstack",
        lambda x, y, z: (
            torch.hstack([x, y]),
            torch.vstack([x, z]),
            torch.hstack((y[0] + 0, x[0])),
            torch.vstack((x[0], z[0])),
        ),
        *PARTS,
    ),
    case("hstack of one", lambda x, y: (torch.hstack([x, y]), torch.vstack([x, y])), S(()), S(())),
    case(
        "split",
        lambda x: (
            torch.split(x, 2),
            x.split(4, dim=-1),
            x.split([1, 3]),
            torch.split(x, [2, 4], 1),
            x.split(split_size=2),
        ),
        X,
    ),
    case("split_with_sizes", lambda x: (torch.split_with_sizes(x, [1, 3]), x.split_with_sizes((2, 4), dim=1)), X),
    case(
        "chunk",
        lambda x: (
            x.chunk(3, -1),
            torch.chunk(x, 2),
            x.chunk(chunks=2, dim=1),
            torch.tensor_split(x, 3, 1),
            x.tensor_split((1, 2)),
        ),
        X,
    ),
    case("unbind", lambda x: (x.unbind(), torch.unbind(x, -1), x.unbind(dim=1), tuple(x), [*x]), X),
    case("iterate", lambda x: [row for row in x], X),
    case(
        "select",
        lambda x: (
            x.select(0, 1),
            torch.select(x, -1, 2),
            x.select(dim=1, index=-1),
            x.narrow(1, 2, 3),
            torch.narrow(x, 0, -2, 2),
        ),
        X,
    ),
    case(
        "flip",
        lambda x: (
            x.flip(0),
            x.flip((0, 1)),
            torch.flip(x, dims=[-1]),
            x.fliplr(),
            x.flipud(),
            torch.fliplr(x),
            torch.flipud(x),
        ),
        X,
    ),
    case("roll", lambda x: (x.roll(1, 0), torch.roll(x, (1, 2), (0, 1)), x.roll(shifts=-1, dims=-1), x.roll(2)), X),
    case(
        "diagonal",
        lambda x: (
            x.diagonal(),
            torch.diagonal(x, 1),
            x.diagonal(dim1=-2, dim2=-1),
            x.diagonal(0, 1, 2),
            torch.linalg.diagonal(x),
        ),
        X3,
    ),
    case(
        "tril",
        lambda x: (x.tril(), torch.triu(x), x.triu(1), torch.tril(x, diagonal=-1), x.clone().tril_(), x.triu_(1)),
        X3,
    ),
    case(
        "pad",
        lambda x: (
            F.pad(x, (1, 2)),
            F.pad(x, (1, 0, 0, 1)),
            F.pad(x, (-1, 1)),
            F.pad(x, (1, 1), value=0),
            torch._C._nn.pad(x, (1, 1)),
        ),
        X,
    ),
    case(
        "pad by itself",
        lambda x: (F.pad(x, (1, 2), mode="reflect"), F.pad(x, (2, 1), "replicate"), F.pad(x, (1, 1), mode="circular")),
        X3,
    ),
    case(
        "pad an image", lambda x: (F.pad(x, (1, 2, 1, 0), mode="reflect"), F.pad(x, (2, 1, 0, 0), "replicate")), IMAGE
    ),
    case(
        "pixel_shuffle",
        lambda x: (F.pixel_shuffle(x, 2), F.pixel_unshuffle(x[..., :4, :4], 2), F.channel_shuffle(x, 2)),
        IMAGE,
    ),
    case("pixel_shuffle of one", lambda x: (F.pixel_shuffle(x, 2), F.pixel_unshuffle(x, 2)), S((4, 2, 4))),
    case("windows", lambda x: (x.unfold(1, 3, 2), x.unfold(-1, 2, 1), x.unfold(dimension=0, size=2, step=1)), X),
    case(
        "F.unfold",
        lambda x: (F.unfold(x, 3), F.unfold(x, kernel_size=(2, 3), stride=2), F.unfold(x, 3, padding=1)),
        IMAGE,
    ),
    case("F.unfold of one", lambda x: F.unfold(x, 2), S((2, 4, 4))),
    case("nearest", lambda x: (F.interpolate(x, scale_factor=2), F.interpolate(x, size=(3, 4), mode="nearest")), IMAGE),
    case("getitem", lambda x: (x[0], x[-1], x[1:3], x[:, 2], x[..., 0], x[::2, 1::2], x[None, :, None], x[()]), X),
    case(
        "getitem by lists", lambda x: (x[[0, 2]], x[:, [1, 3, 1]], x[[0, 1], [2, 3]], x[[True, False, True, True]]), X
    ),
    case(
        "getitem by tensors",
        lambda x, i, j: (x[i], x[:, j], x[i, j], x[i[:, None], j], x[..., j], x[i, None]),
        X,
        I((3,), 4),
        I((3,), 6),
    ),
    case(
        "getitem apart",
        lambda x, i, j: (x[i, :, j], x[:, i, j], x[0, :, j], x[i, 1:, 0], x[i, ..., j], x[:, 0, j]),
        X3,
        I((5,), 2),
        I((5,), 3),
    ),
    case("getitem by one number", lambda x, i: (x[i], x[:, i], x[i, i], x[i, 1:]), X, I((), 4)),
    case("getitem of changed", lambda x: (x[0], x[:, 1], x[1:], x[None]), C((4, 6), form="mixed")),
    case("getitem of experts", lambda x: (x[0] + 0, x[1, 2], x[:, 1], x[-1] + 0), C((4, 3, 2))),
    case(
        "getitem by a mask", lambda x, m: (x[m], x.masked_select(m), torch.masked_select(x, m), x[:, 0]), X, B((4, 6))
    ),
    case("getitem by rows", lambda x, m: (x[m], x[m, 1:], x[m] + 0), X, B((4,))),
    case(
        "index_select",
        lambda x, i: (x.index_select(0, i), torch.index_select(x, -1, i), torch.index_select(x, dim=1, index=i)),
        X,
        I((3,), 4),
    ),
    case(
        "gather",
        lambda x, i: (x.gather(0, i), torch.gather(x, -1, i), torch.gather(x, dim=1, index=i)),
        X,
        I((2, 3), 4),
    ),
    case("take_along_dim", lambda x, i: (torch.take_along_dim(x, i, 1), x.take_along_dim(i, dim=0)), X, I((4, 6), 4)),
    case(
        "take_along_dim of all",
        lambda x, i: (torch.take_along_dim(x.contiguous(), i), x.take_along_dim(indices=i[:1], dim=0)),
        X,
        I((4, 6), 4),
    ),
    case(
        "scatter",
        lambda x, i, y: (
            x.scatter(0, i, y),
            torch.scatter(x, 1, i, y),
            x.scatter_add(-1, i, y),
            torch.scatter_add(x, 0, i, y),
        ),
        X,
        I((4, 6), 4),
        S((4, 6)),
    ),
    case(
        "scatter_", lambda x, i, y: (x.clone().scatter_(0, i, y), x.scatter_add_(1, i, y)), X, I((2, 3), 4), P((4, 6))
    ),
    case(
        "scatter plain",
        lambda x, i, y: (x.scatter(0, i, y), x.scatter_add(1, i, y)),
        P((4, 6)),
        I((2, 3), 4),
        S((4, 6)),
    ),
    case(
        "index_copy",
        lambda x, y: (x.index_copy(0, torch.tensor([2, 0]), y), x.index_copy_(0, torch.tensor([1, 3]), y)),
        X,
        S((2, 6)),
    ),
    case("index_copy plain", lambda x, y: torch.index_copy(x, 0, torch.tensor([2, 0]), y), P((4, 6)), S((2, 6))),
    case(
        "masked_scatter",
        lambda x, m, y: (x.masked_scatter(m, y), torch.masked_scatter(x, m, y), x.masked_scatter_(m, y)),
        X,
        B((4, 6)),
        S((30,)),
    ),
    case("copy_", lambda x, y: (x[0].copy_(y), x, torch.clone(x)), X, S((6,))),
    case("copy_ broadcast", lambda x, y: (x.copy_(y), x), S((4, 6)), S((6,))),
    case("copy_ of a row to 1 + Q rows", lambda x, y: x.copy_(y), S((4, 4, 3)), S((4, 3))),
    case("setitem", lambda x, y: (x.__setitem__(0, y), x.__setitem__((slice(1, 3), 2), 0.0), x)[-1], X, S((6,))),
    case(
        "setitem by tensors",
        lambda x, y, i: (x.__setitem__(i, y), x.__setitem__((Ellipsis, [1, 2]), y[:2]), x)[-1],
        X,
        S((6,)),
        I((2,), 4),
    ),
    case("setitem apart", lambda x, y: (x.__setitem__(([0, 1], slice(None), [2, 0]), y), x)[-1], X3, S((2, 3))),
    case(
        "setitem by arrays",
        lambda x, y: (x.__setitem__((np.array([0, 1]), slice(None), np.array([2, 0])), y), x)[-1],
        X3,
        S((2, 3)),
    ),
    case("setitem by a mask", lambda x, y, m: (x.__setitem__(m, y), x)[-1], X, S(()), B((4, 6))),
    case("setitem by rows", lambda x, y, m: (x.__setitem__(m, y), x)[-1], X, S((6,)), B((4,))),
    case(
        "views are written",
        lambda x, y: (x[:, 1].copy_(y), x.view(-1)[3:7].zero_(), x.mT[0].copy_(y), x)[-1],
        X,
        S((4,)),
    ),
    case("sums alias", lambda x, y: (x.chunk(2, 1)[1].copy_(y), x.unbind(0)[0].zero_(), x)[-1], X, S((4, 3))),
    case(
        "casts",
        lambda x: (x.to(torch.float32), x.float(), x.double(), x.to(dtype=torch.float64)),
        S((3, 4), dtype=torch.float32),
    ),
    case(
        "casts of half",
        lambda x: (x.float(), x.to(torch.float32), x.bfloat16(), x.type(torch.float64)),
        S((3, 4), dtype=torch.bfloat16),
    ),
    case("casts down", lambda x: (x.bfloat16(), x.half()), S((3, 4), dtype=torch.float32, tame=1.0)),
]


@pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors")
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("one", MOVES, ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_moves_numbers_touches_none(one, strided, dtype):
    strided = strided and "view" not in one.name  # torch refuses to view what lies apart
    moves(one.f, one.arguments(World(dtype, strided=strided)))
