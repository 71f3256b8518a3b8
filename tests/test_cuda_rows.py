"""The CUDA kernels' loops without a GPU: threads for lanes, behind the module's own border, against the same truth."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import checks
from checks import check, check_segment_sum, check_topk, make_case, shifted_target
from finf_fast import ops
from finf_fast.ops import dispatch
from finf_fast.ops.decode_tokens import STORED

pytestmark = pytest.mark.prove
ROOT = Path(__file__).parent.parent
OPS = [
    *("cross_entropy_delta", "decode_pixels", "decode_tokens", "noise", "segment_sum", "squared_error_delta"),
    "topk_merge",
]
FLOATS = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """finf_fast._cuda, its kernels played by tests/cuda_rows.cpp."""
    pybind11 = pytest.importorskip("pybind11")
    compiler = shutil.which("g++") or pytest.skip("no g++")
    library = tmp_path_factory.mktemp("cuda") / "_cuda.so"
    folders = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    sources = ["tests/cuda_rows.cpp", "csrc/cuda/bindings.cpp"]
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-fPIC", "-shared", "-pthread"]
    # A device refuses 16 bytes that lie on no border of theirs; here such an access ends the process.
    flags += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    subprocess.run([compiler, *flags, *folders, *sources, "-o", str(library)], cwd=ROOT, check=True)
    spec = importlib.util.spec_from_file_location("_cuda", library)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    yield loaded
    sys.modules.pop("_cuda", None)


@pytest.fixture(params=[1, 8, 32], ids=lambda lanes: f"{lanes}-lanes")
def lanes(request, module, monkeypatch):
    """The face `cuda` of every operation takes CPU tensors and is forced."""
    monkeypatch.setenv("FINF_BACKEND", "cuda")
    monkeypatch.setattr(dispatch, "_choices", {})
    monkeypatch.setattr(dispatch, "compiled_cuda", lambda: module)
    monkeypatch.setitem(dispatch._MISSING, "cuda", lambda: "")
    for op in OPS:
        monkeypatch.setitem(dispatch.TABLE[op], "cuda", replace(dispatch.TABLE[op]["cuda"], devices=("cpu",)))
        monkeypatch.setattr(importlib.import_module(f"finf_fast.ops.{op}"), "place", lambda x: (request.param, 0))
    for op in ("cross_entropy_delta", "topk_merge"):
        monkeypatch.setattr(importlib.import_module(f"finf_fast.ops.{op}"), "multiprocessors", lambda x: 132)
    return request.param


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("step", [30, 1, 1e-3, 1e-6])
@pytest.mark.parametrize("lead", [0, 20])
def test_cross_entropy_delta(lanes, dtype, step, lead):
    check(ops.cross_entropy_delta, make_case(step=step, lead=lead, dtype=dtype))


@pytest.mark.parametrize("by", [-60, -0.7, 3, 60])
def test_cross_entropy_delta_target_alone_moves(lanes, by):
    check(ops.cross_entropy_delta, shifted_target(make_case(step=1e-4, lead=12), by))


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_cross_entropy_delta_label_smoothing(lanes, smoothing):
    check(ops.cross_entropy_delta, make_case(step=1e-3, lead=12, label_smoothing=smoothing))


@pytest.mark.parametrize("change", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_cross_entropy_delta_of_different_dtypes_and_any_address(lanes, dtype, change):
    """Rows that begin anywhere between two borders of 16 bytes, the change's rows elsewhere than the value's."""
    case = make_case(step=1e-2, lead=5, dtype=dtype, change=change)
    for z, dz in [(0, 1), (3, 3), (5, 2)]:
        moved = replace(case, z=shifted(case.z, z), dz=shifted(case.dz, dz))
        check(ops.cross_entropy_delta, moved)


@pytest.mark.parametrize("V", [1, 2, 8, 9, 300])
@pytest.mark.parametrize("Q", [0, 1, 3, 6])
def test_cross_entropy_delta_of_any_size(lanes, V, Q):
    check(ops.cross_entropy_delta, make_case(N=3, V=V, Q=Q))


@pytest.fixture(params=["cross_entropy_delta"])
def splits(request, module, monkeypatch):
    """What was said of how many blocks should share a row, or a query."""
    said, name = [], f"{request.param}_splits"
    real = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *sizes: said.append(real(*sizes)) or said[-1])
    return said


# On 132 multiprocessors two rows are worth many blocks, each of at least 4096 columns.
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("V, Q", [(8192, 1), (12291, 6), (40001, 3)])
def test_cross_entropy_delta_of_rows_that_blocks_share(lanes, splits, dtype, V, Q):
    check(ops.cross_entropy_delta, make_case(N=2, V=V, Q=Q, step=1e-3, lead=12, dtype=dtype, label_smoothing=0.1))
    assert [count for count, _ in splits] == [V // 4096]


def test_cross_entropy_delta_of_shared_rows_that_are_moved_far_masked_or_ignored(lanes, splits):
    case = shifted_target(make_case(N=4, V=9000, Q=2, step=1e-4), 60)
    case.z[0, :8999], case.target[0] = -torch.inf, 8999  # a part without any chance
    case.dz[1, 1, 5] += 50
    case.target[3] = -100
    check(ops.cross_entropy_delta, case)
    assert splits[0][0] == 2


def test_cross_entropy_delta_of_shared_rows_keeps_nan_and_gives_the_same_bits_again(lanes, splits):
    case = make_case(N=3, V=9000, Q=2)
    case.z[1, 8000], case.dz[1, 2, 30] = torch.nan, torch.nan
    base, delta = ops.cross_entropy_delta(case.z, case.dz, case.target)
    assert base.isnan().tolist() == [False, True, False]
    assert delta.isnan().tolist() == [[False, True, False], [False, True, True]]
    again = ops.cross_entropy_delta(case.z, case.dz, case.target)
    assert torch.equal(base.nan_to_num(), again[0].nan_to_num())
    assert torch.equal(delta.nan_to_num(), again[1].nan_to_num())
    assert splits == 2 * [splits[0]] and splits[0][0] == 2


def test_how_many_blocks_share_a_row(module):
    def count(N, V, Q, multiprocessors=132):
        blocks, size = module.cross_entropy_delta_splits(multiprocessors, N, V, Q)
        assert (size > 0) == (blocks > 1)
        return blocks

    assert [count(1, V, 1) for V in (1, 2048, 8191, 8192, 128256)] == [1, 1, 1, 2, 31]
    assert [count(N, 128256, 1) for N in (0, 1, 9, 10, 132, 263, 264, 4096)] == [1, 31, 30, 27, 2, 2, 1, 1]
    assert [count(16, 128256, Q) for Q in (0, 1, 4, 5, 8, 64, 68)] == [17, 17, 17, 9, 9, 2, 1]  # four queries together
    assert module.cross_entropy_delta_splits(132, 3, 9000, 1) == (2, 3 * 2 * 40)  # a part: 4 doubles and 2 floats
    assert module.cross_entropy_delta_splits(132, 3, 9000, 6) == (2, 3 * 2 * 2 * 104)  # of four queries 10 and 5
    assert [count(16, 128256, 1, multiprocessors) for multiprocessors in (1, 8, 16, 108)] == [1, 1, 2, 14]


def test_more_columns_than_a_kernel_counts_are_refused():
    kernels = pytest.importorskip("finf_fast._cuda")
    z, dz, outputs = (1, 0, 2**31), (0, 0, 0, 0), (1, 1, 1, 0)
    with pytest.raises(ValueError, match=r"V: wanted at most 2\^30, got 1073741825"):
        kernels.cross_entropy_delta(0, 0, *z, *dz, *outputs, 1, 2**30 + 1, 0, -100, 0.0, 1, 0)


def test_cross_entropy_delta_of_rows_without_target(lanes):
    case = make_case(N=3, V=20, Q=3)
    case.target[1] = -100
    base, delta = ops.cross_entropy_delta(case.z, case.dz, case.target)
    assert base[1] == 0 and not delta[:, 1].any() and base[[0, 2]].all() and delta[:, [0, 2]].all()


def test_cross_entropy_delta_logit_offset(lanes):
    case = make_case(step=1e-3)
    check(ops.cross_entropy_delta, replace(case, z=case.z + 1e4))


def shifted(x, by):
    """The same numbers `by` elements further into memory that was aligned."""
    room = torch.empty(x.numel() + by, dtype=x.dtype)[by:].view(x.shape)
    return room.copy_(x)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("D", [1, 7, 8, 300])
def test_squared_error_delta(lanes, dtype, D):
    p, dp, y = shifted(torch.randn(3, D).to(dtype), 3), torch.randn(5, 3, D) * 1e-4, torch.randn(3, D).to(dtype)
    base, delta = ops.squared_error_delta(p, dp, y)
    gap, d = p.double() - y.double(), dp.double()
    terms = d * (2 * gap + d)
    assert torch.allclose(base.double(), gap.square().sum(1), rtol=1e-6, atol=0)
    assert ((delta - terms.sum(2)).abs() <= 1e-6 * terms.abs().sum(2)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_segment_sum_has_the_bits_of_the_cpu(lanes, dtype, monkeypatch):
    values, offsets = torch.randn(3, 500, dtype=dtype), torch.tensor([1, 1, 8, 9, 30, 46, 400, 499])
    check_segment_sum(ops.segment_sum, values, offsets)
    here = ops.segment_sum(values, offsets)
    monkeypatch.setenv("FINF_BACKEND", "cpp")
    assert torch.equal(here, ops.segment_sum(values, offsets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("K", [1, 5, 70, 2000])
def test_topk_merge(lanes, dtype, K):
    scores = torch.randint(-20, 20, (2, 900)).to(dtype)
    scores[:, ::7], scores[:, 3::50], scores[:, 5::90] = -torch.inf, torch.nan, -0.0
    check_topk(ops.topk_merge, scores, K, cuts=(0, 3, 500))


# On 132 multiprocessors two queries are worth many blocks, each of at least 16384 scores.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("splits", ["topk_merge"], indirect=True)
@pytest.mark.parametrize("K, by", [(1, 0), (70, 1), (300, 3)])
def test_topk_merge_of_scores_that_blocks_share_has_the_bits_of_the_cpu(lanes, splits, dtype, K, by, monkeypatch):
    scores = shifted(torch.randint(-20, 20, (2, 50_001)).to(dtype), by)
    scores[:, ::7], scores[:, 3::50], scores[:, 5::90], scores[0, 40_000:] = -torch.inf, torch.nan, -0.0, torch.nan
    scores[1, 49_990:] = torch.arange(11) + 100.0  # the best come last
    lists = (torch.full((2, K), -torch.inf, dtype=dtype), torch.full((2, K), -1))
    got = ops.topk_merge(*ops.topk_merge(*lists, scores, 70_000), scores[:, :40_000] + 1, 0)
    assert [count for count, _ in splits] == [3, 2]
    monkeypatch.setenv("FINF_BACKEND", "cpp")
    wanted = ops.topk_merge(*ops.topk_merge(*lists, scores, 70_000), scores[:, :40_000] + 1, 0)
    assert torch.equal(got[1], wanted[1])
    assert torch.equal(got[0].view(torch.uint8), wanted[0].view(torch.uint8))


def test_how_many_blocks_share_a_query(module):
    def count(Q, K, S, multiprocessors=132):
        return module.topk_merge_splits(multiprocessors, Q, K, S, 0)[0]

    assert [count(1, 100, S) for S in (0, 1000, 32767, 32768, 1 << 20, 1 << 30)] == [1, 1, 1, 2, 64, 264]
    assert [count(Q, 100, 1 << 20) for Q in (0, 1, 16, 132, 263, 264)] == [1, 64, 17, 2, 2, 1]
    assert [count(1, K, 1 << 20) for K in (0, 1, 2048, 4096, 1 << 16, 1 << 20)] == [1, 64, 64, 32, 2, 1]
    assert module.topk_merge_splits(132, 2, 10, 1 << 16, 0) == (4, 2 * 4 * 10 * 12)
    assert module.topk_merge_splits(132, 2, 10, 1 << 16, 2) == (4, 2 * 4 * 10 * 16)


def test_noise_has_the_bits_of_the_cpu(lanes, monkeypatch):
    samples = torch.tensor([0, 1, -5, 1 << 40])
    here = [ops.noise(12345, samples, 7, (M,)) for M in (0, 1, 4, 8, 1003)]
    monkeypatch.setenv("FINF_BACKEND", "cpp")
    there = [ops.noise(12345, samples, 7, (M,)) for M in (0, 1, 4, 8, 1003)]
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("C, run", [(1, 1), (3, 1), (3, 7), (2, 16), (1, 100)])
def test_decode_pixels_has_the_bits_of_the_table(lanes, dtype, C, run):
    table = torch.randn(C, 256).to(dtype)
    for by in (0, 3):
        raw = shifted(torch.randint(256, (3, 4 * C * run), dtype=torch.uint8), by)
        channel = torch.arange(4 * C * run) // run % C
        assert torch.equal(ops.decode_pixels(raw, table, run), table[channel, raw.long()])


@pytest.mark.parametrize("dtype", STORED, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("L", [1, 2, 15, 16, 17, 40])
def test_decode_tokens_wherever_rows_begin(lanes, dtype, L):
    for by in (0, 1, 8):
        raw = shifted(torch.arange(7 * (L + 9)).mul_(997).to(dtype).view(7, L + 9), by)
        for rows in (raw.flatten()[: 7 * L].view(7, L), raw[:, 3 : 3 + L], raw[1::3, :L], raw[:0, :L]):
            assert torch.equal(ops.decode_tokens(rows), rows.to(torch.int64)), (by, rows.stride())


def test_every_face_named_cuda_is_tested():
    assert [op for op, row in sorted(dispatch.TABLE.items()) if "cuda" in row] == OPS
    assert checks.face_dtypes("noise")  # the tests of the operations leave this face to a device
