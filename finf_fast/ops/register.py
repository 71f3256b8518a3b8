"""How an operation becomes known to torch: schema, one implementation for every device, and its fake.

``torch.library.custom_op`` would do the same, but guards each call against torch.compile, and the guard's first use
imports the whole compiler: 1.7 s of a sweep's start (torch 2.13). These operations hold nothing that a compiler could
trip over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["on_its_device", "register"]

_LIBRARY = torch.library.Library("finf_fast", "DEF")


def register(name: str, schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Decorator: the function becomes ``torch.ops.finf_fast.<name>`` and the operation is returned in its place.

    Args:
        name: of the operation.
        schema: argument and result types as torch writes them; mutated arguments are marked ``(a!)``.
        fake: same arguments; checks shapes and allocates the results without computing them.
    """

    def decorate(function: Callable) -> Callable:
        _LIBRARY.define(name + schema)
        _LIBRARY.impl(name, on_its_device(_without_graph(function)), "CompositeExplicitAutograd")
        torch.library.register_fake(f"finf_fast::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.finf_fast, name).default

    return decorate


def on_its_device(function: Callable) -> Callable:
    """`function` with the device of its first argument, a tensor, as the current one.

    Triton launches on the current device, whatever device its pointers are of.
    """

    def run(x: Tensor, *more: Any) -> Any:
        if x.device.type != "cuda":
            return function(x, *more)
        with torch.cuda.device(x.device):
            return function(x, *more)

    return run


def _without_graph(function: Callable) -> Callable:
    """No operation here has a derivative; a parameter among the inputs must not start a graph through its insides.

    torch.no_grad as a decorator costs 2 microseconds a call, in a sweep mostly for nothing.
    """

    def run(*inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*inputs)
        with torch.no_grad():
            return function(*inputs)

    return run
