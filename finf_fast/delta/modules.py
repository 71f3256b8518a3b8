"""The table of modules: structures that a model spells out in small steps and an operation does in one.

A module is recognised by what it holds, never by its name alone, and believed only after a numerical comparison with
its own forward, for inputs of as many dimensions as were compared and while it is as it was then. Any other call goes
to its own forward, whose steps are carried one by one. The replacement is an attribute of the engine's own copy of the
module; the user's module is not touched.
"""

from __future__ import annotations

import itertools
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
from finf_fast.delta.table import current

PARTS = 16  # modules; what one operation does has few, and a whole model need not be looked through
# What every module has and no forward sets; which tensors it holds is the engine's own business.
COMMON = vars(nn.Module()).keys() - {"training"}
EPS = ("variance_epsilon", "eps", "epsilon")


def install(body: nn.Module) -> dict[str, int]:
    """Gives recognised modules of the engine's body their fused forward; how many of each kind, for the record."""
    found: dict[str, int] = {}
    config = getattr(body, "config", None)
    if hasattr(config, "_experts_implementation") and next(body.parameters()).dtype is torch.float64:
        config._experts_implementation = "eager"  # the grouped product knows no float64
    for module in body.modules():
        few = len(list(itertools.islice(module.modules(), PARTS + 1))) <= PARTS
        for kind, recognise in RECOGNISED if few else ():
            forward = _unmoved(module, recognise)
            if forward is not None:
                module.forward = forward
                found[kind] = found.get(kind, 0) + 1
                break
    return found


def _unmoved(module: nn.Module, recognise: Callable[[nn.Module], Any]) -> Callable[..., Any] | None:
    """The forward that ``recognise`` gives a module; None if asking changed the module, which is put back as it was."""
    held = [(part, dict(vars(part))) for part in module.modules()]
    before = _condition(module)
    forward = recognise(module)
    if _is_as(before, _condition(module)):
        return forward
    for part, attributes in held:
        vars(part).clear()
        vars(part).update(attributes)
    return None


def _condition(module: nn.Module) -> list[Any]:
    """What decides how a module and its children compute, their tensors aside: every attribute that a call may set."""
    found: list[Any] = []
    for part in module.modules():
        found.append(part)
        for name, value in vars(part).items():
            if name != "forward" and name not in COMMON:
                found += (name, tuple(value) if isinstance(value, list) else value)
    return found


def _is_as(before: list[Any], now: list[Any]) -> bool:
    return len(before) == len(now) and all(map(_same, before, now))


def _same(a: Any, b: Any) -> bool:
    """Whether two attributes are the same thing, or equal numbers or words or tuples of them."""
    if a is b:
        return True
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and isinstance(a, (int, float, complex, str, bytes)) and a == b


