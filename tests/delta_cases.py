"""Cases for the rules of the delta engine: what a function is given, and float64 truth of what it must give.

A case is a function of torch as a model would write it, and one description for each of its arguments. The function is
called on carried tensors, on their logical tensors for the dtype and shape it must have, and on each row's float64
values for the numbers: row 0 is f(h), row q is f(h + d_q) - f(h).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_flatten

from finf_fast.delta.stack import Carried, Changed, Group, Stack
from stack_cases import apart

Q = 3
# Relative error of a query's change; bfloat16 has 2^-9 a rounding and a rule may round a few times.
BOUNDS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2}
NOISE = 8 * torch.finfo(torch.float64).eps  # of truth itself, which is a difference of float64's

TINY = 64 * torch.finfo(torch.float32).tiny  # below it float32 has no digits left


@dataclass(frozen=True)
class World:
    """What one run of a case is drawn from."""

    dtype: torch.dtype = torch.float64
    size: float = 0.1  # of the changes beside the values
    scale: float = 1.0  # of the values
    kind: str = "random"  # or "zero" changes, "ties" among the values, "some" queries unchanged
    strided: bool = False
    seed: int = 0


WORLDS = st.builds(
    World,
    dtype=st.sampled_from(list(BOUNDS)),
    size=st.sampled_from([1.0, 1e-1, 1e-3, 1e-6, 1e-9]),
    scale=st.sampled_from([1.0, 1e-3, 1e4]),
    kind=st.sampled_from(["random", "random", "zero", "ties", "some"]),
    strided=st.booleans(),
    seed=st.integers(0, 99),
)


@dataclass(frozen=True)
class Argument:
    """One argument of a run: ``carried`` and ``logical`` make a new one each time, ``rows`` are its float64 values."""

    carried: Callable[[], Any]
    logical: Callable[[], Any]
    rows: list[Any]


class Spec:
    """Describes an argument; ``make`` draws it."""

    def make(self, world: World, draw: torch.Generator) -> Argument:
        raise NotImplementedError


@dataclass(frozen=True)
class S(Spec):
    """A stack of numbers. ``near`` shifts the values, which stay within half of it; ``tame`` is the width they keep."""

    shape: tuple[int, ...]
    near: float = 0.0
    tame: float = 0.0
    dtype: torch.dtype | None = None

    def numbers(self, world: World, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """float64 values (\\*shape) and changes (Q, \\*shape)."""
        base, change = (torch.randn((*n, *self.shape), generator=draw, dtype=torch.float64) for n in ((), (Q,)))
        scale = self.tame or (1.0 if self.near else world.scale)
        if world.kind == "ties":
            base, change = base.round().clamp(-1, 1), change.round().clamp(-1, 1)
        if self.near:
            base, change = self.near * (1 + 0.4 * base.tanh()), 0.3 * self.near * change.tanh()
        base, change = scale * base, scale * world.size * change
        if world.kind in ("zero", "some"):
            change[: 1 if world.kind == "some" else Q] = 0
        return base, change

    def make(self, world: World, draw: torch.Generator) -> Argument:
        base, change = self.numbers(world, draw)
        stacked = torch.cat([base[None], change]).to(self.dtype or world.dtype)
        return of_stack(stacked, world.strided)


def of_stack(stacked: Tensor, strided: bool = False) -> Argument:
    """The argument of a stacked tensor of numbers or of integers."""
    wide = stacked.double() if stacked.is_floating_point() else stacked
    rows = [wide[0], *(_after(wide[0], d) if stacked.is_floating_point() else d for d in wide[1:])]

    def build() -> Tensor:
        return apart(stacked) if strided and stacked.dim() > 1 else stacked.clone()

    return Argument(lambda: Stack(build()), lambda: build()[0], rows)


def _after(h: Tensor, d: Tensor) -> Tensor:
    return torch.where(d == 0, h, h + d)  # an infinite value without a change stays what it is


@dataclass(frozen=True)
class P(S):
    """A plain tensor of numbers."""

    def make(self, world: World, draw: torch.Generator) -> Argument:
        x = self.numbers(world, draw)[0].to(self.dtype or world.dtype)
        return Argument(x.clone, x.clone, [x.double()] * (1 + Q))


@dataclass(frozen=True)
class C(S):
    """A changed parameter, ``form`` dense, low (rank), or mixed with one query that leaves it as it is."""

    form: str = "dense"

    def make(self, world: World, draw: torch.Generator) -> Argument:
        base, change = self.numbers(world, draw)
        base, change = base.to(world.dtype), change.to(world.dtype)
        rank = 2
        sizes = self.shape[0], math.prod(self.shape[1:])
        u, v = (torch.randn(Q, n, rank, generator=draw, dtype=torch.float64) for n in sizes)
        u, v = (world.size * (self.tame or 1.0) * u).to(world.dtype), v.to(world.dtype)
        groups = {
            "dense": [Group(tuple(range(Q)), change)],
            "low": [Group(tuple(range(Q)), None, u, v)],
            "mixed": [Group((2,), change[:1]), Group((0,), None, u[:1], v[:1])],
        }[self.form]
        rows = [base.double()] * (1 + Q)
        for group in groups:
            for q, d in zip(group.queries, group.to_kind(torch.float64).full(base.double()), strict=True):
                rows[1 + q] = base.double() + d
        return Argument(lambda: Changed(base.clone(), groups, Q), base.clone, rows)


@dataclass(frozen=True)
class I(Spec):  # noqa: E742
    """Plain integers below ``high``."""

    shape: tuple[int, ...]
    high: int

    def make(self, world: World, draw: torch.Generator) -> Argument:
        x = torch.randint(self.high, self.shape, generator=draw)
        return Argument(x.clone, x.clone, [x] * (1 + Q))


@dataclass(frozen=True)
class IS(I):
    """Integers that differ between base and queries."""

    def make(self, world: World, draw: torch.Generator) -> Argument:
        x = torch.randint(self.high, (1 + Q, *self.shape), generator=draw)
        return of_stack(x, world.strided)


@dataclass(frozen=True)
class B(Spec):
    """A plain mask."""

    shape: tuple[int, ...]

    def make(self, world: World, draw: torch.Generator) -> Argument:
        x = torch.rand(self.shape, generator=draw) < 0.5
        return Argument(x.clone, x.clone, [x] * (1 + Q))


@dataclass(frozen=True)
class BS(B):
    """A mask that differs between base and queries."""

    def make(self, world: World, draw: torch.Generator) -> Argument:
        return of_stack(torch.rand((1 + Q, *self.shape), generator=draw) < 0.5, world.strided)


@dataclass(frozen=True)
class Case:
    """``f`` on arguments of these descriptions.

    ``slack`` multiplies the bound; who gives it says why. What ``sums`` values that may cancel is also allowed the
    rounding of those.
    """

    name: str
    f: Callable[..., Any]
    specs: tuple[Spec, ...]
    slack: float = 1.0
    sums: bool = False

    def arguments(self, world: World) -> list[Argument]:
        draw = torch.Generator().manual_seed(world.seed)
        return [spec.make(world, draw) for spec in self.specs]

    def check(self, world: World) -> None:
        check(self.f, self.arguments(world), world.dtype, self.slack, self.sums)


def case(name: str, f: Callable[..., Any], *specs: Spec, slack: float = 1.0, sums: bool = False) -> Case:
    return Case(name, f, specs, slack, sums)


def check(
    f: Callable[..., Any], arguments: list[Argument], dtype: torch.dtype, slack: float = 1.0, sums: bool = False
) -> None:
    """Assert that f of what is carried is float64 truth, in the dtype and shape that f gives the logical tensors."""
    got = tree_flatten(f(*(x.carried() for x in arguments)))[0]
    like = tree_flatten(f(*(x.logical() for x in arguments)))[0]
    truth = [tree_flatten(_true(f, [x.rows[j] for x in arguments]))[0] for j in range(1 + Q)]
    assert len(got) == len(like)
    noise = NOISE * max((size_of(x.rows[0]) for x in arguments), default=0.0)
    if sums:
        noise += (
            16 * torch.finfo(dtype).eps * max(size_of(row * 1.0 - x.rows[0] * 1.0) for x in arguments for row in x.rows)
        )
    base = 16 * torch.finfo(dtype).eps * max(size_of(x.rows[0]) for x in arguments) if sums else 0.0
    for one, alike, *rows in zip(got, like, *truth, strict=True):
        compare(one, alike, rows, slack * BOUNDS[dtype], noise, base)


def _true(f: Callable[..., Any], row: list[Any]) -> Any:
    """f of one row, with what it makes of integers in float64 as well."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return f(*(x.clone() if isinstance(x, Tensor) else x for x in row))
    finally:
        torch.set_default_dtype(usual)


