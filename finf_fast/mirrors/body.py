"""The model's stand-in during a mirror step: its structure, weights θ + Δ in leaf tensors of their own, buffers copied.

The user's model is read and never written, so there is nothing to put back after an exception or a Ctrl-C.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finf_fast.loss import Loss, mapped
from finf_fast.lowrank import LowRank, compress_kernel, dense, kernel_pays, parts
from finf_fast.mirrors.choose import Filter, choose
from finf_fast.mirrors.factors import Capture, Gradient
from finf_fast.mirrors.query import Query, longest
from finf_fast.mirrors.watch import Use, Watch, each_its_own
from finf_fast.records import BadSample, NonFiniteLoss
from finf_fast.skeleton import Skeleton, vocabulary

# What sums of another order may differ by, far above rounding and below a mix-up. In float64 too: norms of some models
# round to float32 inside.
ALIKE = 3e-4
ONE_ROW = "Expected more than 1 value per channel"  # how torch's batch norm begins its complaint


@dataclass(frozen=True)
class Watched:
    """What :meth:`Body.watched` finds: (Q,) losses, uses of layers, and the gradients of each use's output, those of
    the sum of the losses and those of their weighted sum."""

    losses: Tensor
    uses: list[Use]
    gradients: list[Tensor | None]
    weighted: list[Tensor | None]


class Body:
    """Loss and gradients of a query at θ + Δ.

    Args:
        model: the user's model, never modified.
        loss: what is stepped.
        params: which parameters move, as in :func:`finf_fast.mirrors.choose.choose`.
        train: train mode: batch statistics, dropout, and buffers that move.
        device: where to compute.

    Attributes:
        weights: name -> θ of every parameter that moves.
        dtype: of weights and gradients: the model's own widest, at least float32.
        own_dtypes: the model's floating-point dtypes, by name.
    """

    def __init__(self, model: nn.Module, loss: Loss, params: Filter, train: bool, device: torch.device):
        names = choose(model, params)
        own = {p.dtype for p in model.parameters() if p.is_floating_point()}
        self.own_dtypes = sorted(str(dtype).removeprefix("torch.") for dtype in own)
        self.dtype = torch.float32
        for dtype in own:
            self.dtype = torch.promote_types(self.dtype, dtype)
        self.device, self.train, self._loss = device, train, loss
        self._skeleton = Skeleton(model, self.device, self.dtype, train)
        self.weights = self._skeleton.base(names)
        self._kernels = _kernels(self._skeleton.module)
        self._buffers = {name: slot.tensor for name, slot in self._skeleton.slots.items() if slot.buffer}
        self._vocabulary, self._outputs = vocabulary(model), None

    def begin(self) -> None:
        """The model as the user gave it: θ, and fresh copies of its buffers."""
        self._skeleton.set_mode(self.train)
        self._skeleton.put({name: tensor.clone() for name, tensor in self._buffers.items()})
        self.place({})

    def place(self, changes: Mapping[str, Tensor | LowRank]) -> None:
        """Puts θ + Δ in, as leaves; a parameter without a change stands at θ. ``changes`` itself is never rounded."""
        self._leaves = {
            name: (weight + dense(changes[name]) if name in changes else weight.clone()).detach().requires_grad_()
            for name, weight in self.weights.items()
        }
        self._skeleton.put(self._leaves)

    def storages(self) -> set[int]:
        """Addresses of the storages of the parameters and buffers now in place."""
        return {slot.tensor.untyped_storage().data_ptr() for slot in self._skeleton.slots.values()}

    def loss(self, query: Query) -> Tensor:
        """Mean of the rows' :meth:`losses`, () with its graph."""
        return self.losses(query).mean()

    def losses(self, query: Query) -> Tensor:
        """(B,) losses of the rows with their graph.

        Raises:
            NonFiniteLoss: a row's loss is NaN or infinite.
            ValueError: batch norm in train mode saw one value a channel, or a token id is outside its embedding.
        """
        with _explained(query.who):
            losses = self._loss.precise(self._skeleton.module, mapped(torch.clone, query.batch))
        finite = torch.isfinite(losses)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0, 0])
            raise NonFiniteLoss(
                f"{query.who}: wanted a finite loss, got {losses[row].item()} at row {row} "
                "(NaN also where every target of the row is ignored)"
            )
        return losses

    def gradients(self, loss: Tensor, who: str) -> dict[str, Tensor]:
        """Name -> dense gradient of ``loss`` at the weights now in place; parameters it does not feel are left out.

        Raises:
            NonFiniteLoss: a gradient is NaN or infinite.
            ValueError: the loss depends on none of the parameters.
        """
        found: tuple[Tensor | None, ...] = ()
        if loss.requires_grad:
            found = torch.autograd.grad(loss, list(self._leaves.values()), allow_unused=True)
        gradients = {
            name: g if g.layout is torch.strided else g.to_dense()
            for name, g in zip(self._leaves, found, strict=False)
            if g is not None
        }
        self._require_some(gradients, who)
        require_finite(gradients, "gradient", who)
        return gradients

    def factored(self, query: Query, rank: int) -> tuple[float, dict[str, Tensor | LowRank], dict[str, float]]:
        """The loss of a query, and as :meth:`gradients` its gradients, as factors where they pay.

        Of a linear map they are taken during the backward pass. The kernel of a convolution meets more positions than
        it has rows, so its gradient is formed, and then compressed.

        Args:
            rank: the most columns of a factor.

        Returns:
            The loss; name -> gradient; name -> share of its squared norm that compression discarded, where factored.

        Raises:
            As :meth:`loss` and :meth:`gradients`.
        """
        loss, caught = self.caught(query)
        gradients: dict[str, Tensor | LowRank] = {}
        shares: dict[str, float] = {}
        for name in list(caught):
            pieces = caught.pop(name)  # let go of as it is used: together they are as large as the activations
            gradients[name], shares[name] = pieces.whole(rank)
            if name in self._kernels and kernel_pays(gradients[name].shape, rank):
                gradients[name], shares[name] = compress_kernel(gradients[name], rank)
        return loss, gradients, shares

    def caught(self, query: Query) -> tuple[float, dict[str, Gradient]]:
        """The loss of a query, and of every parameter that it depends on the gradient, in the pieces it comes in.

        Raises:
            As :meth:`loss` and :meth:`gradients`.
        """
        with Capture(self._leaves) as capture:
            loss = self.loss(query)
            caught = capture.gradients(loss)
        self._require_some(caught, query.who)
        for name, pieces in caught.items():
            for tensor in pieces.tensors:
                require_finite({name: tensor}, "gradient", query.who)
        return loss.item(), caught

    def watched(self, query: Query, names: Sequence[str], weights: Tensor) -> Watched:
        """Of several queries in one batch what their layers see, and the gradients of two sums over their losses.

        Args:
            names: of the parameters to watch.
            weights: (Q,) of the queries in the second sum; in the first they are 1. Each has B / Q rows, whose mean
                is its loss.

        Raises:
            Mixed: a call may move samples, a parameter is used in a way that is not watched, or the gradient of one
                that is not among ``names`` is not finite.
            NonFiniteLoss: as :meth:`losses`.
        """
        watch = Watch(self._skeleton, list(names), query.rows, longest(query.batch))
        with each_its_own(watch, query.rows, self.storages()):
            losses = self.losses(query)
        means = losses.view(len(weights), -1).mean(1)
        plain = watch.gradients(means.sum(), self._leaves, again=True)
        return Watched(means.detach(), watch.uses, plain, watch.gradients((means * weights.to(means)).sum()))

    def alike(self, losses: Tensor, queries: Sequence[Query]) -> bool:
        """Whether each query alone, as the model now stands, has the loss that it had in a batch with others."""
        with torch.no_grad():
            alone = torch.stack([self.loss(query) for query in queries])
        gap = (losses - alone).abs()
        return bool((gap <= ALIKE * (1 + alone.abs())).all())

    def _require_some(self, gradients: Mapping[str, object], who: str) -> None:
        if not gradients:
            raise ValueError(f"{who}: the loss depends on none of the {len(self._leaves)} parameters to step")

    def loss_after(self, changes: Mapping[str, Tensor | LowRank], query: Query) -> float:
        """The loss at θ + Δ, measured without moving buffers."""
        self.place(changes)
        with self._unmoved(), torch.no_grad():
            try:
                return self.loss(query).item()
            except NonFiniteLoss as error:
                raise NonFiniteLoss(f"{error}, after the step; a smaller lr may help") from None

    def moved(self) -> dict[str, Tensor]:
        """Buffers that train mode changed since :meth:`begin`, with their new values; none in eval mode."""
        if not self.train:
            return {}
        now = self._skeleton.base(self._buffers)
        return {name: now[name].detach() for name, old in self._buffers.items() if not torch.equal(old, now[name])}

    def check(self, query: Query) -> None:
        """Labels and token ids against the model's width and vocabulary; the width costs one forward, once a body.

        Raises:
            ValueError: one is out of range, or the loss cannot read such a batch.
        """
        if type(self._loss).check is Loss.check:
            return
        self._judge(query)
        if self._outputs is None:
            self._outputs = self._width(query)
            self._judge(query)

    def _judge(self, query: Query) -> None:
        try:
            self._loss.check(query.batch, self._outputs, self._vocabulary)
        except BadSample as error:
            raise ValueError(f"{query.who}, row {error.row}: {error}") from None
        except (TypeError, ValueError) as error:  # no target, or not class indices; a loss speaks of the corpus
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{query.who}: {str(error).removeprefix('corpus: ')}") from error

    def _width(self, query: Query) -> int:
        self.begin()
        self._skeleton.set_mode(False)  # batch norm would not take a single row
        with torch.no_grad(), forked(self.device), _explained(query.who):
            return self._loss.output(self._skeleton.module, mapped(torch.clone, query.batch)).shape[-1]

    @contextlib.contextmanager
    def _unmoved(self) -> Iterator[None]:
        """A forward that is not part of the step: buffers are as before when it is over."""
        kept = {name: tensor.clone() for name, tensor in self._skeleton.base(self._buffers).items()}
        try:
            yield
        finally:
            self._skeleton.put(kept)


