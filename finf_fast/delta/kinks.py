"""Which steps of a model have a kink or a jump: there a rounding of the values flips a mask, and the change with it.

Told from what the model calls, and with what. A mask that no query's values made, a causal one say, is the same for
all: `where` and `masked_fill` count only by a mask that is carried, and a comparison by the numbers that it compares.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from finf_fast.delta.stack import Carried
from finf_fast.delta.table import name_of, words

__all__ = ["kink"]

Test = Callable[[tuple, dict], bool]

# With a corner or a step in them wherever numbers are carried.
CORNERS = words(
    "relu relu6 leaky_relu prelu rrelu threshold hardtanh hardswish hardsigmoid hardshrink softshrink selu abs "
    "absolute renorm l1_loss hinge_embedding_loss margin_ranking_loss multi_margin_loss multilabel_margin_loss "
    "triplet_margin_loss triplet_margin_with_distance_loss cosine_embedding_loss"
)
STEPS = words(
    "sign sgn signbit copysign heaviside round floor ceil trunc fix frac floor_divide floordiv ifloordiv rfloordiv "
    "remainder fmod mod imod rmod bucketize searchsorted"
)
COMPARISONS = words("gt ge lt le eq ne greater greater_equal less less_equal not_equal isclose")
CHOICES = words(
    "max min amax amin aminmax argmax argmin maximum minimum fmax fmin max_of_two min_of_two cummax cummin topk sort "
    "msort argsort kthvalue median nanmedian mode quantile nanquantile unique unique_consecutive"
)
POOLS = [
    f"{kind}max_pool{n}d{also}"
    for kind in ("", "adaptive_", "fractional_")
    for n in (1, 2, 3)
    for also in ("", "_with_indices")
]
CASTS = words("to type type_as long int short char bool byte")
LAST = 6e4  # about where float16 ends: a bound so far out turns overflows back, and no number that a net computes


def kink(func: Any, args: tuple, kwargs: dict[str, Any]) -> str | None:
    """The name of a call's kink, None where it has none."""
    name = name_of(func).removeprefix("special_").removeprefix("linalg_").strip("_")
    test = TESTS.get(name)
    return name if test is not None and test(args, kwargs) else None


def _numbers(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether numbers are carried. Carried integers came out of a kink that has been noted, or out of an update."""
    return any(isinstance(x, Carried) and x.is_floating_point() for x in tree_leaves((args, kwargs)))


def _masks(args: tuple, kwargs: dict[str, Any]) -> bool:
    return any(isinstance(x, Carried) and x.dtype is torch.bool for x in tree_leaves((args, kwargs)))


def _bounds(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Of a clamp: whether a bound lies where numbers do."""
    bounds = [x for x in (*args[1:], *kwargs.values()) if x is not None]
    near = any(not isinstance(x, (int, float)) or abs(x) < LAST for x in bounds)
    return near and _numbers(args, kwargs)


def _to_integers(args: tuple, kwargs: dict[str, Any]) -> bool:
    if not args or not isinstance(args[0], Carried) or not args[0].is_floating_point():
        return False
    given = [x.dtype if isinstance(x, torch.Tensor) else x for x in (*args[1:], kwargs.get("dtype"))]
    return any(isinstance(x, torch.dtype) and not x.is_floating_point for x in given)


def _cast(name: str) -> Test:
    return _to_integers if name.startswith("t") else _numbers


def _order(place: int, usual: float) -> Test:
    """Of a norm: whether it is a sum of absolute values or the largest of them."""

    def test(args: tuple, kwargs: dict[str, Any]) -> bool:
        order = kwargs.get("p", kwargs.get("ord", args[place] if len(args) > place else usual))
        return order in (0, 1, -1, math.inf, -math.inf) and _numbers(args, kwargs)

    return test


def _given(name: str, place: int, usual: Any, bends: Callable[[Any], bool]) -> Test:
    """Of a function that bends by what it is told."""

    def test(args: tuple, kwargs: dict[str, Any]) -> bool:
        told = kwargs.get(name, args[place] if len(args) > place else usual)
        return bends(told) and _numbers(args, kwargs)

    return test


def _chooses(args: tuple, kwargs: dict[str, Any]) -> bool:
    return any(x in ("amax", "amin") for x in (*args, *kwargs.values()) if isinstance(x, str)) and _numbers(
        args, kwargs
    )


ROUNDED = _given("rounding_mode", 3, None, lambda mode: mode is not None)
TESTS: dict[str, Test] = {
    **dict.fromkeys((*CORNERS, *STEPS, *COMPARISONS, *CHOICES, *POOLS), _numbers),
    **dict.fromkeys(words("where masked_fill masked_select masked_scatter"), _masks),
    **dict.fromkeys(words("clamp clip clamp_min clamp_max"), _bounds),
    **{name: _cast(name) for name in CASTS},
    **dict.fromkeys(words("norm vector_norm normalize"), _order(1, 2)),
    **dict.fromkeys(words("cdist pairwise_distance dist"), _order(2, 2)),
    **dict.fromkeys(words("div divide true_divide"), ROUNDED),
    **dict.fromkeys(words("scatter_reduce index_reduce"), _chooses),
    "elu": _given("alpha", 1, 1.0, lambda alpha: alpha != 1),
    "softplus": _given("threshold", 2, 20.0, lambda threshold: threshold < 20),
    "grid_sample": lambda args, kwargs: isinstance(kwargs.get("grid", (*args, None)[1]), Carried),
}
