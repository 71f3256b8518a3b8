"""The compiled module, where it is there; without it numpy does the work, and what only the module can is left out."""

from __future__ import annotations

import functools
from types import ModuleType

__all__ = ["compiled"]


@functools.cache
def compiled() -> ModuleType | None:
    try:
        from finf_fast import _C
    except ImportError:
        return None
    return _C
