"""Milliseconds of the faces that are rivals on a GPU, a case a row; written by bench/measured_faces.py."""

from __future__ import annotations

from typing import Any

ROWS: tuple[dict[str, Any], ...] = ()
