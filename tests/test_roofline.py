"""Saved measurements can be placed under the machine's roof, and none of them above it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import roofline


def test_every_saved_row_has_its_place_under_the_roof():
    where = roofline.roof()
    found = roofline.points(where)
    assert {point.op for point in found} >= {"linear_cross_entropy_delta", "attention_delta", "layer_norm_delta"}
    for point in found:
        ceiling = min(where[f"{point.kind}_gflops"], point.intensity * where["read_gb_per_s"] * 4)
        # A processor is not equally fast at all times; what fits its caches is read up to four times as fast.
        assert 0 < point.gflops < 1.15 * ceiling, point


def test_a_row_that_cannot_be_read_says_so():
    with pytest.raises(ValueError, match="case: wanted .* got 'N=3'"):
        roofline._linear("linear_delta", {"case": "N=3", "gflops": 1.0})
