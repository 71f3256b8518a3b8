"""A change of a matrix as two thin factors, u vᵀ: what one gradient step on T tokens does to a linear layer.

The gradient of a linear map is a sum of T outer products, so its rank is T at most. Kept as factors it takes
r·(rows + cols) numbers instead of rows·cols, and adds to a forward two skinny products instead of a whole one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """The change ``u @ v.T`` of a 2-D tensor of shape (rows, cols).

    Attributes:
        u: (rows, r), floating point.
        v: (cols, r), same dtype and device as ``u``.

    Raises:
        TypeError: a factor is not a floating-point tensor, or their dtypes differ.
        ValueError: a factor is not 2-D, or their ranks or devices differ.
    """

    u: Tensor
    v: Tensor

    def __post_init__(self):
        for name in ("u", "v"):
            factor = getattr(self, name)
            if not isinstance(factor, Tensor) or not factor.is_floating_point():
                got = factor.dtype if isinstance(factor, Tensor) else type(factor).__name__
                raise TypeError(f"{name}: wanted a floating-point tensor, got {got}")
            if factor.dim() != 2:
                raise ValueError(f"{name}: wanted shape (n, r), got {tuple(factor.shape)}")
        if self.u.dtype != self.v.dtype:
            raise TypeError(f"v: wanted dtype {self.u.dtype} as u, got {self.v.dtype}")
        if self.u.device != self.v.device:
            raise ValueError(f"v: wanted device {self.u.device} as u, got {self.v.device}")
        if self.u.shape[1] != self.v.shape[1]:
            raise ValueError(f"v: wanted rank {self.u.shape[1]} as u, got {self.v.shape[1]}")

    @property
    def shape(self) -> torch.Size:
        """(rows, cols), of the matrix that the factors stand for."""
        return torch.Size((self.u.shape[0], self.v.shape[0]))

    @property
    def rank(self) -> int:
        """r, the number of columns of each factor; the matrix may have a smaller rank."""
        return self.u.shape[1]

    @property
    def nbytes(self) -> int:
        return self.u.nbytes + self.v.nbytes

    @property
    def dtype(self) -> torch.dtype:
        return self.u.dtype

    @property
    def device(self) -> torch.device:
        return self.u.device

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """(rows, cols) in ``dtype``, by default the factors' own; multiplied in the wider of the two, float32 at least.

        A half-precision product would round every term of the sum.
        """
        dtype = dtype or self.dtype
        wide = torch.promote_types(torch.promote_types(self.dtype, dtype), torch.float32)
        return (self.u.to(wide) @ self.v.to(wide).T).to(dtype)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LowRank:
        """The factors on another device, in another dtype."""
        return LowRank(self.u.to(device=device, dtype=dtype), self.v.to(device=device, dtype=dtype))

    def t(self) -> LowRank:
        """The transpose, (cols, rows)."""
        return LowRank(self.v, self.u)

    def scaled(self, factor: float) -> LowRank:
        """``factor`` times the matrix; ``v`` is shared."""
        return LowRank(self.u * factor, self.v)


def dense(change: Tensor | LowRank, like: Tensor | None = None) -> Tensor:
    """The change as one tensor, on the device and in the dtype of ``like`` where given."""
    if isinstance(change, LowRank):
        return change.dense() if like is None else change.to(like.device).dense(like.dtype)
    return change if like is None else change.to(like)


def parts(change: Tensor | LowRank) -> dict[str, Tensor]:
    """The tensors that a change is stored in: ``{"": change}``, or ``{" u": u, " v": v}``; keys go behind a name."""
    return {" u": change.u, " v": change.v} if isinstance(change, LowRank) else {"": change}


def squared_norm(change: Tensor | LowRank) -> float:
    """Squared Frobenius norm, added up in float64; of factors Σ (uᵀu)∘(vᵀv), nothing dense is formed."""
    if not isinstance(change, LowRank):
        return change.double().square().sum().item()
    u, v = change.u.double(), change.v.double()
    return max(0.0, ((u.T @ u) * (v.T @ v)).sum().item())  # of a change that cancels out, rounding may go below 0


def compress(u: Tensor, v: Tensor, rank: int) -> tuple[LowRank, float]:
    """The best approximation of ``u @ v.T`` of at most this rank (Eckart & Young, 1936).

    Thin QR of both factors, singular values of the small core; computed in float32, or float64 where given that. Each
    singular value is shared evenly, √σ to both sides. Factors of that few columns come back as they are.

    Args:
        u: (rows, T), finite.
        v: (cols, T), finite.
        rank: at least 1.

    Returns:
        The factors, and the share of the squared Frobenius norm that was discarded, 0 to 1.

    Raises:
        ValueError: ``rank`` below 1 or not a whole number; ``u`` and ``v`` do not fit together.
        TypeError: ``u`` or ``v`` is not a floating-point tensor, or their dtypes differ.
        torch.linalg.LinAlgError: a factor holds NaN or infinity.
    """
    require_rank(rank)
    whole = LowRank(u, v)
    if whole.rank <= rank:
        return whole, 0.0
    if u.shape[0] < v.shape[0]:  # the orthogonal factor is formed for the shorter side only
        low, discarded = compress(v, u, rank)
        return low.t(), discarded
    whole = whole.to(dtype=torch.promote_types(whole.dtype, torch.float32))
    across, inner = torch.linalg.qr(whole.v)  # (cols, k), (k, T)
    core = torch.linalg.qr(whole.u, mode="r").R @ inner.T
    _, sigma, right = torch.linalg.svd(core, full_matrices=False)
    root, towards = sigma[:rank].sqrt(), right[:rank].T
    left = whole.u @ (inner.T @ towards)  # the matrix times its right singular vectors: column k has length σ_k
    return LowRank(left * _inverse(root), across @ towards * root), _share(sigma, rank)


def compress_rows(ids: Tensor, values: Tensor, rows: int, rank: int) -> tuple[LowRank, float]:
    """As :func:`compress`, of a matrix (rows, cols) that is zero but for the rows ``ids``: an embedding's gradient.

    Args:
        ids: (n,) int64, all different.
        values: (n, cols), those rows.
        rows: of the whole matrix.
        rank: at least 1.
    """
    require_rank(rank)
    left, sigma, right = torch.linalg.svd(values, full_matrices=False)
    root = sigma[:rank].sqrt()
    u = values.new_zeros(rows, len(root)).index_copy_(0, ids, left[:, :rank] * root)
    return LowRank(u, right[:rank].T * root), _share(sigma, rank)


def require_rank(rank: object) -> None:
    """Raises ``ValueError`` unless ``rank`` is a whole number, at least 1."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank: wanted a whole number, at least 1, got {rank!r}")


def _inverse(root: Tensor) -> Tensor:
    return torch.where(root > 0, 1 / root, torch.zeros_like(root))


def _share(sigma: Tensor, rank: int) -> float:
    """Σ σ² past ``rank`` over Σ σ², not 1 − kept: a small share would drown in that."""
    squares = sigma.double().square()
    total = squares.sum().item()
    return squares[rank:].sum().item() / total if total else 0.0
