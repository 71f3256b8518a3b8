"""The operations of the line, each with one contract and several faces (plain torch, compiled).

Each is registered with torch.library under the namespace ``finf_fast`` (so torch.compile and fake tensors know it), and
picks its face from the one table in `finf_fast.ops.dispatch`. Dimension key: `finf_fast.records`.
"""

from __future__ import annotations

from finf_fast.ops.cross_entropy_delta import cross_entropy_delta, cross_entropy_delta_out
from finf_fast.ops.dispatch import chosen, faces
from finf_fast.ops.segment_sum import segment_sum, segment_sum_out
from finf_fast.ops.topk_merge import topk_merge, topk_merge_

__all__ = [
    "chosen",
    "cross_entropy_delta",
    "cross_entropy_delta_out",
    "faces",
    "segment_sum",
    "segment_sum_out",
    "topk_merge",
    "topk_merge_",
]
