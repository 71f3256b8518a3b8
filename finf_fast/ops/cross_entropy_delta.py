"""Cross entropy of N rows of logits, and what Q changes of the logits do to it, to the change's last digits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from finf_fast import reference
from finf_fast.ops import dispatch
from finf_fast.ops.border import (
    CODES,
    FLOATS,
    check_dtype,
    check_rows,
    check_same_device,
    check_shape,
    multiprocessors,
    place,
    result_dtype,
    rows,
)
from finf_fast.ops.register import register

__all__ = ["cross_entropy_delta", "cross_entropy_delta_out"]


def cross_entropy_delta(
    z: Tensor, dz: Tensor, target: Tensor, *, ignore_index: int = -100, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Loss of each row, and its exact change for each query.

    With ``F = torch.nn.functional``, in exact arithmetic and elementwise::

        base     = F.cross_entropy(z, target, reduction="none", ...)
        delta[q] = F.cross_entropy(z + dz[q], target, reduction="none", ...) - base

    computed so that the difference keeps its digits whatever the size of the change and however small the loss
    (formulas: csrc/numerics.h)::

        D     = (1 - eps) d_t + eps mean(d)               the target's own change, d = dz[q, n], eps = label_smoothing
        s     = sum_v e^(z_v - m),   u = sum_v e^(z_v - m) expm1(d_v - D)
        delta = log1p(u / s)                              or the difference of two logarithms once the sum halves
        base  = log1p(sum_{v != t} e^(z_v - m))           where the target leads

    Where a logit gains more than 20 on the target a face may take two losses' difference instead: its error is then of
    the size of the losses' last digits.

    Args:
        z: (N, V) logits, V >= 1; float32, float64, bfloat16 or float16. Rows may lie any distance apart; where the
            columns of a row are not neighbours in memory a contiguous copy is made. A column at -inf (a masked
            vocabulary) counts for nothing, whatever finite or -inf change it has.
        dz: (Q, N, V) change of the logits, Q >= 0; any of those dtypes, layout as for `z`.
        target: (N,) int64 in [0, V), or `ignore_index`.
        ignore_index: rows with this target give base 0 and delta 0.
        label_smoothing: in [0, 1], as in F.cross_entropy (dimensionless).

    Returns:
        base (N,) and delta (Q, N) in nats, contiguous: float64 if an input is, else float32, which is also the
        arithmetic inside. A NaN in a row of `z` or `dz` gives NaN there and nowhere else.

    Raises:
        TypeError: a dtype not named above.
        ValueError: shapes or devices do not fit, V = 0, label_smoothing outside [0, 1]; a face is forced that refuses
            (see `finf_fast.ops.dispatch`).
        IndexError: (CPU) a target out of range, by row. On a GPU nothing waits to look: torch's own assertion there.
    """
    return _cross_entropy_delta(z, dz, target, ignore_index, label_smoothing)


