"""noise: Philox's published vectors, the same bits everywhere, and numbers that are normal and independent."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import checks
from finf_fast import _C, reference
from finf_fast.ops import noise, uniform_integers

ROOT = Path(__file__).parent.parent
dtype = checks.face_fixture("noise")

# Known answers of Random123's kat_vectors for philox4x32-10: counter, key, words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("counter, key, known", KNOWN)
def test_published_vectors(counter, key, known):
    got = reference.philox([torch.tensor([w]) for w in words(counter)], tuple(words(key)))
    assert [int(w) for w in got] == words(known)


def samples(S: int) -> torch.Tensor:
    """Small, neighbouring, huge and negative names."""
    return torch.cat([torch.arange(S), torch.tensor([2**31, 2**32 + 1, 2**63 - 1, -1, -(2**63)])])


# Numbers of a sample: none, ragged blocks of four, around 256 (what a loop draws at once) and 2^15 (a task).
SIZES = [0, 1, 3, 4, 5, 255, 256, 257, 1000, 2**15 - 1, 2**15, 2**15 + 5]


@pytest.mark.parametrize("M", SIZES)
@pytest.mark.parametrize("seed, draw", [(0, 0), (2**63 - 1, 2**32 - 1), (2**32, 7)])
def test_every_face_gives_the_same_bits(M, seed, draw):
    found = []
    for face, _ in checks.face_dtypes("noise"):
        with checks.forced(face):
            found.append(noise(seed, samples(2)[1:], draw, (M,)))
    assert found[0].shape == (6, M) and found[0].dtype == torch.float32
    assert all(torch.equal(found[0].view(torch.int32), other.view(torch.int32)) for other in found[1:])


def true_normals(block: list[int]) -> list[float]:
    """Box and Muller by definition, in double."""
    out = []
    for distance, direction in (block[:2], block[2:]):
        r = math.sqrt(-2 * math.log((distance | 1) / 2**32))
        signed = (direction << 2 & 0xFFFFFFFF | 2) - (2**32 if direction >> 29 & 1 else 0)
        angle = math.pi / 2 * (direction >> 30) + math.pi / 4 * signed / 2**31
        out += [r * math.cos(angle), r * math.sin(angle)]
    return out


def test_the_numbers_are_those_of_the_definition(dtype):
    got = noise(5, torch.tensor([11]), 3, (4000,))[0].double()
    blocks = reference.philox([torch.arange(1000), *(torch.full((1000,), w) for w in (3, 11, 0))], (5, 0))
    true = torch.tensor([x for block in zip(*[w.tolist() for w in blocks], strict=True) for x in true_normals(block)])
    assert (got - true.double()).abs().max() < 5e-7


@pytest.mark.parametrize("word", [0, 1, 2, 3, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1, 2**16, 2**16 - 1])
def test_extreme_words(word):
    page = sys.modules["finf_fast.reference.noise"]
    size = float(page._minus_log(torch.tensor([word]))[0])
    assert size == pytest.approx(-math.log((word | 1) / 2**32), rel=2e-7, abs=2**-31)
    x, y = (int(v) / 2**31 for v in page._direction(torch.tensor([word])))
    assert math.hypot(x, y) == pytest.approx(1, abs=1e-8)


def test_a_number_depends_on_nothing_but_its_place(dtype):
    whole = noise(1, samples(6), 2, (5, 33))
    assert torch.equal(noise(1, samples(6)[4:8], 2, (5, 33)), whole[4:8])
    assert torch.equal(noise(1, samples(6), 2, (100,)), whole.flatten(1)[:, :100])
    assert torch.equal(noise(1, samples(6).flip(0), 2, (165,)), whole.flatten(1).flip(0))
    spread = samples(6).repeat_interleave(2)[::2]
    assert torch.equal(noise(1, spread, 2, [5, 33]), whole)


def test_same_bits_for_any_number_of_threads(dtype):
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(noise(9, samples(3), 0, (40_000,)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("isa", _C.isas())
def test_same_bits_on_each_instruction_set(isa, tmp_path):
    code = (
        "import sys, torch; from finf_fast.ops import noise\n"
        "torch.save(noise(2**40 + 3, torch.tensor([0, 5, -7]), 1, (5001,)), sys.argv[1])"
    )
    env = {**os.environ, "FINF_FORCE_ISA": isa, "FINF_BACKEND": "cpp", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "drawn.pt")], env=env, check=True, timeout=300)
    wanted = reference.noise(2**40 + 3, torch.tensor([0, 5, -7]), 1, (5001,))
    assert torch.equal(torch.load(tmp_path / "drawn.pt").view(torch.int32), wanted.view(torch.int32))


def test_they_are_normal_and_independent(dtype):
    """Moments and tails of 2^18 numbers within five standard deviations; neighbours in every sense uncorrelated."""
    n = 1 << 18
    x = noise(3, torch.arange(64), 0, (n // 64,)).double()
    flat = x.flatten()
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(flat.pow(power).mean() - mean) < 5 * math.sqrt(variance / n)
    for edge in (0.5, 1, 2, 3):
        p = math.erfc(edge / math.sqrt(2))
        assert abs((flat.abs() > edge).double().mean() - p) < 5 * math.sqrt(p * (1 - p) / n)
    others = [noise(4, torch.arange(64), 0, (n // 64,)), noise(3, torch.arange(64), 1, (n // 64,)), x.roll(1, 0)]
    for other in [*others, x.roll(1, 1), x.roll(2, 1), x.roll(4, 1)]:
        assert abs((x * other).mean()) < 5 / math.sqrt(n)
        assert abs((x.square() * other.double().square()).mean() - 1) < 5 * math.sqrt(8 / n)


@pytest.mark.parametrize("high", [1, 2, 7, 1000, 2**31 - 1])
def test_integers(high):
    drawn = uniform_integers(3, torch.arange(20_000), 5, high)
    assert drawn.dtype == torch.int64 and drawn.shape == (20_000,) and drawn.min() >= 0 and drawn.max() < high
    assert torch.equal(uniform_integers(3, torch.tensor([17, 4]), 5, high), drawn[[17, 4]])
    mean, deviation = (high - 1) / 2, high / math.sqrt(12)
    assert abs(drawn.double().mean() - mean) <= 5 * deviation / math.sqrt(20_000)
    if high == 7:
        share = np.bincount(drawn.numpy(), minlength=7) / 20_000
        assert np.abs(share - 1 / 7).max() < 5 * math.sqrt(1 / 7 / 20_000)


def test_an_integer_is_its_block_times_high():
    words = reference.philox([torch.tensor([w]) for w in (1 << 31, 5, 9, 0)], (3, 0))
    fraction = int(words[1]) << 32 | int(words[0])
    for high in (1, 1000, 2**31 - 1):
        assert int(uniform_integers(3, torch.tensor([9]), 5, high)) == fraction * high >> 64


def test_opcheck(dtype):
    torch.library.opcheck(torch.ops.finf_fast.noise.default, (samples(1), 3, 1, [2, 5]))


def test_errors():
    with pytest.raises(TypeError, match="samples: wanted int64, got int32"):
        noise(0, torch.zeros(2, dtype=torch.int32), 0, (3,))
    with pytest.raises(ValueError, match="seed: wanted from 0, below 2\\^63, got -1"):
        noise(-1, samples(1), 0, (3,))
    with pytest.raises(ValueError, match="draw: wanted from 0, below 2\\^32, got 4294967296"):
        noise(0, samples(1), 1 << 32, (3,))
    with pytest.raises(ValueError, match="shape: wanted sizes from 0"):
        noise(0, samples(1), 0, (1 << 20, 1 << 20))
    with pytest.raises(ValueError, match="high: wanted from 1, below 2\\^31, got 0"):
        uniform_integers(0, samples(1), 0, 0)
