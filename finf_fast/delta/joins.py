"""Rules that join stacks with each other or with plain tensors, and take them apart."""

from __future__ import annotations

import torch

from finf_fast.delta.stack import Stack, lift
from finf_fast.delta.structure import behind, cast, count_of
from finf_fast.delta.table import rule


@rule("cat", "concat", "concatenate")
def cat(tensors, dim=0, **kwargs):
    count = count_of(*tensors)
    parts = [lift(x, count) for x in tensors if not (x.dim() == 1 and x.numel() == 0)]
    kind = parts[0].dtype
    for part in parts[1:]:
        kind = torch.promote_types(kind, part.dtype)
    parts = [p if p.is_floating_point() == kind.is_floating_point else cast(Stack(p), kind).stacked for p in parts]
    return Stack(torch.cat(parts, behind(kwargs.get("axis", dim))))


@rule("stack")
def stack(tensors, dim=0):
    return cat([x.unsqueeze(dim if dim >= 0 else dim + x.dim() + 1) for x in tensors], dim)


@rule("hstack")
def hstack(tensors):
    tensors = [x if x.dim() else x.unsqueeze(0) for x in tensors]
    return cat(tensors, 0 if tensors[0].dim() == 1 else 1)


@rule("vstack")
def vstack(tensors):
    return cat([x if x.dim() > 1 else x.reshape(1, -1) for x in tensors], 0)


def _several(function: str):
    def run(x, size, dim=0):
        return tuple(Stack(part) for part in getattr(torch, function)(x.stacked, size, behind(dim)))

    return run


@rule("split", "split_with_sizes")
def split(x, split_size=None, dim=0, **kwargs):
    return _several("split")(x, kwargs.get("split_size_or_sections", kwargs.get("split_sizes", split_size)), dim)


@rule("chunk")
def chunk(input, chunks, dim=0):
    return _several("chunk")(input, chunks, dim)


@rule("tensor_split")
def tensor_split(input, indices_or_sections=None, dim=0, **kwargs):
    return _several("tensor_split")(input, kwargs.get("sections", kwargs.get("indices", indices_or_sections)), dim)


@rule("unbind")
def unbind(input, dim=0):
    parts = tuple(Stack(part) for part in input.stacked.unbind(behind(dim)))
    return parts
