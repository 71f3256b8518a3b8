"""Functions of one number and their exact changes f(h + d) − f(h), for Triton: twin of ``activations.inl.h``.

The mathematics in torch is ``finf_fast/reference/changes.py``. What all changes of one h share is computed once by
``shared``: a pair (up, down) that is the sigmoid of y and of −y, with y the gate's argument, or for gelu the density
e^(−h²/2) and the tail Phi(−|h|). ``near_change`` is right for the changes that ``is_near`` names and costs about twenty
instructions; ``far_change`` is right for all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from finf_fast.kernels.numerics import expm1, half_tanh

KINDS = ("relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "quick_gelu")

# Up to here a sigmoid's argument may move for the short form.
SHORT_REACH = tl.constexpr(0.25)
# gelu_tanh(x) = x sigmoid(x (a + b x^2)), a = 2 sqrt(2/pi), b = 0.044715 a (Hendrycks and Gimpel, arXiv 1606.08415).
SLOPE = tl.constexpr(1.5957691216)
CUBIC = tl.constexpr(0.0713548162726)
QUICK_SLOPE = tl.constexpr(1.702)
ROOT = tl.constexpr(0.398942280401)  # 1 / sqrt(2 pi)
# Up to here, for |d| (|h| + 4 |d|), the exponent in `_near_step_of_normal` moves by a quarter at most.
GELU_REACH = tl.constexpr(0.4)


@triton.jit
def _sides(y):
    """The sigmoid of y and of −y, each with all its digits."""
    w = tl.exp(-tl.abs(y))
    more = 1.0 / (1.0 + w)
    less = w * more
    return tl.where(y < 0, less, more), tl.where(y < 0, more, less)


@triton.jit
def _near_step(up, down, dy):
    """sigmoid(y + dy) − sigmoid(y) for |dy| <= 1/4, by tanh's addition theorem: 2 up down x / (1 + (up − down) x) with

    x = tanh(dy / 2), whose polynomial is fitted for that interval (6.4e-9).
    """
    z = 0.5 * dy
    square = z * z
    x = z * (0.99999999363 + square * (-0.33332599104 + square * 0.13207752052))
    return 2.0 * up * down * x / (1.0 + (up - down) * x)


@triton.jit
def _far_step(up, down, y1, dy):
    """The same for every dy, y1 being y + dy: expm1(dy) sigmoid(y) sigmoid(−y1), mirrored where dy > 0 so that the

    exponential stays below 1.
    """
    up1, down1 = _sides(y1)
    return tl.where(dy > 0, -down * up1, up * down1) * expm1(-tl.abs(dy))


@triton.jit
def _far_product(before, after, held, by_product):
    """After a long way the plain difference where it takes nothing back, or less than the product rule does with

    held = d gate(h); else the product rule. In the tails two values near each other differ by much less than the
    rounding of h + d moves either.
    """
    plain = after - before
    size = tl.abs(before) + tl.abs(after)
    by_rule = (tl.abs(held) < size) & (2.0 * tl.abs(plain) < size)
    return tl.where(by_rule, by_product, plain)


@triton.jit
def _gate(x, KIND: tl.constexpr):
    """y where the function is x sigmoid(y), or sigmoid(y) itself, or tanh(y / 2)."""
    if KIND == "gelu_tanh":
        y = x * (x * x * CUBIC + SLOPE)
    elif KIND == "quick_gelu":
        y = x * QUICK_SLOPE
    elif KIND == "tanh":
        y = 2.0 * x
    else:
        y = x
    return y


@triton.jit
def _gate_change(h, d, KIND: tl.constexpr):
    if KIND == "gelu_tanh":
        h1 = h + d
        dy = d * (((h + h1) * h1 + h * h) * CUBIC + SLOPE)
    else:
        dy = _gate(d, KIND)  # the others are straight
    return dy


@triton.jit
def _normal(h):
    """e^(−h²/2), and Phi(−|h|) by (x + 3) e^(x²/2) Phi(−x) = P((x − 3) / (x + 3)) for 0 <= x <= 14.5, past which it is

    zero; fitted for the least relative error (5.2e-8).
    """
    x = tl.abs(h)
    x = tl.where(x > 16.0, 16.0, x)
    density = tl.exp(-0.5 * x * x)
    r = 1.0 / (x + 3.0)
    t = (x - 3.0) * r
    p = 0.001074733851 + t * (-0.0008977559842 + t * -0.0002629911409)
    p = -0.04725528543 + t * (-0.01048009395 + t * (0.006920007984 + t * p))
    p = 0.7290836684 + t * (-0.5093323282 + t * (0.2300193986 + t * p))
    return density, density * p * r


@triton.jit
def _distribution(h, tail):
    return tl.where(h < 0, tail, 1.0 - tail)


@triton.jit
def _near_step_of_normal(density, h, d):
    """Phi(h + d) − Phi(h), the density's integral, around its middle m: with u = d² and k = m d it is

    d density(m) (1 + (k² − u) / 24 + (k⁴ − 6 k² u + 3 u²) / 1920 + ...),
    where density(m) = density(h) e^(−d (h + d/4) / 2).
    """
    half = 0.5 * d
    u = d * d
    k = (h + half) * d
    k2 = k * k
    x = -half * (h + 0.25 * d)
    # e^x − 1, fitted for |x| <= 1/4 (8.5e-8)
    by = x * (1.0 + x * (0.49999826127 + x * (0.16666738689 + x * (0.04177515209 + x * 0.00833333004))))
    bend = (k2 * (k2 - 6.0 * u) + 3.0 * u * u) * (1.0 / 1920) + (k2 - u) * (1.0 / 24)
    return density * ROOT * (d + d * (by + bend + by * bend))  # d (1 + by) (1 + bend)


@triton.jit
def _far_step_of_normal(h, tail, h1, tail1):
    """By the tails of the side that both ends lie on, or across 0 by both."""
    same = tl.where(h < 0, tail1 - tail, tail - tail1)
    across = 1.0 - tail - tail1
    return tl.where(h * h1 < 0, tl.where(h1 < 0, -across, across), same)


@triton.jit
def shared(h, KIND: tl.constexpr):
    """What the function's value and all its changes at h have in common."""
    if KIND == "relu":
        first, second = h, h
    elif KIND == "gelu":
        first, second = _normal(h)
    else:
        first, second = _sides(_gate(h, KIND))
    return first, second


