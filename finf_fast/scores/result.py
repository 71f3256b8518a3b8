"""The reader: scores of a finished sweep, from memory or mapped from a folder, and what a person asks of them."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from finf_fast.records import TopK
from finf_fast.scores import averaging, comparing, files, frames, joining
from finf_fast.scores import manifest as manifests
from finf_fast.scores.folder import Folder, Mapped, Memory, check_folder, claim
from finf_fast.topk import RunningTop, check_k

if TYPE_CHECKING:
    import pandas
    import pyarrow

# Scores that .top reads at a time: half a MiB of float64 keys, which stays in a core's L2 cache.
TOP_CELLS = 1 << 16


class Scores:
    """Loss of S samples before a step, and its change for each of Q queries.

    Background queries, which a sweep was given for comparison only, are in the arrays behind these Q and count in
    :meth:`normalized`; nothing else shows them.

    Comes from a sweep, from ``Scores.open(folder)`` or ``Scores.merge(shards)``. Arrays are read-only; those of a
    folder are mapped, not loaded.
    """

    def __init__(
        self, manifest: dict[str, Any], arrays: dict[str, np.ndarray], done: np.ndarray, path: Path | None = None
    ):
        self._manifest, self._arrays, self._done, self.path = manifest, arrays, done, path
        for array in arrays.values():
            array.flags.writeable = False

    @classmethod
    def of(cls, target: Memory | Folder) -> Scores:
        """The scores of a store that has been closed."""
        if isinstance(target, Folder):
            return cls.open(target.path)
        return cls(target.manifest, target.arrays, target.done)

    @classmethod
    def open(cls, path: str | os.PathLike[str], partial: bool = False) -> Scores:
        """Maps a result folder, once header and size of every file are checked.

        Args:
            path: the folder.
            partial: take an unfinished one too; what is not scored yet reads as NaN (memory: those rows).

        Raises:
            FileNotFoundError: no folder, or no manifest in it.
            DamagedFile: a file is not what the manifest says.
            ValueError: unfinished, and ``partial`` is False.
        """
        path = Path(path)
        manifest = manifests.read(path)
        done = check_folder(path, manifest)
        if not done.all() and not partial:
            raise ValueError(
                f"path: wanted a finished result folder (or partial=True), got {path} with "
                f"{int(done.sum())} of {len(done)} blocks done"
            )
        return cls(manifest, Mapped(path, manifest, done), done, path)

    @staticmethod
    def merge(parts: Sequence[Scores | str | os.PathLike[str]], out: str | os.PathLike[str] | None = None) -> Scores:
        """Joins the shards of one sweep, in any order, into one.

        Args:
            parts: scores or folders. Together they must cover a range without gap or overlap.
            out: folder for the result; None joins in memory.

        Raises:
            ManifestMismatch: shards of different sweeps; lists what differs.
            ValueError: none given, one is unfinished, a gap, an overlap, or ``out`` holds scores already.
            DamagedFile, OSError: as ``Scores.open``.
        """
        shards = [part if isinstance(part, Scores) else Scores.open(part) for part in parts]
        shards.sort(key=lambda shard: shard._manifest["shape"]["start"])
        manifest = joining.join([shard._manifest for shard in shards], [shard._where for shard in shards])
        return write_all(manifest, [shard._complete_arrays("merge") for shard in shards], out)

    def save(self, path: str | os.PathLike[str]) -> Scores:
        """Writes the scores to a new result folder and returns them as read from there.

        Raises:
            ValueError: unfinished, or ``path`` holds scores or other files already.
            OSError: the folder cannot be written.
        """
        return write_all(self._manifest, [self._complete_arrays("save")], path)

    def __len__(self) -> int:
        return len(self.base)

    def __repr__(self) -> str:
        state = "complete" if self.complete else f"{int(self._done.sum())} of {len(self._done)} blocks"
        return f"Scores({len(self)} samples, {len(self.names)} queries, {self.base.dtype}, {state}, {self._where})"

    @property
    def base(self) -> np.ndarray:
        """(S,) loss of each sample before the step."""
        return self._arrays["base"]

    @property
    def delta(self) -> np.ndarray:
        """(Q,S) loss after the step minus loss before; a view of sample-major data."""
        return self._arrays["delta"].T[: self._asked]

    @property
    def background(self) -> np.ndarray:
        """(B,S) the same for background queries; B is 0 where there are none."""
        return self._arrays["delta"].T[self._asked :]

    @property
    def token_base(self) -> np.ndarray | None:
        """(S,T) loss of each token before the step, NaN where there is none; None if it was not asked for."""
        return self._arrays.get("token_base")

    @property
    def token_delta(self) -> np.ndarray | None:
        """(Q,S,T) change of each token's loss, a view; None if it was not asked for."""
        array = self._arrays.get("token_delta")
        return None if array is None else np.moveaxis(array, 2, 0)[: self._asked]

    @property
    def influence(self) -> np.ndarray:
        """(Q,S), positive = helpful: delta after an ascent step, its negative after a descent step (then a copy)."""
        if (self._signs[: self._asked] > 0).all():
            return self.delta
        return self.delta * self._signs[: self._asked, None]

    @property
    def indices(self) -> np.ndarray:
        """(S,) int64 position of each sample in the corpus."""
        shape = self._manifest["shape"]
        return np.arange(shape["start"], shape["stop"])

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each query."""
        return tuple(self._manifest["names"][: self._asked])

    @property
    def directions(self) -> tuple[str, ...]:
        """ "ascent" or "descent" for each query."""
        return tuple(self._manifest["directions"][: self._asked])

    @property
    def manifest(self) -> dict[str, Any]:
        """All that is known of the sweep; a copy."""
        return manifests.as_json("manifest", self._manifest)

    @property
    def record(self) -> dict[str, Any]:
        """How the run went, as the sweep wrote it down; a copy."""
        return self.manifest["record"]

    @property
    def plan(self) -> str:
        """The engine and why the work was cut as it was, in a line."""
        engine = self._manifest["identity"].get("settings", {}).get("engine")
        return ": ".join(part for part in (engine, self._manifest["plan"]["reason"]) if part)

    @property
    def complete(self) -> bool:
        """Whether every block is scored."""
        return bool(self._done.all())

    def normalized(
        self,
        kind: str = "rms",
        *,
        self_influence: np.ndarray | None = None,
        groups: Sequence[Sequence[int | str]] | Mapping[str, Sequence[int | str]] | None = None,
        how: str = "mean",
        out: str | os.PathLike[str] | None = None,
    ) -> np.ndarray:
        """Influence made comparable between samples; worked out block by block, positive = helpful.

        With I (Q,S) the influence, L the loss before the step and L' after it, and means over all queries, background
        ones included:

        * ``"rms"``: I / √mean_q I²: samples that answer to whatever is asked no longer stand in front. At least 8
          queries;
        * ``"zscore"``: (I − mean_q I) / √mean_q (I − mean_q I)². At least 8 queries;
        * ``"relatif"``: I / √(the sample's influence on itself); ℓ-RelatIF of Barshan et al., "RelatIF", AISTATS 2020,
          arXiv 2003.11630. That is the diagonal of ``forward_inf(model, corpus, corpus, lr=…).influence`` with the same
          method and lr. A method left to find the length of its step makes each sample's about as long as any other's,
          and the diagonal is then √(self-influence) already, but for a factor: give its square;
        * ``"ratio"``: (L' − L) / (L' + L), its sign turned where the step went down: the change a unit of loss;
        * ``"absolute"``: |L' − L|, the score of the released protocol.

        NaN where a sample has no score, or nothing to be divided by. For a sample whose scores under some queries are
        not finite the others make the mean.

        Args:
            kind: as above.
            self_influence: (S,), for ``"relatif"``.
            groups: lists of queries, by number or name, or name -> list; the result has a row a group.
            how: ``"sum"``, ``"mean"`` or ``"max"`` of the normalised scores of a group's queries.
            out: new ``.npy`` file to write the result to, sample-major; it is there once whole, and mapped read-only:
                memory does not grow with S.

        Returns:
            (Q,S) or (G,S) in the dtype of the scores, a view of sample-major data.

        Raises:
            ValueError, TypeError: an argument is not as above; fewer queries than a kind compares; ``out`` is there.
            OSError: ``out`` cannot be written, or the disk is too full for it.
        """
        comparison = self._comparison(kind, self_influence)
        if how not in comparing.HOWS:
            raise ValueError(f"how: wanted one of {', '.join(comparing.HOWS)}, got {how!r}")
        lists = None if groups is None else comparing.groups_of(groups, self.names)
        shape = (len(self), len(self.names) if lists is None else len(lists))
        blocks = comparison.blocks(self.base, self._arrays["delta"])
        if lists is not None:
            blocks = ((first, comparing.joined(block, lists, how)) for first, block in blocks)
        if out is not None:
            return np.asarray(files.write_new(out, shape, self.base.dtype, blocks)).T
        result = np.empty(shape, self.base.dtype)
        for first, block in blocks:
            result[first : first + len(block)] = block
        return result.T

    def spread(self) -> np.ndarray:
        """(S,) float64 root mean square of each sample's delta over all queries, background ones included."""
        return comparing.root_mean_square(self._arrays["delta"])

    @staticmethod
    def mean(parts: Sequence[Scores | str | os.PathLike[str]], out: str | os.PathLike[str] | None = None) -> Scores:
        """Means of base and delta over several models, as over checkpoints of one training.

        Args:
            parts: scores or folders, of the same corpus, queries and loss. Queries are compared by number and name.
            out: folder for the result; None keeps it in memory.

        Raises:
            ManifestMismatch: other samples, queries or settings; lists what differs.
            ValueError: none given, one is unfinished, or ``out`` holds scores already.
            DamagedFile, OSError: as ``Scores.open``.
        """
        models = [part if isinstance(part, Scores) else Scores.open(part) for part in parts]
        manifest = averaging.average([model._manifest for model in models], [model._where for model in models])
        return write_all(manifest, averaging.blocks([model._complete_arrays("mean") for model in models]), out)

    def top(
        self,
        query: int,
        k: int = 10,
        tail: str = "helpful",
        *,
        normalized: str | None = None,
        self_influence: np.ndarray | None = None,
    ) -> TopK:
        """The k strongest samples of a query, strongest first.

        Args:
            query: 0 to Q-1.
            k: how many; more than S gives S. NaN is left out.
            tail: "helpful" the most positive influence, "harmful" the most negative, "both" the largest either way.
            normalized: a kind of :meth:`normalized` to order by, with its ``self_influence``; None for raw influence.

        Returns:
            Corpus indices and influence, normalised if asked for. Of equal ones the smaller index is first. Memory does
            not grow with S.

        Raises:
            ValueError, TypeError: an argument is not as above.
        """
        query = self._check_query(query)
        return self._strongest(range(query, query + 1), k, tail, normalized, self_influence)[0]

    def tops(
        self,
        k: int = 10,
        tail: str = "helpful",
        *,
        normalized: str | None = None,
        self_influence: np.ndarray | None = None,
    ) -> list[TopK]:
        """:meth:`top` of every query, in one pass over the scores instead of Q."""
        return self._strongest(range(len(self.names)), k, tail, normalized, self_influence)

    def _strongest(self, queries: range, k: int, tail: str, *normalized: Any) -> list[TopK]:
        k = min(check_k(k), len(self))
        running = RunningTop(len(queries), k, tail, getattr(torch, self.base.dtype.name))
        first = self._manifest["shape"]["start"]
        for row, block in self._columns_of(queries, *normalized):
            running.add(torch.from_numpy(np.ascontiguousarray(block.T)), first + row)
        return [running.result(place) for place in range(len(queries))]

    def _columns_of(
        self, queries: range, normalized: str | None, self_influence: np.ndarray | None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """First row and (b, n) scores of n queries, block by block."""
        delta, columns = self._arrays["delta"], slice(queries.start, queries.stop)
        if normalized is not None:
            for row, block in self._comparison(normalized, self_influence).blocks(self.base, delta):
                yield row, block[:, columns].astype(delta.dtype)
            return
        rows = max(1, TOP_CELLS // len(queries))
        for row in range(0, len(self), rows):
            yield row, delta[row : row + rows, columns] * self._signs[columns]

    def _comparison(self, kind: str, self_influence: np.ndarray | None) -> comparing.Comparison:
        return comparing.Comparison(kind, self._signs, self._asked, self_influence, len(self))

    def to_pandas(self) -> pandas.DataFrame:
        """A row a sample: ``index``, ``base``, then ``delta_<name>`` and ``influence_<name>`` for each query.

        Raises:
            ImportError: pandas is not installed.
        """
        return frames.to_pandas(self._columns())

    def to_arrow(self) -> pyarrow.Table:
        """The table of ``to_pandas`` as Arrow, for Parquet, DuckDB or Polars.

        Raises:
            ImportError: pyarrow is not installed.
        """
        return frames.to_arrow(self._columns())

    def _columns(self) -> dict[str, np.ndarray]:
        return frames.columns(self.indices, self.base, self.delta, self._signs[: self._asked], self.names)

    @property
    def _asked(self) -> int:
        """Queries that are no background: Q."""
        shape = self._manifest["shape"]
        return shape["queries"] - shape["background"]

    @property
    def _signs(self) -> np.ndarray:
        """(Q',) from delta to influence, background included."""
        return np.where(np.array(self._manifest["directions"]) == "ascent", 1, -1).astype(self.base.dtype)

    @property
    def _where(self) -> str:
        shape = self._manifest["shape"]
        return str(self.path) if self.path else f"samples {shape['start']} to {shape['stop'] - 1} in memory"

    def _check_query(self, query: int) -> int:
        try:
            number = operator.index(query)
        except TypeError as err:
            raise TypeError(f"query: wanted a whole number, got {query!r}") from err
        if not 0 <= number < len(self.names):
            raise ValueError(f"query: wanted 0 to {len(self.names) - 1}, got {number}")
        return number

    def _complete_arrays(self, action: str) -> dict[str, np.ndarray]:
        if not self.complete:
            raise ValueError(f"{action}: wanted finished scores, got {self!r}")
        return self._arrays


def write_all(
    manifest: dict[str, Any], parts: Iterable[dict[str, np.ndarray]], out: str | os.PathLike[str] | None
) -> Scores:
    """Puts the parts one after the other into memory or a new folder, as complete scores under ``manifest``."""
    manifest = {**manifest, "ready": False}
    target = Memory(manifest) if out is None else claim(out, manifest)
    try:
        if target.path and target.manifest["ready"]:
            raise ValueError(f"out: wanted an empty folder, got {out} with scores in it")
        target.create(ready=False)  # stopped half-way, the folder counts as empty and can be written again
        joining.copy(parts, target)
        target.sync()
        target.flag(range(manifests.plan_of(manifest).blocks))
        target.save_manifest({**manifest, "ready": True})
    finally:
        target.close()
    return Scores.of(target)
