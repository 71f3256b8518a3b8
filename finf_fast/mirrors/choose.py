"""Which parameters a mirror step may move: all that train, or those a filter picks by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

from torch import Tensor, nn

Filter = Callable[[str], bool] | str | Iterable[str] | None

SHOWN = 5  # names in an error: enough to recognise the naming scheme, short enough to read


def choose(model: nn.Module, params: Filter) -> list[str]:
    """Names of the floating-point parameters to step, as in ``model.named_parameters()``.

    Args:
        params: None for every parameter with ``requires_grad``; a callable ``name -> bool``, or one or several patterns
            as in ``fnmatch`` (``"*.weight"``), which also pick frozen parameters.

    Raises:
        ValueError: the model has no floating-point parameter; all are frozen and no filter was given; a filter or one
            of its patterns picks none.
        TypeError: ``params`` is none of the above.
    """
    floating = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    if not floating:
        raise ValueError("model: wanted at least one floating-point parameter, got a model without any")
    if params is None:
        return _training(floating)
    if callable(params):
        names = [name for name in floating if params(name)]
        if not names:
            raise ValueError(f"params: the filter picks none of the model's parameters {_some(floating)}")
        return names
    return _matching(floating, _patterns(params))


def describe(params: Filter) -> str | list[str]:
    """What the filter was, for the record."""
    if params is None:
        return "requires_grad"
    if callable(params):
        return f"{getattr(params, '__module__', '?')}.{getattr(params, '__qualname__', type(params).__name__)}"
    return list(_patterns(params))


def _training(floating: Mapping[str, Tensor]) -> list[str]:
    names = [name for name, p in floating.items() if p.requires_grad]
    if not names:
        raise ValueError(
            "params: every parameter of the model is frozen (requires_grad=False); params='*' steps them all the same"
        )
    return names


def _patterns(params: str | Iterable[str]) -> tuple[str, ...]:
    if isinstance(params, str):
        return (params,)
    patterns = tuple(params) if isinstance(params, Iterable) else ()
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"params: wanted a callable name -> bool, a pattern or several of them, got {params!r}")
    return patterns


def _matching(floating: Mapping[str, Tensor], patterns: tuple[str, ...]) -> list[str]:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in floating):
            raise ValueError(f"params: {pattern!r} matches none of the model's parameters {_some(floating)}")
    return [name for name in floating if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _some(floating: Mapping[str, Tensor]) -> str:
    names = list(floating)
    more = f", ... ({len(names)} in all)" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more
