"""The loops that layer, RMS and group norm share, on stacks (value, changes): one read, one write.

A program takes some rows: their values once, centred in registers, then all their changes in turn. With dc the centred
change, c1 = c0 + dc, s the root of the mean square plus eps, and 0, 1 for before and after:

    dv = mean dc (c0 + c1)     n1 − n0 = dc / s1 − c0 dv / ((s0 + s1) s0 s1)

and the result is n0 weight + bias with the change (n1 − n0) weight + n1 dweight + dbias. Rows too long for a program's
registers are walked in chunks, three times for each query, out of the second-level cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from finf_fast.kernels.configurations import INTERPRETER, OPTIONS, Specimen, architecture, newer_assembler, settings_for
from finf_fast.kernels.layouts import MULTIPLE
from finf_fast.kernels.numerics import rounded

STAGES = 1  # no product waits for a load


@dataclass(frozen=True)
class Rows:
    """How rows are shared out."""

    longest: int  # row that a program holds in its registers
    longest_grouped: int  # the same with a parameter's place for each number
    chunk: int  # in which a longer one is walked
    least: int  # numbers of a program: shorter rows go several together
    each: int  # numbers of a thread


@dataclass(frozen=True)
class Settings:
    whole: Rows
    ragged: Rows  # whose width or distances are no multiples of 16


# 16 numbers of a thread are two loads of 16 bytes in bfloat16, four in float32, all under way at once; with what is
# made of them they take about 100 registers. The longest row then fills half of a multiprocessor's registers, so that
# one program loads while another adds up. Ragged rows are read a number at a time: with 16 of them to a thread
# addresses alone took up to 360 bytes of stack, with 8 none. The interpreter's rows are short, so that tests see both
# ways.
_GPU = Settings(
    whole=Rows(longest=8192, longest_grouped=4096, chunk=4096, least=2048, each=16),
    ragged=Rows(longest=2048, longest_grouped=2048, chunk=2048, least=1024, each=8),
)
SETTINGS = {
    INTERPRETER: Settings(*[Rows(longest=1024, longest_grouped=512, chunk=512, least=16384, each=1024)] * 2),
    80: _GPU,
    89: _GPU,
    90: _GPU,
    100: _GPU,
}


@triton.jit
def _taken(X, OTHER, at, other_at, inside, X_THERE: tl.constexpr, OTHER_THERE: tl.constexpr):
    """Numbers of a stack and of its residual, added, where either is there."""
    x = tl.zeros(inside.shape, tl.float32)
    if X_THERE:
        x += tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    if OTHER_THERE:
        x += tl.load(OTHER + other_at, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def _mean(x, D):
    return tl.sum(x, 1)[:, None] / D


@triton.jit
def _centred(x, inside, D):
    return tl.where(inside, x - _mean(x, D), 0.0)


@triton.jit
def _slope(moved, s0, s1):
    """1/s1 − 1/s0, where the mean square has moved by ``moved``."""
    return -moved / (s0 + s1) / s0 / s1


@triton.jit
def _places(rows, at, D, GROUPS, RUN, GROUPED: tl.constexpr):
    """Which parameter belongs to number ``at`` of a row: its own, or that of its channel."""
    return (rows % GROUPS).to(tl.int32) * (D // RUN) + at // RUN if GROUPED else at


@triton.jit
def _affine(n0, place, inside, WEIGHT, BIAS):
    if WEIGHT is not None:
        n0 *= tl.load(WEIGHT + place, mask=inside, other=0.0)
    if BIAS is not None:
        n0 += tl.load(BIAS + place, mask=inside, other=0.0)
    return n0


@triton.jit
def _affine_change(n0, dn, place, inside, WEIGHT, DWEIGHT, DBIAS):
    """What _affine's result moves by; DWEIGHT and DBIAS stand at this query's."""
    change = _affine(dn, place, inside, WEIGHT, DBIAS)
    if DWEIGHT is not None:
        change += (n0 + dn) * tl.load(DWEIGHT + place, mask=inside, other=0.0)
    return change


@triton.jit(do_not_specialize=["N", "CHANGES", "GROUPS"])
def _norm_rows_kernel(
    X, OTHER, WEIGHT, BIAS, DWEIGHT, DBIAS, Y, SUM,
    x_q, x_n, other_q, other_n, y_q, param_q, N, D, CHANGES, GROUPS, RUN, eps,
    CENTRED: tl.constexpr, GROUPED: tl.constexpr, X_MOVES: tl.constexpr, OTHER_MOVES: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = Y.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.arange(0, WIDTH)[None, :]
    inside = (rows < N) & (at < D)
    # As wide as its mask: before Triton 3.4 a load brings only the mask to the addresses' shape.
    place = tl.broadcast_to(_places(rows, at, D, GROUPS, RUN, GROUPED), (ROWS, WIDTH))
    x_at, other_at, y_at = rows * x_n + at, rows * other_n + at, rows * D + at
    c0 = _taken(X, OTHER, x_at, other_at, inside, True, OTHER is not None)
    if SUM is not None:
        tl.store(SUM + y_at, rounded(c0, TYPE), mask=inside)
    if CENTRED:
        # Twice: the first mean's last digit, which a large common part leaves in every value.
        c0 = _centred(_centred(c0, inside, D), inside, D)
    s0 = tl.sqrt(_mean(c0 * c0, D) + eps)
    n0 = c0 * (1.0 / s0)
    tl.store(Y + y_at, rounded(_affine(n0, place, inside, WEIGHT, BIAS), TYPE), mask=inside)
    for _ in range(0, CHANGES):
        X += x_q
        Y += y_q
        dn = tl.zeros_like(c0)
        if OTHER_MOVES:
            OTHER += other_q
        if X_MOVES or OTHER_MOVES:
            dc = _taken(X, OTHER, x_at, other_at, inside, X_MOVES, OTHER_MOVES)
            if SUM is not None:
                SUM += y_q
                tl.store(SUM + y_at, rounded(dc, TYPE), mask=inside)
            if CENTRED:
                dc = _centred(dc, inside, D)
            c1 = c0 + dc
            s1 = tl.sqrt(_mean(c1 * c1, D) + eps)
            dn = dc * (1.0 / s1) + c0 * _slope(_mean(dc * (c0 + c1), D), s0, s1)
        change = _affine_change(n0, dn, place, inside, WEIGHT, DWEIGHT, DBIAS)
        tl.store(Y + y_at, rounded(change, TYPE), mask=inside)
        if DWEIGHT is not None:
            DWEIGHT += param_q
        if DBIAS is not None:
            DBIAS += param_q


@triton.jit
def _long_mean(
    X, OTHER, D, X_THERE: tl.constexpr, OTHER_THERE: tl.constexpr, CENTRED: tl.constexpr, WIDTH: tl.constexpr
):
    """The mean that is to be taken off a long row: 0 where it is not centred; twice, as above."""
    mean = tl.zeros((1, 1), tl.float32)
    if CENTRED:
        for _ in tl.static_range(2):
            total = tl.zeros((1, WIDTH), tl.float32)
            for v in range(0, D, WIDTH):
                total += _long_centred(X, OTHER, v, D, mean, X_THERE, OTHER_THERE, WIDTH)
            mean += _mean(total, D)
    return mean


@triton.jit
def _long_centred(X, OTHER, v, D, mean, X_THERE: tl.constexpr, OTHER_THERE: tl.constexpr, WIDTH: tl.constexpr):
    """A chunk of a long row from number v on, less its mean."""
    at = v + tl.arange(0, WIDTH)[None, :]
    return tl.where(at < D, _taken(X, OTHER, at, at, at < D, X_THERE, OTHER_THERE) - mean, 0.0)


@triton.jit(do_not_specialize=["N", "CHANGES", "GROUPS"])
def _norm_long_kernel(
    X, OTHER, WEIGHT, BIAS, DWEIGHT, DBIAS, Y, SUM,
    x_q, x_n, other_q, other_n, y_q, param_q, N, D, CHANGES, GROUPS, RUN, eps,
    CENTRED: tl.constexpr, GROUPED: tl.constexpr, X_MOVES: tl.constexpr, OTHER_MOVES: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """As above, one row a program, in chunks of WIDTH numbers whose sums run side by side."""
    TYPE: tl.constexpr = Y.dtype.element_ty
    MOVES: tl.constexpr = X_MOVES or OTHER_MOVES
    ADDED: tl.constexpr = OTHER is not None
    row = tl.program_id(0).to(tl.int64)
    X, Y = X + row * x_n, Y + row * D
    if ADDED:
        OTHER += row * other_n
        SUM += row * D
    D_X = X
    D_OTHER = OTHER if ADDED else X  # that is not looked at: before Triton 3.4 no name may stand for None
    mean = _long_mean(X, OTHER, D, True, ADDED, CENTRED, WIDTH)
    squares = tl.zeros((1, WIDTH), tl.float32)
    for v in range(0, D, WIDTH):
        c0 = _long_centred(X, OTHER, v, D, mean, True, ADDED, WIDTH)
        squares += c0 * c0
    s0 = tl.sqrt(_mean(squares, D) + eps)
    for v in range(0, D, WIDTH):
        at = v + tl.arange(0, WIDTH)[None, :]
        c0 = _long_centred(X, OTHER, v, D, mean, True, ADDED, WIDTH)
        if ADDED:
            tl.store(SUM + at, rounded(c0 + mean, TYPE), mask=at < D)
        y = _affine(c0 * (1.0 / s0), _places(row, at, D, GROUPS, RUN, GROUPED), at < D, WEIGHT, BIAS)
        tl.store(Y + at, rounded(y, TYPE), mask=at < D)
    for _ in range(0, CHANGES):
        D_X += x_q
        Y += y_q
        if OTHER_MOVES:
            D_OTHER += other_q
        s1, slope, dmean = s0, tl.zeros((1, 1), tl.float32), tl.zeros((1, 1), tl.float32)
        if MOVES:
            dmean = _long_mean(D_X, D_OTHER, D, X_MOVES, OTHER_MOVES, CENTRED, WIDTH)
            squares = tl.zeros((1, WIDTH), tl.float32)
            moved = squares
            for v in range(0, D, WIDTH):
                c0 = _long_centred(X, OTHER, v, D, mean, True, ADDED, WIDTH)
                dc = _long_centred(D_X, D_OTHER, v, D, dmean, X_MOVES, OTHER_MOVES, WIDTH)
                squares += (c0 + dc) * (c0 + dc)
                moved += dc * (2.0 * c0 + dc)
            s1 = tl.sqrt(_mean(squares, D) + eps)
            slope = _slope(_mean(moved, D), s0, s1)
            if ADDED:
                SUM += y_q
        for v in range(0, D, WIDTH):
            at = v + tl.arange(0, WIDTH)[None, :]
            c0 = _long_centred(X, OTHER, v, D, mean, True, ADDED, WIDTH)
            dn = tl.zeros_like(c0)
            if MOVES:
                dc = _long_centred(D_X, D_OTHER, v, D, dmean, X_MOVES, OTHER_MOVES, WIDTH)
                dn = dc * (1.0 / s1) + c0 * slope
                if ADDED:
                    tl.store(SUM + at, rounded(dc + dmean, TYPE), mask=at < D)
            place = _places(row, at, D, GROUPS, RUN, GROUPED)
            change = _affine_change(c0 * (1.0 / s0), dn, place, at < D, WEIGHT, DWEIGHT, DBIAS)
            tl.store(Y + at, rounded(change, TYPE), mask=at < D)
        if DWEIGHT is not None:
            DWEIGHT += param_q
        if DBIAS is not None:
            DBIAS += param_q


def normalize(
    x: Tensor,
    other: Tensor | None,
    params: tuple[Tensor | None, ...],
    y: Tensor,
    total: Tensor | None,
    eps: float,
    *,
    centred: bool,
    groups: int = 1,
    run: int = 1,
) -> None:
    """Fill `y` (1+Q, N, D) and `total`, contiguous, from stacks of rows without gaps.

    Args:
        x: (1+Q, N, D) or leading size 1; float32 or bfloat16.
        other: the residual, alike, or None; `total` is their sum.
        params: weight, bias (C) and their changes (Q, C), contiguous float32, or None each.
        y: x's dtype.
        eps: added to the mean square.
        centred: whether the mean is taken off.
        groups: N runs over samples and, faster, over this many groups; C = groups D / run.
        run: neighbouring numbers of a row that share a parameter.
    """
    _, N, D = x.shape
    weight, bias, dweight, dbias = map(_at_border, params)
    grouped = groups > 1 or run > 1
    strides = (*x.stride()[:2], *(() if other is None else other.stride()[:2]))
    ragged = any(number % MULTIPLE for number in (D, *strides))
    kernel, width, rows, warps = _shape(architecture(x.device), D, grouped, ragged)
    kernel[(triton.cdiv(N, rows),)](
        *(x, other, weight, bias, dweight, dbias, y, total),
        *(*strides, *((0, 0) if other is None else ())),
        *(y.stride(0), groups * (D // run), N, D, len(y) - 1, groups, run, eps),
        CENTRED=centred,
        GROUPED=grouped,
        X_MOVES=len(x) > 1,
        OTHER_MOVES=other is not None and len(other) > 1,
        ROWS=rows,
        WIDTH=width,
        num_warps=warps,
        num_stages=STAGES,
        **OPTIONS,
    )


def _at_border(y: Tensor | None) -> Tensor | None:
    """A parameter that begins at a border of 16 bytes, as what is allocated does; one inside another is copied.

    Read a number at a time, parameters took 24 bytes of stack in the longest rows; stacks take none, and stay.
    """
    return y if y is None or y.data_ptr() % MULTIPLE == 0 else y.clone()


def _shape(architecture: int, D: int, grouped: bool, ragged: bool) -> tuple[Any, int, int, int]:
    """Kernel, and width, rows and warps of a program, for rows of D numbers."""
    settings = settings_for(SETTINGS, architecture)
    found = settings.ragged if ragged else settings.whole
    each = found.each
    if (found.longest_grouped if grouped else found.longest) < D:
        return _norm_long_kernel, found.chunk, 1, max(1, found.chunk // (32 * each))
    width = triton.next_power_of_2(D)
    if width > 4096 and not newer_assembler():  # which spills two registers of the longest row
        each //= 2
    # 512: of 1024 rows of one number Triton 3.9 spills two registers on sm_80
    rows = max(1, min(512, found.least // width))
    return _norm_rows_kernel, width, rows, max(1, width * rows // (32 * each))


def specimens(architecture: int) -> list[Specimen]:
    """Rows within registers and beyond, whole ones and ragged ones, with all that a norm may have; group norm's
    parameters; and whole rows of stacks that begin off a border of 16 bytes."""
    found = settings_for(SETTINGS, architecture).whole
    return [
        _specimen(kind, architecture, D, grouped, off)
        for kind in ("bf16", "fp32")
        for grouped, longest in ((False, found.longest), (True, found.longest_grouped))
        for off, widths in (
            (False, (64, 768, longest, longest + 16, 1, 20, 999, 2001, 2049)),
            (True, (64, longest, longest + 16)),
        )
        for D in widths
    ]


def _specimen(kind: str, architecture: int, D: int, grouped: bool, off: bool) -> Specimen:
    ragged = D % MULTIPLE != 0
    kernel, width, rows, warps = _shape(architecture, D, grouped, ragged)
    given = ["X"] if grouped else ["X", "OTHER"]
    results = ["Y"] if grouped else ["Y", "SUM"]
    params = dict.fromkeys(["WEIGHT", "BIAS", "DWEIGHT", "DBIAS"], "*fp32")
    strides = ["x_q", "x_n", "other_q", "other_n", "y_q", "param_q", "D"]
    return Specimen(
        f"{kind} {D} {'grouped' if grouped else 'residual'}{', off the border' if off else ''}",
        kernel,
        {
            **dict.fromkeys([*given, *results], f"*{kind}"),
            **params,
            **dict.fromkeys([*strides, "N", "CHANGES", "GROUPS", "RUN"], "i32"),
            "eps": "fp32",
        },
        {
            **({"OTHER": None, "SUM": None} if grouped else {}),
            **{"CENTRED": True, "GROUPED": grouped, "X_MOVES": True, "OTHER_MOVES": not grouped},
            **{"ROWS": rows, "WIDTH": width},
        },
        num_warps=warps,
        num_stages=STAGES,
        unaligned=("RUN", *(strides if ragged else ()), *(given if off else ())),
    )
