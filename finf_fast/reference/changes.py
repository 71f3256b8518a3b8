"""How far a function of one number moves when its argument does: f(h + d) - f(h), to the change's last digits.

Every nonlinearity of the line goes through this page. Each ``<f>_change(h, d)`` takes the value h and its finite change
d, tensors of float32 or float64 that broadcast against each other, and gives the change of f in a form that does not
cancel: right for a d of 1e-9 as for one of 10, far out in the tails too, and exactly 0 where d is 0. What depends on h
alone is computed in h's own shape, so that all queries of a stack share it. Changes are finite numbers; a value may be
-inf or inf where f has a limit there.

On a CPU some forms first look how large the changes are and take a shorter way when all are small; other devices are
never asked, since looking would stop them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "CHANGES",
    "VALUES",
    "abs_change",
    "clamp_change",
    "cos_change",
    "elu_change",
    "erf_change",
    "exp_change",
    "expm1_change",
    "gelu_change",
    "gelu_tanh_change",
    "hardtanh_change",
    "leaky_relu_change",
    "log1p_change",
    "log_change",
    "pow_change",
    "quick_gelu",
    "quick_gelu_change",
    "reciprocal_change",
    "relu_change",
    "rsqrt_change",
    "sigmoid_change",
    "silu_change",
    "sin_change",
    "softplus_change",
    "sqrt_change",
    "square_change",
    "tanh_change",
]

# Hendrycks & Gimpel, arXiv 1606.08415: gelu(x) is about x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)) or
# x sigmoid(1.702 x).
_TANH_SLOPE = 2 * math.sqrt(2 / math.pi)
_TANH_CUBIC = 0.044715 * _TANH_SLOPE
_QUICK_SLOPE = 1.702
_ROOT_HALF = math.sqrt(0.5)


def _largest(x: Tensor) -> float:
    """The largest |x|, NaN if there is one; inf where looking would stop the device or a compiler."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return math.inf
    if not x.numel():
        return 0.0
    low, high = torch.aminmax(x)
    return float(torch.maximum(-low, high))


def _still(change: Tensor, d: Tensor) -> Tensor:
    """0 wherever nothing moved, also where f is infinite."""
    return change.masked_fill(d == 0, 0)


def _mended(near: Tensor, size: Tensor, limit: float, largest: float, far: Callable, *args: Tensor) -> Tensor:
    """`near`, with far(*args) in its place where size > limit; one by one where they are known to be few."""
    if largest <= limit:
        return near
    where = (size > limit).expand_as(near)
    # Picking numbers out one by one costs as much as 8 times as many in their order.
    if math.isinf(largest) or 8 * int(where.sum()) > near.numel():
        return torch.where(where, far(*args), near)
    picked = where.nonzero(as_tuple=True)
    near[picked] = far(*(x.expand_as(near)[picked] for x in args))
    return near


# Piecewise linear functions.
def relu_change(h: Tensor, d: Tensor) -> Tensor:
    """max(x, 0): d above the corner, what sticks out of it below."""
    return torch.maximum(d + h.clamp(max=0), -h.clamp(min=0))


