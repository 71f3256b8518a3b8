"""The writer: takes scored blocks in any order, keeps them for good, and knows after any crash which are missing."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finf_fast.records import Plan
from finf_fast.scores import manifest as manifests
from finf_fast.scores.folder import Folder, Memory, claim
from finf_fast.scores.result import Scores

if TYPE_CHECKING:
    from typing_extensions import Self

# Seconds between two syncs of the arrays. A sync costs some milliseconds however little was written, so one a block
# would bind the speed of small blocks; the price of waiting is at most this much work done again after a crash.
SYNC_EVERY = 0.5

SO_FAR = "so_far"  # in the record of a run that is not finished: what was counted up to the blocks that are done


def open_store(
    out: str | os.PathLike[str] | None,
    identity: dict[str, Any],
    plan: Plan,
    queries: int,
    dtype: Any,
    tokens: int | None = None,
    *,
    directions: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    corpus_samples: int | None = None,
    background: int = 0,
    resume: bool = True,
) -> Store:
    """Opens the place where a sweep puts its scores, and checks before any work that it can go there.

    Args:
        out: result folder, made if need be; None keeps the scores in memory.
        identity: what the scores depend on (versions, fingerprints, settings), nested dicts of JSON values. A folder
            is resumed only if every key is equal.
        plan: how to cut the work. A resumed folder keeps its own: read ``store.plan``.
        queries: Q, background included.
        dtype: of the scores, float32 or float64.
        tokens: T, the longest sample in tokens, to keep scores per token as well.
        directions: "ascent" or "descent" for each query; ascent if not given.
        names: a different name for each query; "q0", "q1", … if not given.
        corpus_samples: samples in the whole corpus, of which the plan may be a shard; the plan's stop if not given.
        background: how many of the queries, the last ones, are there for comparison only.
        resume: False refuses a folder that already holds scores.

    Raises:
        ValueError, TypeError: an argument is not as above; ``out`` is a file, holds other files, or is being written.
        ManifestMismatch: the folder holds scores of another run; lists each difference.
        DamagedFile: a file of the folder has not the size or header it should.
        OSError: the folder cannot be made or written, or the disk is too full for the whole result.
    """
    wanted = manifests.make(
        identity,
        plan,
        queries,
        dtype,
        tokens=tokens,
        directions=directions,
        names=names,
        corpus_samples=corpus_samples,
        background=background,
    )
    if out is None:
        return Store(Memory(wanted))
    folder = claim(out, wanted)
    try:
        enter(folder, wanted, resume)
    except BaseException:
        folder.close()
        raise
    return Store(folder)


def earlier(out: str | os.PathLike[str] | None) -> dict[str, Any] | None:
    """The manifest of the run that a folder holds, or None: what of it a sweep takes over is known before it opens it.

    Raises:
        DamagedFile: the manifest cannot be read.
    """
    if out is None or not (Path(out) / manifests.NAME).exists():
        return None
    found = manifests.read(Path(out))
    return found if found["ready"] else None


def enter(folder: Folder, wanted: dict[str, Any], resume: bool) -> None:
    """Creates the arrays of an empty folder, or opens those of an earlier run of the same scores."""
    if not folder.manifest["ready"]:
        folder.create()
        return
    if not resume:
        raise ValueError(f"out: wanted an empty folder because resume=False, got {folder.path} with scores in it")
    manifests.compare(wanted, folder.manifest, str(folder.path))
    folder.open()


class Store:
    """Blocks of scores on their way to memory or disk; made by ``open_store``.

    A context manager: leaving it, by an exception too, keeps all blocks written so far.
    """

    def __init__(self, target: Memory | Folder):
        self._target = target
        self._plan = manifests.plan_of(target.manifest)
        self._counted = _counted(target)
        self._to_note: dict[str, Any] | None = None  # with the blocks that are pending
        self._noted: dict[str, Any] | None = None  # by this run
        self._pending: set[int] = set()
        self._next_sync = time.monotonic() + SYNC_EVERY
        self._wrote = self._closed = False
        self._process = os.getpid()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def plan(self) -> Plan:
        """The plan that holds: the folder's own when it is resumed."""
        return self._plan

    @property
    def counted(self) -> dict[str, Any]:
        """What ``write`` was given with the last of the blocks that are done, in whichever run; empty at first."""
        return self._counted

    @property
    def scored(self) -> int:
        """Samples whose block has been written, in this run or an earlier one."""
        return sum(stop - start for start, stop in map(self._plan.rows, self._written()))

    def missing(self) -> list[int]:
        """Numbers of the blocks still to be scored, in order."""
        written = set(self._written())
        return [number for number in range(self._plan.blocks) if number not in written]

    def write(
        self,
        number: int,
        base: Any,
        delta: Any,
        token_base: Any = None,
        token_delta: Any = None,
        counted: Mapping[str, Any] | None = None,
    ) -> None:
        """Takes the scores of one block of the plan.

        Args:
            number: the block, one of ``missing()``.
            base: (b,) losses before the step; numpy or CPU tensor, of the store's dtype, as the others.
            delta: (b,Q) loss after minus loss before.
            token_base, token_delta: (b,t) and (b,t,Q) with t <= T, if the store was opened with ``tokens``.
                NaN where a sample has no token; the columns from t on are filled with NaN here.
            counted: what the record will say of the blocks up to this one, JSON values. It becomes durable with the
                block, so that a run that goes on from here can count on.

        Raises:
            ValueError, TypeError: wrong block, shape or dtype; nothing is written.
            OSError: the disk failed; the block stays missing.
        """
        self._check_missing(number)
        start, stop = self._plan.rows(number)
        given = {"base": base, "delta": delta, "token_base": token_base, "token_delta": token_delta}
        for name, data in self._checked(given, stop - start).items():
            self._target.write(name, start - self._plan.start, data)
        self._wrote = True
        self._pending.add(number)
        self._to_note = None if counted is None else manifests.as_json("counted", counted)
        if time.monotonic() >= self._next_sync:
            self._flush()

    def halve(self, number: int, size: int) -> None:
        """Notes that from this block on a forward takes at most ``size`` samples; durable before the block is scored.

        A smaller batch may round another way, so a resumed run must repeat the change at the same place.

        Raises:
            ValueError: the block is already written, or ``size`` is not smaller than its forwards were.
        """
        self._check_missing(number)
        before = self._plan.forward_size(number)
        if not 1 <= size < before:
            raise ValueError(f"size: wanted at least 1 and less than {before} for block {number}, got {size}")
        halvings = tuple(sorted((*self._plan.halvings, (number, size)), key=lambda pair: pair[0]))
        plan = replace(self._plan, halvings=halvings)
        self._target.save_manifest({**self._target.manifest, "plan": manifests.as_json("plan", plan.to_json())})
        self._plan = plan

    def finish(self, record: dict[str, Any] | None = None) -> Scores:
        """Closes a complete store and returns its scores.

        Args:
            record: how the run went (times, faces chosen, …), JSON values. It replaces an earlier one, except when
                this run had nothing left to do.

        Raises:
            ValueError: blocks are missing.
        """
        missing = self.missing()
        if missing:
            raise ValueError(f"finish: wanted every block written, got {len(missing)} missing, first {missing[0]}")
        self._flush()
        manifest = self._target.manifest
        if self._wrote or SO_FAR in manifest["record"] or not manifest["record"]:
            self._target.save_manifest({**manifest, "record": manifests.as_json("record", record or {})})
        self.close()
        return Scores.of(self._target)

    def close(self) -> None:
        """Keeps what was written and lets go of the folder. Harmless when repeated.

        What a forked child was given with the store is the parent's to keep.
        """
        self._closed = True
        try:
            if os.getpid() == self._process:
                self._flush()
        finally:
            self._target.close()

    def _flush(self) -> None:
        """Makes pending rows durable, and only then says so. See ``folder.py`` for the order."""
        # Forgotten first: when a sync fails the rows may be lost although a second sync would report success.
        pending, self._pending = self._pending, set()
        if pending:
            self._target.sync()
            try:
                self._note(max(pending))
            except (
                OSError
            ):  # a disk too full for a new manifest has room for flags, and rows are worth more than counts
                self._target.flag(pending)
                raise
            self._target.flag(pending)
        self._next_sync = time.monotonic() + SYNC_EVERY

    def _note(self, last: int) -> None:
        """Writes down what was counted, if it has changed; it holds once the last of the pending blocks is flagged."""
        if self._to_note is None or self._to_note == self._noted:
            return
        note = {"block": last, "counted": self._to_note, "before": self._counted}
        self._target.save_manifest({**self._target.manifest, "record": {SO_FAR: note}})
        self._counted = self._noted = self._to_note

    def _written(self) -> list[int]:
        return [*np.flatnonzero(self._target.done).tolist(), *self._pending]

    def _check_missing(self, number: int) -> None:
        if self._closed:
            raise ValueError("store: wanted an open one, got one that is closed")
        if os.getpid() != self._process:
            raise RuntimeError("store: opened by the process that this one was forked from, which alone writes to it")
        if not 0 <= number < self._plan.blocks:
            raise ValueError(f"number: wanted a block from 0 to {self._plan.blocks - 1}, got {number}")
        if self._target.done[number] or number in self._pending:
            raise ValueError(f"number: wanted a block that is missing, got {number}, which is already written")

    def _checked(self, given: dict[str, Any], rows: int) -> dict[str, np.ndarray]:
        """The arrays of a block at their full shape; tokens padded with NaN."""
        shapes = manifests.arrays_of(self._target.manifest)
        dtype = np.dtype(self._target.manifest["dtype"])
        surplus = [name for name, data in given.items() if data is not None and name not in shapes]
        if surplus:
            raise ValueError(f"{surplus[0]}: wanted none, because the store was opened without tokens")
        return {name: checked(name, given[name], (rows, *shape[1:]), dtype) for name, shape in shapes.items()}


def _counted(target: Memory | Folder) -> dict[str, Any]:
    """What was counted up to the blocks that are done: a crash may have come between the note and its flag."""
    note = target.manifest["record"].get(SO_FAR)
    if note is None:
        return {}
    return note["counted"] if target.done[note["block"]] else note["before"]


def checked(name: str, data: Any, wanted: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    array = np.asarray(data)
    if array.dtype != dtype:
        raise TypeError(f"{name}: wanted {dtype}, got {array.dtype}")
    if name.startswith("token_") and array.ndim == len(wanted) and array.shape[1] < wanted[1]:
        padding = np.full((array.shape[0], wanted[1] - array.shape[1], *array.shape[2:]), math.nan, dtype)
        array = np.concatenate([array, padding], axis=1)
    if array.shape != wanted:
        raise ValueError(f"{name}: wanted shape {wanted}, got {array.shape}")
    return array
