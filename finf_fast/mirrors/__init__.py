"""Stage 0, the mirror: from a query to the small change of weights that raises (or lowers) its loss.

One method a file; a new one is a subclass of :class:`finf_fast.mirrors.base.Method` and a line in ``METHODS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from finf_fast import loss as losses
from finf_fast.loss import Loss
from finf_fast.lowrank import squared_norm
from finf_fast.mirrors.adam import Adam
from finf_fast.mirrors.base import Method, Step
from finf_fast.mirrors.body import Body, require_finite, seed_all, stepping
from finf_fast.mirrors.cg import ConjugateGradients
from finf_fast.mirrors.choose import Filter, describe
from finf_fast.mirrors.curvature import Factors
from finf_fast.mirrors.diagonal import AdamWState, FisherDiagonal
from finf_fast.mirrors.kfac import EKFAC, KFAC
from finf_fast.mirrors.query import Query, read, title
from finf_fast.mirrors.released import Released
from finf_fast.mirrors.sgd import SGD
from finf_fast.skeleton import place_of, require_model
from finf_fast.update import Update

__all__ = ["METHODS", "Factors", "mirror", "mirrors_of"]

KINDS = (SGD, Adam, Released, FisherDiagonal, KFAC, EKFAC, ConjugateGradients, AdamWState)
METHODS: dict[str, type[Method]] = {method.name: method for method in KINDS}


def mirror(
    model: nn.Module,
    query: Any,
    *,
    loss: str | Loss | Callable[[Any, Any], Tensor] = "cross_entropy",
    method: str = "sgd",
    lr: float | None = None,
    direction: str = "ascent",
    steps: int = 1,
    params: Filter = None,
    mode: str | None = None,
    name: str = "",
    seed: int | None = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> Update:
    """The mirror step of one query: θ → θ'; Ko et al., CVPR 2024, arXiv 2402.08922.

    The change is computed as a change and never as a difference of weights: a step far below the rounding of θ is kept.
    The model is not modified (weights, buffers, gradients, mode), nor is torch's global random state, whatever happens.
    Weights in half precision are stepped in float32.

    Args:
        model: any ``torch.nn.Module`` with floating-point parameters.
        query: a batch of B rows: a tensor, a tuple ``(x, y)`` or a dict of tensors or arrays with leading dimension B.
            Several rows are one query: the mean of their losses is stepped.
        loss: a name, a :class:`finf_fast.loss.Loss`, or ``(model, batch) -> (B,) losses``.
        method: ``"sgd"``, ``"adam"`` (fresh state), or ``"released"``, the authors' published protocol
            (:class:`finf_fast.mirrors.released.Released`; its score is ``|delta|``); ``"kfac"``, ``"ekfac"``,
            ``"fisher_diag"`` or ``"cg"`` with the ``factors`` of :func:`finf_fast.fit_factors`, or ``"adamw_state"``:
            the gradient times an inverse curvature (:mod:`finf_fast.mirrors.preconditioned`).
        lr: step size; by default 1e-2 for sgd, 5e-3 for adam and released; the last five find their own by ``size``.
        direction: ``"ascent"`` raises the query's loss, ``"descent"`` lowers it.
        steps: gradient steps, at least 1.
        params: which parameters move: a callable ``name -> bool``, or one or several ``fnmatch`` patterns; by default
            all with ``requires_grad``. A parameter that the loss does not depend on gets no entry in the update.
        mode: ``"eval"`` or ``"train"`` (batch statistics, dropout; buffers that moved travel in the update); by default
            ``"eval"``, and ``"train"`` for released.
        name: what reports and errors call this query.
        seed: start of the random draws of train mode and of released; None draws from torch's state as it is.
        device: where to compute; the device of the model's first parameter by default.
        options: of the method: ``weight_decay`` (sgd, adam), ``rank`` (sgd, 32 by default; None for dense changes),
            ``betas`` and ``eps`` (adam), ``tries`` (released); ``size`` and ``rank`` of the last five, ``factors`` and
            ``damping`` of four of them, ``tolerance`` and ``iterations`` (cg), ``state``, ``eps`` and ``damping``
            (adamw_state).

    Returns:
        :class:`Update` with changes in the dtype computed in, dense, but for the linear layers of a single sgd step,
        which are :class:`finf_fast.LowRank` where that pays; its ``record`` says how it was made: settings, the query's
        loss before and after in the mode used, Euclidean norm of the change, and what a compression discarded.

    Raises:
        TypeError: not a module, a leaf of the query that is not numbers, an unknown option.
        ValueError: a setting out of range, a model without parameters, a filter that picks none, a query without rows
            or without the sample dimension, a label or token id out of range, a loss that depends on no parameter.
        NonFiniteLoss: the query's loss, a gradient or the change is NaN or infinite.
    """
    setup = _Setup(model, loss, method, lr, direction, steps, params, mode, seed, device, **options)
    return setup.run([(read(query, title(name)), name)])[0]


def mirrors_of(
    model: nn.Module,
    queries: Any,
    groups: Sequence[Sequence[int]] | Mapping[str, Sequence[int]] | None = None,
    *,
    on_done: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> list[Update]:
    """One mirror step for every row of ``queries``, or for every group of rows, each from the model as it is.

    Args:
        queries: a batch of rows.
        groups: lists of row numbers, or name -> row numbers; a group's loss is the mean of its rows'.
        on_done: called with (queries done, queries in all) after each.
        settings: the keyword arguments of :func:`mirror`, but ``name``. With a ``seed``, query q draws from
            ``seed + q``, which its record tells, so that :func:`mirror` can repeat it alone.

    Returns:
        Q updates, named ``"query 0"``, ... or by their group.

    Raises:
        ValueError: no groups, an empty one, a row number out of range; else as :func:`mirror`.
    """
    setup = _Setup(model, **settings)
    whole = read(queries, "queries")
    named = _groups(groups, whole.rows)
    return setup.run([(whole.pick(rows, title(name)), name) for name, rows in named.items()], on_done)


class _Setup:
    """The settings of a call, checked, and the work they ask for."""

    def __init__(
        self,
        model: nn.Module,
        loss: str | Loss | Callable[[Any, Any], Tensor] = "cross_entropy",
        method: str = "sgd",
        lr: float | None = None,
        direction: str = "ascent",
        steps: int = 1,
        params: Filter = None,
        mode: str | None = None,
        seed: int | None = None,
        device: str | torch.device | None = None,
        **options: Any,
    ):
        require_model(model)
        self._model, self._params = model, params
        self._method = _method(method, lr, direction, steps, options)
        self._loss = losses.resolve(loss)
        self._device = place_of(model, device)
        self._method.accept(self._loss, params)
        self._method = self._method.prepared(model, self._loss, self._device)
        self._mode = self._method.modes[0] if mode is None else mode
        if self._mode not in self._method.modes:
            wanted = " or ".join(map(repr, self._method.modes))
            raise ValueError(f"mode: method={method!r} wants {wanted}, got {mode!r}")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise TypeError(f"seed: wanted a whole number or None, got {seed!r}")
        self._seed = seed

    def run(
        self, queries: Iterable[tuple[Query, str]], on_done: Callable[[int, int], None] | None = None
    ) -> list[Update]:
        """An update for each (query, name), all with one body."""
        queries, updates = list(queries), []
        with stepping(self._device):
            body = Body(self._model, self._loss, self._params, self._mode == "train", self._device)
            there = [query.on(body.device, body.dtype) for query, _ in queries]
            seeds = [None if self._seed is None else self._seed + number for number in range(len(queries))]
            for query in there:
                body.check(query)

            def begin(number: int) -> None:
                body.begin()
                if seeds[number] is not None:
                    seed_all(body.device, seeds[number])

            for step in self._method.steps_in_turn(body, there, begin):
                number = len(updates)
                updates.append(self._update(body, step, there[number], queries[number][1], seeds[number]))
                if on_done is not None:
                    on_done(number + 1, len(queries))
        return updates

    def _update(self, body: Body, step: Step, query: Query, name: str, seed: int | None) -> Update:
        require_finite(step.params, "change", query.who)
        after = body.loss_after(step.params, step.query)
        record = {**self._record(body, query, step), "loss_after": after, "seed": seed}
        return Update(step.params, body.moved(), self._method.direction, name, record)

    def _record(self, body: Body, query: Query, step: Step) -> dict[str, Any]:
        settings = self._method.settings()
        common = {key: settings.pop(key) for key in ("lr", "direction", "steps")}
        squares = sum(map(squared_norm, step.params.values()))
        return {
            "method": self._method.name,
            **{key: value for key, value in common.items() if key not in step.notes},
            "mode": self._mode,
            "options": {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()},
            "params": describe(self._params),
            "loss": self._loss.settings(),
            "rows": query.rows,
            "dtype": str(body.dtype).removeprefix("torch."),
            "model_dtypes": body.own_dtypes,
            "loss_before": step.before,
            "change_norm": squares**0.5,
            **step.notes,
        }


def _method(name: str, lr: float | None, direction: str, steps: int, options: Mapping[str, Any]) -> Method:
    """The method of that name with its settings."""
    if name not in METHODS:
        raise ValueError(f"method: wanted one of {', '.join(METHODS)}, got {name!r}")
    known = [field.name for field in fields(METHODS[name]) if field.name not in ("lr", "direction", "steps")]
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise TypeError(f"method={name!r} takes {', '.join(known)}, got {', '.join(unknown)}")
    given = {} if lr is None else {"lr": lr}
    return METHODS[name](direction=direction, steps=steps, **given, **options)


def _groups(groups: Sequence[Sequence[int]] | Mapping[str, Sequence[int]] | None, rows: int) -> dict[str, list[int]]:
    """Name -> row numbers of every query."""
    if groups is None:
        return {f"query {row}": [row] for row in range(rows)}
    named = groups if isinstance(groups, Mapping) else {f"query {q}": group for q, group in enumerate(groups)}
    if not named:
        raise ValueError("groups: wanted at least one group, got none")
    checked = {}
    for name, group in named.items():
        members = [int(row) for row in group]
        if not members:
            raise ValueError(f"groups: {name!r} wanted at least one row, got none")
        if min(members) < 0 or max(members) >= rows:
            raise ValueError(f"groups: {name!r} wanted rows in [0, {rows}), got {members}")
        checked[str(name)] = members
    return checked
