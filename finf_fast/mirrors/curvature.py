"""Curvature factors of a model on its training data: fitted once, kept, and used by the mirror step of every query."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finf_fast.disk import save_tensors
from finf_fast.records import ManifestMismatch
from finf_fast.reference import product
from finf_fast.update import model_fingerprint

FORMAT = 1  # of the file; a reader refuses others


@dataclass(frozen=True, eq=False)
class Factor:
    """One side of a Kronecker product: a symmetric matrix (n, n), or its diagonal (n,) where that is all there is."""

    values: Tensor

    @property
    def size(self) -> int:
        return self.values.shape[0]

    @property
    def is_diagonal(self) -> bool:
        return self.values.dim() == 1

    @property
    def trace(self) -> float:
        diagonal = self.values if self.is_diagonal else self.values.diagonal()
        return diagonal.double().sum().item()

    @property
    def mean(self) -> float:
        """Of the eigenvalues."""
        return self.trace / self.size

    def inverse(self, shift: float) -> Inverse:
        """Of this plus ``shift`` times the identity, made in float64 and kept in the dtype of this."""
        wide = self.values.double()
        if self.is_diagonal:
            return Inverse((1 / (wide + shift)).to(self.values.dtype))
        shifted = wide + shift * torch.eye(self.size, dtype=wide.dtype, device=wide.device)
        return Inverse(torch.cholesky_inverse(torch.linalg.cholesky(shifted)).to(self.values.dtype))

    def eigen(self) -> tuple[Tensor | None, Tensor]:
        """Eigenvectors (n, n) as columns, None where they are the axes; eigenvalues (n,); float64."""
        wide = self.values.double()
        if self.is_diagonal:
            return None, wide
        values, vectors = torch.linalg.eigh(wide)
        return vectors, values


@dataclass(frozen=True, eq=False)
class Inverse:
    """The inverse of a damped factor, (n, n) or its diagonal (n,).

    The matrix itself and no Cholesky factor: every query has its products, which take half the time and half the memory
    of triangular solves in float64.
    """

    values: Tensor

    @property
    def is_diagonal(self) -> bool:
        return self.values.dim() == 1

    def times(self, x: Tensor) -> Tensor:
        """The inverse times x (n, T), in the dtype of ``x``."""
        wide = x.to(torch.promote_types(x.dtype, self.values.dtype))
        values = self.values.to(wide.dtype)
        return (wide * values[:, None] if self.is_diagonal else product.linear(wide.T, values).T).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Block:
    """The curvature of one weight, and its bias: rows ⊗ cols for the gradient as a matrix.

    Attributes:
        rows, cols: second moments of its two sides, (out) and (in) for a linear layer; the input's side has one more
            coordinate, always 1, where there is a bias.
        bias: name of that bias; None without.
        turned: whether the inputs are the rows, as in an embedding or a Hugging Face Conv1D.
        spectrum: (rows, cols) second moments of the gradient in the eigenbasis of the two; EK-FAC only.
        uses: how often each kind of layer used the weight in a forward.
    """

    rows: Factor
    cols: Factor
    bias: str | None = None
    turned: bool = False
    spectrum: Tensor | None = None
    uses: Mapping[str, int] = field(default_factory=dict)
    _made: dict[Any, Any] = field(default_factory=dict, repr=False)

    def inverses(self, damping: float) -> tuple[Inverse, Inverse]:
        """Of both sides, each with √damping of its mean eigenvalue added; made once.

        That is the factored Tikhonov damping of Martens & Grosse, "Optimizing Neural Networks with Kronecker-factored
        Approximate Curvature", ICML 2015, section 6.3, with λ = damping · mean(rows) · mean(cols): π√λ and √λ/π are
        then these two.
        """
        if damping not in self._made:
            self._made[damping] = tuple(side.inverse(damping**0.5 * side.mean) for side in (self.rows, self.cols))
        return self._made[damping]

    def eigenbasis(self) -> tuple[Tensor | None, Tensor | None]:
        """Eigenvectors of rows and cols; made once."""
        if "basis" not in self._made:
            self._made["basis"] = tuple(side.eigen()[0] for side in (self.rows, self.cols))
        return self._made["basis"]

    @property
    def tensors(self) -> dict[str, Tensor]:
        found = {"rows": self.rows.values, "cols": self.cols.values}
        return found if self.spectrum is None else {**found, "spectrum": self.spectrum}


@dataclass(frozen=True, eq=False)
class Factors:
    """What :func:`finf_fast.fit_factors` learned about a model's curvature.

    Attributes:
        kind: ``"kfac"``, ``"ekfac"``, ``"fisher_diag"`` or ``"cg"``.
        blocks: name of a weight -> its Kronecker factors.
        diagonals: name -> (shape of the parameter) mean of the squared gradient.
        batches: samples that products with the curvature are taken over (``"cg"``).
        left: name -> why this parameter has no factor; a step leaves it still.
        record: fingerprints, settings and versions; plain values.
    """

    kind: str
    blocks: Mapping[str, Block] = field(default_factory=dict)
    diagonals: Mapping[str, Tensor] = field(default_factory=dict)
    batches: tuple[Any, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Of all factors, without what is made of them later."""
        own = [tensor for block in self.blocks.values() for tensor in block.tensors.values()]
        return sum(tensor.nbytes for tensor in (*own, *self.diagonals.values()))

    def check(self, model: nn.Module) -> None:
        """Raises :class:`finf_fast.ManifestMismatch` unless these were fitted on this very model."""
        mine, theirs = self.record.get("model"), model_fingerprint(model)
        if mine != theirs:
            raise ManifestMismatch(
                f"factors: wanted those of this model, fingerprint {theirs}, got those of {mine}; fit them again with "
                "finf_fast.fit_factors"
            )

    def save(self, path: str | Path) -> None:
        """Writes one file with ``torch.save``: tensors and plain values, so it loads with ``weights_only=True``.

        Raises:
            OSError: the file cannot be written; none is left that is not whole, and one that was there is as it was.
        """
        blocks = {
            name: {**block.tensors, "bias": block.bias, "turned": block.turned, "uses": dict(block.uses)}
            for name, block in self.blocks.items()
        }
        save_tensors(
            path,
            {
                **{"format": FORMAT, "kind": self.kind, "blocks": blocks, "diagonals": dict(self.diagonals)},
                **{"batches": list(self.batches), "left": dict(self.left), "record": dict(self.record)},
            },
        )

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Factors:
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: a file of another kind.
        """
        plain = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(plain, dict) or plain.get("format") != FORMAT or "blocks" not in plain:
            raise ValueError(f"path: wanted a file that Factors.save wrote (format {FORMAT}), got {path}")
        blocks = {name: _block(**parts) for name, parts in plain["blocks"].items()}
        return cls(plain["kind"], blocks, plain["diagonals"], tuple(plain["batches"]), plain["left"], plain["record"])


def _block(rows: Tensor, cols: Tensor, spectrum: Tensor | None = None, **plain: Any) -> Block:
    return Block(Factor(rows), Factor(cols), spectrum=spectrum, **plain)
