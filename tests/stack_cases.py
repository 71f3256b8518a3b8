"""Stacks of (value, exact changes) for the tests, and what the operations on them are held to.

Truth is the difference of the function after and before in numpy's long double, written down literally by each test,
from exactly the numbers that the operation got.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

LONG = np.longdouble
SIZES = (10.0, 1.0, 1e-1, 1e-3, 1e-6, 1e-9)

# Relative error of a query's change, ||e|| / ||true||, arithmetic and the rounding of the result together.
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def draw(*shape: int, size: float = 1.0, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Normal numbers of this size."""
    generator = torch.Generator().manual_seed(seed)
    return (size * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def make_stack(Q: int, *shape: int, size: float, dtype: torch.dtype, seed: int = 0, base: float = 1.0) -> Tensor:
    """(1+Q, *shape): values of width `base`, changes of width `size`."""
    h = draw(1, *shape, size=base, dtype=dtype, seed=seed)
    return torch.cat([h, draw(Q, *shape, size=size, dtype=dtype, seed=seed + 1000)])


def sizes(dtype: torch.dtype) -> tuple[float, ...]:
    """The sizes of change that a dtype can hold: float16 ends at 6e-8."""
    return tuple(s for s in SIZES if dtype != torch.float16 or s > 1e-2)


def exact(x: Tensor) -> np.ndarray:
    return x.detach().double().numpy().astype(LONG)


def at(stack: Tensor, q: int | None) -> np.ndarray:
    """The value of a stack before (None) or after query q's change; one of leading size 1 does not change."""
    base = exact(stack[0])
    return base if q is None or len(stack) == 1 else base + exact(stack[1 + q])


def moved(param: Tensor | None, change: Tensor | None, q: int | None) -> np.ndarray | None:
    """A parameter before or after its change."""
    if param is None or change is None or q is None:
        return None if param is None else exact(param)
    return exact(param) + exact(change[q])


def relative(got: Tensor, true: np.ndarray) -> float:
    e = np.sqrt(((exact(got) - true) ** 2).sum())
    return float(e / max(np.sqrt((true**2).sum()), LONG(1e-300)))


def check(
    out: Tensor,
    f: Callable[[int | None], np.ndarray],
    Q: int,
    dtype: torch.dtype,
    size: float = 1.0,
    slack: float = 1.0,
) -> None:
    """Assert that a stack of results is f before, and f after less f before for each query; f takes a query or None.

    `size` is that of the changes beside the values. `slack` multiplies the bound; who gives it says why.
    """
    before = f(None)
    assert out.dtype == dtype and out.shape == (1 + Q, *before.shape), f"{out.dtype}, {tuple(out.shape)}"
    assert relative(out[0], before) <= BOUNDS[dtype], f"base: relative error {relative(out[0], before):.1e}"
    # What truth itself, a difference in 64 bits of mantissa, may be off by.
    bound = slack * BOUNDS[dtype] + 64 * float(np.finfo(LONG).eps) / size
    for q in range(Q):
        error = relative(out[1 + q], f(q) - before)
        assert error <= bound, f"query {q}: relative error {error:.1e}, bound {bound:.1e}"


def with_threads(f: Callable[[], Tensor]) -> list[Tensor]:
    """What f gives on 1, 2, 3 and 7 threads."""
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(f())
    finally:
        torch.set_num_threads(threads)
    return found


def same_bits(found: Sequence[Tensor]) -> bool:
    """Whether all are the same to the bit, NaN included."""
    return all(torch.equal(found[0].view(torch.uint8), x.view(torch.uint8)) for x in found[1:])


def apart(x: Tensor) -> Tensor:
    """The same numbers with gaps between them and the dimensions stored in reverse."""
    order = list(range(x.dim()))[::-1]
    wide = x.permute(order).contiguous().repeat_interleave(2, -1)
    return wide[..., ::2].permute(order)
