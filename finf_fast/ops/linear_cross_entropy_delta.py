"""Cross entropy of N rows behind a linear layer, and what Q changes of rows and layer do to it; logits never stored."""

from __future__ import annotations

import torch
from torch import Tensor

from finf_fast import reference
from finf_fast.ops import dispatch, hybrid, measured
from finf_fast.ops.border import (
    CODES,
    FLOATS,
    check_dtype,
    check_rows,
    check_same_device,
    check_shape,
    check_softcap,
    check_targets,
    result_dtype,
    rows,
)
from finf_fast.ops.cross_entropy_delta import row_kernel
from finf_fast.ops.linear_delta import check_changes, factors_of, queries
from finf_fast.ops.register import register

__all__ = ["linear_cross_entropy_delta", "linear_cross_entropy_delta_out"]


def linear_cross_entropy_delta(
    x: Tensor,
    dx: Tensor | None,
    W: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    db: Tensor | None = None,
    dW: Tensor | None = None,
    dW_factors: tuple[Tensor, Tensor] | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Loss of each row, and its exact change for each query.

    `finf_fast.ops.cross_entropy_delta` of the logits z and of their changes d::

        z   = x Wᵀ + bias                                  then c tanh(z / c) where softcap = c is given
        d_q = dx_q Wᵀ + (x + dx_q) dW_qᵀ + db_q            dW_q = U_q V_qᵀ where factors are given

    formed panel by panel over the vocabulary (formulas: design section 2, "At the loss"; csrc/numerics.h). z is a
    product in float32 even of shorter inputs; d is a product in the inputs' dtype (float16: in float32), which a face
    may round once to bfloat16 for bfloat16, at a cost of 2e-3 of each d. The compiled face does not: of bfloat16 inputs
    too its d is a sum in float32 of exact products, with x + dx alone rounded where `dW` is given. Where a processor
    multiplies bfloat16 itself, numbers below 1.2e-38 are zero to it.

    Args:
        x: (N, D) what enters the layer; float32, float64, bfloat16 or float16, any strides.
        dx: (Q, N, D) its change, in the same dtype, or None: unchanged.
        W: (V, D), V >= 1, in the same dtype.
        target: (N,) int64 in [0, V), or `ignore_index`.
        bias: (V) or None; any of those dtypes, as are the changes below. A column at -inf (a masked vocabulary) counts
            for nothing, whatever finite or -inf change it has.
        db: (Q, V) change of the bias, whether or not there is a bias.
        dW: (Q, V, D) dense change of the weight, or None.
        dW_factors: (U, V), a change of rank r: U (Q, V, r), V (Q, D, r); not beside `dW`.
        softcap: c > 0 (logits), a normal number of float32, or None.
        ignore_index: rows with this target give base 0 and delta 0.
        label_smoothing: in [0, 1], as in F.cross_entropy (dimensionless).

    Returns:
        base (N,) and delta (Q, N) in nats: float64 for float64 inputs, else float32. Q = 0 where nothing changes.

    Raises:
        TypeError: a dtype not named above.
        ValueError: shapes, numbers of queries or devices do not fit, V = 0, softcap or label_smoothing out of range,
            both forms of the weight's change are given.
        IndexError: (CPU) a target out of range, by row. On a GPU nothing waits to look: torch's own assertion there.
    """
    U, V = factors_of(dW, dW_factors)
    return _linear_cross_entropy_delta(x, dx, W, target, bias, db, dW, U, V, softcap, ignore_index, label_smoothing)


def linear_cross_entropy_delta_out(
    x: Tensor,
    dx: Tensor | None,
    W: Tensor,
    target: Tensor,
    base: Tensor,
    delta: Tensor,
    *,
    bias: Tensor | None = None,
    db: Tensor | None = None,
    dW: Tensor | None = None,
    dW_factors: tuple[Tensor, Tensor] | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> None:
    """`linear_cross_entropy_delta` written into `base` (N,) and `delta` (Q, N), whose rows may lie any distance apart.

    They have the dtype that `linear_cross_entropy_delta` would return and share no memory with the inputs; otherwise
    TypeError. ValueError if their shape, device or layout (last stride 1) is another.
    """
    U, V = factors_of(dW, dW_factors)
    changes = (bias, db, dW, U, V, softcap, ignore_index, label_smoothing)
    _linear_cross_entropy_delta_out(x, dx, W, target, base, delta, *changes)


def _allocate(x, dx, W, target, bias, db, dW, U, V, softcap, ignore_index, label_smoothing):
    Q = _check(x, dx, W, target, bias, db, dW, U, V, softcap, label_smoothing)
    N, dtype = x.shape[0], result_dtype(x)
    return x.new_empty(N, dtype=dtype), x.new_empty((Q, N), dtype=dtype)


def _check_out(x, dx, W, target, base, delta, bias, db, dW, U, V, softcap, ignore_index, label_smoothing):
    Q = _check(x, dx, W, target, bias, db, dW, U, V, softcap, label_smoothing)
    check_shape("base", base, "N", x.shape[0])
    check_shape("delta", delta, "Q,N", Q, x.shape[0])
    for name, y in (("base", base), ("delta", delta)):
        check_dtype(name, y, result_dtype(x))
        check_rows(name, y)
    check_same_device(x=x, base=base, delta=delta)


def _check(x, dx, W, target, bias, db, dW, U, V, softcap, label_smoothing) -> int:
    check_dtype("x", x, *FLOATS)
    check_dtype("W", W, x.dtype)
    check_dtype("target", target, torch.int64)
    check_shape("x", x, "N,D", None, None)
    check_shape("W", W, "V,D", None, x.shape[1])
    check_shape("target", target, "N", x.shape[0])
    check_same_device(x=x, W=W, target=target)
    if dx is not None:
        check_dtype("dx", dx, x.dtype)
        check_shape("dx", dx, "Q,N,D", None, *x.shape)
        check_same_device(x=x, dx=dx)
    _check_numbers(W, softcap, label_smoothing)
    Q = queries(dx=dx, dW=dW, db=db, **{"dW_factors U": U, "dW_factors V": V})
    check_changes(Q, W, bias, dW, U, V, db, "V")
    return Q


def _check_numbers(W: Tensor, softcap: float | None, label_smoothing: float) -> None:
    if W.shape[0] == 0:
        raise ValueError(f"W: wanted at least one row (V >= 1), got shape {tuple(W.shape)}")
    check_softcap(softcap)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: wanted a number in [0, 1], got {label_smoothing}")


def _run_reference(x, dx, W, target, base, delta, bias, db, dW, U, V, softcap, ignore_index, label_smoothing):
    loss, change = reference.linear_cross_entropy_delta(
        *(x, dx, W, target),
        bias=bias,
        db=db,
        dW=dW,
        dW_factors=None if U is None else (U, V),
        softcap=softcap,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )
    base.copy_(loss)
    delta.copy_(change)


def _run_cpp(x, dx, W, target, base, delta, bias, db, dW, U, V, softcap, ignore_index, label_smoothing):
    (N, D), Q, r = x.shape, len(delta), 0 if U is None else U.shape[2]
    # Of an update in another type every number is needed once for each block of rows: it is converted once instead.
    x, dx, W, dW, U = (_rows(y) for y in (x, dx, W, _short(dW), _short(U)))
    bias, db = _shifted(bias, softcap), None if db is None else db.float().contiguous()
    R = None if V is None else V.mT.float().contiguous()
    target = target.contiguous()
    dispatch.compiled().linear_cross_entropy_delta(
        *(CODES[x.dtype], x.data_ptr(), x.stride(0), *_place(dx), W.data_ptr(), W.stride(0), target.data_ptr()),
        *(_place(bias)[0], *_place(db)[:2]),
        *(_place(dW)[0], _code(dW), *_place(dW)[1:], _place(U)[0], _code(U), *_place(U)[1:], _place(R)[0], r),
        *(base.data_ptr(), delta.data_ptr(), delta.stride(0), N, D, len(W), Q),
        *(softcap or 0.0, ignore_index, label_smoothing, torch.get_num_threads()),
    )


def _run_triton(x, dx, W, target, base, delta, bias, db, dW, U, V, softcap, ignore_index, label_smoothing):
    from finf_fast.kernels.linear_cross_entropy_delta import linear_cross_entropy_delta as launch

    check_targets(target, len(W), ignore_index)
    changes = (_shifted(bias, softcap), db, dW, U, V, softcap, ignore_index, label_smoothing)
    launch(x, dx, W, target, base, delta, *changes)


def _run_hybrid(x, dx, W, target, base, delta, bias, db, dW, U, V, softcap, ignore_index, label_smoothing):
    check_targets(target, len(W), ignore_index)
    changes = (_shifted(bias, softcap), db, dW, U, V, softcap, ignore_index, label_smoothing)
    score_rows = row_kernel(x.device)
    hybrid.linear_cross_entropy_delta(x, dx, W, target.contiguous(), base, delta, *changes, score_rows)


def _shifted(bias: Tensor | None, softcap: float | None) -> Tensor | None:
    """The bias in float32. A shift is not felt but by a soft cap, and against the largest -1e9 for a masked word takes
    no digits from the others."""
    if bias is None:
        return None
    bias = bias.float().contiguous()
    return bias if softcap else bias - bias.amax().clamp(min=torch.finfo(torch.float32).min)


def _rows(y: Tensor | None) -> Tensor | None:
    return None if y is None else rows(y)


def _short(y: Tensor | None) -> Tensor | None:
    """`y` in a type that the compiled loops read."""
    return y if y is None or y.dtype in (torch.float32, torch.bfloat16) else y.float()


def _place(y: Tensor | None) -> tuple[int, int, int]:
    """Address and the first two strides; zeros for what is not given."""
    return (0, 0, 0) if y is None else (y.data_ptr(), y.stride(0), y.stride(1) if y.dim() > 1 else 0)


def _code(y: Tensor | None) -> int:
    return 0 if y is None else CODES[y.dtype]


_FACES = {"cpp": _run_cpp, "triton": _run_triton, "hybrid": _run_hybrid, "reference": _run_reference}


def _run(x, dx, W, target, base, delta, bias, db, dW, U, V, *options):
    """On a GPU two faces are rivals, and the sizes choose between them."""
    case = None
    if x.device.type == "cuda":
        form = "dense" if dW is not None else "low rank" if U is not None else "input"
        sizes = {"T": len(x), "D": x.shape[1], "V": len(W), "Q": len(delta)}
        case = measured.case_of(form, str(x.dtype).removeprefix("torch."), **sizes)
    face = dispatch.choose("linear_cross_entropy_delta", x, case=case)
    _FACES[face](x, dx, W, target, base, delta, bias, db, dW, U, V, *options)


_CHANGES = (
    "Tensor? bias, Tensor? db, Tensor? dW, Tensor? U, Tensor? V, float? softcap, int ignore_index, "
    "float label_smoothing"
)


@register(
    "linear_cross_entropy_delta",
    f"(Tensor x, Tensor? dx, Tensor W, Tensor target, {_CHANGES}) -> (Tensor, Tensor)",
    _allocate,
)
def _linear_cross_entropy_delta(x, dx, W, target, *changes):
    base, delta = _allocate(x, dx, W, target, *changes)
    _run(x, dx, W, target, base, delta, *changes)
    return base, delta


@register(
    "linear_cross_entropy_delta_out",
    f"(Tensor x, Tensor? dx, Tensor W, Tensor target, Tensor(a!) base, Tensor(b!) delta, {_CHANGES}) -> ()",
    _check_out,
)
def _linear_cross_entropy_delta_out(x, dx, W, target, base, delta, *changes):
    _check_out(x, dx, W, target, base, delta, *changes)
    _run(x, dx, W, target, base, delta, *changes)
