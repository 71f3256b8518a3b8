"""A change of a matrix as two thin factors, u vᵀ: what one gradient step on T tokens does to a linear layer.

The gradient of a linear map is a sum of T outer products, so its rank is T at most. Kept as factors it takes
r·(rows + cols) numbers instead of rows·cols, and adds to a forward two skinny products instead of a whole one. A
convolution's kernel (C', C, …) is the matrix (C', C·…): its change is r filters, mixed by a 1×1 convolution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """The change ``u @ v.T`` of a tensor of shape (rows, cols), or (rows, *columns).

    Attributes:
        u: (rows, r), floating point.
        v: (cols, r), same dtype and device as ``u``.
        columns: what the columns are made of where the tensor has more than two dimensions, as a convolution's kernel
            (out, in, height, width) has columns (in, height, width); their product is cols. Empty: a matrix.

    Raises:
        TypeError: a factor is not a floating-point tensor, or their dtypes differ.
        ValueError: a factor is not 2-D, their ranks or devices differ, or ``columns`` do not multiply to cols.
    """

    u: Tensor
    v: Tensor
    columns: tuple[int, ...] = ()

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
        if self.columns and math.prod(self.columns) != self.v.shape[0]:
            raise ValueError(f"columns: wanted sizes whose product is {self.v.shape[0]}, got {tuple(self.columns)}")

    @property
    def shape(self) -> torch.Size:
        """(rows, cols), or (rows, *columns), of the tensor that the factors stand for."""
        return torch.Size((self.u.shape[0], *(self.columns or (self.v.shape[0],))))

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
        """The whole, in ``dtype``, by default the factors' own.

        Multiplied in the wider of the two, float32 at least: a half-precision product would round every term of a sum.
        """
        dtype = dtype or self.dtype
        wide = torch.promote_types(torch.promote_types(self.dtype, dtype), torch.float32)
        return (self.u.to(wide) @ self.v.to(wide).T).to(dtype).view(self.shape)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LowRank:
        """The factors on another device, in another dtype."""
        return replace(self, u=self.u.to(device=device, dtype=dtype), v=self.v.to(device=device, dtype=dtype))

    def t(self) -> LowRank:
        """The transpose, (cols, rows), of a matrix."""
        if self.columns:
            raise ValueError(f"t: wanted a matrix, got shape {tuple(self.shape)}")
        return LowRank(self.v, self.u)

    def scaled(self, factor: float) -> LowRank:
        """``factor`` times the whole; ``v`` is shared."""
        return replace(self, u=self.u * factor)


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


def compress_kernel(kernel: Tensor, rank: int) -> tuple[LowRank, float]:
    """As :func:`compress`, of a whole tensor (rows, *columns): the gradient of a convolution's kernel.

    Its rows, the output channels, are few, so the squares of the singular values are the eigenvalues of a small matrix;
    squared in float64, they lose no digits that float32 has.
    """
    require_rank(rank)
    matrix = kernel.flatten(1)
    wide = matrix.double()
    squares, left = torch.linalg.eigh(wide @ wide.T)  # ascending
    squares = squares.clamp(min=0).flip(0)
    u = left.flip(1)[:, :rank]
    v = wide.T @ u
    root = v.square().sum(0).sqrt().sqrt()  # √σ to both sides
    factors = LowRank((u * root).to(kernel.dtype), (v * _inverse(root)).to(kernel.dtype), tuple(kernel.shape[1:]))
    return factors, _share(squares.sqrt(), rank)


def compress_whole(change: Tensor, rank: int) -> tuple[Tensor | LowRank, float]:
    """As :func:`compress`, of a dense change of any shape; it comes back as it is where factors would not pay."""
    if change.dim() < 2 or not pays(change.shape, rank):
        return change, 0.0
    matrix = change.flatten(1)
    wide = matrix.shape[0] <= matrix.shape[1]
    low, share = compress_kernel(matrix if wide else matrix.T, rank)
    u, v = (low.u, low.v) if wide else (low.v, low.u)
    return LowRank(u, v, tuple(change.shape[1:]) if change.dim() > 2 else ()), share


def pays(shape: torch.Size, rank: int) -> bool:
    """Whether factors of this rank cost less in a forward than the whole."""
    return kernel_pays(shape, rank) if len(shape) > 2 else 2 * rank < min(shape)


def kernel_pays(shape: torch.Size, rank: int) -> bool:
    """Whether r filters and their mixing cost at most two thirds of the kernel: two more passes come with them."""
    rows, cols = shape[0], math.prod(shape[1:])
    return 3 * rank * (rows + cols) <= 2 * rows * cols


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
