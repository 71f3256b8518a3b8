"""The operations' tests on a GPU: tensors made on the CPU travel to a face's device, what it wrote travels back.

FINF_TEST_DEVICE=cuda makes `checks.face_fixture` install this around the runner of the face under test. What
travels are whole storages, so that a face sees the strides, offsets, gaps and overlaps that the test laid out, and the
test sees whatever the face wrote, in a gap too.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from finf_fast.ops import dispatch
from finf_fast.ops.register import on_its_device

GPU_FACES = ("triton", "cuda", "hybrid")

# For a test that wants an error by what values are given: only a CPU may look at them without waiting.
cpu_looks = pytest.mark.skipif(
    os.environ.get("FINF_TEST_DEVICE", "cpu") != "cpu",
    reason="on a GPU nothing waits to look: a bad target ends the process there, a bad list stays one",
)

# For a test of its own that nothing stands in for.
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def destination() -> str | None:
    """Where the faces for GPUs are to run: a device by name, or None, wherever the tensors are."""
    return os.environ.get("FINF_TEST_DEVICE") or None


class Luggage:
    """Copies of tensors on another device; tensors that share memory share its copy."""

    def __init__(self, device: str):
        self._device, self._storages = device, {}

    def moved(self, x: Any) -> Any:
        """`x` there, laid out as here; what is no tensor as it is."""
        if not isinstance(x, Tensor):
            return x
        here = _bytes(x)
        if here.data_ptr() not in self._storages:
            self._storages[here.data_ptr()] = here, here.to(self._device, copy=True)
        _, there = self._storages[here.data_ptr()]
        place = x.storage_offset(), x.size(), x.stride()
        return torch.empty(0, dtype=x.dtype, device=there.device).set_(there.untyped_storage(), *place)

    def bring_back(self) -> None:
        """Every storage that was written to there is written here."""
        for here, there in self._storages.values():
            after = there.to(here.device)
            if not torch.equal(here, after):
                here.copy_(after)


def _bytes(x: Tensor) -> Tensor:
    """All of the storage behind `x`."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())


def abroad(run: Callable, device: str) -> Callable:
    """The runner `run`, executed on `device` for tensors that lie on the CPU."""

    def travelling(*args: Any) -> Any:
        luggage = Luggage(device)
        found = on_its_device(run)(*(luggage.moved(x) for x in args))
        luggage.bring_back()
        home = Luggage("cpu")
        return [home.moved(x) for x in found] if isinstance(found, (list, tuple)) else home.moved(found)

    return travelling


@contextlib.contextmanager
def sent(op: str, face: str, device: str) -> Iterator[None]:
    """While it lasts `face` of `op` takes CPU tensors and runs on `device`."""
    runners, row = importlib.import_module(f"finf_fast.ops.{op}")._FACES, dispatch.TABLE[op]
    run, takes = runners[face], row[face]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_choices", {})  # a choice made abroad is not one for here
        patch.setitem(runners, face, abroad(run, device))
        patch.setitem(row, face, replace(takes, devices=(*(takes.devices or ()), "cpu")))
        yield
