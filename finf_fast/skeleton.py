"""A second body for the same weights: modules copied, tensors shared, so that the user's model is never touched.

``torch.func.functional_call`` swaps tensors inside the user's own modules for the time of a call; a Ctrl-C in the
wrong place or a second thread would see them swapped. Copying the Python structure once costs milliseconds and no
tensor memory, and gives a body that may be put in eval mode, folded and swapped at will.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Slot:
    """One tensor of the model and every place of the module tree that holds it (several where weights are tied)."""

    name: str
    places: tuple[tuple[dict, str], ...]
    buffer: bool

    @property
    def tensor(self) -> Tensor:
        table, key = self.places[0]
        return table[key]

    def put(self, tensor: Tensor) -> None:
        for table, key in self.places:
            table[key] = tensor


class Skeleton:
    """The model's structure over tensors of ``device`` and ``dtype``; parameters already there are shared.

    Args:
        model: the user's model, not modified.
        device: where the copy computes.
        dtype: of floating-point tensors; None leaves them.
        train: train mode instead of eval mode.

    Raises:
        TypeError: the model's Python structure cannot be copied, or one of its attributes is a function that holds on
            to the model itself; the message says which.
    """

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype | None = None, train: bool = False):
        _require_own_functions(model)
        self.module = _copy(model, device, dtype)
        _uncompile(self.module)
        self._guard = Guard(self.module)
        self.set_mode(train)
        config = getattr(self.module, "config", None)
        if getattr(config, "use_cache", None):  # Hugging Face would keep every layer's keys and values for a next token
            config.use_cache = False
        self.slots = _slots(model, self.module)

    def set_mode(self, train: bool) -> None:
        """Train or eval mode by the model's own method, unless that would write into the weights (LoRA that merges)."""
        try:
            with self._guard:
                self.module.train(train)
        except WritesWeights:
            for module in self.module.modules():
                module.training = train

    @property
    def buffers(self) -> list[str]:
        """Names of the buffers still in place."""
        return [name for name, slot in self.slots.items() if slot.buffer]

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Places tensors by name, at every module that shares them."""
        for name, tensor in tensors.items():
            self.slots[name].put(tensor)

    def base(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors now in place under these names."""
        return {name: self.slots[name].tensor for name in names}


def require_model(model: Any) -> None:
    """Refuses what no step can be taken from.

    Raises:
        TypeError: no module.
        ValueError: a module without parameters, without their values, or inside another process' wrapper.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: wanted a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("model: wanted the module itself, model.module, got it inside DistributedDataParallel")
    if next(model.parameters(), None) is None:
        raise ValueError("model: wanted at least one parameter, got a model without any")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("model: wanted parameters with values, got some on the device 'meta'")


def place_of(model: nn.Module, device: str | torch.device | None) -> torch.device:
    """Device of the forwards: the model's own unless asked for.

    Raises:
        ValueError: CUDA that this torch cannot reach.
    """
    place = torch.device(device if device is not None else next(model.parameters()).device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: wanted one this torch can reach, got {place} without CUDA")
    return place


class WritesWeights(RuntimeError):
    """A model is about to write into the weights that its user gave it."""


class Guard(TorchFunctionMode):
    """Inside this mode a write into one of the model's own parameters raises :class:`WritesWeights` before it happens.

    A copy of the structure shares them, so a forward that clamps its weight would change the user's.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self._own = {p.untyped_storage().data_ptr(): n for n, p in model.named_parameters() if p.numel()}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        target = args[0] if args and writes(func) else kwargs.get("out")
        for tensor in target if isinstance(target, (tuple, list)) else (target,):
            if type(tensor) in (Tensor, nn.Parameter) and tensor.untyped_storage().data_ptr() in self._own:
                raise WritesWeights(f"the model writes into its own {self._own[tensor.untyped_storage().data_ptr()]}")
        return func(*args, **kwargs)


@functools.cache
def writes(func: Any) -> bool:
    """Whether a function of torch writes into its first argument."""
    name = getattr(func, "__name__", "")
    dunder = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__iand__", "__ior__", "__ipow__")
    return name in dunder or (name.endswith("_") and not name.endswith("__"))


