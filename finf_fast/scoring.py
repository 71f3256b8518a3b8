"""Stages 3 to 6 of one block: to the device, through model and loss, into the store; and what the time went to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from finf_fast import ragged
from finf_fast.corpus import Corpus, Undecoded
from finf_fast.loss import Result, check_stored
from finf_fast.planning import Probe, out_of_memory
from finf_fast.records import BadSample, Block, NonFiniteLoss, Part
from finf_fast.scores import Store
from finf_fast.transfer import Crossing, rows, to_device

__all__ = ["Clock", "Scorer"]


class Clock:
    """What a sweep's time went to: seconds by stage, each measured in the sweep's own thread, where it waits.

    A device that stands still for a copy is seen there as a model that takes longer: `move` gives such seconds to the
    stage that they belong to.
    """

    def __init__(self):
        self._since, self.seconds = time.perf_counter(), dict.fromkeys(("staging", "model", "scores"), 0.0)

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - began

    def move(self, seconds: float, of: str, to: str) -> None:
        """So many seconds that were counted as one stage's were another's."""
        seconds = min(seconds, self.seconds[of])
        self.seconds[of], self.seconds[to] = self.seconds[of] - seconds, self.seconds.get(to, 0.0) + seconds

    def waiting(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """The blocks, the wait for each counted as staging."""
        each = iter(blocks)
        while True:
            with self.of("staging"):
                block = next(each, None)
            if block is None:
                return
            yield block
            del block  # the consumer's alone: not kept alive while the next is awaited

    def record(self) -> dict[str, Any]:
        whole = max(time.perf_counter() - self._since, 1e-9)
        return {
            "seconds": round(whole, 3),
            "percent_of_time": {stage: round(100 * spent / whole, 2) for stage, spent in self.seconds.items()},
        }


class Scorer:
    """Takes blocks through device, model and loss into the store.

    Args:
        runner: the engine.
        found: what a sample showed: outputs and tokens.
        vocabulary: token ids that the model knows, or None.
        nonfinite: ``"raise"`` or ``"keep"``.
        on_scored: told how many samples more have been scored; fewer than none where a block begins again in smaller
            forwards.
        crossing: where blocks were sent ahead.
        stored: how blocks were staged as they are stored, to be decoded on the device; None where they were not.
    """

    def __init__(
        self,
        runner: Any,
        corpus: Corpus,
        store: Store,
        found: Probe,
        vocabulary: int | None,
        nonfinite: str,
        on_scored: Callable[[int], None],
        crossing: Crossing,
        stored: Undecoded | None = None,
    ):
        self._runner, self._corpus, self._store = runner, corpus, store
        self._limits, self._nonfinite, self._tokens = (found.outputs, vocabulary), nonfinite, found.tokens
        self._on_scored, self._crossing, self._stored, self.clock = on_scored, crossing, stored, Clock()
        self._empty = self._there = self._computed = self._told = 0
        if store.counted:
            self._resume(store.counted)

    def write(self, block: Block) -> None:
        """Checks, scores and stores one block; nothing of a bad one is written."""
        for part in block.parts:
            self._check(block, part)
        with self.clock.of("model"):
            result = self._score(block)
            if self._nonfinite == "raise":
                self._require_finite(result, block)
            arrays = _on_disk(result, self._runner.score_dtype)
        if self._crossing.crosses:
            self.clock.move(self._crossing.waited(), "model", "transfer")
        if result.empty is not None:
            self._empty += int(result.empty.sum())
        self._require_tokens(result)
        with self.clock.of("scores"):
            self._store.write(block.number, *arrays, counted=self._counted())
        self._tell(len(block))

    def _check(self, block: Block, part: Part) -> None:
        try:
            if self._stored is not None and self._stored.kind == "tokens":
                check_stored(self._runner.loss, part.batch, *self._limits)
            else:
                self._runner.loss.check(part.batch, *self._limits)
        except BadSample as error:
            row = int(part.rows[error.row])
            sample = block.start + row
            raise BadSample(f"sample {sample} ({self._corpus.locate(sample)}): {error}", row) from None

    def record(self) -> dict[str, Any]:
        """How the run went, for the manifest: times are of this run, counts of those that it goes on from too."""
        padding = {} if not self._computed else {"padding_percent": round(100 - 100 * self._there / self._computed, 2)}
        return {
            **self._runner.record(),
            "corpus": self._corpus.describe(),
            **self.clock.record(),
            **self._crossing.record(),
            **({} if self._stored is None else {f"{self._stored.kind}_decoded": "on the device"}),
            "samples_scored": self._store.scored,
            "samples_without_target": self._empty,
            **padding,
        }

    def _counted(self) -> dict[str, Any]:
        """What goes into the record, and what a later block depends on, as of now."""
        mine = {"empty": self._empty, "there": self._there, "computed": self._computed}
        return {**mine, "engine": self._runner.counted()}

    def _resume(self, counted: Mapping[str, Any]) -> None:
        """Goes on from there: after an interruption, and in a block that begins again."""
        self._empty, self._there, self._computed = (counted[key] for key in ("empty", "there", "computed"))
        self._runner.resume(counted["engine"])

    def _score(self, block: Block) -> Result:
        """The block's result, in smaller forwards from here on if memory runs out."""
        before = self._counted()
        while True:
            done, part, self._told = [], None, 0
            try:
                for part in self._forwards(block):
                    self._tell(sum(len(places) for places, _ in done))
                    done.append((part.rows, self._part(part.batch)))
                return _in_order(done)
            except IndexError as error:
                self._name_the_sample(block, part, error)
            except Exception as error:
                # Before there is a part, where its rows were to be gathered on the device.
                tried = self._store.plan.forward_size(block.number) if part is None else len(part)
                if not out_of_memory(error) or tried == 1:
                    raise
                halved = tried // 2
            self._tell(0)
            self._resume(before)
            self._store.halve(block.number, halved)

    def _tell(self, scored: int) -> None:
        """Progress inside a block, of which the last forward counts when it is stored."""
        self._on_scored(scored - self._told)
        self._told = scored

    def _forwards(self, block: Block) -> Iterator[Part]:
        """Samples in a row, or those of like length where that saves padding."""
        plan, loss = self._store.plan, self._runner.loss
        size = plan.forward_size(block.number)
        for read in block.parts:
            batch = self._crossing.receive(read)
            if ragged.width(read.batch, loss):
                tokens = torch.zeros(len(block), dtype=torch.int64)
                tokens[read.rows] = (read.batch[ragged.MASK] != 0).sum(1)
                for part in ragged.parts(read, loss, size, plan.tokens, self._runner.columns, batch):
                    self._there += int(tokens[part.rows].sum())
                    self._computed += part.batch[ragged.MASK].numel()
                    yield part
                continue
            for first in range(0, len(read), size):
                last = min(first + size, len(read))
                yield Part(read.rows[first:last], rows(batch, first, last))

    def _part(self, batch: Any) -> Result:
        batch = to_device(batch, self._runner.device)
        return self._runner.score(batch if self._stored is None else self._stored.decode(batch))

    def _name_the_sample(self, block: Block, part: Part, error: IndexError) -> None:
        """Raises for the sample that made the model look outside a table (an embedding of the user's own)."""
        for place, row in enumerate(part.rows.tolist()):
            try:
                self._part(rows(part.batch, place, place + 1))
            except IndexError as alone:
                sample = block.start + row
                raise BadSample(f"sample {sample} ({self._corpus.locate(sample)}): {alone}", row) from error
        raise error

    def _require_tokens(self, result: Result) -> None:
        held = self._tokens
        if result.token_base is not None and result.token_base.shape[1] > held:
            got = result.token_base.shape[1]
            raise ValueError(
                f"per_token: room was made for {held} tokens a sample, as the first 64 have, got {got}; bring the "
                "longest forward, or cut all to one length"
            )

    def _require_finite(self, result: Result, block: Block) -> None:
        bad = ~torch.isfinite(result.base) | ~torch.isfinite(result.delta).all(0)
        if result.empty is not None:
            bad &= ~result.empty
        if not bool(bad.any()):
            return
        row = int(bad.nonzero()[0, 0])
        sample, base = block.start + row, float(result.base[row])
        query = (
            int((~torch.isfinite(result.delta[:, row])).nonzero()[0, 0])
            if base == base and abs(base) != float("inf")
            else None
        )
        found = (
            f"loss before the step is {base}"
            if query is None
            else f"loss after the step of query {query} is not finite"
        )
        raise NonFiniteLoss(
            f"sample {sample} ({self._corpus.locate(sample)}): {found}; nonfinite='keep' would keep it in the scores"
        )


