"""What has no rule: f after minus f before, in float64, and a note in the record. Never in silence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from finf_fast.delta.arithmetic import kind_of
from finf_fast.delta.integers import collapse
from finf_fast.delta.stack import Carried, NotCarried, Stack, values_of
from finf_fast.delta.table import assign, current, name_of, otherwise


@otherwise
def generic(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs ``func`` once for the base and once a query, on float64 values, and subtracts.

    float32 would be 8 % wrong at a change of 1e-6 (design section 2); float64 holds 1e-9 to seven digits.

    Raises:
        NotCarried: ``func`` cannot run on such values, or gives something else than tensors.
    """
    name = name_of(func)
    flat, _ = tree_flatten((args, kwargs))
    carried = [x for x in flat if isinstance(x, Carried)]
    if _writes(func, name):
        raise NotCarried(f"{name} writes into a changed tensor and has no rule")
    values = {id(x): values_of(x) for x in carried}
    count = len(next(iter(values.values())))
    numbers = [x for x in flat if isinstance(x, Tensor) and x.is_floating_point()]
    kind = kwargs.get("dtype") or (kind_of(*numbers) if numbers else torch.get_default_dtype())

    def row(j: int) -> Any:
        def at(x: Any) -> Any:
            if isinstance(x, Carried):
                return values[id(x)][j]
            return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

        return func(*tree_map(at, args), **tree_map(at, kwargs))

    drawn = _random_state(carried[0].device)
    try:
        found = [row(j) for j in range(count)]
        outs = [tree_flatten(one) for one in found]
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise NotCarried(f"{name} has no rule and does not run on float64 values: {error}") from error
    if not torch.equal(drawn, _random_state(carried[0].device)):
        raise NotCarried(f"{name} draws random numbers from a changed tensor")
    if found[0] is None:
        raise NotCarried(f"{name} returns nothing, so it works by a side effect, and has no rule")
    if not kwargs.get("inplace"):
        _require_fresh(name, outs, flat, values)
    current().generic[name] = current().generic.get(name, 0) + 1
    leaves = [_joined(name, rows, kind) for rows in zip(*(out[0] for out in outs), strict=True)]
    found = tree_unflatten(leaves, outs[0][1])
    return assign(args[0], found) if kwargs.get("inplace") else found


def _writes(func: Any, name: str) -> bool:
    """Whether a function may write into what it is given, by its name or by its schema."""
    packet = func.overloads() if hasattr(func, "overloads") else ()
    schemas = [getattr(each, "_schema", None) for each in (func, *(getattr(func, one) for one in packet))]
    plain = name.partition(".")[0]
    return (
        name.endswith("__set__")
        or (plain.endswith("_") and not plain.endswith("__"))
        or any(schema is not None and schema.is_mutable for schema in schemas)
    )


def _require_fresh(name: str, outs: list, inputs: list, values: dict[int, Any]) -> None:
    """A view of its input is a copy here, and what the model then writes into it would be lost."""
    own = {v.untyped_storage().data_ptr() for v in values.values()}
    own |= {x.untyped_storage().data_ptr() for x in inputs if isinstance(x, Tensor) and not isinstance(x, Carried)}
    leaves = [leaf for flat, _ in outs for leaf in flat if isinstance(leaf, Tensor) and leaf.numel()]
    if any(leaf.untyped_storage().data_ptr() in own for leaf in leaves):
        raise NotCarried(f"{name} gives a view of a changed tensor and has no rule")


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _joined(name: str, rows: tuple[Any, ...], kind: torch.dtype) -> Any:
    """One leaf of the results of base and queries, as a stack."""
    first = rows[0]
    if not isinstance(first, Tensor):
        if any(row != first for row in rows[1:]):
            raise NotCarried(f"{name} gives {first!r} for the base and something else for a query")
        return first
    if any(row.shape != first.shape for row in rows[1:]):
        raise NotCarried(f"{name} gives shapes that depend on values")
    stacked = torch.stack(rows)
    if stacked.is_complex():
        raise NotCarried(f"{name} gives complex numbers")
    if not stacked.is_floating_point():
        return collapse(stacked)
    stacked[1:] = torch.where(stacked[1:] == stacked[:1], 0, stacked[1:] - stacked[:1])  # inf stays inf
    return Stack(stacked.to(kind if first.dtype is torch.float64 else first.dtype))