def clamp_change(h: Tensor, d: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """min(max(x, low), high); None leaves a side open. As in torch, `high` holds where low > high."""
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    at = h.clamp(low, high)
    moved = (h - at) + d
    return torch.minimum(torch.maximum(moved, low - at), high - at)


def hardtanh_change(h: Tensor, d: Tensor, low: float = -1.0, high: float = 1.0) -> Tensor:
    """min(max(x, low), high)."""
    return clamp_change(h, d, low, high)


def leaky_relu_change(h: Tensor, d: Tensor, slope: float = 0.01) -> Tensor:
    """x above 0, slope * x below: what moves above the corner and what moves below it, each without rounding twice."""
    above = relu_change(h, d)
    return above + slope * (d - above)


def abs_change(h: Tensor, d: Tensor) -> Tensor:
    """|x|."""
    return leaky_relu_change(h, d, -1.0)


# Powers.
def square_change(h: Tensor, d: Tensor) -> Tensor:
    """x^2."""
    return d * torch.add(d, h, alpha=2)


def sqrt_change(h: Tensor, d: Tensor) -> Tensor:
    """The difference of squares, solved for the roots."""
    return _still(d / (h.sqrt() + (h + d).sqrt()), d)


def rsqrt_change(h: Tensor, d: Tensor) -> Tensor:
    """1 / sqrt(x): -d / ((s0 + s1) s0 s1), divided one by one so that no product leaves the range."""
    s0, s1 = h.sqrt(), (h + d).sqrt()
    return _still(-d / (s0 + s1) / s0 / s1, d)


def reciprocal_change(h: Tensor, d: Tensor) -> Tensor:
    """1 / x. Divided by the changed value first: d is never much larger than it unless the result is as large."""
    return _still(-d / (h + d) / h, d)


def pow_change(h: Tensor, d: Tensor, exponent: float) -> Tensor:
    """x^exponent. Whole exponents by products alone, halves by roots, others by expm1 of the logarithm's change."""
    if exponent == int(exponent):
        return _whole_power_change(h, d, int(exponent))
    if exponent in (0.5, -0.5):
        return sqrt_change(h, d) if exponent > 0 else rsqrt_change(h, d)
    before = h.pow(exponent)
    x = exponent * log_change(h, d)
    near = (h > 0) & (x.abs() <= 1)  # past a factor of e the plain difference loses nothing
    return _still(torch.where(near, before * torch.expm1(x), (h + d).pow(exponent) - before), d)


def _whole_power_change(h: Tensor, d: Tensor, n: int) -> Tensor:
    """x^n by binary powering: a square moves by D (2p + D), one factor more by the product rule."""
    if n < 0:
        return _whole_power_change(1 / h, reciprocal_change(h, d), -n)
    if n < 2:
        return n * d + torch.zeros_like(h)
    if n % 2:
        return _whole_power_change(h, d, n - 1) * (h + d) + h ** (n - 1) * d
    return square_change(h ** (n // 2), _whole_power_change(h, d, n // 2))


# Exponentials and logarithms.
def exp_change(h: Tensor, d: Tensor) -> Tensor:
    """e^h expm1(d); past d = 1 the plain difference, which loses nothing there and cannot meet 0 * inf."""
    before = h.exp()
    if _largest(d) <= 1:
        return _still(before * torch.expm1(d), d)
    return _still(torch.where(d > 1, (h + d).exp() - before, before * torch.expm1(d.clamp(max=1))), d)


def expm1_change(h: Tensor, d: Tensor) -> Tensor:
    """e^x - 1 moves as e^x does."""
    return exp_change(h, d)


def log_change(h: Tensor, d: Tensor) -> Tensor:
    """log1p(d / h) up to half the value, then the logarithm of the ratio, or two where the ratio leaves the range."""
    r, ratio = d / h, (h + d) / h
    known = torch.finfo(ratio.dtype)
    inside = (ratio > known.tiny) & (ratio < known.max)
    far = torch.where(inside, ratio.log(), (h + d).log() - h.log())
    return _still(torch.where(r.abs() <= 0.5, torch.log1p(r), far), d)


def log1p_change(h: Tensor, d: Tensor) -> Tensor:
    """log(1 + x); the sum 1 + h is exact where it is small."""
    return log_change(1 + h, d)


def softplus_change(h: Tensor, d: Tensor, beta: float = 1.0) -> Tensor:
    """log(1 + e^(beta x)) / beta.

    torch's version turns into x past beta x = 20, a step of 2e-9 that is not followed here.
    """
    y, dy = beta * h, beta * d
    y1, m = y + dy, dy.abs()
    low, high, shrunk = torch.minimum(y, y1), torch.maximum(y, y1), torch.expm1(-m)
    # log((1 + e^high) / (1 + e^low)) with the ratio or its inverse around 1, while neither falls below a half: then the
    # way crosses 0 and is long, and the plain difference loses nothing.
    falls, rises = torch.sigmoid(high) * shrunk, torch.sigmoid(-low) * shrunk
    far = torch.where(rises >= -0.5, m + torch.log1p(rises), F.logsigmoid(-low) - F.logsigmoid(-high))
    size = torch.where(falls >= -0.5, -torch.log1p(falls), far) / beta
    return torch.where(d < 0, -size, size)


# Sigmoids. S is sigmoid(y) before the change and N = sigmoid(-y) what is missing to 1, in its own digits.
def _near_step(S: Tensor, N: Tensor, dy: Tensor) -> Tensor:
    """sigmoid(y + dy) - S = S N E / (1 + S E), E = expm1(dy): up to |dy| = 1 the denominator does not cancel."""
    E = torch.expm1(dy)
    return (N * E).div_(S.reciprocal() + E)


def _step(S: Tensor, N: Tensor, y1: Tensor, dy: Tensor) -> Tensor:
    """sigmoid(y1) - S = expm1(dy) S sigmoid(-y1), mirrored where dy > 0 so that the exponential stays below 1."""
    up = dy > 0
    E = torch.expm1(-dy.abs())
    return torch.where(up, -N, S).mul_(E).mul_(torch.sigmoid(torch.where(up, y1, -y1)))


def sigmoid_change(h: Tensor, d: Tensor) -> Tensor:
    """1 / (1 + e^-x)."""
    S, N = torch.sigmoid(h), torch.sigmoid(-h)
    return _mended(_near_step(S, N, d), d.abs(), 1, _largest(d), _far_sigmoid, h, d)


def _far_sigmoid(h: Tensor, d: Tensor) -> Tensor:
    return _step(torch.sigmoid(h), torch.sigmoid(-h), h + d, d)


def tanh_change(h: Tensor, d: Tensor) -> Tensor:
    """tanh(x) = 2 sigmoid(2x) - 1, so sinh(d) sech(h) sech(h + d) without its overflows."""
    return sigmoid_change(2 * h, 2 * d).mul_(2)


def _gate_change(h: Tensor, d: Tensor, h1: Tensor, dy: Tensor, gate: Callable[[Tensor], Tensor]) -> Tensor:
    """x sigmoid(y), y = gate(x), by the product rule."""

    def far(h: Tensor, d: Tensor, dy: Tensor) -> Tensor:
        h1, y = h + d, gate(h)
        y1, S = gate(h1), torch.sigmoid(y)
        by_product = torch.addcmul(_step(S, torch.sigmoid(-y), y1, dy).mul_(h1), d, S)
        return _far_difference(h * S, h1 * torch.sigmoid(y1), d * S, by_product)

    y = gate(h)
    S = torch.sigmoid(y)
    near = torch.addcmul(_near_step(S, torch.sigmoid(-y), dy).mul_(h1), d, S)
    return _mended(near, dy.abs(), 1, _largest(dy), far, h, d, dy)


def _far_difference(before: Tensor, after: Tensor, held: Tensor, by_product: Tensor) -> Tensor:
    """The plain difference where it takes nothing back, or less than the product rule does with held = d gate(h); else
    the product rule. In the tails two values near each other differ by much less than the rounding of h + d moves
    either."""
    plain, size = after - before, before.abs() + after.abs()
    return torch.where((held.abs() < size) & (2 * plain.abs() < size), by_product, plain)


def silu_change(h: Tensor, d: Tensor) -> Tensor:
    """x sigmoid(x)."""
    return _gate_change(h, d, h + d, d, lambda x: x)


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), the gelu of CLIP."""
    return x * torch.sigmoid(_QUICK_SLOPE * x)


def quick_gelu_change(h: Tensor, d: Tensor) -> Tensor:
    """x sigmoid(1.702 x)."""
    return _gate_change(h, d, h + d, _QUICK_SLOPE * d, lambda x: _QUICK_SLOPE * x)


def _tanh_slope(x: Tensor) -> Tensor:
    """y / x of gelu_tanh = x sigmoid(y)."""
    return (x * x).mul_(_TANH_CUBIC).add_(_TANH_SLOPE)


def gelu_tanh_change(h: Tensor, d: Tensor) -> Tensor:
    """x sigmoid(y), y = x (a + b x^2), with dy = d (a + b (h^2 + h h1 + h1^2)); |x| below 1e12 in float32."""
    h1 = h + d
    dy = torch.addcmul(_tanh_slope(h), h + h1, h1, value=_TANH_CUBIC).mul_(d)
    return _gate_change(h, d, h1, dy, lambda x: _tanh_slope(x).mul_(x))


# The error function: Gauss-Legendre quadrature of its density over [h, h + d] while that is short.
def _quadrature_limit(n: int, eps: float) -> float:
    """Largest k for which n nodes integrate e^(kx) over [-1, 1] to eps/4 (the rule's error term, solved for k)."""
    f = math.factorial
    constant = 4**n * f(n) ** 4 / ((2 * n + 1) * f(2 * n) ** 3)
    return (eps / 4 / constant) ** (1 / (2 * n))


# As many nodes as bring the limit past 1, where the plain difference of the tails loses nothing.
_NODES = {torch.float32: (1, 2, 3, 5), torch.float64: (1, 2, 3, 5, 8)}
_LIMITS = {dtype: [(_quadrature_limit(n, torch.finfo(dtype).eps), n) for n in ns] for dtype, ns in _NODES.items()}


def _bend(h: Tensor, d: Tensor) -> tuple[Tensor, float, float, int]:
    """How much the density's exponent moves over [h, h + d], the most, what quadrature may have, and its nodes."""
    bend = (h.abs() + 1).mul(d.abs()).addcmul(d, d)
    largest = _largest(bend)
    limits = _LIMITS[bend.dtype]
    limit, n = next((pair for pair in limits if largest <= pair[0]), limits[-1])
    return bend, largest, limit, n


def erf_change(h: Tensor, d: Tensor) -> Tensor:
    """erf(x). Long ways by erfc on their own side of 0, by erf across it."""
    bend, largest, limit, n = _bend(h, d)
    return _mended(_erf_by_quadrature(h, d, n), bend, limit, largest, lambda h, d: _erf_between(h, h + d), h, d)


def _erf_by_quadrature(h: Tensor, d: Tensor, n: int) -> Tensor:
    nodes, weights = np.polynomial.legendre.leggauss(n)
    total = None
    for x, w in zip((nodes + 1) / 2, weights / math.sqrt(math.pi), strict=True):
        at = torch.add(h, d, alpha=float(x))
        density = at.mul_(at).neg_().exp_()
        total = density.mul_(float(w)) if total is None else total.add_(density, alpha=float(w))
    return total.mul_(d)


def _erf_between(h: Tensor, h1: Tensor) -> Tensor:
    tails = torch.special.erfc(h.abs()) - torch.special.erfc(h1.abs())
    return torch.where(h.sign() * h1.sign() > 0, torch.where(h > 0, tails, -tails), h1.erf() - h.erf())


def gelu_change(h: Tensor, d: Tensor) -> Tensor:
    """x Phi(x), Phi the normal distribution, by the product rule."""
    r, e = _ROOT_HALF * h, _ROOT_HALF * d
    bend, largest, limit, n = _bend(r, e)
    near = torch.addcmul(_erf_by_quadrature(r, e, n).mul_(0.5).mul_(h + d), d, _normal(h))
    return _mended(near, bend, limit, largest, _far_gelu, h, d)


def _far_gelu(h: Tensor, d: Tensor) -> Tensor:
    h1, below = h + d, _normal(h)
    step = _erf_between(_ROOT_HALF * h, _ROOT_HALF * h1)  # as the two values have them
    by_product = torch.addcmul(step.mul_(0.5).mul_(h1), d, below)
    return _far_difference(h * below, h1 * _normal(h1), d * below, by_product)


def _normal(x: Tensor) -> Tensor:
    """Phi(x), from its own side of 0."""
    return torch.special.erfc(-_ROOT_HALF * x).mul_(0.5)


def elu_change(h: Tensor, d: Tensor, alpha: float = 1.0) -> Tensor:
    """x above 0, alpha (e^x - 1) below: each side with the part of d that moves there."""
    above = relu_change(h, d)
    return above + alpha * exp_change(h.clamp(max=0), d - above)


# Waves: by the addition theorems, with h as it is; a rounded h + d would be off by h's last digit.
def sin_change(h: Tensor, d: Tensor) -> Tensor:
    """2 sin(d/2) cos(h + d/2)."""
    s, c = torch.sin(d / 2), torch.cos(d / 2)
    return 2 * s * (c * h.cos() - s * h.sin())


def cos_change(h: Tensor, d: Tensor) -> Tensor:
    """-2 sin(d/2) sin(h + d/2)."""
    s, c = torch.sin(d / 2), torch.cos(d / 2)
    return -2 * s * (c * h.sin() + s * h.cos())


# By name: the functions that need no parameter, and the same functions themselves.
CHANGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": relu_change,
    "tanh": tanh_change,
    "sigmoid": sigmoid_change,
    "silu": silu_change,
    "gelu": gelu_change,
    "gelu_tanh": gelu_tanh_change,
    "quick_gelu": quick_gelu_change,
    "exp": exp_change,
    "expm1": expm1_change,
    "log": log_change,
    "log1p": log1p_change,
    "sqrt": sqrt_change,
    "rsqrt": rsqrt_change,
    "reciprocal": reciprocal_change,
    "sin": sin_change,
    "cos": cos_change,
    "erf": erf_change,
    "abs": abs_change,
    "square": square_change,
}
VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": lambda x: x * _normal(x),  # torch's own is 0 from -8.3 down, being 1 + erf
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": quick_gelu,
}
VALUES |= {name: getattr(torch, name) for name in CHANGES if name not in VALUES}
