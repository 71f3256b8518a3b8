"""What flows into and back out of every layer with a weight, for the fit of curvature factors.

The weights themselves are left without a graph, so a backward pass asks only for the gradients of the layers' outputs:
two thirds of the work of an ordinary one. Seen are ``torch.nn.functional.linear``, ``embedding`` and ``conv1d`` to
``conv3d`` with one group, the ``torch.addmm(bias, x, weight)`` of Hugging Face's Conv1D, and inside
``nn.MultiheadAttention`` both projections of a self-attention.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from finf_fast.calls import by_place, ordinary, patches, plain, self_attention, takes
from finf_fast.order import InOrder, Mixed
from finf_fast.skeleton import Skeleton

TURNED = ("addmm", "embedding")  # whose weight lies (inputs, outputs)


@dataclass(frozen=True)
class Use:
    """One call of a layer, waiting for the gradient of its output.

    Attributes:
        kind: ``"linear"``, ``"conv"``, ``"addmm"`` or ``"embedding"``.
        weight, bias: names of its parameters; no bias: None.
        lead: sizes of the input before its last dimension, (B, ...) where the model keeps samples first; of a
            convolution (B, positions); of all P the product.
        inputs: () -> (P, n) input rows, or (P,) ids; P positions.
        kept: (P,) which positions count; None for all.
        source: the tensor that inputs are read from, and how often it had been written into.
        edge: where the gradient of the output passes.
        outputs: (its gradient) -> (P, m).
        width: n; of an embedding its number of ids.
    """

    kind: str
    weight: str
    bias: str | None
    lead: tuple[int, ...]
    inputs: Callable[[], Tensor]
    kept: Tensor | None
    source: tuple[Tensor, int]
    edge: GradientEdge
    outputs: Callable[[Tensor], Tensor]
    width: int

    def require_unwritten(self) -> None:
        """Raises ``RuntimeError`` where the input has changed since."""
        tensor, version = self.source
        if tensor._version != version:
            raise RuntimeError(f"{self.weight}: the input of this layer was written in place after its use")


class Watch(TorchFunctionMode):
    """Inside this mode the layers of a body whose weights are ``names`` leave a :class:`Use` behind.

    Args:
        body: whose layers; a parameter among ``names`` is handed to them without its graph.
        names: of parameters.
        samples: B of the batch, where an embedding of positions, whose rows all samples share, is to give every sample
            its own; 0: as it is. What looks like such ids need not be, so whoever asks for it checks what comes of it.
        length: of a sample's first dimension.
        one_each: whether that goes for ids that count up even where there are B of them, which may as well be one for
            each sample.

    Attributes:
        given: names of the embeddings of which that was done, one a use.
    """

    def __init__(self, body: Skeleton, names: list[str], samples: int = 0, length: int = 0, one_each: bool = False):
        super().__init__()
        self._samples, self._length, self._one_each = samples, length, one_each
        self.given: tuple[str, ...] = ()
        self._names = {id(tensor): name for name, tensor in body.base(names).items()}
        self.uses: list[Use] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        catch = _LAYERS.get(func)
        args, kwargs = by_place(func, args, kwargs) if catch is not None and kwargs else (args, kwargs)
        caught = catch is not None and ordinary() and takes(catch, (self, *args), kwargs)
        found = catch(self, *args, **kwargs) if caught else None
        return func(*args, **kwargs) if found is None else found

    def gradients(
        self, total: Tensor, parameters: Mapping[str, Tensor] | None = None, again: bool = False
    ) -> list[Tensor | None]:
        """Of ``total`` by each use's output, in their order.

        Args:
            parameters: what ``total`` feels of these other than through uses is checked.
            again: the graph will be asked once more.

        Raises:
            Mixed: it depends on one that is watched, or its gradient by another is not finite.
        """
        if not self.uses or not total.requires_grad:
            return [None] * len(self.uses)
        others = {} if parameters is None else dict(parameters)
        wanted = [*(use.edge for use in self.uses), *others.values()]
        found = torch.autograd.grad(total, wanted, allow_unused=True, retain_graph=again)
        watched = set(self._names.values())
        for name, gradient in zip(others, found[len(self.uses) :], strict=True):
            if gradient is not None and name in watched:
                raise Mixed(f"{name}, a parameter in a call that is not watched")
            if gradient is not None and not bool(torch.isfinite(gradient).all()):
                raise Mixed(f"{name}, whose gradient is not finite")
        return list(found[: len(self.uses)])

    def name_of(self, tensor: Any) -> str | None:
        return self._names.get(id(tensor))

    def own_ids(self, ids: Tensor, name: str) -> Tensor:
        """Ids of positions (L,) or (1, L) as (B, L), where every sample is to have its own."""
        if self._samples < 2 or not (self._of_places(ids) or self._counted(ids)):
            return ids
        self.given = (*self.given, name)
        return ids.expand(self._samples, ids.shape[-1])

    def _of_places(self, ids: Tensor) -> bool:
        return tuple(ids.shape) in ((self._length,), (1, *ids.shape[1:2]))

    def _counted(self, ids: Tensor) -> bool:
        several = ids.dim() == 1 and len(ids) > 1 and (self._one_each or len(ids) != self._samples)
        return several and bool((ids.diff() == 1).all())

    def still(self, bias: Tensor | None) -> Tensor | None:
        """A bias that is watched without its graph; another as it is."""
        return bias if bias is None or self.name_of(bias) is None else bias.detach()

    def passed(self, output: Tensor, **use: Any) -> Tensor:
        """``output``, no view, with a place where its gradient can be read."""
        if not output.requires_grad:  # a leaf could not be written into
            output = output.requires_grad_().clone()
        self.uses.append(Use(edge=get_gradient_edge(output), **use))
        return output


@contextlib.contextmanager
def each_its_own(watch: Watch, samples: int, fixed: Container[int]) -> Iterator[None]:
    """The forward of a batch that is to be told apart by sample.

    Args:
        watch: entered here.
        samples, fixed: as :class:`finf_fast.order.InOrder` takes them.

    Raises:
        Mixed: a call may move samples, or as in :func:`owned`.
    """
    with owned(watch), watch, InOrder(samples, fixed):
        yield


@contextlib.contextmanager
def owned(watch: Watch) -> Iterator[None]:
    """What is made of a batch after its forward.

    Raises:
        Mixed: it fails, perhaps because every sample was given its own positions.
    """
    try:
        yield
    except (torch.OutOfMemoryError, Mixed):
        raise
    except Exception as error:  # a model's and a loss' own, of shapes they do not expect: each sample alone says if so
        if watch.given:
            raise Mixed(f"{watch.given[-1]}, whose rows all samples share ({error})") from error
        raise


def positions_of(use: Use, samples: int) -> int | None:
    """Positions R a sample, if rows lie sample by sample; None where there are not so many for each."""
    each, rest = divmod(math.prod(use.lead), samples)
    return None if rest else each


def _linear(watch: Watch, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    name = watch.name_of(weight)
    if name is None or weight.dim() != 2 or not plain(input):
        return None
    x = input.reshape(-1, input.shape[-1])
    out = watch.passed(
        F.linear(x, weight.detach(), watch.still(bias)),
        **_matrix_use("linear", name, watch.name_of(bias), input.shape[:-1], x.detach()),
    )
    return out.view(*input.shape[:-1], weight.shape[0])


def _addmm(watch: Watch, bias: Tensor, input: Tensor, weight: Any = None, **scales: Any) -> Tensor | None:
    name = watch.name_of(weight)
    if name is None or scales or weight.dim() != 2 or not plain(input):
        return None
    lead = (len(input),)  # Hugging Face has flattened (B, L) to rows
    return watch.passed(
        torch.addmm(watch.still(bias), input, weight.detach()),
        **_matrix_use("addmm", name, watch.name_of(bias), lead, input.detach()),
    )


def _matrix_use(kind: str, weight: str, bias: str | None, lead: Any, x: Tensor) -> dict[str, Any]:
    return {
        **{"kind": kind, "weight": weight, "bias": bias, "lead": tuple(lead)},
        **{"inputs": lambda: x, "kept": None, "source": (x, x._version), "outputs": lambda g: g},
        "width": x.shape[-1],
    }


def _embedding(
    watch: Watch,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    name = watch.name_of(weight)
    if name is None or scale_grad_by_freq or not plain(input):
        return None
    input = watch.own_ids(input, name)
    ids = input.reshape(-1).long()
    use = _matrix_use("embedding", name, None, input.shape, ids)
    use["kept"] = None if padding_idx is None else ids != padding_idx % weight.shape[0]
    use |= {"outputs": lambda g: g.reshape(-1, g.shape[-1]), "width": weight.shape[0]}
    return watch.passed(F.embedding(input, weight.detach(), padding_idx, max_norm, norm_type), **use)


def _attention(watch: Watch, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None] | None:
    return self_attention(partial(_projected, watch), *args, **kwargs)


def _projected(watch: Watch, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = _linear(watch, x, weight, bias)
    return F.linear(x, weight, bias) if out is None else out


def _convolution(function: Callable) -> Callable:
    def conv(
        watch: Watch,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor | None:
        name = watch.name_of(weight)
        if name is None or groups != 1 or input.dim() != weight.dim() or not plain(input):
            return None
        x = input.detach()
        out = function(input, weight.detach(), watch.still(bias), stride, padding, dilation, groups)
        return watch.passed(
            out,
            kind="conv",
            weight=name,
            bias=watch.name_of(bias),
            lead=(len(x), math.prod(out.shape[2:])),
            inputs=lambda: patches(x, weight.shape[2:], stride, padding, dilation),
            kept=None,
            source=(x, x._version),
            outputs=lambda g: g.flatten(2).transpose(1, 2).reshape(-1, g.shape[1]),
            width=weight[0].numel(),
        )

    return conv


_LAYERS: Mapping[Callable, Callable] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    F.multi_head_attention_forward: _attention,
    **{function: _convolution(function) for function in (F.conv1d, F.conv2d, F.conv3d)},
}
