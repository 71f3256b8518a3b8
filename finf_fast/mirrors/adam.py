"""Adam from a fresh state: the first step is lr · sign(g) wherever the gradient is well above eps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from finf_fast.mirrors.base import Rule, Walking, require_number


@dataclass(frozen=True, kw_only=True)
class Adam(Walking):
    """``torch.optim.Adam`` with its defaults but ``lr``, 5e-3 as in the method's own release.

    Kingma & Ba, "Adam", ICLR 2015, algorithm 1, bias-corrected.

    Args:
        betas: decay of the running means of the gradient and of its square, each in [0, 1).
        eps: added to the root of the second.
    """

    name: ClassVar[str] = "adam"
    lr: float = 5e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self):
        super().__post_init__()
        pair = isinstance(self.betas, (tuple, list)) and len(self.betas) == 2
        if not pair or not all(isinstance(beta, (int, float)) and 0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas: wanted two numbers in [0, 1), got {self.betas!r}")
        require_number("eps", self.eps)

    def rule(self) -> Rule:
        return _Rule(self)


class _Rule(Rule):
    def __init__(self, settings: Adam):
        self._settings = settings
        self._state: dict[str, tuple[int, Tensor, Tensor]] = {}

    def piece(self, name: str, slope: Tensor) -> Tensor:
        (beta1, beta2), settings = self._settings.betas, self._settings
        t, m, v = self._state.get(name) or (0, torch.zeros_like(slope), torch.zeros_like(slope))
        t, m, v = t + 1, torch.lerp(m, slope, 1 - beta1), beta2 * v + (1 - beta2) * slope.square()
        self._state[name] = t, m, v
        root = v.sqrt() / math.sqrt(1 - beta2**t) + settings.eps
        return m / root * (-settings.lr / (1 - beta1**t))
