"""Linear layers of a plain forward through the fast product of `finf_fast.reference.product`.

It is a mode over torch functions, not a replaced module, so that Hugging Face's ``Conv1D`` (``addmm``) and functional
calls profit alike.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from finf_fast.calls import by_place
from finf_fast.reference import product


class OneDnnLinear(TorchFunctionMode):
    """Inside this mode ``F.linear`` and ``torch.addmm`` run in oneDNN where it takes them; the rest is untouched."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (F.linear, torch.addmm) and kwargs:
            args, kwargs = by_place(func, args, kwargs)
        if func is F.linear:
            return product.linear(*args, **kwargs)
        if func is torch.addmm and not kwargs and len(args) == 3 and args[0].shape == args[2].shape[1:]:
            bias, x, weight = args
            return product.linear(x, weight.t(), bias)
        return func(*args, **kwargs)
