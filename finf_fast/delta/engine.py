"""The delta engine: the unmodified model runs once on stacks of (value, exact change), all queries together.

The model's parameters that an update changes are put into a copy of its structure as `Changed`; from the first of them
on every tensor is a `Stack`. What lies before runs plainly, once for all queries.

Why a mode over torch's functions besides the tensor subclass: a model also writes changed values *into plain tensors*
it made itself (a mixture of experts sums into zeros), and a call that later reads such a tensor has nothing carried
among its arguments; and plain float32 products go to oneDNN here too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from finf_fast.calls import by_place
from finf_fast.delta import (
    arithmetic,
    choices,
    functions,
    generic,
    head,
    indexing,
    integers,
    joins,
    layers,
    modules,
    products,
    reductions,
    structure,
)
from finf_fast.delta.head import Linear
from finf_fast.delta.kept import Kept
from finf_fast.delta.kinks import kink
from finf_fast.delta.stack import Carried, NotCarried, lift
from finf_fast.delta.table import State, carry, fresh, name_of
from finf_fast.delta.weights import weight_sets
from finf_fast.loss import Loss, Result, cast, joined, mapped
from finf_fast.reference import product
from finf_fast.skeleton import Skeleton, writes
from finf_fast.update import Update

__all__ = ["DeltaEngine", "NotCarried"]

# Imported to be registered.
RULES = (arithmetic, choices, functions, generic, head, indexing, integers, joins)
MORE_RULES = (layers, products, reductions, structure)
FUSED_WIDTH = 1024  # classes; a narrower head is cheaper formed than walked in panels
CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
DTYPES = (torch.bfloat16, torch.float32, torch.float64)


class Carrying(TorchFunctionMode):
    """Inside this mode calls on carried tensors, or on plain ones that became carried, go to the rules."""

    def __init__(self, state: State):
        super().__init__()
        self._state = state

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, state = kwargs or {}, self._state
        if state.adopting:
            args, kwargs = tree_map(state.adopted, args), tree_map(state.adopted, kwargs)
            types = {type(x) for x in torch.utils._pytree.tree_leaves((args, kwargs))}
        if any(issubclass(kind, Carried) for kind in types):
            state.kinks.add(kink(func, args, kwargs))
            return carry(func, args, kwargs)
        state.plain[func] = state.plain.get(func, 0) + 1
        if state.waits and ("out" in kwargs or kwargs.get("inplace") or writes(func)):
            state.settle()  # a plain tensor is about to be overwritten that a waiting result may read
        if kwargs and (func is F.linear or func in CONVOLUTIONS):
            args, kwargs = by_place(func, args, kwargs)
        if func is F.linear:
            return self._product(product.linear, *args, **kwargs)
        return self._product(func, *args, **kwargs) if func in CONVOLUTIONS else func(*args, **kwargs)

    def _product(self, function: Callable, x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """A product of the base alone, below the first change, once for all chunks of queries."""
        kept = self._state.kept
        if kept is None:
            return function(x, weight, *args, **kwargs)
        key, found = kept.find(x, weight, *(a if isinstance(a, Tensor) else str(a) for a in (*args, *kwargs.items())))
        if found is not None:
            return found.clone()
        found = function(x, weight, *args, **kwargs)
        kept.keep(key, x, found)
        return found


class DeltaEngine:
    """Scores batches in one forward of the model over stacks.

    Args:
        model: the user's model, never modified; scored in eval mode.
        updates: Q updates, of any forms.
        loss: what is measured.
        device, dtype: where and in what the forward runs; bfloat16, float32 or float64.
        chunk: queries in one stack, where all at once would not fit.
        keep: bytes that the base's products may take from one chunk to the next; what has no room is computed again.

    Raises:
        ValueError: another dtype.
    """

    name = "delta"
    columns = 1  # of a text's batch, a multiple: any number

    def __init__(
        self,
        model: nn.Module,
        updates: Sequence[Update],
        loss: Loss,
        device: torch.device,
        dtype: torch.dtype,
        chunk: int | None = None,
        keep: int = 0,
    ):
        if dtype not in DTYPES:
            raise ValueError(f"dtype: wanted torch.bfloat16, torch.float32 or torch.float64, got {dtype}")
        self.loss, self.device, self.dtype = loss, device, dtype
        self._body = Skeleton(model, device, dtype)
        self._fused = modules.install(self._body.module)
        self._images = any(isinstance(m, nn.Conv2d) for m in model.modules())
        self._chunk = min(chunk or len(updates), len(updates))
        self._counts = [len(updates[at : at + self._chunk]) for at in range(0, len(updates), self._chunk)]
        self._sets, self._folded = weight_sets(self._body, model, updates, dtype, self._chunk)
        self._buffers = {name: self._body.slots[name].tensor for name in self._body.buffers}
        self._state = State()
        self.room = keep if len(self._counts) > 1 else 0
        self._kept = Kept(keep) if len(self._counts) > 1 else None
        self._head, self._before = "", {}

    @property
    def rows(self) -> int:
        """Of a sample under way at once."""
        return 1 + self._chunk

    @property
    def score_dtype(self) -> torch.dtype:
        """Of the scores: half precision is carried, but no loss is rounded to it."""
        return torch.float64 if self.dtype is torch.float64 else torch.float32

    def settings(self) -> dict[str, Any]:
        """What a resumed run must share."""
        return {
            "engine": self.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "fused_modules": dict(self._fused),
            "folded_batch_norms": self._folded,
        }

    def record(self) -> dict[str, Any]:
        """What was done, for the manifest."""
        return {
            **self.settings(),
            "queries_at_once": self._chunk,
            **self.counted(),
            **({} if self._kept is None else {"products_kept_between_chunks": self._kept.used}),
        }

    def counted(self) -> dict[str, Any]:
        """What grows from batch to batch, as JSON has it."""
        return {**self._before, "head": self._head, "generic_rules": dict(self._state.generic)}

    def resume(self, counted: Mapping[str, Any]) -> None:
        """Goes on from where an engine, one with pairs behind it perhaps, had counted so far."""
        self._before = dict(counted)
        self._head, self._state.generic = counted["head"], dict(counted["generic_rules"])

    def kinks(self) -> list[str]:
        """Operations seen so far whose masks a rounding flips: they decide what half precision can show."""
        return sorted(self._state.kinks - {None})

    def plain_calls(self) -> dict[str, int]:
        """How often each function of torch ran on plain tensors, by name: what no query changes is computed once."""
        counts: dict[str, int] = {}
        for func, count in self._state.plain.items():
            counts[name_of(func)] = counts.get(name_of(func), 0) + count
        return counts

    def output(self, batch: Any) -> Tensor:
        """Output of the model as it is, (B, ...), by way of a whole stack: what planning measures."""
        with self._running():
            out = self._forward(cast(batch, self.dtype, self._images), 0)
            return (out.stacked[0] if isinstance(out, Carried) else out).clone()

    def score(self, batch: Any) -> Result:
        """Base and delta of every sample of a batch that lies on the engine's device.

        Raises:
            NotCarried: the model did something on this batch that a stack cannot follow.
        """
        with self._running():
            batch, self._state.kept = cast(batch, self.dtype, self._images), self._kept
            try:
                return joined([self._scored(batch, number) for number in range(len(self._sets))])
            finally:
                self._state.kept = None
                if self._kept is not None:
                    self._kept.clear()

    def _scored(self, batch: Any, number: int) -> Result:
        """The result of one chunk of queries."""
        out = self._forward(batch, number)
        if isinstance(out, Linear) and not out.formed:
            return self._finish(out, batch)
        self._head = "logits formed"
        stacked = lift(out, 1 + self._state.queries)
        return self.loss.finish(stacked[0], stacked[1:], batch)

    def _finish(self, out: Linear, batch: Any) -> Result:
        """The loss of a head that waits: a wide one is never formed, a narrow one in float32 at least."""
        fused = out.shape[-1] >= FUSED_WIDTH and len(out.steps) in (0, 3)
        found = self.loss.finish_head(out.head(), batch) if fused else None
        self._head = "logits formed" if found is None else "no logits formed"
        if found is not None:
            return found
        stacked = out.wide()
        return self.loss.finish(stacked[0], stacked[1:], batch)

    def _forward(self, batch: Any, number: int) -> Any:
        """The output of the body with one chunk's weights in it, and fresh buffers: a forward may count in one."""
        self._state.queries = self._counts[number]
        self._state.reset()
        if self._kept is not None:
            self._kept.rewind()
        self._body.put({name: buffer.clone() for name, buffer in self._buffers.items()})
        self._body.put(self._sets[number])
        with Carrying(self._state):
            out = self.loss.output(self._body.module, mapped(torch.clone, batch))
        return self._state.adopted(out)  # it may be a plain tensor that the model made and wrote changed values into

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Rules on, gradients and the user's autocast off."""
        with (
            torch.autocast(self.device.type, enabled=False),
            torch.inference_mode(),
            fresh(self._state),
        ):
            yield
