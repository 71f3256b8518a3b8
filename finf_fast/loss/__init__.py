"""Stage 5, the loss: from (value, change) of a model's output to the loss and its change, sample by sample.

A loss never sees "before" and "after". It is given the output of the model as it is and the *change* of that output for
every query, because a difference of two rounded losses has lost the answer that the change still holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from finf_fast.loss.base import Head, Loss, Result, batch_size, byte_size, cast, joined, mapped
from finf_fast.loss.custom import Custom
from finf_fast.loss.entropy import CausalLM, CrossEntropy, MaskedLM, Seq2Seq
from finf_fast.loss.squared_error import SquaredError
from finf_fast.loss.stored import check_stored, is_served

__all__ = [
    "CausalLM",
    "CrossEntropy",
    "Custom",
    "Head",
    "Loss",
    "MaskedLM",
    "Result",
    "Seq2Seq",
    "SquaredError",
    "batch_size",
    "byte_size",
    "cast",
    "check_stored",
    "is_served",
    "joined",
    "mapped",
    "resolve",
]

NAMED: dict[str, Callable[[], Loss]] = {
    "cross_entropy": CrossEntropy,
    "causal_lm": CausalLM,
    "masked_lm": MaskedLM,
    "seq2seq": Seq2Seq,
    "squared_error": SquaredError,
}


def resolve(loss: str | Loss | Callable[[Any, Any], Tensor]) -> Loss:
    """The loss of that name, the :class:`Loss` itself, or a wrapper round ``(model, batch) -> (B,) losses``.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name, a :class:`Loss` nor a callable.
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str):
        if loss not in NAMED:
            raise ValueError(
                f"loss: wanted one of {', '.join(NAMED)} or a callable (model, batch) -> loss per sample, got {loss!r}"
            )
        return NAMED[loss]()
    if type(loss).__module__ == nn.modules.loss.__name__ or getattr(loss, "__module__", None) == F.__name__:
        raise TypeError(f"loss: wanted a name or a callable (model, batch) -> loss per sample, got torch's {loss!r}, "
                        "which takes outputs: lambda model, batch: ...")  # fmt: skip
    if callable(loss):
        return Custom(loss)
    raise TypeError(f"loss: wanted a name, a finf_fast.loss.Loss or a callable, got {type(loss).__name__}")
