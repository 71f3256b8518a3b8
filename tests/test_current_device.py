"""Where an operation launches: on its tensors' device, for Triton would take the current one whatever its pointers."""

from __future__ import annotations

import contextlib
import importlib

import pytest
import torch
from torch import Tensor

from finf_fast.ops import dispatch
from finf_fast.ops.register import on_its_device


class Elsewhere(Tensor):
    """A tensor that says it lies on the second GPU of a machine that has none."""

    @staticmethod
    def __new__(cls, *shape: int):
        return Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32, device="cuda:1")

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        with torch._C._DisableTorchDispatch():  # to the operation itself, as for a tensor of no class of its own
            return operation(*args, **kwargs or {})


@pytest.fixture
def current(monkeypatch):
    """The current devices, last the one that counts: a driver with one GPU too many."""
    entered = [torch.device("cuda:0")]

    @contextlib.contextmanager
    def device(wanted):
        entered.append(wanted)
        yield
        entered.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    return entered


def test_a_face_is_launched_on_the_device_of_its_tensors(current, monkeypatch):
    """Through the operation as it is registered, up to a face that records where it would launch."""
    op, launched = importlib.import_module("finf_fast.ops.activation_delta"), []

    def face(stack, kind, gate, Q):
        launched.append(current[-1])
        return torch.zeros(1)

    monkeypatch.setattr(dispatch, "choose", lambda *inputs: "triton")
    monkeypatch.setitem(op._FACES, "triton", face)
    torch.ops.finf_fast.activation_delta(Elsewhere(2, 3), "gelu", None)
    assert launched == [torch.device("cuda:1")] and current == [torch.device("cuda:0")]


def test_on_a_cpu_no_device_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: pytest.fail("no CUDA here"))
    assert on_its_device(lambda x, more: x.sum() + more)(torch.ones(2), 1) == 3