def _in_order(done: list[tuple[Tensor, Result]]) -> Result:
    """Results of a block's forwards as one, every sample at its own place."""
    places, parts = [rows for rows, _ in done], [result for _, result in done]
    first = parts[0]
    if len(parts) > 1:
        longest = max(0 if part.token_base is None else part.token_base.shape[1] for part in parts)
        first = Result(
            torch.cat([part.base for part in parts]),
            torch.cat([part.delta for part in parts], 1),
            None if first.empty is None else torch.cat([part.empty for part in parts]),
            None if first.token_base is None else torch.cat([_wide(part.token_base, longest) for part in parts]),
            None if first.token_delta is None else torch.cat([_wide(part.token_delta, longest) for part in parts], 1),
        )
    order = torch.cat(places)
    if bool((order[1:] > order[:-1]).all()):
        return first
    back = order.argsort().to(first.base.device)
    return Result(
        first.base[back],
        first.delta[:, back],
        None if first.empty is None else first.empty[back],
        None if first.token_base is None else first.token_base[back],
        None if first.token_delta is None else first.token_delta[:, back],
    )


def _wide(tokens: Tensor, longest: int) -> Tensor:
    """(..., L) with columns of NaN, where no token is, up to the longest."""
    return torch.nn.functional.pad(tokens, (0, longest - tokens.shape[-1]), value=torch.nan)


def _on_disk(result: Result, dtype: torch.dtype) -> tuple[Any, ...]:
    """base (B,), delta (B, Q), and the tokens' (B, L), (B, L, Q): sample-major, on the CPU, in the sweep's dtype."""
    tokens = () if result.token_base is None else (result.token_base, result.token_delta.movedim(0, -1))
    return tuple(t.to("cpu", dtype).numpy() for t in (result.base, result.delta.mT, *tokens))
