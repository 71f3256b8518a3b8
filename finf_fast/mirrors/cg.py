"""The exact step: (C + λ)⁻¹ g by conjugate gradients, with products C v by automatic differentiation; small models."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from finf_fast.loss import Loss, mapped
from finf_fast.loss.base import batch_size
from finf_fast.mirrors.base import Method, require_number
from finf_fast.mirrors.body import Body, stepping
from finf_fast.mirrors.diagonal import compressed
from finf_fast.mirrors.factors import Gradient
from finf_fast.mirrors.preconditioned import Direction, Fitted
from finf_fast.skeleton import Skeleton


@dataclass(frozen=True, kw_only=True)
class ConjugateGradients(Fitted):
    """(C + λ)⁻¹ g with nothing approximated but the sample of the corpus that C is a mean over.

    C is the Gauss-Newton matrix (``fisher="true"``, its expectation over labels taken exactly) or the empirical Fisher
    of that sample; λ is ``damping`` times the mean of C's diagonal as the fit estimates it. Martens, "Deep learning via
    Hessian-free optimization", ICML 2010; preconditioned by that diagonal. All in float64; the graphs of the whole
    sample stay in memory. The step is dense; ``rank`` compresses it.

    Args:
        tolerance: of the residual's norm, relative to the gradient's.
        iterations: at most.

    Raises:
        ValueError: not there after so many iterations; another loss than the fit's; a model that cannot be
            differentiated twice or does not run in float64.
    """

    name: ClassVar[str] = "cg"
    fits: ClassVar[str | None] = "cg"
    hidden: ClassVar[tuple[str, ...]] = ("factors", "curvature")

    damping: float = 1.0  # on digits the LDS is .75 there, .63 with a tenth or ten times as much
    tolerance: float = 1e-6
    iterations: int = 1000
    curvature: Any = None

    def __post_init__(self):
        super().__post_init__()
        require_number("tolerance", self.tolerance, above=0.0)
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int) or self.iterations < 1:
            raise ValueError(f"iterations: wanted a whole number, at least 1, got {self.iterations!r}")

    def prepared(self, model: nn.Module, loss: Loss, device: torch.device) -> Method:
        super().prepared(model, loss, device)
        fitted = self.factors.record
        if loss.settings() != fitted["loss"]:
            raise ValueError(f"loss: method='cg' wants that of its factors, {fitted['loss']}, got {loss.settings()}")
        with stepping(device):
            made = Curvature(model, loss, self.factors.batches, list(self.factors.diagonals), fitted["fisher"], device)
        return replace(self, curvature=made)

    def direction_of(self, body: Body, caught: dict[str, Gradient]) -> Direction:
        names = list(self.factors.diagonals)
        gradient = [_dense(caught.get(name), self.factors.diagonals[name]) for name in names]
        diagonal = [self.factors.diagonals[name].double() for name in names]
        shift = self.damping * sum(d.sum().item() for d in diagonal) / sum(d.numel() for d in diagonal)
        solved, count = self._solved(gradient, [d + shift for d in diagonal], shift)
        found = Direction({}, notes={**self.left(body), "iterations": count})
        for name, step in zip(names, solved, strict=True):
            if name in caught:
                found.params[name], found.shares[name] = compressed(step.to(body.dtype), self.rank)
        return found

    def _solved(self, gradient: list[Tensor], diagonal: list[Tensor], shift: float) -> tuple[list[Tensor], int]:
        def product(v: list[Tensor]) -> list[Tensor]:
            return [c + shift * x for c, x in zip(self.curvature.product(v), v, strict=True)]

        return solve(product, gradient, diagonal, self.tolerance, self.iterations)


class Curvature:
    """Products of the Gauss-Newton matrix, or the empirical Fisher, of some batches with a vector.

    J v is taken as the derivative by u of ⟨Jᵀ u, v⟩, so every model that torch can differentiate twice will do.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        batches: tuple[Any, ...],
        names: list[str],
        fisher: str,
        device: torch.device,
    ):
        self._loss, self._true = loss, fisher == "true"
        body = Skeleton(model, device, torch.float64)
        self._leaves = [tensor.detach().requires_grad_() for tensor in body.base(names).values()]
        body.put(dict(zip(names, self._leaves, strict=True)))
        with sdpa_kernel(SDPBackend.MATH), _explained():  # the fused ones cannot be differentiated twice
            self._parts = [self._part(body.module, mapped(lambda t: _wide(t, device), batch)) for batch in batches]
        self._samples = sum(batch_size(batch) for batch in batches)

    def product(self, v: list[Tensor]) -> list[Tensor]:
        """C v, with v and the result shaped as the parameters."""
        total = [torch.zeros_like(x) for x in v]
        for batch, value, u, pulled in self._parts:
            with _explained():
                (pushed,) = torch.autograd.grad(pulled, u, v, retain_graph=True)
            if self._true:
                pushed = self._loss.gauss_newton(value.detach(), batch, pushed)
            for whole, part in zip(total, self._pulled(value, pushed, False), strict=True):
                whole += part
        return [whole / self._samples for whole in total]

    def _part(self, module: nn.Module, batch: Any) -> tuple[Any, Tensor, Tensor, list[Tensor]]:
        """A batch, what its curvature is taken through (outputs or losses), u, and Jᵀ u with its graph."""
        value = self._loss.output(module, mapped(torch.clone, batch))
        if not self._true:
            value = self._loss.fisher(value, batch, None)
        u = torch.zeros_like(value, requires_grad=True)
        return batch, value, u, self._pulled(value, u, True)

    def _pulled(self, value: Tensor, u: Tensor, graph: bool) -> list[Tensor]:
        found = torch.autograd.grad(
            *(value, self._leaves, u), create_graph=graph, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return list(found)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """torch's errors at models that this method cannot take, said in its terms."""
    once = "'kfac', 'ekfac' and 'fisher_diag' differentiate once, in the model's own dtype"
    try:
        yield
    except RuntimeError as error:
        if "not implemented" in str(error):
            raise ValueError(
                f"method: 'cg' wants a model that torch can differentiate twice ({error}); {once}"
            ) from error
        if "dtype" in str(error) or "scalar type" in str(error):
            raise ValueError(
                "method: 'cg' wants a model that runs in float64 too, with casts such as x.to(weight.dtype) in place "
                f"of x.float() ({error}); {once}"
            ) from error
        raise


def solve(
    product: Callable[[list[Tensor]], list[Tensor]],
    b: list[Tensor],
    diagonal: list[Tensor],
    tolerance: float,
    iterations: int,
) -> tuple[list[Tensor], int]:
    """x with product(x) = b, and how many products it took; Hestenes & Stiefel, 1952, with a diagonal preconditioner.

    Raises:
        ValueError: the residual is not below ``tolerance`` · ‖b‖ after so many iterations.
    """
    x, r = [torch.zeros_like(t) for t in b], list(b)
    z = [t / d for t, d in zip(r, diagonal, strict=True)]
    p, rz, wanted = z, _dot(r, z), tolerance * _dot(b, b) ** 0.5
    for count in range(iterations):
        if _dot(r, r) ** 0.5 <= wanted:
            return x, count
        ap = product(p)
        step = rz / _dot(p, ap)
        x = [a + step * c for a, c in zip(x, p, strict=True)]
        r = [a - step * c for a, c in zip(r, ap, strict=True)]
        z = [t / d for t, d in zip(r, diagonal, strict=True)]
        rz, before = _dot(r, z), rz
        p = [a + rz / before * c for a, c in zip(z, p, strict=True)]
    left = _dot(r, r) ** 0.5 / (wanted / tolerance)
    raise ValueError(
        f"iterations: wanted a residual of {tolerance:g}, got {left:.3g} after {iterations}; more damping, more "
        "iterations or a larger tolerance help"
    )


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return sum((x * y).sum().item() for x, y in zip(a, b, strict=True))


def _dense(pieces: Gradient | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.float64) if pieces is None else pieces.total().double()


def _wide(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, torch.float64 if tensor.is_floating_point() else None)
