"""Where a backward pass over activations meets the parameters that queries change.

Every call that reads such a parameter runs as ever, on the parameter without its graph, and leaves a hook on its
output: when the gradient of that output comes by, what it says about the parameter is multiplied with all queries'
changes, and nothing of it is kept. A call in none of the forms below reaches the parameter through autograd, which the
engine sees, and then takes one sample at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from finf_fast.calls import by_place, ordinary, takes
from finf_fast.dot.changes import Change
from finf_fast.order import Mixed

__all__ = ["Taps", "still", "wide_sum"]

Note = Callable[[str, Tensor], None]
OF_ONE_TYPE = {  # whose operands torch wants alike
    *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.layer_norm, F.group_norm, F.rms_norm),
    *(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.addmm),
}


class Taps(TorchFunctionMode):
    """Inside this mode calls with changed parameters leave hooks; plain products go to the fast one.

    Args:
        changes: name -> what the queries do to it.
        leaves: name -> the tensor that stands for it in the body, with ``requires_grad``.
        samples: B of the batch.
        length: of a sample's first dimension, such as tokens; 0 where it has none.
        calls: function of torch -> its rule, called as (taps, *args): the output, or None to leave the call as it is.
        note: told the name of a parameter and a contribution (B, Q), in the order of the backward pass.

    Attributes:
        roots: the first tensors of the graph: what to ask the gradient of.
        given: name of an embedding whose rows every sample was given of its own; none: "".
    """

    def __init__(
        self,
        changes: Mapping[str, Change],
        leaves: Mapping[str, Tensor],
        samples: int,
        length: int,
        calls: Mapping[Callable, Callable],
        note: Note,
    ):
        super().__init__()
        self._of = {id(leaf): (name, changes[name]) for name, leaf in leaves.items()}
        self.samples, self.length = samples, length
        self._calls, self._note = calls, note
        self.roots: list[Tensor] = []
        self.given = ""
        self._derived: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        catch = self._calls.get(func)
        args, kwargs = by_place(func, args, kwargs) if catch is not None and kwargs else (args, kwargs)
        args, kwargs = self._alike(args, kwargs) if func in OF_ONE_TYPE else (args, kwargs)
        caught = catch is not None and ordinary() and takes(catch, (self, *args), kwargs)
        out = catch(self, *args, **kwargs) if caught else None
        return func(*args, **kwargs) if out is None else out

    def _alike(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """Operands in the widest of their types: a model may have float32 values before weights in half precision."""
        types = {value.dtype for value in (*args, *kwargs.values()) if _floating(value)}
        if len(types) < 2:
            return args, kwargs
        wide = reduce(torch.promote_types, types)
        return tuple(self._in(wide, a) for a in args), {name: self._in(wide, a) for name, a in kwargs.items()}

    def _in(self, dtype: torch.dtype, value: Any) -> Any:
        if not _floating(value) or value.dtype is dtype:
            return value
        (found,) = self.find(value)
        return value.to(dtype) if found is None else self.known(value.detach().to(dtype), *found)

    def find(self, *tensors: Any) -> list[tuple[str, Change] | None]:
        """Name and change of each of these, None of what no query changes."""
        return [self._of.get(id(tensor)) for tensor in tensors]

    def known(self, derived: Tensor, name: str, change: Change) -> Tensor:
        """A tensor made of a changed parameter, which stands for it from now on."""
        self._derived.append(derived)  # held, so that no other tensor comes to have its identity
        self._of[id(derived)] = (name, change)
        return derived

    def shared(self, shape: torch.Size) -> bool:
        """Whether ids of this shape are positions, of which all samples have the same."""
        return self.samples > 1 and tuple(shape) in ((self.length,), (1, *shape[1:2]))

    def kept(self, x: Tensor, name: str) -> Callable[[], Tensor]:
        """Gives what met this parameter back, without its graph.

        Raises:
            RuntimeError: when called after it has been written into.
        """
        x, version = x.detach(), x._version

        def get() -> Tensor:
            if x._version != version:
                raise RuntimeError(
                    f"{name}: what this parameter was applied to has been written in place since, and has no "
                    "derivative; use engine='delta'"
                )
            return x

        return get

    def passed(self, out: Tensor, *uses: tuple[str, Callable[[Tensor], Tensor]]) -> Tensor:
        """``out``, no view, with a hook that tells of every use (name, gradient of out -> (B, Q))."""
        if not out.requires_grad:  # a leaf could not be written into
            self.roots.append(out.requires_grad_())
            out = out.clone()

        def hook(gradient: Tensor) -> None:
            for name, product_with in uses:
                self._note(name, product_with(gradient))

        out.register_hook(hook)
        return out

    def by_sample(self, x: Tensor, name: str) -> Tensor:
        """(B, T, n) from rows (..., n) that keep the samples first, or flat, sample by sample; one sample has them all.

        Raises:
            Mixed: they do neither.
        """
        lead = x.shape[:-1]
        flat = len(lead) == 1 and lead[0] % self.samples == 0
        if self.samples > 1 and not (lead and (lead[0] == self.samples or flat)):
            raise Mixed(f"{name}, whose input of {tuple(lead)} rows holds {self.samples} samples in no known order")
        return x.reshape(self.samples, lead.numel() // self.samples, x.shape[-1])


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def still(tensor: Any, found: Any) -> Any:
    """A changed parameter without its graph; anything else as it is, for it may be computed from others."""
    return tensor if found is None else tensor.detach()


def wide_sum(rows: Tensor) -> Tensor:
    """(B, T, n) -> (B, n), in float32 at least."""
    return rows.sum(1, dtype=torch.promote_types(rows.dtype, torch.float32))
