"""The operations of the line, each with one contract and several faces (plain torch, compiled).

Each is registered with torch.library under the namespace ``finf_fast`` (so torch.compile and fake tensors know it), and
picks its face from the one table in `finf_fast.ops.dispatch`. Dimension key: `finf_fast.records`.
"""

from __future__ import annotations

from finf_fast.ops.activation_delta import activation_delta
from finf_fast.ops.attention_delta import attention_delta
from finf_fast.ops.cross_entropy_delta import cross_entropy_delta, cross_entropy_delta_out
from finf_fast.ops.decode_pixels import decode_pixels
from finf_fast.ops.decode_tokens import decode_tokens
from finf_fast.ops.dispatch import chosen, faces
from finf_fast.ops.group_norm_delta import group_norm_delta
from finf_fast.ops.layer_norm_delta import layer_norm_delta
from finf_fast.ops.linear_cross_entropy_delta import linear_cross_entropy_delta, linear_cross_entropy_delta_out
from finf_fast.ops.linear_delta import linear_delta
from finf_fast.ops.noise import noise, uniform_integers
from finf_fast.ops.rms_norm_delta import rms_norm_delta
from finf_fast.ops.segment_sum import segment_sum, segment_sum_out
from finf_fast.ops.squared_error_delta import squared_error_delta, squared_error_delta_out
from finf_fast.ops.topk_merge import topk_merge, topk_merge_

__all__ = [
    "activation_delta",
    "attention_delta",
    "chosen",
    "cross_entropy_delta",
    "cross_entropy_delta_out",
    "decode_pixels",
    "decode_tokens",
    "faces",
    "group_norm_delta",
    "layer_norm_delta",
    "linear_cross_entropy_delta",
    "linear_cross_entropy_delta_out",
    "linear_delta",
    "noise",
    "rms_norm_delta",
    "segment_sum",
    "segment_sum_out",
    "squared_error_delta",
    "squared_error_delta_out",
    "topk_merge",
    "topk_merge_",
    "uniform_integers",
]
