"""The compiled loops on every instruction set of this processor: chosen by name, right, alike, steady under threads.

Each set runs in a process of its own, since the choice is made once. Truth is numpy's long double; the dispatching of
tensors is left out on purpose, so that what fails here is the compiled code.
"""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from finf_fast import _C

ROOT = Path(__file__).parent.parent
ISAS = _C.isas()
IGNORED = -100
# About twice the worst of these cases; float32 itself carries 6e-8.
BASE_BOUND, DELTA_BOUND = 2e-6, 2e-6
# Columns: one; around the widths of a vector (4, 8, 16) and of four vectors; around a block of 2048; a real vocabulary.
WIDTHS = (1, 2, 5, 15, 16, 17, 63, 64, 65, 1000, 2047, 2048, 2049, 4096, 6161)
LEADS = (0, 12, 20)  # how far the target leads: 20 is a memorised sample
STEPS = (30.0, 3.0, 1e-1, 1e-3, 1e-6)
SEGMENTS = (0, 1, 7, 8, 9, 15, 16, 17, 1000, 4099)


def address(x: np.ndarray) -> int:
    return x.__array_interface__["data"][0]


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Bits of the bfloat16 below (toward zero); what it keeps is what the truth is computed from."""
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def to_float(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x


def cross_entropy_delta(z, dz, target, *, smoothing=0.0, threads=2):
    (Q, N, V), codes = dz.shape, {np.dtype(np.float32): 0, np.dtype(np.uint16): 1}
    base, delta = np.full(N, np.nan, np.float32), np.full((Q, N), np.nan, np.float32)
    _C.cross_entropy_delta(
        *(address(z), codes[z.dtype], V, address(dz), codes[dz.dtype], N * V, V, address(target)),
        *(address(base), address(delta), N, N, V, Q, IGNORED, smoothing, threads),
    )
    return base, delta


def linear_cross_entropy_delta(x, dx, W, target, *, dW=None, U=None, R=None, bias=None, softcap=0.0, threads=2):
    (Q, N, D), V = dx.shape, len(W)
    base, delta = np.full(N, np.nan, np.float32), np.full((Q, N), np.nan, np.float32)
    where = [0 if y is None else address(y) for y in (bias, dW, U, R)]
    r, code = 0 if R is None else R.shape[1], int(x.dtype == np.uint16)
    _C.linear_cross_entropy_delta(
        *(code, address(x), D, address(dx), N * D, D, address(W), D, address(target), where[0], 0, 0),
        *(where[1], code, V * D, D, where[2], code, V * r, r, where[3], r),
        *(address(base), address(delta), N, N, D, V, Q, softcap, IGNORED, 0.0, threads),
    )
    return base, delta


def segment_sum(values, offsets, *, threads=2):
    (Q, N), S = values.shape, len(offsets) - 1
    out = np.full((Q, S), np.nan, values.dtype)
    code = 0 if values.dtype == np.float32 else 2
    _C.segment_sum(address(values), code, N, address(offsets), address(out), S, Q, N, S, threads)
    return out


def topk(scores, K, *, block, threads=2):
    Q, S = scores.shape
    values, indices = np.full((Q, K), -np.inf, scores.dtype), np.full((Q, K), -1, np.int64)
    code = 0 if scores.dtype == np.float32 else 2
    for start in range(0, S, block):
        new = np.ascontiguousarray(scores[:, start : start + block])
        n = new.shape[1]
        _C.topk_merge(address(values), address(indices), address(new), code, n, start, Q, K, n, threads)
    return values, indices


def draw(V, lead, step, bf16, rows=6, queries=2):
    rng = np.random.default_rng([V, lead, int(step * 1e6)])
    z = (2 * rng.standard_normal((rows, V))).astype(np.float32)
    dz = (step * rng.standard_normal((queries, rows, V))).astype(np.float32)
    target = rng.integers(V, size=rows)
    z[np.arange(rows), target] += np.float32(lead)
    if step > 10:  # a change that turns the answer round, once toward the target and once away from it
        dz[:, np.arange(rows), target] += np.where(np.arange(rows) % 2, 40, -40).astype(np.float32)
    return (to_bf16(z), to_bf16(dz), target) if bf16 else (z, dz, target)


# Of the head: D around the units of a vector, V around a strip (12, 24, 48), a panel (384, or 768) and a part (2048).
HEADS = [(1, 47, 5), (16, 48, 8), (33, 49, 9), (31, 400, 17), (7, 4500, 9)]


def draw_head(D, V, N, lead, step, bf16, queries=2, rank=3):
    """x, dx, W, target, and a dense and a low-rank change of W."""
    rng = np.random.default_rng([D, V, lead, int(step * 1e6)])
    W, target = rng.standard_normal((V, D)), rng.integers(V, size=N)
    x = rng.standard_normal((N, D)) + lead * W[target] / np.square(W[target]).sum(1, keepdims=True)
    changes = [step * rng.standard_normal(shape) for shape in ((queries, N, D), (queries, V, D), (queries, V, rank))]
    R = rng.standard_normal((queries, rank, D)).astype(np.float32)
    x, W, dx, dW, U = (to_bf16(y.astype(np.float32)) if bf16 else y.astype(np.float32) for y in (x, W, *changes))
    return x, dx, W, target, dW, U, R


def true_head(x, dx, W, target, dW=None):
    x, dx, W = (to_float(y).astype(np.longdouble) for y in (x, dx, W))
    moved = np.stack([W] * len(dx)) if dW is None else W + dW
    base = long_loss(x @ W.T, target)
    return base, np.stack([long_loss((x + dx[q]) @ moved[q].T, target) - base for q in range(len(dx))])


@functools.cache  # one for all sets
def head_truths(case):
    """Largest logit, then base and changes of the heads that `run_heads` runs."""
    x, dx, W, target, dW, U, R = draw_head(*case)
    low = np.einsum("qvr,qrd->qvd", to_float(U).astype(np.longdouble), R.astype(np.longdouble))
    truths = [true_head(x, dx, W, target, change) for change in (None, to_float(dW).astype(np.longdouble), low)]
    return np.abs(to_float(x) @ to_float(W).T).max(), truths[0][0], [delta for _, delta in truths]


def head_cases():
    return [
        (*shape, lead, step, bf16)
        for shape in HEADS
        for lead in (0, 12)
        for step in STEPS[1:]
        for bf16 in (False, True)
    ]


def run_heads(case):
    """Base and changes of the plain head, of one with a dense change of W, and of one with a change of low rank."""
    x, dx, W, target, dW, U, R = draw_head(*case)
    runs = [linear_cross_entropy_delta(x, dx, W, target, **more) for more in ({}, {"dW": dW}, {"U": U, "R": R})]
    return runs[0][0], np.stack([delta for _, delta in runs])


def cases():
    return [(V, lead, step, bf16) for V in WIDTHS for lead in LEADS for step in STEPS for bf16 in (False, True)]


def long_loss(z, target):
    """log(1 + sum over the others of e^(z_v - z_t)) in long double: the definition, kept from cancelling."""
    rows = np.arange(len(target))
    gap = z - z[rows, target][:, None]
    e = np.exp(gap)
    e[rows, target] = 0
    return np.log1p(e.sum(1))


def truth(z, dz, target):
    z, dz = to_float(z).astype(np.longdouble), to_float(dz).astype(np.longdouble)
    base = long_loss(z, target)
    return base, np.stack([long_loss(z + d, target) - base for d in dz])


def everything() -> dict[str, np.ndarray]:
    """What a process with its instruction set computes; by name, so that processes can be compared."""
    found = {}
    for V, lead, step, bf16 in cases():
        name = f"{V} {lead} {step} {bf16}"
        found[f"base {name}"], found[f"delta {name}"] = cross_entropy_delta(*draw(V, lead, step, bf16))
    for case in head_cases():
        found[f"head base {case}"], found[f"head delta {case}"] = run_heads(case)
    rng = np.random.default_rng(0)
    offsets = np.cumsum([0, *SEGMENTS])
    for dtype in (np.float32, np.float64):
        values = rng.standard_normal((3, offsets[-1])).astype(dtype)
        found[f"sum {dtype.__name__}"] = segment_sum(values, offsets)
        found[f"top {dtype.__name__}"] = topk(values, 17, block=1000)[1]
    return found


def in_process(code: str, isa: str | None, *arguments: str) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if key != "FINF_FORCE_ISA"}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])} | ({"FINF_FORCE_ISA": isa} if isa else {})
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict[str, np.ndarray]]:
    folder, found = tmp_path_factory.mktemp("isa"), {}
    code = "import sys, numpy, test_isa; numpy.savez(sys.argv[1], isa=test_isa._C.isa(), **test_isa.everything())"
    for isa in ISAS:
        done = in_process(code, isa, str(folder / f"{isa}.npz"))
        assert done.returncode == 0, done.stderr
        found[isa] = dict(np.load(folder / f"{isa}.npz"))
    return found


@pytest.mark.parametrize("isa", ISAS)
def test_the_forced_set_runs(results, isa):
    assert str(results[isa]["isa"]) == isa


def test_without_force_the_best_set_runs():
    done = in_process("from finf_fast import _C; print(_C.isa())", None)
    assert done.stdout.strip() == ISAS[0], done.stderr
    assert ISAS[-1] == "baseline"


def test_an_unknown_set_is_an_error_that_lists_the_known():
    done = in_process("from finf_fast import _C; _C.isa()", "avx9")
    assert done.returncode != 0
    assert f"FINF_FORCE_ISA: wanted one of {', '.join(ISAS)}" in done.stderr
    assert "'avx9'" in done.stderr


def test_an_unknown_set_stops_the_operation_too():
    done = in_process("import test_isa as t; t.cross_entropy_delta(*t.draw(9, 0, 1e-3, False))", "avx9")
    assert "ValueError: FINF_FORCE_ISA" in done.stderr


TILES = pytest.mark.skipif("amx_bf16" not in ISAS, reason="a processor without AMX")
# An alternate stack for signals as small as they were before tiles, which a thread's registers now have to fit.
SIGNALS = """
import ctypes
from finf_fast import _C
class Stack(ctypes.Structure):
    _fields_ = [("first", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
libc, room = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer(8192)
def accepted():
    return libc.sigaltstack(ctypes.byref(Stack(ctypes.addressof(room), 0, 8192)), None) == 0
"""


@TILES
def test_only_who_uses_tiles_asks_the_system_for_them():
    listed = SIGNALS + "_C.isas(); before = accepted(); print(before, _C.isa(), accepted())"
    assert in_process(listed, "avx2").stdout.split() == ["True", "avx2", "True"]


@TILES
def test_where_the_system_refuses_tiles_the_next_set_runs():
    code = SIGNALS + "accepted(); print(_C.isa(), *_C.isas())"
    assert in_process(code, None).stdout.split() == [ISAS[1], *ISAS]
    forced = in_process(code, "amx_bf16")
    assert "ValueError: FINF_FORCE_ISA: wanted a set that the system lets this process use" in forced.stderr


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("V", WIDTHS)
def test_each_set_holds_the_bounds(results, isa, V):
    for case in cases():
        if case[0] != V:
            continue
        name = "{} {} {} {}".format(*case)
        base, delta = truth(*draw(*case))
        got, change = results[isa][f"base {name}"], results[isa][f"delta {name}"]
        assert np.all(np.abs(got - base) <= BASE_BOUND * base), name
        for q in range(len(delta)):
            error = np.sqrt(np.sum((change[q] - delta[q]) ** 2))
            assert error <= DELTA_BOUND * np.sqrt(np.sum(delta[q] ** 2)), f"{name} query {q}"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", HEADS)
def test_each_set_holds_the_bounds_of_the_head(results, isa, shape):
    for case in [case for case in head_cases() if case[:3] == shape]:
        largest, true_base, true_deltas = head_truths(case)
        reach = largest + case[4]  # an exponent carries its size into the rounding
        base = results[isa][f"head base {case}"]
        assert np.all(np.abs(base - true_base) <= 1e-6 * (1 + reach) * true_base), case
        for form, delta in enumerate(true_deltas):
            # x + dx is rounded to bfloat16 before a dense change of its type.
            bound = 6e-3 if case[5] and form == 1 and isa in ("amx_bf16", "avx512_bf16") else 4e-7 * (1 + reach)
            change = results[isa][f"head delta {case}"][form]
            error = np.sqrt(np.square(change - delta).sum(1))
            assert np.all(error <= bound * np.sqrt(np.square(delta).sum(1))), (case, form)


def test_sums_and_ranks_have_the_same_bits_on_every_set(results):
    for isa in ISAS[1:]:
        for name in (key for key in results[isa] if key.startswith(("sum", "top"))):
            assert np.array_equal(results[isa][name], results[ISAS[0]][name]), (isa, name)


def test_sums_are_right(results):
    rng = np.random.default_rng(0)
    offsets = np.cumsum([0, *SEGMENTS])
    values = rng.standard_normal((3, offsets[-1])).astype(np.float32)
    want = [[values[q, a:b].astype(np.longdouble).sum() for a, b in itertools.pairwise(offsets)] for q in range(3)]
    np.testing.assert_allclose(results[ISAS[0]]["sum float32"], np.array(want, np.float64), rtol=6e-8, atol=0)


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_thread_count_does_not_change_a_bit(threads):
    z, dz, target = draw(1000, 0, 1e-2, False, rows=1500, queries=3)
    alone = cross_entropy_delta(z, dz, target, threads=1)
    for one, many in zip(alone, cross_entropy_delta(z, dz, target, threads=threads), strict=True):
        assert np.array_equal(one.view(np.uint32), many.view(np.uint32))
    x, dx, W, targets, _, U, R = draw_head(9, 4500, 700, 0, 3.0, False)  # several blocks and parts, some rows far
    one, many = (linear_cross_entropy_delta(x, dx, W, targets, U=U, R=R, threads=count) for count in (1, threads))
    assert np.array_equal(one[0], many[0])
    assert np.array_equal(one[1], many[1])
    values, offsets = z.reshape(1, -1), np.arange(0, z.size + 1, 250)
    assert np.array_equal(segment_sum(values, offsets, threads=1), segment_sum(values, offsets, threads=threads))
    one, many = topk(dz[0], 50, block=300, threads=1), topk(dz[0], 50, block=300, threads=threads)
    assert np.array_equal(one[0], many[0])
    assert np.array_equal(one[1], many[1])


def test_queries_do_not_touch_each_other():
    z, dz, target = draw(3000, 12, 1e-1, False, rows=4, queries=5)
    _, together = cross_entropy_delta(z, dz, target)
    for q in range(5):
        _, alone = cross_entropy_delta(z, np.ascontiguousarray(dz[q : q + 1]), target)
        assert np.array_equal(alone[0], together[q])


def test_callers_on_several_python_threads_get_their_own_results():
    inputs = [draw(700, lead, 1e-2, False, rows=900) for lead in range(4)]
    want = [cross_entropy_delta(*each) for each in inputs]
    got: list = [None] * len(inputs)

    def call(k):
        for _ in range(5):
            got[k] = cross_entropy_delta(*inputs[k])

    callers = [threading.Thread(target=call, args=(k,)) for k in range(len(inputs))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for one, other in zip(want, got, strict=True):
        assert np.array_equal(one[0], other[0])
        assert np.array_equal(one[1], other[1])


FORKING = """
import os, signal, numpy as np, test_isa
inputs = test_isa.draw(1000, 0, 1e-2, False, rows=1500)
want = test_isa.cross_entropy_delta(*inputs)          # the pool's threads are running now
child = os.fork()
if child == 0:
    signal.alarm(60)                                  # a child that waits for its parent's threads would wait for ever
    got = test_isa.cross_entropy_delta(*inputs)
    again = test_isa.cross_entropy_delta(*inputs)
    os._exit(0 if all(np.array_equal(a, b) for a, b in zip(want + want, got + again)) else 3)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
assert all(np.array_equal(a, b) for a, b in zip(want, test_isa.cross_entropy_delta(*inputs)))
"""


ON_TORCHS_THREADS = """
import os, ctypes, torch, test_isa
if not hasattr(ctypes.CDLL(None), "GOMP_parallel"):
    raise SystemExit(5)
torch.set_num_threads(2)
torch.randn(1 << 20).exp_()
before = len(os.listdir("/proc/self/task"))
test_isa.cross_entropy_delta(*test_isa.draw(1000, 0, 1e-2, False, rows=1500), threads=2)
after = len(os.listdir("/proc/self/task"))
assert before == after, (before, after)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_runs_on_the_threads_that_torch_has():
    done = in_process(ON_TORCHS_THREADS, None)
    if done.returncode == 5:
        pytest.skip("this torch brings no GCC OpenMP")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_starts_threads_of_its_own():
    done = in_process(FORKING, None)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("isa", ISAS)
def test_masked_columns_and_nan_on_each_set(isa):
    done = in_process("import test_isa; test_isa.masked_and_nan()", isa)
    assert done.returncode == 0, done.stderr


def masked_and_nan():
    """Columns at -inf count for nothing, whatever their change; a NaN stays in its row and is not lost in it."""
    for V in (17, 2500):
        z, dz, target = draw(V, 0, 1e-2, False, rows=5)
        target[:] = 0
        short = [np.ascontiguousarray(x[..., : V // 2]) for x in (z, dz)]
        z[:, V // 2 :] = -np.inf
        want = truth(*short, target)
        # Past 40 the change is taken as a difference of two losses of about 8: right to their rounding.
        for change, atol in ((0.0, 1e-8), (-np.inf, 1e-8), (5.0, 1e-8), (39.0, 1e-8), (1e30, 2e-6)):
            dz[..., V // 2 :] = change
            got = cross_entropy_delta(z, dz, target)
            np.testing.assert_allclose(got[0], want[0].astype(float), rtol=BASE_BOUND)
            np.testing.assert_allclose(got[1], want[1].astype(float), rtol=1e-5, atol=atol)
        for column in (0, 1, V // 2 - 1, V - 1):
            z, dz, target = draw(V, 0, 1e-2, False, rows=5)
            z[2, column], dz[1, 3, column] = np.nan, np.nan
            base, delta = cross_entropy_delta(z, dz, target)
            assert np.array_equal(np.isnan(base), [False, False, True, False, False])
            assert np.array_equal(
                np.isnan(delta), [[False, False, True, False, False], [False, False, True, True, False]]
            )


def test_smoothing_is_that_of_the_definition():
    z, dz, target = draw(2500, 12, 1e-3, False)
    eps, rows = 0.1, np.arange(len(target))
    base, delta = truth(z, dz, target)
    base = base + eps * (z[rows, target] - z.astype(np.longdouble).mean(1))
    delta = delta + eps * (dz[:, rows, target] - dz.astype(np.longdouble).mean(2))
    got = cross_entropy_delta(z, dz, target, smoothing=eps)
    np.testing.assert_allclose(got[0], base.astype(float), rtol=BASE_BOUND)
    np.testing.assert_allclose(got[1], delta.astype(float), rtol=1e-5)


def test_a_wrong_argument_is_named_and_nothing_is_written():
    z, dz, target = draw(9, 0, 1e-3, False)
    base, delta = np.full(6, 7, np.float32), np.full((2, 6), 7, np.float32)
    good = {
        **{"z": address(z), "z_dtype": 0, "z_stride": 9, "dz": address(dz), "dz_dtype": 0, "dz_stride_q": 54},
        **{"dz_stride_n": 9, "target": address(target), "base": address(base), "delta": address(delta)},
        **{"delta_stride_q": 6, "N": 6, "V": 9, "Q": 2, "ignore_index": IGNORED, "label_smoothing": 0.0, "threads": 1},
    }
    wrong = [("z", 0), ("z_dtype", 2), ("dz_dtype", -1), ("N", -1), ("V", 0), ("threads", 0), ("delta_stride_q", 5)]
    for name, value in [*wrong, ("label_smoothing", 1.5), ("label_smoothing", float("nan"))]:
        with pytest.raises(ValueError, match=rf"^{name}: wanted .*, got "):
            _C.cross_entropy_delta(**{**good, name: value})
    target[4] = 9
    with pytest.raises(IndexError, match="target: wanted 0 to 8 or ignore_index -100, got 9 in row 4"):
        _C.cross_entropy_delta(**good)
    assert np.all(base == 7)
    assert np.all(delta == 7)


def test_a_wrong_argument_of_the_head_is_named():
    x, dx, W, target, *_ = draw_head(5, 9, 6, 0, 1e-3, False)
    base, delta = np.full(6, 7, np.float32), np.full((2, 6), 7, np.float32)
    good = {
        **{"dtype": 0, "x": address(x), "x_stride": 5, "dx": address(dx), "dx_stride_q": 30, "dx_stride_n": 5},
        **{"W": address(W), "W_stride": 5, "target": address(target), "bias": 0, "db": 0, "db_stride_q": 0},
        **{"dW": 0, "dW_dtype": 0, "dW_stride_q": 0, "dW_stride_v": 0},
        **{"U": 0, "U_dtype": 0, "U_stride_q": 0, "U_stride_v": 0, "R": 0, "r": 0},
        **{"base": address(base), "delta": address(delta), "delta_stride_q": 6, "N": 6, "D": 5, "V": 9, "Q": 2},
        **{"softcap": 0.0, "ignore_index": IGNORED, "label_smoothing": 0.0, "threads": 1},
    }
    wrong = [("x", 0), ("W", 0), ("dtype", 2), ("N", -1), ("V", 0), ("threads", 0), ("delta_stride_q", 5), ("r", -1)]
    for name, value in [*wrong, ("softcap", -1.0), ("label_smoothing", 1.5), ("label_smoothing", float("nan"))]:
        with pytest.raises(ValueError, match=rf"^{name}: wanted .*, got "):
            _C.linear_cross_entropy_delta(**{**good, name: value})
    target[4] = 9
    with pytest.raises(IndexError, match="target: wanted 0 to 8 or ignore_index -100, got 9 in row 4"):
        _C.linear_cross_entropy_delta(**good)
    assert np.all(base == 7)
    assert np.all(delta == 7)


def test_peak_is_that_of_a_processor():
    assert 1 < _C.fma_peak("fp32") <= 1.2 * _C.fma_peak("bf16") < 10_000
    with pytest.raises(ValueError, match="kind: wanted fp32 or bf16, got int8"):
        _C.fma_peak("int8")


def test_build_info_names_compiler_and_version():
    info = _C.build_info()
    assert set(info) == {"compiler", "version", "cuda"}
    assert info["cuda"] is False


@pytest.mark.prove
@pytest.mark.parametrize("watch", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(tmp_path, watch):
    compiled = [
        p for room in ("cpu", "io") for p in sorted((ROOT / "csrc" / room).rglob("*.cpp")) if p.stem != "bindings"
    ]
    sources = [ROOT / "tests" / "sanitized.cpp", *compiled]
    flags = ["-O1", "-g1", "-std=c++17", "-pthread", f"-fsanitize={watch}", "-fno-sanitize-recover=all"]
    program = tmp_path / "sanitized"
    compiler = os.environ.get("CXX", "c++")

    def compiled_one(number: int) -> str:
        target = str(tmp_path / f"{number}.o")
        subprocess.run([compiler, *flags, "-c", str(sources[number]), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # five minutes of compiling, on one core
        objects = list(pool.map(compiled_one, range(len(sources))))
    subprocess.run([compiler, *flags, *objects, "-o", str(program)], check=True)
    for isa in ISAS:
        done = subprocess.run([str(program)], env={**os.environ, "FINF_FORCE_ISA": isa}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stdout.strip() == isa
