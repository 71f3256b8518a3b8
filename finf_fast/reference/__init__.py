"""Every operation in plain torch, on any device and dtype: the face that is always there, and the easiest to read."""

from __future__ import annotations

from finf_fast.reference.cross_entropy_delta import cross_entropy_delta
from finf_fast.reference.segment_sum import segment_sum
from finf_fast.reference.topk_merge import topk_merge

__all__ = ["cross_entropy_delta", "segment_sum", "topk_merge"]
