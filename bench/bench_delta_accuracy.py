"""Error of the scores on every architecture at every step size: the carried change beside its rivals.

Truth is two float64 forwards with the change added in float64. The rivals: ``torch.func.jvp`` (the first-order limit)
and subtracting two forwards. The carried change and both rivals run in bfloat16 and in float32, from the same float32
model, update and samples.

    python bench/bench_delta_accuracy.py [--nets gpt2 resnet ...] [--steps 1e-1 1e-3 1e-5 1e-6] [--save]

Error is ‖e‖ / ‖true‖ over samples, root mean square over the queries; rank is Spearman's correlation of the carried
scores with the truth, the worst query's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import architectures
import finf_fast as ff
import table
from finf_fast import loss as losses
from finf_fast.delta import DeltaEngine
from finf_fast.lowrank import dense

STEPS = (1e-1, 1e-3, 1e-5, 1e-6)
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Float64(TorchFunctionMode):
    """Where a model says float32, as Hugging Face's norms and softmax do, it gets float64: a truth without rounding."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = Tensor.double if func is Tensor.float else func
        args = tuple(torch.float64 if x is torch.float32 else x for x in args)
        kwargs = {key: torch.float64 if x is torch.float32 else x for key, x in (kwargs or {}).items()}
        return func(*args, **kwargs)


def cast(batch: Any, dtype: torch.dtype) -> Any:
    return losses.mapped(lambda x: x.to(dtype) if x.is_floating_point() else x, batch)


def plainest(model: nn.Module) -> nn.Module:
    """A copy whose experts are computed one by one: the grouped product knows neither float64 nor a derivative."""
    model = copy.deepcopy(model)
    if hasattr(model, "config"):
        model.config._experts_implementation = "eager"
    return model


class Called(nn.Module):
    """The per-sample losses of a net as a module's output, for functional calls."""

    def __init__(self, net: nn.Module, loss: losses.Loss):
        super().__init__()
        self.net, self._loss = net, loss

    def forward(self, batch: Any) -> Tensor:
        return self._loss.per_sample(self.net, batch)


def subtracted(case: architectures.Case, update: ff.Update, dtype: torch.dtype) -> Tensor:
    """(S,) two forwards in ``dtype`` and their difference."""
    loss, batch = losses.resolve(case.loss), cast(case.batch, dtype)
    before = plainest(case.model).double()
    after = copy.deepcopy(before)
    with torch.no_grad():
        for name, change in update.params.items():
            after.get_parameter(name).add_(dense(change).double())
        values = [loss.per_sample(net.to(dtype), batch).double() for net in (before, after)]
    return values[1] - values[0]


def truth(case: architectures.Case, update: ff.Update) -> Tensor:
    """(S,) in float64 throughout."""
    with Float64():
        return subtracted(case, update, torch.float64)


def derivative(case: architectures.Case, update: ff.Update, dtype: torch.dtype) -> Tensor:
    """(S,) the first-order change by forward-mode differentiation in ``dtype``."""
    net = Called(plainest(case.model).to(dtype), losses.resolve(case.loss))
    for p in net.parameters():
        p.requires_grad_(False)
    names = dict(net.named_parameters())
    primals = {name: p.detach() for name, p in names.items() if name.removeprefix("net.") in update.params}
    tangents = {name: dense(update.params[name.removeprefix("net.")]).to(dtype) for name in primals}
    batch = cast(case.batch, dtype)
    torch.backends.mha.set_fastpath_enabled(False)  # neither it nor the fused attention has a forward-mode rule
    with sdpa_kernel(SDPBackend.MATH):
        return jvp(lambda weights: functional_call(net, weights, (batch,)), (primals,), (tangents,))[1].double()


def carried(case: architectures.Case, updates: Sequence[ff.Update], dtype: torch.dtype, generic: set[str]) -> Tensor:
    """(Q, S) by the delta engine in ``dtype``; names of generic rules that it needed go into ``generic``."""
    engine = DeltaEngine(case.model, updates, losses.resolve(case.loss), torch.device("cpu"), dtype)
    found = engine.score(case.batch).delta.double()
    generic |= set(engine.record()["generic_rules"])
    return found


def each(way: Callable[..., Tensor], case: architectures.Case, updates: Sequence[ff.Update], *how: Any) -> Tensor:
    """(Q, S) by a way that knows one update at a time."""
    return torch.stack([way(case, update, *how) for update in updates])


def error(found: Tensor, true: Tensor) -> float:
    """Of (S,) or (Q, S) scores."""
    return float(((found - true).norm(dim=-1) / true.norm(dim=-1)).square().mean().sqrt())


def spearman(found: Tensor, true: Tensor) -> float:
    """Of (S,) or (Q, S) scores, the worst query's."""
    pairs = zip(found.reshape(-1, found.shape[-1]), true.reshape(-1, true.shape[-1]), strict=True)
    ranks = [torch.stack([x.argsort().argsort().double() for x in pair]) for pair in pairs]
    return min(float(torch.corrcoef(rank)[0, 1]) for rank in ranks)


def steps_on(case: architectures.Case, step: float) -> list[ff.Update]:
    """One SGD step of that size on each of the held-out queries."""
    return [ff.mirror(case.model, query, loss=case.loss, lr=step) for query in case.queries]


def tried(work: Callable[[], Tensor], true: Tensor) -> float | None:
    """An error, or None where a rival cannot run this model at all."""
    try:
        return float(f"{error(work(), true):.2g}")
    except (RuntimeError, NotImplementedError):
        return None


def row(name: str, step: float) -> dict[str, object]:
    """One line of the table."""
    case = architectures.build(name)
    updates = steps_on(case, step)
    true, generic, found = each(truth, case, updates), set(), {}
    for word, dtype in TYPES.items():
        scores = carried(case, updates, dtype, generic)
        found[f"carried_{word}"] = float(f"{error(scores, true):.2g}")
        found[f"rank_{word}"] = round(spearman(scores, true), 5)
    for word, dtype in TYPES.items():
        found[f"jvp_{word}"] = tried(lambda dtype=dtype: each(derivative, case, updates, dtype), true)
        found[f"subtraction_{word}"] = tried(lambda dtype=dtype: each(subtracted, case, updates, dtype), true)
    size = float(f"{true.abs().median():.2g}")
    return {"case": name, "kind": case.kind, "step": step, "change": size, **found, "generic": sorted(generic)}


def main(argv: list[str] | None = None) -> None:
    options = table.parser(__doc__.splitlines()[0])
    options.add_argument("--nets", nargs="+", default=list(architectures.ARCHITECTURES))
    options.add_argument("--steps", nargs="+", type=float, default=list(STEPS))
    options = options.parse_args(argv)
    nets, steps = (options.nets[:1], options.steps[:1]) if options.quick else (options.nets, options.steps)
    rows = []
    for name in nets:
        for step in steps:
            rows.append(row(name, step))
            print(" | ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if options.save:
        print(f"saved to {table.append('delta_accuracy', rows, table.machine.describe())}")


if __name__ == "__main__":
    main()