def compare(got: Any, like: Any, rows: list[Any], bound: float, noise: float, base: float = 0.0) -> None:
    """One result against its rows of truth."""
    if not isinstance(like, Tensor):
        assert got == like and type(got) is type(like), f"{got!r}, wanted {like!r}"
        return
    assert got.dtype == like.dtype and got.shape == like.shape, f"{got.dtype} {tuple(got.shape)}, wanted {like}"
    stacked = got.stacked if isinstance(got, Carried) else _constant(got)
    bound = max(bound, BOUNDS.get(like.dtype, 0.0))  # integers become numbers of the default type
    assert stacked.dtype == like.dtype and stacked.shape == (1 + Q, *like.shape), tuple(stacked.shape)
    if not stacked.is_floating_point():
        assert all(torch.equal(one, row.to(one.dtype)) for one, row in zip(stacked, rows, strict=True))
        return
    # Of gelu far out torch's own float64 keeps no digit and says 0, where there is still 1e-22.
    near(stacked[0], rows[0], bound, base or (0.0 if rows[0].any() else 1e-16), "base")
    for q in range(Q):
        true = torch.where(rows[1 + q] == rows[0], 0.0, rows[1 + q] - rows[0])
        # Two factors that move so that their product stays leave the rounding of the terms, 1e-6 in the smallest world.
        still = 0.0 if true.any() else torch.finfo(like.dtype).eps * max(1e-6, 4 * size_of(rows[0]))
        near(stacked[1 + q], true, bound, noise + still + NOISE * size_of(rows[0]), f"query {q}")


