"""decode_tokens: every stored integer as int64, from any address, with gaps between rows or without."""

from __future__ import annotations

import pytest
import torch

import checks
from finf_fast import ops

dtype = checks.face_fixture("decode_tokens")


def numbers(dtype, count, by=0):
    """From the least to the greatest of a dtype, `by` numbers further into memory that was aligned."""
    least, most = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    spread = [least + (most - least) * k // (count - 1) for k in range(count)]
    room = torch.empty(count + by, dtype=dtype)[by:]
    return room.copy_(torch.tensor(spread)), torch.tensor(spread)


def test_every_number(dtype):
    raw, wanted = numbers(dtype, 1 << 16 if dtype.itemsize > 1 else 256)
    got = ops.decode_tokens(raw)
    assert got.dtype == torch.int64 and torch.equal(got, wanted)


@pytest.mark.parametrize("L", [1, 2, 7, 8, 9, 16, 40, 1023])
def test_every_start_of_rows_of_every_length(dtype, L):
    for by in range(17):
        raw, wanted = numbers(dtype, 6 * (L + 5), by)
        whole = raw[: 6 * L].view(6, L)
        assert torch.equal(ops.decode_tokens(whole[1:5]), wanted[: 6 * L].view(6, L)[1:5])
        for cut in (slice(0, L), slice(3, L + 3)):
            got = ops.decode_tokens(raw.view(6, L + 5)[::2, cut])
            assert got.is_contiguous() and torch.equal(got, wanted.view(6, L + 5)[::2, cut])


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (1,), (2, 3, 4)])
def test_any_shape_without_gaps(dtype, shape):
    raw = torch.ones(shape, dtype=dtype)
    got = ops.decode_tokens(raw)
    assert got.shape == shape and got.dtype == torch.int64 and (got == 1).all()


def test_errors():
    for raw, kind, said in [
        (torch.zeros(3, dtype=torch.int64), TypeError, "raw: wanted uint8 or int8 or uint16 or .* got int64"),
        (torch.zeros(3), TypeError, "raw: wanted uint8"),
        (torch.zeros(2, 6, dtype=torch.int16)[:, ::2], ValueError, r"raw: wanted rows without gaps, got \(2, 3\) with"),
        (torch.zeros(2, 2, 6, dtype=torch.int16)[:, :1], ValueError, "raw: wanted rows without gaps"),
        (torch.zeros(6, dtype=torch.int16)[::2], ValueError, "raw: wanted rows without gaps"),
    ]:
        with pytest.raises(kind, match=said):
            ops.decode_tokens(raw)
