"""Stage 4, the model: one forward that carries (value, exact finite change) through every layer, for all queries."""

from __future__ import annotations

from finf_fast.delta.engine import DeltaEngine
from finf_fast.delta.stack import NotCarried, Stack

__all__ = ["DeltaEngine", "NotCarried", "Stack"]
