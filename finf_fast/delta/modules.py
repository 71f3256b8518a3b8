"""The table of modules: structures that a model spells out in small steps and an operation does in one.

A module is recognised by what it holds, never by its name alone, and believed only after a numerical comparison with
its own forward, for inputs of the ranks at which the two agreed and while its settings are what they were then; or it
is rewritten in terms of rules that are exact by themselves (experts). The replacement is an attribute of the engine's
own copy of the module; the user's module is not touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finf_fast import ops
from finf_fast.delta.layers import change_of, rms_norm, rows_of
from finf_fast.delta.products import logical_of
from finf_fast.delta.stack import Carried, Stack, lift
from finf_fast.delta.structure import count_of

EPS = ("variance_epsilon", "eps", "epsilon")


def install(body: nn.Module) -> dict[str, int]:
    """Gives recognised modules of the engine's body their fused forward; how many of each kind, for the record."""
    found: dict[str, int] = {}
    config = getattr(body, "config", None)
    if hasattr(config, "_experts_implementation") and next(body.parameters()).dtype is torch.float64:
        config._experts_implementation = "eager"  # the grouped product knows no float64
    for module in body.modules():
        for kind, recognise in RECOGNISED:
            forward = recognise(module)
            if forward is not None:
                module.forward = forward
                found[kind] = found.get(kind, 0) + 1
                break
    return found


def _carries(*xs: Any) -> bool:
    return any(isinstance(x, Carried) for x in xs)


def _rms_norm(module: nn.Module) -> Callable[[Any], Any] | None:
    """x / sqrt(mean(x²) + eps) · weight, or · (1 + weight): spelt out as pow, mean, rsqrt, mul in Hugging Face."""
    parameters = dict(module.named_parameters())
    eps = next((getattr(module, name) for name in EPS if isinstance(getattr(module, name, None), float)), None)
    if (
        set(parameters) != {"weight"}
        or parameters["weight"].dim() != 1
        or eps is None
        or isinstance(module, nn.RMSNorm)
    ):
        return None
    if dict(module.named_buffers()) or list(module.children()) or module._forward_hooks or module._forward_pre_hooks:
        return None
    plus, ranks = _which_weight(module, parameters["weight"], eps)
    if not ranks:
        return None
    own = module.forward

    def forward(hidden_states: Any) -> Any:
        weight = module.weight
        if not _carries(hidden_states, weight):
            return own(hidden_states)
        if plus:
            return Stack(_shifted(hidden_states, weight, eps))
        return rms_norm(hidden_states, (weight.shape[0],), weight, eps)

    return _for(ranks, module, forward)