def _kernels(module: nn.Module) -> set[str]:
    """Names of the weights of convolutions whose every output channel reads all inputs."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return {f"{n}.weight" for n, m in module.named_modules() if isinstance(m, kinds) and m.groups == 1}


@contextlib.contextmanager
def stepping(device: torch.device) -> Iterator[None]:
    """Gradients on, autocast off, and the global random state as it was when all is over."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        forked(device),
    ):
        yield


def forked(device: torch.device) -> contextlib.AbstractContextManager:
    """Random draws inside do not move the global state of the CPU and of ``device``."""
    if device.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([_index(device)], device_type=device.type)


def seed_all(device: torch.device, seed: int) -> None:
    """Starts the global state of the CPU and of ``device`` from ``seed``, and of no other device."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        backend = torch.get_device_module(device)
        with backend.device(_index(device)):
            backend.manual_seed(seed)


def _index(device: torch.device) -> int:
    return device.index if device.index is not None else torch.get_device_module(device).current_device()


def require_finite(tensors: Mapping[str, Tensor | LowRank], what: str, who: str) -> None:
    """Raises :class:`NonFiniteLoss` at the first tensor, or pair of factors, holding NaN or infinity."""
    for name, tensor in tensors.items():
        if not all(bool(torch.isfinite(part).all()) for part in parts(tensor).values()):
            raise NonFiniteLoss(f"{who}: wanted a finite {what}, got NaN or infinity in that of {name!r}")


@contextlib.contextmanager
def _explained(who: str) -> Iterator[None]:
    """torch's errors that a change of the arguments cures, said in their terms."""
    try:
        yield
    except IndexError as error:
        raise ValueError(f"{who}: wanted token ids inside the model's embedding; its forward says: {error}") from error
    except ValueError as error:
        if ONE_ROW not in str(error):
            raise
        raise ValueError(
            f"{who}: batch norm in train mode wants more than one value a channel; use method='released', "
            f"which doubles the sample, or mode='eval' ({error})"
        ) from error
