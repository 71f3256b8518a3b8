"""A loss of the user's own: a callable ``(model, batch) -> loss per sample``."""

from __future__ import annotations

import functools
import hashlib
import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor

from finf_fast.loss.base import Draw, Loss, Result, batch_size


class Custom(Loss):
    """Wraps ``function(model, batch) -> (B,)``; its change is the difference of its two values.

    In a manifest it goes by its name and a hash of its code, defaults and the plain values it closes over.

    That difference is only as exact as the callable's own dtype, so a named loss is the better choice where one fits.

    Raises:
        ValueError: the callable returned something else than one loss a sample.
    """

    def __init__(self, function: Callable[[Any, Any], Tensor]):
        self._function = function
        self.code = _code_of(function)
        self.name = (
            f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__name__)}"
        )

    def output(self, model: Any, batch: Any) -> Tensor:
        losses = self._function(model, batch)
        wanted = (batch_size(batch),)
        if not isinstance(losses, Tensor) or tuple(losses.shape) != wanted:
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"loss: wanted the callable to return one loss per sample, shape {wanted}, got {got}")
        return losses

    def finish(self, value: Tensor, change: Tensor, batch: Any) -> Result:
        return Result(value, change)

    def fisher(self, value: Tensor, batch: Any, draw: Draw | None) -> Tensor:
        return value if draw is None else super().fisher(value, batch, draw)

    def judged(self, value: Tensor, batch: Any) -> Tensor:
        return value


def _code_of(function: Any) -> str:
    """Hash of what a function does, as far as its code and plain values tell; its class alone for other objects."""
    parts: list[str] = []
    if isinstance(function, functools.partial):
        parts += [_code_of(function.func), repr(function.args), repr(sorted(function.keywords.items()))]
    elif inspect.isfunction(function) or inspect.ismethod(function):
        parts += [_body_of(function.__code__), repr(function.__defaults__), repr(function.__kwdefaults__)]
        closed = inspect.getclosurevars(function).nonlocals
        parts += [f"{k}={v!r}" for k, v in sorted(closed.items()) if isinstance(v, (bool, int, float, str, tuple))]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()


def _body_of(code: types.CodeType) -> str:
    """Bytecode, names and constants, those of inner functions included."""
    inner = [_body_of(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return repr((code.co_code, code.co_names, inner))
