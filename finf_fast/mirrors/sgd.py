"""Plain gradient steps: Δ ± lr · g."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from finf_fast.mirrors.base import Method, Rule


@dataclass(frozen=True, kw_only=True)
class SGD(Method):
    """``torch.optim.SGD`` without momentum; ``lr`` 1e-2 by default."""

    name: ClassVar[str] = "sgd"
    lr: float = 1e-2

    def rule(self) -> Rule:
        return _Rule(self.lr)


class _Rule(Rule):
    def __init__(self, lr: float):
        self._lr = lr

    def piece(self, name: str, slope: Tensor) -> Tensor:
        return slope * -self._lr
