"""Scores as a table for pandas or Arrow; both libraries are optional and imported only when asked for."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas
    import pyarrow


def columns(
    indices: np.ndarray, base: np.ndarray, delta: np.ndarray, signs: np.ndarray, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Name and values (S,) of each column, contiguous: a column of sample-major data would be a strided view.

    Args:
        indices, base: (S,).
        delta: (Q,S).
        signs: (Q,) +1 or -1, from delta to influence.
        names: of the queries.
    """
    table = {"index": indices, "base": np.array(base)}
    for name, change, sign in zip(names, delta, signs, strict=True):
        table[f"delta_{name}"] = np.array(change)
        table[f"influence_{name}"] = change * sign
    return table


def to_pandas(table: dict[str, np.ndarray]) -> pandas.DataFrame:
    return needed("pandas", "to_pandas").DataFrame(table)


def to_arrow(table: dict[str, np.ndarray]) -> pyarrow.Table:
    return needed("pyarrow", "to_arrow").table(table)


def needed(module: str, method: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as err:
        raise ImportError(f"Scores.{method} needs {module}: pip install 'finf-fast[frame]'") from err