def cross_entropy_delta_out(
    z: Tensor,
    dz: Tensor,
    target: Tensor,
    base: Tensor,
    delta: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> None:
    """`cross_entropy_delta` written into `base` (N,) and `delta` (Q, N), whose rows may lie any distance apart.

    They have the dtype that `cross_entropy_delta` would return and share no memory with the inputs; otherwise
    TypeError. ValueError if their shape, device or layout (last stride 1) is another.
    """
    _cross_entropy_delta_out(z, dz, target, base, delta, ignore_index, label_smoothing)


def _allocate(z, dz, target, ignore_index, label_smoothing):
    _check(z, dz, target, label_smoothing)
    dtype = result_dtype(z, dz)
    return z.new_empty(z.shape[0], dtype=dtype), z.new_empty(dz.shape[:2], dtype=dtype)


def _check_out(z, dz, target, base, delta, ignore_index, label_smoothing):
    _check(z, dz, target, label_smoothing)
    check_shape("base", base, "N", z.shape[0])
    check_shape("delta", delta, "Q,N", *dz.shape[:2])
    for name, x in (("base", base), ("delta", delta)):
        check_dtype(name, x, result_dtype(z, dz))
        check_rows(name, x)
    check_same_device(z=z, base=base, delta=delta)


def _check(z: Tensor, dz: Tensor, target: Tensor, label_smoothing: float) -> None:
    check_dtype("z", z, *FLOATS)
    check_dtype("dz", dz, *FLOATS)
    check_dtype("target", target, torch.int64)
    check_shape("z", z, "N,V", None, None)
    check_shape("dz", dz, "Q,N,V", None, *z.shape)
    check_shape("target", target, "N", z.shape[0])
    check_same_device(z=z, dz=dz, target=target)
    if z.shape[1] == 0:
        raise ValueError(f"z: wanted at least one column (V >= 1), got shape {tuple(z.shape)}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: wanted a number in [0, 1], got {label_smoothing}")


def _run(z, dz, target, base, delta, ignore_index, label_smoothing):
    face = dispatch.choose("cross_entropy_delta", z, dz)
    _FACES[face](rows(z), rows(dz), target.contiguous(), base, delta, ignore_index, label_smoothing)


def _run_reference(z, dz, target, base, delta, ignore_index, label_smoothing):
    loss, change = reference.cross_entropy_delta(
        z, dz, target, ignore_index=ignore_index, label_smoothing=label_smoothing
    )
    base.copy_(loss)
    delta.copy_(change)


def _run_cpp(z, dz, target, base, delta, ignore_index, label_smoothing):
    Q, N, V = dz.shape
    dispatch.compiled().cross_entropy_delta(
        *(z.data_ptr(), CODES[z.dtype], z.stride(0)),
        *(dz.data_ptr(), CODES[dz.dtype], dz.stride(0), dz.stride(1)),
        target.data_ptr(),
        *(base.data_ptr(), delta.data_ptr(), delta.stride(0)),
        *(N, V, Q, ignore_index, label_smoothing, torch.get_num_threads()),
    )


def _run_cuda(z, dz, target, base, delta, ignore_index, label_smoothing):
    Q, N, V = dz.shape
    kernels = dispatch.compiled_cuda()
    splits, size = kernels.cross_entropy_delta_splits(multiprocessors(z), N, V, Q)
    parts = z.new_empty(size, dtype=torch.uint8)
    kernels.cross_entropy_delta(
        *place(z),
        *(z.data_ptr(), CODES[z.dtype], z.stride(0)),
        *(dz.data_ptr(), CODES[dz.dtype], dz.stride(0), dz.stride(1)),
        target.data_ptr(),
        *(base.data_ptr(), delta.data_ptr(), delta.stride(0)),
        *(N, V, Q, ignore_index, label_smoothing, splits, parts.data_ptr()),
    )


_FACES = {"cpp": _run_cpp, "cuda": _run_cuda, "reference": _run_reference}


def row_kernel(device: torch.device) -> Callable:
    """The compiled face for tensors on `device`, whatever FINF_BACKEND says, for an operation that forms logits itself:
    ``(z, dz, target, base, delta, ignore_index, label_smoothing)``, float32, rows without gaps. On a CPU where nothing
    is built the reference."""
    wanted = "cuda" if device.type == "cuda" else "cpp"
    built = next(v for v in dispatch.faces("cross_entropy_delta") if v.face == wanted).available
    return _FACES[wanted if built or wanted == "cuda" else "reference"]


@register(
    "cross_entropy_delta",
    "(Tensor z, Tensor dz, Tensor target, int ignore_index, float label_smoothing) -> (Tensor, Tensor)",
    _allocate,
)
def _cross_entropy_delta(z, dz, target, ignore_index, label_smoothing):
    base, delta = _allocate(z, dz, target, ignore_index, label_smoothing)
    _run(z, dz, target, base, delta, ignore_index, label_smoothing)
    return base, delta


@register(
    "cross_entropy_delta_out",
    "(Tensor z, Tensor dz, Tensor target, Tensor(a!) base, Tensor(b!) delta, int ignore_index, "
    "float label_smoothing) -> ()",
    _check_out,
)
def _cross_entropy_delta_out(z, dz, target, base, delta, ignore_index, label_smoothing):
    _check_out(z, dz, target, base, delta, ignore_index, label_smoothing)
    _run(z, dz, target, base, delta, ignore_index, label_smoothing)