@triton.jit
def value(h, first, second, KIND: tl.constexpr):
    """f(h); a NaN stays one."""
    if KIND == "relu":
        f = tl.where(h < 0, 0.0, h)
    elif KIND == "gelu":
        f = h * _distribution(h, second)
    elif KIND == "tanh":
        f = half_tanh(2.0 * h)
    elif KIND == "sigmoid":
        f = first
    else:
        f = h * first
    return f


@triton.jit
def is_near(h, d, KIND: tl.constexpr):
    if KIND == "relu":
        near = d == d
    elif KIND == "gelu":
        near = tl.abs(d) * (tl.abs(h) + 4.0 * tl.abs(d)) <= GELU_REACH
    else:
        near = tl.abs(_gate_change(h, d, KIND)) <= SHORT_REACH
    return near


@triton.jit
def near_change(h, d, first, second, KIND: tl.constexpr):
    """f(h + d) − f(h) for a short d; ``first`` and ``second`` are what `shared` gives."""
    if KIND == "relu":
        # d above the corner, what sticks out of it below
        moved = d + tl.where(h > 0, 0.0, h)
        above = tl.where(h < 0, 0.0, h)
        change = tl.where(moved < -above, -above, moved)
    elif KIND == "gelu":
        change = _near_step_of_normal(first, h, d) * (h + d) + d * _distribution(h, second)
    else:
        step = _near_step(first, second, _gate_change(h, d, KIND))
        if KIND == "sigmoid":
            change = step
        elif KIND == "tanh":
            change = 2.0 * step
        else:
            change = step * (h + d) + d * first
    return change


@triton.jit
def far_change(h, d, first, second, KIND: tl.constexpr):
    """f(h + d) − f(h) for every d."""
    h1 = h + d
    if KIND == "relu":
        change = near_change(h, d, first, second, KIND)
    elif KIND == "gelu":
        _, tail1 = _normal(h1)
        below = _distribution(h, second)
        held = d * below
        by_product = _far_step_of_normal(h, second, h1, tail1) * h1 + held
        change = _far_product(h * below, h1 * _distribution(h1, tail1), held, by_product)
    else:
        y1 = _gate(h1, KIND)
        step = _far_step(first, second, y1, _gate_change(h, d, KIND))
        if KIND == "sigmoid":
            change = step
        elif KIND == "tanh":
            change = 2.0 * step
        else:
            up1, _ = _sides(y1)
            held = d * first
            change = _far_product(h * first, h1 * up1, held, step * h1 + held)
    return change
