"""Curvature of a model on its training data: one streamed pass over a sample of the corpus, two for EK-FAC."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import finf_fast
from finf_fast import loss as losses
from finf_fast import ops
from finf_fast.corpus import Corpus, evenly, open_corpus
from finf_fast.disk import require_writable
from finf_fast.loss import Loss, mapped
from finf_fast.mirrors.body import stepping
from finf_fast.mirrors.choose import Filter, choose, describe
from finf_fast.mirrors.collect import CONVENTIONS, Collector
from finf_fast.mirrors.curvature import Factors
from finf_fast.mirrors.passes import Passes
from finf_fast.mirrors.spectrum import Spectra
from finf_fast.planning import Probe, make_plan, probe
from finf_fast.progress import Progress
from finf_fast.records import BadSample, NonFiniteLoss, UnsavedFactors
from finf_fast.skeleton import Skeleton, place_of, require_model, vocabulary
from finf_fast.transfer import rows, to_device
from finf_fast.update import model_fingerprint

__all__ = ["KINDS", "fit_factors"]

KINDS = ("kfac", "ekfac", "fisher_diag", "cg")
FISHERS = ("true", "empirical")
SAMPLES = 4096  # drawn by default; a factor of width 4096 is then of full rank where one position a sample is all
TOKENS = 1 << 16  # rather than more samples: twenty for each direction of a factor of width 3072
FEWEST = 64  # samples, however long
KEPT = 1024  # of "cg", which goes through all of them for every product
LIMIT = 8192  # side beyond which a factor is a diagonal: 512 MiB as a matrix in float64, a minute to factorise
# What a forward's memory is multiplied by: its outputs' gradients, in a batch that is checked twice, and patches or
# per-sample products.
BACKWARD = 5
MOST = 512  # samples a batch


def fit_factors(
    model: nn.Module,
    corpus: Any,
    *,
    kind: str = "kfac",
    loss: str | Loss | Callable[[Any, Any], Tensor] = "cross_entropy",
    samples: int | None = None,
    fisher: str = "true",
    convention: str = "expand",
    params: Filter = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    batch_size: int | None = None,
    limit: int = LIMIT,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    progress: bool | Callable[[int, int], None] | None = None,
) -> Factors:
    """Fits curvature factors of a model on a sample of its training data, for the preconditioned mirror methods.

    The model runs in eval mode and is not modified. The curvature is that of the mean loss over samples, each sample's
    mean over tokens included. Layers see batches of samples; from where positions cannot be told apart by sample and
    must be, they see one sample at a time, at the price of ``batch_size=1`` (ten to sixty times as long for a small
    model), and ``record["one_sample_at_a_time"]`` says which layer or call it was. That is so where samples do not lie
    first and in order (time first, rows sorted or sent to experts), unless ``kind="kfac"`` expands them and there is no
    ``attention_mask``; and always where a layer's positions are of several samples at once, such as T5's
    ``relative_attention_bias``, which all share: a ``params`` that leaves that weight out, and so still, keeps batches
    whole. An embedding of positions 0, 1, ... is given to every sample as its own if the model then gives the same.

    What each kind holds:

    * ``"kfac"``: of every linear layer, Hugging Face Conv1D, convolution with one group, embedding, and projection of a
      self-attention in ``nn.MultiheadAttention``, two factors whose Kronecker product stands for the curvature of
      weight and bias (Martens & Grosse, ICML 2015; Grosse & Martens, ICML 2016; Eschenhagen et al., NeurIPS 2023). A
      side longer than ``limit`` (a vocabulary) has a diagonal factor, an embedding's ids always. A weight with uses of
      several kinds (a tied head) has the one product with the trace of their sum. Anything else, the weights of norms
      too, is named in ``factors.left`` and stays still in a step;
    * ``"ekfac"``: besides, the second moment of the gradient along each pair of their eigenvectors, from a second pass
      (George et al., NeurIPS 2018);
    * ``"fisher_diag"``: of every parameter the mean squared gradient, one backward pass a sample;
    * ``"cg"``: the sample itself, for exact products with the Gauss-Newton or empirical Fisher matrix (small models),
      and an estimate of that matrix' diagonal.

    Args:
        model: any ``torch.nn.Module``.
        corpus: what :func:`finf_fast.open_corpus` gives or takes: S samples.
        kind: as above.
        loss: a name, a :class:`finf_fast.loss.Loss`, or ``(model, batch) -> (B,) losses``.
        samples: how many of the corpus, evenly drawn: one from each of that many equal stretches. By default 4096 (1024
            for ``"cg"``), of texts as many as have 65,536 tokens but at least 64, or all of a smaller corpus.
        fisher: ``"true"``: labels drawn from the model, each sample's from (seed, its index); ``"empirical"``: the
            corpus' own, for a loss of one's own the only one possible.
        convention: ``"expand"`` or ``"reduce"``, where a layer is used at several positions of a sample.
        params: which parameters get factors, as in :func:`finf_fast.mirror`.
        device: where to compute; the model's own by default. Factors stay there.
        dtype: of the sums: torch.float32 (default, float64 where the model is) or float64.
        batch_size: samples a pass; chosen by memory if not given.
        limit: the longest side of a full factor.
        seed: of the choice of samples and of the labels.
        out: file to save the factors in; whether it can be written is tried before the fit.
        progress: as in :func:`finf_fast.sweep`.

    Returns:
        :class:`finf_fast.Factors`.

    Raises:
        ValueError, TypeError: an argument is not as above; a sample's label or token id is out of range (BadSample);
            a loss is not finite (NonFiniteLoss); no layer has a K-FAC form.
        OSError: ``out`` cannot be written, seen before any work; or the disk is too full for what was fitted
            (:class:`finf_fast.UnsavedFactors`), which the error's ``factors`` keeps, to be saved elsewhere.
    """
    require_model(model)
    settings = _Settings(kind, fisher, convention, limit, seed, _positive("batch_size", batch_size))
    if out is not None:
        require_writable(out, "out")
    corpus = corpus if isinstance(corpus, Corpus) else open_corpus(corpus)
    device = place_of(model, device)
    with stepping(device):
        run = _Run(model, corpus, losses.resolve(loss), settings, _positive("samples", samples), params, device)
        with Progress(run.total, "curvature", progress) as bar:
            factors = run.fitted(_sum_dtype(dtype, run.dtype), bar)
    factors = replace(factors, record={**run.record(params), **factors.record})
    if out is not None:
        _save(factors, out)
    return factors


def _save(factors: Factors, out: str | os.PathLike[str]) -> None:
    try:
        factors.save(out)
    except OSError as error:
        raise UnsavedFactors(error, factors) from error


@dataclass(frozen=True)
class _Settings:
    kind: str
    fisher: str
    convention: str
    limit: int
    seed: int
    batch_size: int | None

    def __post_init__(self):
        for name, wanted in (("kind", KINDS), ("fisher", FISHERS), ("convention", CONVENTIONS)):
            if getattr(self, name) not in wanted:
                raise ValueError(f"{name}: wanted one of {', '.join(wanted)}, got {getattr(self, name)!r}")
        _positive("limit", self.limit)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed: wanted a whole number, at least 0, got {self.seed!r}")


class _Run:
    """A fit under way: the model's stand-in, the drawn samples, and the passes over them."""

    def __init__(
        self,
        model: nn.Module,
        corpus: Corpus,
        loss: Loss,
        settings: _Settings,
        samples: int | None,
        params: Filter,
        device: torch.device,
    ):
        self._model, self._corpus, self._loss, self._settings = model, corpus, loss, settings
        self._device, self._names = device, choose(model, params)
        self.dtype = torch.float32
        for parameter in model.parameters():
            if parameter.is_floating_point():
                self.dtype = torch.promote_types(self.dtype, parameter.dtype)
        self._body = Skeleton(model, device, self.dtype)
        found = self._probed()
        self._outputs = found.outputs
        self._indices = _indices(len(corpus), samples, settings.kind, found.tokens, settings.seed)
        self._batch = settings.batch_size or self._fitting(found)
        self._losses: dict[int, float] = {}
        ordered = settings.kind == "ekfac" or settings.convention == "reduce"
        self._passes = Passes(self._body, self._names, self._output, self._pseudo, ordered)
        self.total = len(self._indices) * (2 if settings.kind == "ekfac" else 1)

    def fitted(self, dtype: torch.dtype, bar: Progress) -> Factors:
        kind = self._settings.kind
        if kind in ("fisher_diag", "cg"):
            return self._diagonal(dtype, bar)
        blocks, seen = self._kronecker(dtype, bar)
        if kind == "ekfac":
            spectra = Spectra(blocks, dtype)
            self._pass(bar, spectra.add)
            blocks = spectra.blocks()
        told = {"dtype": str(dtype).rpartition(".")[2], "one_sample_at_a_time": self._passes.alone}
        return Factors(kind, blocks, left=self._left(blocks, seen), record=told)

    def record(self, params: Filter) -> dict[str, Any]:
        return {
            "finf_fast": finf_fast.__version__,
            "torch": str(torch.__version__),
            "model": model_fingerprint(self._model),
            "corpus": self._corpus.fingerprint,
            "samples": len(self._indices),
            "of": len(self._corpus),
            "seed": self._settings.seed,
            "fisher": self._settings.fisher,
            "convention": self._settings.convention,
            "limit": self._settings.limit,
            "loss": self._loss.settings(),
            "mean_loss": self._mean_loss(),
            "params": describe(params),
        }

    def _kronecker(self, dtype: torch.dtype, bar: Progress) -> tuple[dict[str, Any], dict[str, str]]:
        collector = Collector(dtype, self._settings.convention, self._settings.limit)
        self._pass(bar, collector.add)
        blocks, left = collector.blocks()
        if not blocks:
            raise ValueError(
                f"model: wanted a layer that has a K-FAC form among {len(self._names)} parameters, got none; "
                "kind='fisher_diag' takes any"
            )
        return blocks, left

    def _left(self, blocks: Mapping[str, Any], seen: Mapping[str, str]) -> dict[str, str]:
        taken = {*blocks, *(block.bias for block in blocks.values())}
        other = "no layer with a K-FAC form was seen to use it"
        return {name: seen.get(name, other) for name in self._names if name not in taken}

    def _pass(self, bar: Progress, add: Callable[..., None]) -> None:
        """Hands every batch's layers, and the gradients at their outputs, to ``add``."""
        for batch, indices in self._batches(bar):
            for found in self._passes.of(batch, indices):
                add(*found)

    def _diagonal(self, dtype: torch.dtype, bar: Progress) -> Factors:
        """One backward pass a sample: any model, any parameter."""
        weights = self._body.base(self._names)
        leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        self._body.put(leaves)
        sums = {name: torch.zeros_like(leaf, dtype=dtype) for name, leaf in leaves.items()}
        used, kept = set(), []
        for batch, indices in self._batches(bar):
            if self._settings.kind == "cg":
                kept.append(batch)
            for row in range(len(indices)):
                one, number = rows(batch, row, row + 1), indices[row : row + 1]
                total = self._pseudo(self._output(one), one, number).sum()
                found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
                there = {name: g for name, g in zip(leaves, found, strict=True) if g is not None}
                used |= there.keys()
                for name, gradient in there.items():
                    sums[name] += (gradient.to_dense() if gradient.is_sparse else gradient).to(dtype).square()
        diagonals = {name: total / len(self._indices) for name, total in sums.items() if name in used}
        left = {name: "no loss depends on it" for name in sums if name not in used}
        return Factors(self._settings.kind, {}, diagonals, tuple(kept), left)

    def _output(self, batch: Any) -> Tensor:
        return self._loss.output(self._body.module, mapped(torch.clone, batch))

    def _pseudo(self, value: Tensor, batch: Any, indices: np.ndarray) -> Tensor:
        """(B,) numbers to differentiate, of the output for a batch; see :meth:`finf_fast.loss.Loss.fisher`."""
        known = torch.from_numpy(indices).to(self._device)

        def draw(shape: Any) -> Tensor:
            return ops.noise(self._settings.seed, known, 0, shape)

        if self._settings.kind == "cg" and self._settings.fisher == "true":
            found = self._loss.scattered(value, batch, draw)
        else:
            found = self._loss.fisher(value, batch, draw if self._settings.fisher == "true" else None)
        self._note(value.detach(), batch, indices)
        finite = torch.isfinite(found)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0, 0])
            where = self._corpus.locate(int(indices[row]))
            raise NonFiniteLoss(f"sample {indices[row]} ({where}): wanted a finite loss, got {found[row].item()}")
        return found

    def _note(self, value: Tensor, batch: Any, indices: np.ndarray) -> None:
        """Each sample's own loss, in place of what it was in a batch that had to be taken in another way."""
        own = self._loss.judged(value, batch)
        self._losses.update(zip(indices.tolist(), own.double().tolist(), strict=True))

    def _mean_loss(self) -> float:
        """Mean of |loss| over the samples that have one."""
        own = np.abs(np.fromiter(self._losses.values(), np.float64))
        own = own[np.isfinite(own)]
        if not len(own):
            raise ValueError(f"corpus: wanted a target in one of {len(self._indices)} samples at least, got none")
        return float(own.mean())

    def _batches(self, bar: Progress) -> Iterator[tuple[Any, np.ndarray]]:
        for first in range(0, len(self._indices), self._batch):
            indices = self._indices[first : first + self._batch]
            batch = self._corpus.take(indices)
            with self._named(indices):
                self._loss.check(batch, self._outputs, vocabulary(self._model))
            yield self._placed(batch), indices
            bar.advance(len(indices))

    @contextlib.contextmanager
    def _named(self, indices: np.ndarray) -> Iterator[None]:
        try:
            yield
        except BadSample as error:
            sample = int(indices[error.row])
            raise BadSample(f"sample {sample} ({self._corpus.locate(sample)}): {error}", error.row) from None

    def _placed(self, batch: Any) -> Any:
        """On the device, floating-point tensors in the body's dtype."""
        return mapped(lambda t: t.to(self.dtype) if t.is_floating_point() else t, to_device(batch, self._device))

    def _probed(self) -> Probe:
        """What the first sample's forward shows."""
        sample = self._placed(self._corpus.read(0, 1))
        with torch.no_grad():
            return probe(self._output, sample)

    def _fitting(self, found: Probe) -> int:
        """Samples a batch that memory has room for."""
        plan = make_plan(found, 0, len(self._indices), self._device, None)
        return max(1, min(MOST, plan.block // BACKWARD))


def _indices(total: int, samples: int | None, kind: str, tokens: int, seed: int) -> np.ndarray:
    """(n,) ascending: one sample of each of n equal stretches of the corpus of ``total``."""
    if samples is not None and samples > total:
        raise ValueError(f"samples: wanted at most the corpus' {total}, got {samples}")
    most = KEPT if kind == "cg" else SAMPLES
    return evenly(total, min(total, samples or min(most, max(FEWEST, TOKENS // tokens))), seed)


def _sum_dtype(dtype: torch.dtype | None, body: torch.dtype) -> torch.dtype:
    if dtype is None:
        return body
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: wanted torch.float32 or torch.float64, got {dtype}")
    return dtype


def _positive(name: str, value: int | None) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{name}: wanted a whole number, at least 1, got {value!r}")
    return value
