"""The way to a GPU and back, with the CPU standing in for it: copies, and faces that look at what they are given."""

from __future__ import annotations

import contextlib
import importlib

import pytest
import torch

import journey
from checks import face_dtypes, forced
from finf_fast import ops
from finf_fast.ops import dispatch


@contextlib.contextmanager
def standing_in(op, run):
    """`run` is the triton face of `op`, built, for GPUs alone by the table, and sent to a device that is the CPU."""
    runners = importlib.import_module(f"finf_fast.ops.{op}")._FACES
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "interpreted", lambda: False)
        patch.setitem(dispatch._MISSING, "triton", lambda: "")
        patch.setitem(dispatch.TABLE[op], "triton", dispatch._GPU)
        patch.setitem(runners, "triton", run)
        with forced("triton"), journey.sent(op, "triton", "cpu"):
            yield


def overlaps(x, y):
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


def test_a_face_gets_copies_laid_out_alike():
    seen = []
    wide = torch.randn(3, 5, 16)
    stack = wide[:, 1:, 3::2]

    def face(*args):
        seen.extend(args)
        return args[0] + 1

    with standing_in("activation_delta", face):
        got = ops.activation_delta(stack, "relu", stack)
    there, kind, gate, Q = seen
    assert kind == "relu" and Q == 2 and torch.equal(there, stack)
    assert there.stride() == stack.stride() and there.storage_offset() == stack.storage_offset()
    assert not overlaps(there, stack) and overlaps(there, gate)
    assert torch.equal(got, stack + 1)


def test_what_is_broadcast_stays_so():
    row = torch.randn(1, 8)
    luggage = journey.Luggage("cpu")
    there = luggage.moved(row.expand(4, 8))
    assert there.stride() == (0, 1) and there.untyped_storage().nbytes() == row.untyped_storage().nbytes()
    luggage.bring_back()


def writes_in_place(x, dx, W, target, base, delta, *changes):
    base.fill_(2)
    delta.copy_(torch.arange(delta.numel()).view_as(delta))


def test_what_is_written_in_place_comes_back():
    x, dx, W, target = torch.randn(4, 3), torch.randn(2, 4, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 3])
    base, wide = torch.full((4,), torch.nan), torch.full((2, 9), 7.0)
    with standing_in("linear_cross_entropy_delta", writes_in_place):
        ops.linear_cross_entropy_delta_out(x, dx, W, target, base, wide[:, :4])
    assert (base == 2).all() and wide[1, :4].tolist() == [4, 5, 6, 7] and (wide[:, 4:] == 7).all()


def test_a_write_into_a_gap_is_seen():
    def careless(*args):
        args[5].as_strided((2, 9), (9, 1)).fill_(1)

    x, W, target = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 3])
    base, wide = torch.zeros(4), torch.full((2, 9), 7.0)
    with standing_in("linear_cross_entropy_delta", careless):
        ops.linear_cross_entropy_delta_out(x, torch.zeros(2, 4, 3), W, target, base, wide[:, :4])
    assert (wide[:, 4:] == 1).all()


def test_several_results_come_back():
    stack = torch.randn(2, 4, 6)
    with standing_in("layer_norm_delta", lambda x, w, b, dw, db, residual, eps, sizes: [x + 1, residual + 2]):
        normed, summed = ops.layer_norm_delta(stack, residual=stack)
    assert torch.equal(normed, stack + 1) and torch.equal(summed, stack + 2)


def test_afterwards_the_face_refuses_the_cpu_again(monkeypatch):
    with standing_in("activation_delta", lambda x, kind, gate, Q: x.clone()):
        ops.activation_delta(torch.randn(2, 4), "relu")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with forced("triton"), pytest.raises(ValueError, match="triton"):
        ops.activation_delta(torch.randn(2, 4), "relu")


@pytest.mark.parametrize("device, faces", [("", {"cpp", "reference"}), ("cuda", {"triton"})])
def test_the_faces_that_travel_go_alone(monkeypatch, device, faces):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("FINF_TEST_DEVICE", device)
    assert {face for face, _ in face_dtypes("attention_delta")} == faces
