"""The table of rules, and how a call of the model finds its rule.

A rule is written once under a name and stands for every spelling of it: ``torch.add``, ``Tensor.add``, ``a + b``,
``a += b``, ``torch.add(..., out=c)``. What has no rule goes to the generic one, in float64, and is counted.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finf_fast.delta.kept import Kept
from finf_fast.delta.stack import Carried, Changed, NotCarried, Stack, align, lift, untouched

__all__ = [
    "Rule",
    "State",
    "assign",
    "carry",
    "current",
    "fresh",
    "name_of",
    "otherwise",
    "rule",
    "unruled",
    "words",
]

Rule = Callable[..., Any]


def words(text: str) -> list[str]:
    """Names, as one would write them in a sentence."""
    return text.split()


HOMES = (torch, Tensor, F, torch.special, torch.linalg, torch._C._nn)
RULES: dict[Any, Rule] = {}
IN_PLACE: dict[Any, Rule] = {}

# What is asked of the logical tensor alone: nothing that depends on a value.
ASKED = words(
    "dim size numel nelement stride storage_offset is_contiguous is_floating_point is_complex is_signed "
    "get_device element_size ndimension type_as_name is_inference is_conj is_neg is_same_size __len__ "
    "__hash__ __repr__ __format__ has_names is_sparse_csr _is_view is_pinned retain_grad requires_grad_ "
    "is_tensor promote_types result_type can_cast __dir__ __reduce_ex__"
)
PROPERTIES = words(
    "shape dtype device ndim layout requires_grad is_cuda is_cpu is_sparse is_quantized is_meta is_leaf "
    "is_mps is_mkldnn is_nested is_xpu itemsize nbytes names grad grad_fn _version _base output_nr "
    "is_vulkan is_xla is_ipu is_maia"
)
PASSED: set[Any] = set()
# What a stack's wrapper cannot do in place: take another shape.
RESHAPED = words("transpose swapaxes swapdims t unsqueeze squeeze")


def rule(*names: Any) -> Callable[[Rule], Rule]:
    """Registers a rule for every function of these names and its in-place spellings, or for just this function.

    It is called like the function, with carried tensors among its arguments.
    """

    def decorate(function: Rule) -> Rule:
        RULES.update({target: function for target in names if callable(target)})
        for name in (name for name in names if isinstance(name, str)):
            for target in _spellings(name):
                RULES[target] = function
            for inplace in () if name in RESHAPED else (f"{name}_", f"__i{name.strip('_')}__"):
                for target in _spellings(inplace):
                    IN_PLACE[target] = function
        return function

    return decorate


# Functions that pick numbers out of others, which may be another one for every query.
CHOOSING = {"topk", "sort", "max", "min", "amax", "amin", "kthvalue", "median", "cummax", "cummin", "gather"}

_otherwise: list[Rule] = []


def unruled(function: Any, *args: Any, **kwargs: Any) -> Any:
    """What a rule calls where it knows no exact change: the generic rule, which is counted."""
    return _otherwise[0](function, *args, **kwargs)


def otherwise(function: Rule) -> Rule:
    """Registers what runs where there is no rule, called with the function before its arguments."""
    _otherwise[:] = [function]
    return function


def _spellings(name: str) -> list[Any]:
    homes = (Tensor,) if name.startswith("__") else HOMES  # every module has some __eq__ of its own
    found = [getattr(home, name, None) for home in homes]
    found = [target.__get__ if hasattr(target, "__set__") else target for target in found]
    return [target for target in found if callable(target)]


PASSED.update(target for name in (*ASKED, *PROPERTIES) for target in _spellings(name))
PASSED.update(getattr(Tensor, name).__get__ for name in ("requires_grad", "grad"))


def carry(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Runs one function of torch on arguments of which at least one is carried."""
    if func in PASSED:
        with untouched():
            return func(*args, **kwargs)
    counts = current().carried
    counts[func] = counts.get(func, 0) + 1
    out = kwargs.pop("out", None)
    if not args:  # rules take what they work on by place: torch's names for it are several
        first = next(iter(kwargs), None)
        args = (kwargs.pop(first),) if first in ("input", "tensor", "self", "A") else ()
    if func in IN_PLACE:
        return assign(args[0], IN_PLACE[func](*args, **kwargs))
    found = RULES.get(func)
    if found is None:
        found = functools.partial(_otherwise[0], func)
    result = found(*args, **kwargs)
    if name_of(func) in CHOOSING:
        current().choose(result)
    return result if out is None else assign(out, result)


Carried.handler = staticmethod(carry)


