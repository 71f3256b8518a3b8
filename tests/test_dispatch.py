"""Which face runs: the table and its runners agree, every refusal has its reason, nothing falls back in silence."""

from __future__ import annotations

import importlib
import logging
import os
from types import SimpleNamespace

import pytest
import torch

from finf_fast import ops, reference
from finf_fast.ops import dispatch

Z, DZ, TARGET = torch.randn(4, 5), torch.randn(1, 4, 5), torch.tensor([0, 1, 2, 3])


@pytest.fixture
def fresh(monkeypatch):
    """No choice made yet, FINF_BACKEND unset."""
    monkeypatch.delenv("FINF_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "_choices", {})
    monkeypatch.setattr(dispatch, "_logged", set())
    return monkeypatch


@pytest.fixture
def unbuilt(fresh):
    def fail():
        raise ImportError("no such file")

    fresh.setattr(dispatch, "compiled", fail)
    return fresh


def test_the_compiled_module_is_there():
    """So that a broken build cannot pass as skipped tests; FINF_BACKEND=reference says that none is wanted."""
    if os.environ.get("FINF_BACKEND") == "reference":
        pytest.skip("FINF_BACKEND=reference: no compiled face wanted")
    dispatch.compiled()


@pytest.mark.parametrize("op", dispatch.TABLE)
def test_table_and_runners_agree(op):
    runners = importlib.import_module(f"finf_fast.ops.{op}")._FACES
    assert set(runners) == set(dispatch.TABLE[op])
    assert op in ops.__all__ and op in reference.__all__


@pytest.mark.parametrize("op", dispatch.TABLE)
def test_reference_takes_whatever_any_face_takes(op):
    everything = {dtype for face in dispatch.TABLE[op].values() for dtype in face.dtypes}
    assert everything <= set(dispatch.TABLE[op]["reference"].dtypes)
    assert dispatch.TABLE[op]["reference"].devices is None


def verdict(op, face, *inputs):
    return next(v for v in dispatch.faces(op, *inputs) if v.face == face)


def test_reasons_for_refusal():
    assert verdict("cross_entropy_delta", "cpp", Z.double(), DZ).reason == (
        "float64: the cpp face takes float32, bfloat16 only"
    )
    assert verdict("segment_sum", "cpp", Z.to("meta")).reason == "meta: the cpp face runs on cpu only"
    assert verdict("cross_entropy_delta", "reference", Z.double(), DZ).available


def on_gpu(dtype=torch.float32):
    """What a face is chosen by, of a tensor on the second GPU of a machine that has none."""
    return SimpleNamespace(device=torch.device("cuda:1"), dtype=dtype)


ON_GPU = [(op, face) for op, row in dispatch.TABLE.items() for face in row if face in ("triton", "cuda", "hybrid")]


@pytest.fixture
def capabilities(fresh):
    """Two GPUs of these capabilities, and everything built."""

    def pretend(first, second):
        fresh.setattr(torch.cuda, "is_available", lambda: True)
        fresh.setattr(torch.cuda, "get_device_capability", lambda device=None: second if device.index == 1 else first)
        fresh.setattr(dispatch, "compiled_cuda", lambda: None)
        fresh.setattr(dispatch.importlib.util, "find_spec", lambda name: name)

    return pretend


@pytest.mark.parametrize("op, face", ON_GPU)
def test_a_gpu_too_old_is_refused_whichever_is_the_current_one(capabilities, op, face):
    x = on_gpu(dispatch.TABLE[op][face].dtypes[0])
    capabilities((9, 0), (7, 5))
    assert verdict(op, face, x).reason == "compute capability 7.5: wanted 8.0 or newer"
    assert verdict(op, face).available
    capabilities((7, 5), (8, 0))
    assert verdict(op, face, x).available
    assert verdict(op, face).reason == "compute capability 7.5: wanted 8.0 or newer"


def test_auto_takes_the_reference_on_a_gpu_too_old(capabilities):
    capabilities((7, 0), (7, 0))
    assert dispatch.choose("rms_norm_delta", on_gpu()) == "reference"


@pytest.mark.parametrize("width, face", [(512, "triton"), (513, "reference")])
def test_a_head_wider_than_shared_memory_is_refused(capabilities, caplog, width, face):
    capabilities((9, 0), (8, 0))
    with caplog.at_level(logging.INFO, "finf_fast"):
        assert dispatch.choose("attention_delta", on_gpu(), width=width) == face
    assert ("heads of 513: the triton face takes up to 512" in caplog.text) == (width > 512)


@pytest.mark.parametrize("E, Ev", [(513, 8), (8, 513)])
def test_attention_tells_how_wide_its_heads_are(fresh, E, Ev):
    """By the wider of a head's two widths."""
    fresh.setenv("FINF_BACKEND", "triton")
    fresh.setenv("TRITON_INTERPRET", "1")
    fresh.setattr(dispatch.importlib.util, "find_spec", lambda name: name)
    q, k, v = torch.zeros(2, 1, 1, 3, E), torch.zeros(2, 1, 1, 3, E), torch.zeros(2, 1, 1, 3, Ev)
    with pytest.raises(ValueError, match="heads of 513: the triton face takes up to 512"):
        ops.attention_delta(q, k, v)


def test_rocm_is_refused(capabilities, monkeypatch):
    capabilities((9, 4), (9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert verdict("linear_delta", "triton", on_gpu()).reason == "written for CUDA, and this torch is for ROCm 6.2"
    assert dispatch.choose("linear_delta", on_gpu()) == "reference"


def test_reason_when_not_built(unbuilt):
    assert verdict("topk_merge", "cpp") == dispatch.Verdict("cpp", False, "_C not built: no such file")


def test_auto_says_why_it_passes_over_a_face(unbuilt, caplog):
    with caplog.at_level(logging.INFO, "finf_fast"):
        for _ in range(3):
            ops.cross_entropy_delta(Z, DZ, TARGET)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(
        "cross_entropy_delta runs on its reference face (not cpp: _C not built: no such file; not "
    )


def test_auto_takes_the_compiled_face_and_says_so_once(fresh, caplog):
    with caplog.at_level(logging.INFO, "finf_fast"):
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            ops.cross_entropy_delta(Z.to(dtype), DZ, TARGET)
    wanted = "cpp" if verdict("cross_entropy_delta", "cpp").available else "reference"
    assert len(caplog.records) == 1 and f"runs on its {wanted} face" in caplog.text


def test_record_of_what_ran(fresh):
    assert ops.chosen() == {}
    fresh.setenv("FINF_BACKEND", "reference")
    ops.cross_entropy_delta(Z, DZ, TARGET)
    assert ops.chosen() == {"cross_entropy_delta": "reference"}


def test_forced_face_runs(fresh):
    ran = []
    runners = importlib.import_module("finf_fast.ops.segment_sum")._FACES
    for face, run in list(runners.items()):
        fresh.setitem(runners, face, lambda *args, face=face, run=run: (ran.append(face), run(*args)))
    for face in [face for face in runners if verdict("segment_sum", face).available]:
        fresh.setenv("FINF_BACKEND", face)
        ops.segment_sum(Z, torch.tensor([0, 5]))
        assert ran.pop() == face and not ran


def test_forced_face_that_cannot_is_an_error(fresh):
    fresh.setenv("FINF_BACKEND", "cpp")
    with pytest.raises(ValueError, match=r"FINF_BACKEND=cpp: no face of cross_entropy_delta takes these .*cpp: "):
        ops.cross_entropy_delta(Z.double(), DZ, TARGET)


def test_forced_face_that_is_not_built_is_an_error(unbuilt):
    unbuilt.setenv("FINF_BACKEND", "cpp")
    with pytest.raises(ValueError, match=r"cpp: _C not built: no such file"):
        ops.segment_sum(Z, torch.tensor([0, 5]))


def test_unknown_names(fresh):
    with pytest.raises(ValueError, match=r"op: wanted one of cross_entropy_delta, .* got 'softmax'"):
        ops.faces("softmax")
    fresh.setenv("FINF_BACKEND", "gpu")
    with pytest.raises(
        ValueError, match=r"FINF_BACKEND: wanted one of auto, cpp, cuda, reference, triton, hybrid, got 'gpu'"
    ):
        ops.segment_sum(Z, torch.tensor([0, 5]))


def test_the_record_can_be_read_while_another_thread_chooses(fresh):
    class Choosing(str):
        """A face's name that lets another choice in while the record is being written."""

        def __eq__(self, other):
            dispatch._choices[("segment_sum", len(dispatch._choices))] = "reference"
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    fresh.setattr(dispatch, "_choices", {("noise", n): Choosing("cpp") for n in range(3)})
    assert ops.chosen()["noise"] == "cpp"