def _for(ranks: set[int], module: nn.Module, fused: Callable[[Any], Any]) -> Callable[..., Any]:
    """The fused forward for what it was compared on, the module's own for any other call."""
    own, before = module.forward, _settings(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        known = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and args[0].dim() in ranks
        return fused(*args) if known and _settings(module) == before else own(*args, **kwargs)

    return forward


def _settings(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of a module and its children: a parent may turn one of them later."""
    plain = (bool, int, float, str, tuple, type(None))
    return {
        f"{name}.{key}": value
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, plain) and not key.startswith("_") and key != "training"
    }


def _ranks(D: int) -> dict[int, tuple[int, ...]]:
    """Rank -> a shape of that rank that ends in D, no two of its sizes alike."""
    others = [n for n in (2, 3, 5, 7) if n != D]
    return {rank: (*others[: rank - 1], D) for rank in (1, 2, 3, 4)}


def _shifted(x: Any, weight: Any, eps: float) -> Tensor:
    """rms_norm by 1 + weight; the sum in float32, where it loses nothing that the module keeps."""
    base = logical_of(weight)
    one = 1 + (base.float() if base.dtype in (torch.bfloat16, torch.float16) else base)
    return ops.rms_norm_delta(rows_of(x), one, dweight=change_of(weight), eps=eps)


def _which_weight(module: nn.Module, weight: Tensor, eps: float) -> tuple[bool, set[int]]:
    """Whether the module multiplies by 1 + weight rather than by weight, and at which ranks; none: it does neither."""
    D = len(weight)
    single = torch.eye(D, device=weight.device, dtype=weight.dtype)[0]  # as far out as a normed row can be
    inputs = {
        rank: [*[(samples(weight, *shape) * size,) for size in (1e-2, 1.0, 1e2)], (single.expand(shape),)]
        for rank, shape in _ranks(D).items()
    }
    for plus in (False, True):

        def wanted(x: Tensor, plus: bool = plus) -> Tensor:
            wide = x.double()
            normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
            return normed * (weight.double() + plus)

        ranks = {rank for rank, given in inputs.items() if _agrees(module, wanted, given)}
        if ranks:
            return plus, ranks
    return False, set()


def samples(like: Tensor, *shape: int) -> Tensor:
    """Random numbers that are the same each time, of the type and on the device of ``like``."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like)


def _agrees(module: Callable[..., Any], formula: Callable[..., Tensor], inputs: Sequence[tuple[Any, ...]]) -> bool:
    """Whether a module computes a formula, on each of the inputs, to the rounding of its own type."""
    for given in inputs:
        limit = 1e-4 if given[0].dtype in (torch.float32, torch.float64) else 3e-2
        try:
            with torch.no_grad():
                y, wanted = module(*given), formula(*given).double()
        except Exception:  # whatever a forward says to a shape that was made up: it is not this module
            return False
        if not isinstance(y, Tensor) or y.shape != wanted.shape:
            return False
        if not torch.allclose(y.double(), wanted, rtol=limit, atol=limit * float(wanted.abs().max())):
            return False
    return True


def _activation(module: nn.Module) -> Callable[..., Any] | None:
    """A GELU that a module spells out in powers and products (GPT-2's), told from its values."""
    bare = not (module._parameters or module._buffers or module._modules)
    if not bare or type(module).__module__.startswith("torch.") or (kind := _kind(module.forward)) is None:
        return None
    own = module.forward
    shapes = _ranks(11).items()
    inputs = {rank: [(torch.linspace(-8, 8, math.prod(shape)).double().view(shape),)] for rank, shape in shapes}
    ranks = {rank for rank, given in inputs.items() if _agrees(own, ACTIVATIONS[kind], given)}

    def forward(x: Any) -> Any:
        return Stack(ops.activation_delta(x.stacked, kind)) if isinstance(x, Carried) else own(x)

    return _for(ranks, module, forward)


def _gated(module: nn.Module) -> Callable[[Any], Any] | None:
    """down(act(gate(x)) · up(x)): one pass over the widest activations of a Llama instead of two."""
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(type(part) is nn.Linear for part in parts) or len(list(module.parameters())) > 6:
        return None
    kind = _kind(getattr(module, "act_fn", None))
    if kind is None or module._forward_hooks or module._forward_pre_hooks:
        return None
    ranks = _multiplies(module, parts, kind)
    own = module.forward
    gate, up, down = parts

    def forward(x: Any) -> Any:
        a, b = gate(x), up(x)
        if not _carries(a, b):
            return own(x)
        return down(Stack(ops.activation_delta(rows_of(a), kind, rows_of(b))))

    return _for(ranks, module, forward) if ranks else None


def _multiplies(module: nn.Module, parts: list[Any], kind: str) -> set[int]:
    """The ranks at which the module is down(act(gate(x)) · up(x))."""
    gate, up, down = parts

    def wanted(x: Tensor) -> Tensor:
        return down(ACTIVATIONS[kind](gate(x)) * up(x))

    def inputs(shape: tuple[int, ...]) -> list[tuple[Tensor]]:
        return [(samples(gate.weight, *shape) * size,) for size in (1.0, 30.0)]

    return {rank for rank, shape in _ranks(gate.in_features).items() if _agrees(module, wanted, inputs(shape))}


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def _kind(function: Any) -> str | None:
    """The activation that a module or function computes, told from its values."""
    if not callable(function):
        return None
    # Far out too: a clipped GELU is a GELU up to its clip.
    x = torch.cat([torch.linspace(-8, 8, 81), torch.tensor([-1e4, -100, -30, -12, 12, 30, 100, 1e4])]).double()
    try:
        y = function(x)
    except Exception:  # any module may be asked, with whatever checks of its own
        return None
    for kind, known in ACTIVATIONS.items():
        if isinstance(y, Tensor) and y.shape == x.shape and torch.allclose(y, known(x), rtol=1e-9, atol=1e-12):
            return kind
    return None


def _experts(module: nn.Module) -> Callable[..., Any] | None:
    """Experts of a mixture whose weights lie in one tensor each, and whose route may differ from query to query."""
    names = {name: p.dim() for name, p in module.named_parameters()}
    if names != {"gate_up_proj": 3, "down_proj": 3} or not callable(getattr(module, "act_fn", None)):
        return None
    if not _routes(module):
        return None
    own = module.forward

    def forward(hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        if not _carries(hidden_states, top_k_index, top_k_weights, module.gate_up_proj, module.down_proj):
            return own(hidden_states, top_k_index, top_k_weights)
        return _mixture(module, hidden_states, top_k_index, top_k_weights)

    return forward


def _routes(module: nn.Module) -> bool:
    """Whether the module sums act(gate) · up through its experts as :func:`_mixture` does."""
    weight = module.gate_up_proj
    experts, _, width = weight.shape
    if module.down_proj.shape != (experts, width, weight.shape[1] // 2):
        return False
    x = samples(weight, 5, width)
    index = torch.arange(5 * min(2, experts), device=weight.device).reshape(5, -1) % experts
    gates = samples(weight, 5, index.shape[1]).abs()

    def formula(x: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for token, place in torch.cartesian_prod(torch.arange(5), torch.arange(index.shape[1])).tolist():
            e = int(index[token, place])
            gate, up = (x[token] @ weight[e].T).chunk(2)
            out[token] += gates[token, place] * (module.act_fn(gate) * up @ module.down_proj[e].T)
        return out

    return _agrees(module, formula, [(x, index, gates)])


def _mixture(module: nn.Module, x: Any, index: Any, weights: Any) -> Stack:
    """Σ_e gate_e(x) · expert_e(x), each expert on the tokens that the base or any query sends to it.

    A token that a query sends elsewhere has gate 0 there in one of the two, so its change is the whole of what it gains
    and loses: routing flips are exact.
    """
    count = count_of(x, index, weights, module.gate_up_proj, module.down_proj)
    experts = module.gate_up_proj.shape[0]
    gates, used = _gates(index, weights, experts, count)
    x = x if isinstance(x, Carried) else Stack(lift(x, count))
    out = torch.zeros_like(x.stacked, memory_format=torch.contiguous_format)
    for e in range(experts):
        tokens = used[:, e].nonzero()[:, 0]
        if not len(tokens):
            continue
        gate, up = F.linear(x[tokens], module.gate_up_proj[e]).chunk(2, dim=-1)
        y = F.linear(module.act_fn(gate) * up, module.down_proj[e])
        y = y * Stack(gates[:, tokens, e, None])
        out.index_add_(1, tokens, y.stacked.to(out.dtype))
    return Stack(out)


def _gates(index: Any, weights: Any, experts: int, count: int) -> tuple[Tensor, Tensor]:
    """(1 + Q, T, E) weight of each expert and its change, and (T, E): who is asked by anyone."""
    i = index.stacked if isinstance(index, Carried) else index.expand(count, *index.shape)
    w = lift(weights, count)
    base = w.new_zeros((*i.shape[1:-1], experts)).scatter(-1, i[0], w[0])
    gates = w.new_zeros((count, *base.shape))
    gates[0] = base
    used = torch.zeros_like(base, dtype=torch.bool).scatter(-1, i[0], True)
    for q in range(1, count):
        same = (i[q] == i[0]).all(-1, keepdim=True)
        carried = torch.zeros_like(base).scatter(-1, i[q], w[q])
        moved = torch.zeros_like(base).scatter(-1, i[q], w[0] + w[q]) - base
        gates[q] = torch.where(same, carried, moved)
        used |= torch.zeros_like(used).scatter(-1, i[q], True)
    return gates, used


RECOGNISED = (("rms_norm", _rms_norm), ("activation", _activation), ("gated", _gated), ("experts", _experts))
