"""Philox4x32-10 and normal numbers from its words, in torch's int64: the bits of csrc/philox.inl.h on any device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["noise", "philox", "uniform_integers"]

_LOW = 0xFFFFFFFF
# -ln(1 - s) / s on (0, 1/2] in units of 2^-29; (1 - cos) / t and sin / y of y pi/4, t = y^2, in units of 2^-32.
_LOG = (953278044, -1370407488, 1098817938, -340087663, 189704133, 93036198, 135378312, 178909758, 268436195, 536870910)
_COS = (15212, 1399993, 68093863, 1324675878)
_SIN = (154406, 10694473, 346798992, 3373259415)
_LN_2 = 46516320  # in units of 2^-26


def _high(a: Tensor, b: Tensor | int) -> Tensor:
    """Upper 32 of the 64 bits of a product of words; in two halves, since int64 has a bit too few."""
    return ((a >> 16) * b + ((a & 0xFFFF) * b >> 16)) >> 16


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Ten rounds; counter of four words, key of two, each below 2^32 and as int64."""
    (x0, x1, x2, x3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = 0xD2511F53, 0xCD9E8D57
        x0, x1, x2, x3 = _high(x2, b) ^ x1 ^ k0, x2 * b & _LOW, _high(x0, a) ^ x3 ^ k1, x0 * a & _LOW
        k0, k1 = k0 + 0x9E3779B9 & _LOW, k1 + 0xBB67AE85 & _LOW
    return [x0, x1, x2, x3]


def noise(seed: int, samples: Tensor, draw: int, shape: Sequence[int]) -> Tensor:
    """See `finf_fast.ops.noise`."""
    M = math.prod(shape)
    w0, w1, w2, w3 = _words(seed, samples, draw, torch.arange((M + 3) // 4, device=samples.device))
    drawn = torch.stack([*_normal_pair(w0, w1), *_normal_pair(w2, w3)], -1)
    return drawn.flatten(1)[:, :M].reshape(len(samples), *shape).contiguous()


def uniform_integers(seed: int, samples: Tensor, draw: int, high: int) -> Tensor:
    """See `finf_fast.ops.uniform_integers`."""
    # Blocks from 2^31 on are never noise. The first 64 bits as a fraction, times `high`, rounded down.
    w0, w1, _, _ = _words(seed, samples, draw, torch.full((1,), 1 << 31, device=samples.device))
    return (_product(w1, high)[0] + (_product(w0, high)[0] + _product(w1, high)[1] >> 32))[:, 0]


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    return _high(a, b), a * b & _LOW


def _words(seed: int, samples: Tensor, draw: int, block: Tensor) -> list[Tensor]:
    """Four words (S, blocks) for each sample and block."""
    s = samples[:, None]
    zero = torch.zeros((len(s), len(block)), dtype=torch.int64, device=samples.device)
    return philox([block + zero, draw + zero, (s & _LOW) + zero, (s >> 32 & _LOW) + zero], (seed & _LOW, seed >> 32))


def _normal_pair(distance: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Box and Muller; every float32 step is rounded once and none is an addition."""
    x, y = _direction(direction)
    # Through float64: torch's float32 root is off by a last digit now and then (MKL's, torch 2.13).
    r = _minus_log(distance).mul(2).double().sqrt().float()
    return r * (x.float() * 2.0**-31), r * (y.float() * 2.0**-31)


def _minus_log(word: Tensor) -> Tensor:
    m, z = word | 1, torch.zeros_like(word)
    for step in (16, 8, 4, 2, 1):
        zeros = m >> (32 - step) == 0
        m, z = torch.where(zeros, m << step, m), torch.where(zeros, z + step, z)
    s = (1 << 32) - m
    x, p = s.clamp(max=0x7FFFFFFF), torch.full_like(s, _LOG[0])
    for c in _LOG[1:]:
        p = c + (p * x >> 32)
    fraction = _high(s, p << 2)
    return torch.where(z == 0, fraction.float() * 2.0**-31, ((fraction >> 5) + z * _LN_2).float() * 2.0**-26)


def _direction(word: Tensor) -> tuple[Tensor, Tensor]:
    angle = word << 2 & _LOW | 2
    negative = angle >> 31 == 1
    m = torch.where(negative, (1 << 32) - angle, angle) << 1
    t = _high(m, m)
    cosine = 0x7FFFFFFF - (_high(_descending(_COS, t), t) >> 1)
    size = _high(_descending(_SIN, t), m) >> 1
    sine = torch.where(negative, -size, size)
    odd, half = word >> 30 & 1 == 1, word >> 31 == 1
    x, y = torch.where(odd, -sine, cosine), torch.where(odd, cosine, sine)
    return torch.where(half, -x, x), torch.where(half, -y, y)


def _descending(coefficients: Sequence[int], t: Tensor) -> Tensor:
    """c_n - t (c_(n-1) - t (...)), in units of 2^-32."""
    p = torch.full_like(t, coefficients[0])
    for c in coefficients[1:]:
        p = c - _high(p, t)
    return p
