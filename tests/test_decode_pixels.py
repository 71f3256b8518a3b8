"""decode_pixels: the bits that the corpus' own decoder gives, in every layout, at any address."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import checks
from finf_fast import ops
from finf_fast.corpus.pixels import Pixels

dtype = checks.face_fixture("decode_pixels")
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def image(*shape, by=0):
    """Every value there is, `by` bytes further into memory that was aligned."""
    room = torch.empty(int(np.prod(shape)) + by, dtype=torch.uint8)[by:].view(shape)
    return room.copy_(torch.arange(room.numel()).mul_(7).remainder_(256).view(shape).to(torch.uint8))


@pytest.mark.parametrize("by", [0, 1, 8])
@pytest.mark.parametrize(
    "layout, shape", [("NCHW", (5, 3, 7, 9)), ("NHWC", (5, 8, 8, 3)), ("NHW", (6, 11, 5)), (None, (3, 64))]
)
def test_the_bits_of_the_corpus(dtype, layout, shape, by):
    """As its table makes them, which tests of the corpus hold against torchvision's steps."""
    if dtype not in (torch.float32, torch.bfloat16):
        pytest.skip("a corpus delivers float32 or bfloat16")
    channels = 3 if layout in ("NCHW", "NHWC") else None
    mean, std = (MEAN, STD) if channels else (0.5, 0.25)
    raw = image(*shape, by=by)
    decoder = Pixels(shape, np.dtype(np.uint8), mean, std, layout, str(dtype)[6:])
    wanted = decoder(raw.numpy())
    table = decoder.table(raw.device)
    got = ops.decode_pixels(
        raw, table, 1 if layout == "NHWC" else int(np.prod(shape[2:])) if channels else raw[0].numel()
    )
    got = got.permute(0, 3, 1, 2) if layout == "NHWC" else got.unsqueeze(1) if layout == "NHW" else got
    assert got.dtype == wanted.dtype and torch.equal(got, wanted)


@pytest.mark.parametrize("C", [1, 2, 3, 17])
@pytest.mark.parametrize("run", [1, 2, 5, 15, 16, 17, 40])
def test_every_run_of_every_channel(dtype, C, run):
    raw, table = image(3, 2 * C * run), torch.randn(C, 256).to(dtype)
    channel = torch.arange(raw[0].numel()) // run % C
    assert torch.equal(ops.decode_pixels(raw, table, run), table[channel, raw.long()])


def test_bits_of_a_table_are_copied_as_they_are(dtype):
    table = torch.zeros(1, 256, dtype=dtype)
    table[0, :4] = torch.tensor([-0.0, torch.inf, -torch.inf, torch.nan])
    got = ops.decode_pixels(torch.arange(256, dtype=torch.uint8)[None], table, 1)
    assert torch.equal(got.view(torch.uint8), table.view(torch.uint8))


@pytest.mark.parametrize("N", [0, 1])
def test_empty_and_one(dtype, N):
    assert ops.decode_pixels(image(N, 6), torch.ones(2, 256, dtype=dtype), 3).shape == (N, 6)


def test_errors():
    raw, table = image(2, 6), torch.zeros(2, 256)
    for arguments, kind, said in [
        ((raw.long(), table, 3), TypeError, "raw: wanted"),
        ((raw, table.long(), 3), TypeError, "table: wanted"),
        ((raw, table[:, :9], 3), ValueError, "table: wanted shape"),
        ((raw, table[:0], 3), ValueError, "table: wanted a row a channel"),
        ((raw, table, 0), ValueError, "run: wanted from 1, got 0"),
        ((raw, table, 2), ValueError, r"raw: wanted samples of a multiple of C\*run = 4, got \(2, 6\)"),
        ((raw[:, ::2], table[:1], 3), ValueError, "raw: wanted no gaps"),
        ((raw, table.mT.contiguous().mT, 3), ValueError, "table: wanted no gaps"),
        ((raw, table.to("meta"), 3), ValueError, "table: wanted on cpu"),
    ]:
        with pytest.raises(kind, match=said):
            ops.decode_pixels(*arguments)