def vocabulary(model: nn.Module) -> int | None:
    """Token ids that the model's input embedding knows, where the model says which embedding that is (Hugging Face)."""
    find = getattr(model, "get_input_embeddings", None)
    try:
        embedding = find() if callable(find) else None
    except (NotImplementedError, AttributeError):  # vision models inherit the method and have no tokens
        return None
    return getattr(embedding, "num_embeddings", None)


def _require_own_functions(model: nn.Module) -> None:
    """A function that refers to the model would go on reading the user's weights from inside the copy."""
    own = {id(part) for part in (*model.modules(), *model.parameters(), *model.buffers())}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key == "forward" and _is_compiled(module):  # _uncompile sees to it
                continue
            if any(id(getattr(thing, "__self__", thing)) in own for thing in _referred(value)):
                where = f"{name}.{key}" if name else key
                raise TypeError(f"model: {where} is a function that refers to the model itself; make it a method")


def _referred(value: Any) -> list[Any]:
    """What a function, and what it is a wrapper of, find outside themselves; nothing for anything else."""
    if not inspect.isfunction(value):
        return []
    written = inspect.unwrap(value)
    found = [inspect.getclosurevars(f) for f in (value, written) if inspect.isfunction(f) or inspect.ismethod(f)]
    return [written, *(thing for each in found for thing in (*each.nonlocals.values(), *each.globals.values()))]


def _uncompile(body: nn.Module) -> None:
    """Has what torch.compile wrapped, a module or its ``forward``, run as it is written.

    For stacks, and for each engine's calls, it would be compiled anew; and a compiled ``forward`` is the user's own.
    """
    for module in body.modules():
        if _wraps(module):
            module.forward = module._orig_mod.__call__
        elif _is_compiled(module):
            del module.forward


def _wraps(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch._dynamo.")


def _is_compiled(module: nn.Module) -> bool:
    """Whether it is what torch.compile made of a module, or its own ``forward`` what it made of that."""
    if _wraps(module):
        return True
    given = vars(module).get("forward")
    if not hasattr(given, "_torchdynamo_orig_callable"):
        return False
    written = inspect.unwrap(given)
    return getattr(written, "__func__", written) is type(module).forward


def _copy(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    memo: dict[int, object] = {}
    precise = _precise(model) if dtype in (torch.bfloat16, torch.float16) else set()
    for tensor in (*model.parameters(), *model.buffers()):
        kept = not tensor.is_floating_point() or id(tensor) in precise
        moved = tensor.detach().to(device, None if kept else dtype)
        if not isinstance(tensor, nn.Parameter) and moved.data_ptr() == tensor.data_ptr():
            moved = moved.clone()  # a forward may write into a buffer: batch norm, a counter, a cache
        memo[id(tensor)] = nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved
    for module in model.modules():
        if getattr(module, "max_norm", None) is not None:  # an embedding that rescales its weight in place as it reads
            weight = memo[id(module.weight)]
            memo[id(module.weight)] = nn.Parameter(weight.detach().clone(), requires_grad=False)
        for parameter in module.parameters(recurse=False):
            if parameter.grad is not None:  # a left-over gradient is not needed, and as large as the weight
                memo[id(parameter.grad)] = None
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise TypeError(f"model: wanted modules whose structure can be copied (copy.deepcopy), got {error}") from error


def _precise(model: nn.Module) -> set[int]:
    """Buffers that half precision would spoil and that no product reads: statistics of norms, rotary frequencies."""
    names = ("running_mean", "running_var", "inv_freq")
    return {id(tensor) for name, tensor in model.named_buffers() if name.rpartition(".")[2].endswith(names)}


def _slots(model: nn.Module, body: nn.Module) -> dict[str, Slot]:
    """Name -> slot; names as in ``model.named_parameters()`` and ``named_buffers()``, a tied tensor under its first."""
    first: dict[int, str] = {id(t): n for n, t in (*model.named_buffers(), *model.named_parameters())}
    places: dict[str, list[tuple[dict, str]]] = {}
    buffers = {name for name, _ in model.named_buffers()}
    for theirs, mine in zip(model.modules(), body.modules(), strict=True):
        for source, table in ((theirs._parameters, mine._parameters), (theirs._buffers, mine._buffers)):
            for key, tensor in source.items():
                if tensor is not None:
                    places.setdefault(first[id(tensor)], []).append((table, key))
    return {name: Slot(name, tuple(found), name in buffers) for name, found in places.items()}
