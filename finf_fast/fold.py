"""Batch norm folded into the convolution before it, where the graph proves that this is exact.

In eval mode batch norm is ``y·a + c`` with ``a = γ/√(var+ε)`` and ``c = β − mean·a``, so it disappears into the
weight and bias of the layer it follows, for the base model and for every updated one alike. It is done only where
``torch.fx`` traces the model and shows that the norm is the layer's sole reader and that neither is called twice;
anywhere else the norm stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from finf_fast.skeleton import Skeleton, Slot

# Not linear layers: behind one, batch norm scales the last dimension of (B, C) but the first of (B, L, C).
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Fold:
    """A layer and the batch norm that reads it, by module name."""

    layer: str
    norm: str
    eps: float

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the tensors that the folded weight and bias are made of; not all need exist."""
        norm = ("weight", "bias", "running_mean", "running_var")
        return (f"{self.layer}.weight", f"{self.layer}.bias", *(f"{self.norm}.{key}" for key in norm))

    def fold(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Weight and bias of the layer with the norm inside, from the tensors of :attr:`sources`."""
        weight = tensors[self.sources[0]]
        scale, bias = self.affine(tensors)
        return weight * scale.reshape(-1, *[1] * (weight.dim() - 1)), bias

    def affine(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What each output channel of the layer without its bias is multiplied by, and what is added."""
        _, bias, gamma, beta, mean, var = (tensors.get(name) for name in self.sources)
        scale = torch.rsqrt(var + self.eps)
        scale = scale if gamma is None else scale * gamma
        shift = -mean if bias is None else bias - mean
        return scale, shift * scale if beta is None else shift * scale + beta


def find(body: Skeleton) -> list[Fold]:
    """The pairs that may be folded; none if the model cannot be traced or shares one weight between two layers."""
    module = body.module
    if not any(isinstance(m, NORMS) for m in module.modules()):
        return []
    try:
        tracer = fx.Tracer()
        tracer.proxy_buffer_attributes = True  # a read of a norm's statistics past the norm is to be seen
        graph = tracer.trace(module)
    except Exception:  # a model with Python control flow over its inputs: any error means "leave it as it is"
        return []
    modules = dict(module.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    direct = {
        node.target.rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"
    }  # tensors read past their module
    pairs = (_pair(node, modules, calls, direct) for node in graph.nodes)
    return [pair for pair in pairs if pair is not None and _alone(body, pair)]


def _alone(body: Skeleton, pair: Fold) -> bool:
    """Whether no other module shares the layer's or the norm's tensors."""
    return all(len(body.slots[name].places) == 1 for name in pair.sources if name in body.slots) and (
        f"{pair.layer}.weight" in body.slots
    )


def install(body: Skeleton, folds: Sequence[Fold]) -> None:
    """Takes the norms out of the body and gives every folded layer a bias."""
    for pair in folds:
        layer = body.module.get_submodule(pair.layer)
        body.slots[f"{pair.layer}.bias"] = Slot(f"{pair.layer}.bias", ((layer._parameters, "bias"),), False)
        parent, _, child = pair.norm.rpartition(".")
        setattr(body.module.get_submodule(parent), child, nn.Identity())
        for name in [name for name in body.slots if name.rpartition(".")[0] == pair.norm]:
            del body.slots[name]


def _pair(node: fx.Node, modules: dict[str, nn.Module], calls: Counter, direct: set[str]) -> Fold | None:
    norm = modules.get(node.target) if node.op == "call_module" else None
    if (
        not isinstance(norm, NORMS)
        or norm.running_var is None
        or not node.args
        or not isinstance(node.args[0], fx.Node)
    ):
        return None
    source = node.args[0]
    layer = modules.get(source.target) if source.op == "call_module" else None
    if type(layer) not in LAYERS or len(source.users) != 1 or calls[source.target] != 1 or calls[node.target] != 1:
        return None
    if {source.target, node.target} & direct or layer._forward_hooks or norm._forward_hooks or norm._forward_pre_hooks:
        return None
    return Fold(source.target, node.target, norm.eps)


def laid_out(kernel: Tensor) -> Tensor:
    """A 2-D convolution's kernel channels-last: what convolutions on a processor read fastest; else as it is."""
    return kernel.contiguous(memory_format=torch.channels_last) if kernel.dim() == 4 else kernel