def _guarded(
    module: nn.Module, ranks: Sequence[int], fused: Callable[..., Any], carries: Callable[..., bool], arguments: int = 1
) -> Callable[..., Any]:
    """``fused`` for the calls for which it was compared with the module's own forward, that one for all others.

    Args:
        ranks: dimensions that the first argument may have.
        carries: whether a call with these arguments has anything to carry.
        arguments: how many tensors a call gives; all by place and nothing else.
    """
    own, before = module.forward, _condition(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        usual = len(args) == arguments and not kwargs and all(isinstance(x, Tensor) for x in args)
        if usual and args[0].dim() in ranks and carries(*args) and _is_as(before, _condition(module)):
            return fused(*args)
        return own(*args, **kwargs)

    return forward


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

    def fused(x: Any) -> Stack:
        if plus:
            return Stack(_shifted(x, module.weight, eps))
        return rms_norm(x, (module.weight.shape[0],), module.weight, eps)

    return _guarded(module, ranks, fused, lambda x: _carries(x, module.weight))


def _shifted(x: Any, weight: Any, eps: float) -> Tensor:
    """rms_norm by 1 + weight; the sum in float32, where it loses nothing that the module keeps."""
    base = logical_of(weight)
    one = 1 + (base.float() if base.dtype in (torch.bfloat16, torch.float16) else base)
    return ops.rms_norm_delta(rows_of(x), one, dweight=change_of(weight), eps=eps)


def _which_weight(module: nn.Module, weight: Tensor, eps: float) -> tuple[bool, list[int]]:
    """Whether the module multiplies by 1 + weight or by weight, and for inputs of how many dimensions; none if neither.

    Asked with another weight than its own: by one that is 1 everywhere it might as well multiply twice.
    """
    given = samples(weight, 2, len(weight))[1]
    single = torch.eye(len(weight), device=weight.device, dtype=weight.dtype)[:2]  # as far out as a normed row can be
    rows = _rows(weight, len(weight), (1.0, 1e-2, 1e2))
    rows[3 : 3 + len(single)] = single

    def asked(x: Tensor) -> Any:
        return torch.func.functional_call(module, {"weight": given}, (x,))

    for plus in (False, True):

        def wanted(x: Tensor, plus: bool = plus) -> Tensor:
            wide = x.double()
            normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
            return normed * (given.double() + plus)

        if ranks := _ranks(asked, wanted, rows):
            return plus, ranks
    return False, []


RANKS = (1, 2, 3, 4)


def _rows(like: Tensor, width: int, sizes: Sequence[float]) -> Tensor:
    """Rows for :func:`_ranks`: random numbers of these sizes in turn."""
    count = math.prod(_leading(4, width))
    return samples(like, count, width) * torch.tensor(sizes).repeat(count)[:count, None].to(like)


def _leading(rank: int, width: int) -> tuple[int, ...]:
    """Sizes before the last of an input: none of them alike or 1, so that no dimension is taken for another."""
    sizes = [size for size in (2, 3, 4, 5, 6) if size != width]
    return tuple(sizes[3:4] if rank == 2 else sizes[: rank - 1])


def _ranks(module: Callable[..., Any], formula: Callable[[Tensor], Tensor], rows: Tensor) -> list[int]:
    """Of how many dimensions an input may be for the module to compute the formula on each row by itself."""
    width, wanted = rows.shape[-1], _asked(formula, rows)
    found = []
    for rank in RANKS if wanted is not None else ():
        shape = _leading(rank, width)
        starts = range(5) if rank == 1 else (0,)  # a single row each, of every size and the far ones
        taken = [slice(start, start + math.prod(shape)) for start in starts]
        pairs = [(rows[at].reshape(*shape, width), wanted[at].reshape(*shape, -1)) for at in taken]
        if all(_agrees(module, (x,), y) for x, y in pairs):
            found.append(rank)
    return found


def samples(like: Tensor, *shape: int) -> Tensor:
    """Random numbers that are the same each time, of the type and on the device of ``like``."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like)


def _agrees(module: Callable[..., Any], given: tuple[Any, ...], wanted: Tensor) -> bool:
    """Whether a module gives what is wanted, each row to the rounding of its own type."""
    limit = 1e-4 if given[0].dtype in (torch.float32, torch.float64) else 3e-2
    y, wanted = _asked(module, *given), wanted.double()
    if not isinstance(y, Tensor) or y.shape != wanted.shape:
        return False
    room = limit * (wanted.abs() + wanted.abs().amax(-1, keepdim=True))
    return bool(((y.double() - wanted).abs() <= room).all())


def _asked(function: Callable[..., Any], *given: Any) -> Any:
    """What a function gives for an input that we made up; None where it will not have it, whatever it raises then.

    None too where it writes into its input, as no operation does that might stand for it.
    """
    taken = [x.clone() for x in given]
    try:
        with torch.no_grad():
            y = function(*taken)
    except Exception:
        return None
    return y if all(map(torch.equal, taken, given)) else None


def _activation(module: nn.Module) -> Callable[..., Any] | None:
    """A GELU that a module spells out in powers and products (GPT-2's), told from its values."""
    bare = not (module._parameters or module._buffers or module._modules)
    if not bare or type(module).__module__.startswith("torch."):
        return None
    kind, ranks = _kind(module.forward)
    if kind is None:
        return None

    def fused(x: Any) -> Stack:
        _note(kind)
        return Stack(ops.activation_delta(x.stacked, kind))

    return _guarded(module, ranks, fused, _carries)


def _note(kind: str) -> None:
    """The engine watches what a model calls for kinks; what a fused forward does, it does not see."""
    if kind == "relu":
        current().kinks.add(kind)


def _gated(module: nn.Module) -> Callable[..., Any] | None:
    """down(act(gate(x)) · up(x)): one pass over the widest activations of a Llama instead of two."""
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(type(part) is nn.Linear for part in parts) or len(list(module.parameters())) > 6:
        return None
    if dict(module.named_buffers()) or module._forward_hooks or module._forward_pre_hooks:
        return None
    kind, _ = _kind(getattr(module, "act_fn", None))
    ranks = [] if kind is None else _multiplies(module, parts, kind)
    if not ranks:
        return None
    gate, up, down = parts
    weights = [(part, name) for part in (gate, up) for name in ("weight", "bias")]

    def fused(x: Any) -> Any:
        _note(kind)
        return down(Stack(ops.activation_delta(rows_of(gate(x)), kind, rows_of(up(x)))))

    return _guarded(module, ranks, fused, lambda x: _carries(x, *(getattr(*weight) for weight in weights)))


def _multiplies(module: nn.Module, parts: list[Any], kind: str) -> list[int]:
    gate, up, down = parts
    rows = _rows(gate.weight, gate.in_features, (1.0, 30.0))
    return _ranks(module, lambda x: down(ACTIVATIONS[kind](gate(x)) * up(x)), rows)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def _kind(function: Any) -> tuple[str | None, list[int]]:
    """The activation that a module or function computes, and for how many dimensions, told from its values."""
    if not callable(function):
        return None, []
    # Far out too: a clipped GELU is a GELU up to its clip.
    far = torch.tensor([-1e4, -100, -30, -12, 12, 30, 100, 1e4])
    x = torch.cat([torch.linspace(-8, 8, math.prod(SIZES) - len(far)), far]).double()
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    found: dict[str, list[int]] = {}
    for rank in RANKS:
        given = x.view(-1, *SIZES[5 - rank :])
        for kind, known in ACTIVATIONS.items():
            if _equal(_asked(function, given), known(given)):
                found.setdefault(kind, []).append(rank)
    return next(iter(found.items())) if len(found) == 1 else (None, [])


SIZES = (2, 3, 5, 7)  # of the dimensions of an input to an activation


def _equal(y: Any, known: Tensor) -> bool:
    return isinstance(y, Tensor) and y.shape == known.shape and torch.allclose(y.to(known), known, 1e-9, 1e-12)


def _experts(module: nn.Module) -> Callable[..., Any] | None:
    """Experts of a mixture whose weights lie in one tensor each, and whose route may differ from query to query."""
    names = {name: p.dim() for name, p in module.named_parameters()}
    if names != {"gate_up_proj": 3, "down_proj": 3} or not callable(getattr(module, "act_fn", None)):
        return None
    if not _routes(module):
        return None
    own = (module, "gate_up_proj"), (module, "down_proj")

    def carries(*args: Any) -> bool:
        return args[1].dim() == args[2].dim() == 2 and _carries(*args, *(getattr(*weight) for weight in own))

    return _guarded(module, (2,), lambda *args: _mixture(module, *args), carries, arguments=3)


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

    wanted = _asked(formula, x, index, gates)
    return wanted is not None and _agrees(module, (x, index, gates), wanted)


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
