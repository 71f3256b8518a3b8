"""Every operation in plain torch, on any device and dtype: the face that is always there, and the easiest to read."""

from __future__ import annotations

from finf_fast.reference.activation_delta import activation_delta
from finf_fast.reference.attention_delta import attention_delta
from finf_fast.reference.cross_entropy_delta import cross_entropy_delta
from finf_fast.reference.decode_pixels import decode_pixels
from finf_fast.reference.decode_tokens import decode_tokens
from finf_fast.reference.group_norm_delta import group_norm_delta
from finf_fast.reference.layer_norm_delta import layer_norm_delta
from finf_fast.reference.linear_cross_entropy_delta import linear_cross_entropy_delta
from finf_fast.reference.linear_delta import linear_delta
from finf_fast.reference.noise import noise, philox, uniform_integers
from finf_fast.reference.rms_norm_delta import rms_norm_delta
from finf_fast.reference.segment_sum import segment_sum
from finf_fast.reference.squared_error_delta import squared_error_delta
from finf_fast.reference.topk_merge import topk_merge

__all__ = [
    "activation_delta",
    "attention_delta",
    "cross_entropy_delta",
    "decode_pixels",
    "decode_tokens",
    "group_norm_delta",
    "layer_norm_delta",
    "linear_cross_entropy_delta",
    "linear_delta",
    "noise",
    "philox",
    "rms_norm_delta",
    "segment_sum",
    "squared_error_delta",
    "topk_merge",
    "uniform_integers",
]