def assign(target: Any, result: Any) -> Any:
    """Writes a result into the tensor that the model wanted it in; views of it see the change, as they must."""
    if isinstance(target, (tuple, list)):
        return (
            type(result)(*map(assign, target, result))
            if hasattr(result, "_fields")
            else tuple(map(assign, target, result))
        )
    state = current()
    if isinstance(target, Changed):
        raise NotCarried("the model writes into one of its own changed tensors")
    if not isinstance(target, Stack):
        target = state.adopt(target, len(result.stacked) if isinstance(result, Stack) else None)
    state.settle()
    room = target.stacked
    source = align(lift(result, len(room), room), room.dim() - 1)
    room.copy_(source)
    return target


class State:
    """What a forward leaves behind: counts for the record, plain tensors that became stacks, results not yet formed."""

    def __init__(self, queries: int = 0):
        self.queries = queries
        self.generic: dict[str, int] = {}
        self.plain: dict[Any, int] = {}
        self.carried: dict[Any, int] = {}
        self.kinks: set[str | None] = set()
        self._adopted: dict[int, tuple[Tensor, Stack]] = {}
        self._storages: set[int] = set()
        self._pending: list[Any] = []
        self._chosen: set[int] = set()
        self.kept: Kept | None = None  # the base's products, where queries come in chunks

    @property
    def adopting(self) -> bool:
        return bool(self._adopted)

    def adopt(self, plain: Tensor, count: int | None) -> Stack:
        """A plain tensor that something carried is written into: a stack stands for it from here on."""
        if id(plain) in self._adopted:
            return self._adopted[id(plain)][1]
        storage = plain.untyped_storage()
        if storage.nbytes() != plain.nbytes or not plain.is_contiguous():
            raise NotCarried("the model writes changed values into a part of a plain tensor")
        count = count if count is not None else 1 + self.queries
        stacked = lift(plain, count)
        stack = Stack(stacked if plain.is_floating_point() else stacked.clone())
        self._adopted[id(plain)] = (plain, stack)
        self._storages.add(storage.data_ptr())
        return stack

    def adopted(self, x: Any) -> Any:
        """The stack that stands for a plain tensor, or the argument as it is."""
        if not isinstance(x, Tensor) or isinstance(x, Carried):
            return x
        if id(x) in self._adopted:
            return self._adopted[id(x)][1]
        if x.untyped_storage().data_ptr() in self._storages and x.numel():
            raise NotCarried("the model reads a view of a plain tensor into which changed values were written")
        return x

    def choose(self, result: Any) -> None:
        """Notes numbers that a choice took from elsewhere; views of them share their storage."""
        results = result if isinstance(result, (tuple, list)) else (result,)
        self._chosen |= {x.stacked.untyped_storage().data_ptr() for x in results if isinstance(x, Stack)}

    def chosen(self, x: Stack) -> bool:
        return bool(self._chosen) and x.stacked.untyped_storage().data_ptr() in self._chosen

    @property
    def waits(self) -> bool:
        return bool(self._pending)

    def wait(self, result: Any) -> None:
        """Keeps a result that is not yet formed where :meth:`settle` finds it; those formed meanwhile are let go."""
        self._pending = [one for one in self._pending if not one.formed]
        self._pending.append(result)

    def settle(self) -> None:
        """Forms results that were put off, before something they depend on is overwritten."""
        for waiting in self._pending:
            waiting.form()
        self._pending.clear()

    def reset(self) -> None:
        """Forgets a forward's tensors, keeps the counts."""
        self._adopted.clear()
        self._storages.clear()
        self._chosen.clear()
        self._pending.clear()


_local = threading.local()


def current() -> State:
    """The state of the forward that is running in this thread."""
    if not getattr(_local, "states", None):
        _local.states = [State()]
    return _local.states[-1]


class fresh:
    """Makes ``state`` the current one inside a ``with``."""

    def __init__(self, state: State):
        self._state = state

    def __enter__(self) -> State:
        current()
        _local.states.append(self._state)
        return self._state

    def __exit__(self, *error) -> None:
        self._state.reset()
        _local.states.remove(self._state)


def name_of(func: Any) -> str:
    """A function's name for the record, a property's for its getter. A compiled function without one goes by its kind:
    what tells one such object from another is its address, different in every run."""
    owner = getattr(func, "__self__", None)
    if getattr(func, "__name__", "") in ("__get__", "__set__") and owner is not None:
        return f"{owner.__name__}.{func.__name__}"
    # TorchScript's objects have their name under `name` and may give their class's as `__name__`.
    names = (getattr(func, "name", None), getattr(func, "__name__", None))
    return next((name for name in names if isinstance(name, str)), type(func).__name__)
