"""The hybrid face where its own ways differ: chunks of rows, panels of columns, the memory it takes.

That its numbers are right is shown by test_linear_cross_entropy_delta.py, which runs along every face.
"""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

import checks
from finf_fast.kernels.centre import SAMPLED, centre
from finf_fast.ops import dispatch, hybrid
from heads import BOUNDS, FORMS, check, make_head

HEAD = importlib.import_module("finf_fast.ops.linear_cross_entropy_delta")  # the package has a function of this name
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def asked():
    with checks.forced("hybrid"):
        yield


@pytest.fixture
def chunks(monkeypatch):
    """The numbers of rows scored at a time."""
    seen, kernel = [], HEAD.row_kernel

    def watched(device):
        score = kernel(device)
        return lambda z, *rest: (seen.append(len(z)), score(z, *rest))

    monkeypatch.setattr(HEAD, "row_kernel", watched)
    return seen


@BOTH
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("rows, columns", [(1, 64), (3, 64), (8, 128)])
def test_chunks_and_panels(monkeypatch, chunks, dtype, form, softcap, rows, columns):
    """Ragged ends of both: 8 rows, 600 columns; columns are only cut where a copy or a soft cap asks for it."""
    head = make_head(form, step=1e-2, dtype=dtype, softcap=softcap)
    planes = 3 + ("input" in form and form not in ("input", "bias"))
    monkeypatch.setattr(hybrid, "CHUNK_BYTES", rows * 4 * planes * 600)
    monkeypatch.setattr(hybrid, "PANEL_BYTES", 1)
    monkeypatch.setattr(hybrid, "NARROWEST", columns)
    check(head, bound=2 * BOUNDS[dtype])
    assert chunks == [rows] * (8 // rows) + ([8 % rows] if 8 % rows else [])


@BOTH
@pytest.mark.parametrize("form", ["input", "low rank", "dense", "input and low rank and bias"])
def test_the_room_is_what_is_stated(monkeypatch, dtype, form):
    """Of every tensor made on the way none is larger than the chunk or the panel, but for one row of a chunk."""
    head = make_head(form, N=256, D=64, V=2048, Q=2, step=1e-2, dtype=dtype)
    monkeypatch.setattr(hybrid, "CHUNK_BYTES", 1 << 19)
    monkeypatch.setattr(hybrid, "PANEL_BYTES", 1 << 17)
    with Largest() as largest:
        head.run()
    copied = 4 * head.x.numel() * 3  # values and changes of x, whole at the most
    assert largest.bytes <= max(1 << 19, NARROWEST_COPY, copied)


NARROWEST_COPY = 512 * 64 * 4  # a panel is never narrower


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest storage made while it lasts."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in torch.utils._pytree.tree_leaves((args, kwargs)) if tensor(x)}
        for x in torch.utils._pytree.tree_leaves(out):
            if tensor(x) and x.untyped_storage().data_ptr() not in given:
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


def tensor(x) -> bool:
    return isinstance(x, torch.Tensor)


def test_one_row_wider_than_a_chunk(monkeypatch, chunks):
    monkeypatch.setattr(hybrid, "CHUNK_BYTES", 1)
    check(make_head(step=1e-2))
    assert chunks == [1] * 8


@BOTH
def test_products_are_exact_in_short_numbers(dtype):
    """bfloat16 is multiplied and added in float32: nothing but x1's own rounding is lost, and without a changed weight
    nothing."""
    for step in (1e-2, 1e-6):
        check(make_head("input", N=32, D=64, step=step, dtype=dtype), bound=BOUNDS[torch.float32])


def test_it_is_not_chosen_on_a_cpu_unasked(monkeypatch):
    monkeypatch.delenv("FINF_BACKEND")
    verdict = next(v for v in dispatch.faces("linear_cross_entropy_delta", torch.zeros(1)) if v.face == "hybrid")
    assert not verdict.available


def test_it_needs_products_with_wide_results(monkeypatch):
    """Refused with the reason, before a GPU is asked for anything."""
    monkeypatch.delenv("FINF_BACKEND")
    monkeypatch.setattr(torch.ops.aten.mm, "overloads", lambda: ["default", "out"])
    verdict = next(v for v in dispatch.faces("linear_cross_entropy_delta") if v.face == "hybrid")
    assert not verdict.available and verdict.reason.startswith("torch.mm has no out_dtype before torch 2.8")


def test_asked_for_it_stays_refused_on_a_gpu_without_them(monkeypatch):
    monkeypatch.setattr(torch.ops.aten.mm, "overloads", lambda: ["default", "out"])
    elsewhere = torch.zeros(1, device="meta")
    verdict = next(v for v in dispatch.faces("linear_cross_entropy_delta", elsewhere) if v.face == "hybrid")
    assert not verdict.available and "torch 2.8" in verdict.reason


def test_the_row_kernel_without_a_build_is_the_reference(monkeypatch):
    def fail():
        raise ImportError("no such file")

    head = make_head(step=1e-2)
    monkeypatch.setattr(dispatch, "compiled", fail)
    check(head)
    check(replace(head, label_smoothing=0.1))


@pytest.mark.parametrize("V", [1, 2, 128, 129, 130, 1000])
def test_the_middle_is_found_without_what_has_no_deterministic_form(monkeypatch, V):
    W = torch.randn(V, 24)
    wanted = W[:: -(-V // SAMPLED)].median(0).values
    monkeypatch.setattr(torch.Tensor, "median", lambda *_: pytest.fail("raises on a GPU that is to be deterministic"))
    assert torch.equal(centre(W), wanted)
    check(make_head("input", V=max(V, 2), step=1e-2), bound=2 * BOUNDS[torch.float32], by_terms=True)