def _constant(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        return x.expand(1 + Q, *x.shape)
    return torch.cat([x[None], x.new_zeros(Q, *x.shape)])


def size_of(x: Tensor) -> float:
    return float(x[torch.isfinite(x)].double().norm())


def near(got: Tensor, true: Tensor, bound: float, noise: float, what: str) -> None:
    """Relative to the norm of the whole; what is infinite or no number must be just that."""
    got, true = got.double(), true.double()
    odd = ~torch.isfinite(true)
    assert torch.equal(got[odd].nan_to_num(7.0), true[odd].nan_to_num(7.0)), f"{what}: {got[odd]}, wanted {true[odd]}"
    error, whole = float((got - true)[~odd].norm()), size_of(true)
    assert error <= bound * whole + noise + TINY, f"{what}: error {error:.2e} of {whole:.2e}"


def moves(f: Callable[..., Any], arguments: list[Argument]) -> None:
    """Assert that f moves numbers and touches none: each row of the result is f of that row, bit by bit."""
    parts = [x.carried() for x in arguments]
    got, like = (tree_flatten(f(*xs))[0] for xs in (parts, [x.logical() for x in arguments]))
    for j in range(1 + Q):
        rows = [_row(x.carried(), j) for x in arguments]
        for one, alike, row in zip(got, like, tree_flatten(f(*rows))[0], strict=True):
            assert one.shape == alike.shape and one.dtype == alike.dtype, f"{one}, wanted {tuple(alike.shape)}"
            assert torch.equal(one.stacked[j], row)


def _row(x: Any, j: int) -> Any:
    if isinstance(x, Carried):
        return x.stacked[j].clone()
    return torch.zeros_like(x) if isinstance(x, Tensor) and x.is_floating_point() and j else x
