"""What the stages hand to each other, and nothing else: frozen records, the named errors, the dimension key.

Dimension key, used in every docstring, kernel and test:

    N rows or tokens   D width       V vocabulary or classes   Q queries
    S samples          r rank        L window length           B batch
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = [
    "BadSample",
    "Block",
    "DamagedFile",
    "ManifestMismatch",
    "NonFiniteLoss",
    "Part",
    "Plan",
    "TopK",
    "UnsavedFactors",
]


class DamagedFile(ValueError):
    """A file whose header, size or content is not what its format promises; the message says which file and where."""


class BadSample(ValueError):
    """A value inside a batch that cannot be scored: a label out of range, a token id outside the vocabulary.

    Args:
        message: what was wanted and what was found.
        row: position of the sample inside the batch (0-based); the line turns it into the index in the corpus.
    """

    def __init__(self, message: str, row: int):
        super().__init__(message)
        self.row = row


class NonFiniteLoss(ValueError):
    """A sample's loss, before or after the step, is NaN or infinite; the message names the sample and the query."""


class ManifestMismatch(ValueError):
    """A result folder holds scores of another model, update, corpus or setting; the message lists what differs."""


class UnsavedFactors(OSError):
    """A fit that ended well, and whose file could not be written.

    Args:
        error: of the disk.
        factors: the fitted :class:`finf_fast.Factors`, to be saved elsewhere; an attribute of that name.
    """

    def __init__(self, error: OSError, factors: Any):
        said = f"{error.strerror}; the fit is not lost: save this error's .factors elsewhere"
        super().__init__(error.errno, said, error.filename)
        self.factors = factors


@dataclass(frozen=True)
class Part:
    """Some samples of a block: their places (B,) in it, and a pytree of tensors whose leading dimension is B.

    ``sent`` is what stands for the batch on its way to the device, where it was sent ahead.
    """

    rows: Any
    batch: Any = field(repr=False)
    sent: Any = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Block:
    """Rows ``[start, stop)`` of the corpus, decoded: one batch, or several of samples of like length.

    ``number`` is the block's place in the plan: its completion flag in the result folder.
    """

    number: int
    start: int
    stop: int
    parts: tuple[Part, ...]

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Plan:
    """How the sweep cuts the work; written in the manifest, so that a resumed run repeats the same arithmetic.

    Attributes:
        start, stop: the samples of this run (a shard), indices in the corpus.
        block: samples per block, the unit that is read, scored and flagged as done.
        forward: samples per forward, at most; None for a whole block.
        tokens: of texts of different lengths, tokens per forward, padding counted, at most; None for any number.
        halvings: ``(block number, samples per forward)`` from that block on; grows when memory runs out.
        stack: rows of a sample that the engine carries at once, as many as memory held: 1 + queries, or 1.
        room: bytes that products may take from one chunk of queries to the next; one made anew may round another way.
        threads: intra-op threads of torch; another count may round another way.
        reason: one line that says why it was planned so.
    """

    start: int
    stop: int
    block: int
    forward: int | None = None
    tokens: int | None = None
    halvings: tuple[tuple[int, int], ...] = ()
    stack: int = 1
    room: int = 0
    threads: int = 1
    reason: str = ""

    @property
    def samples(self) -> int:
        return self.stop - self.start

    @property
    def blocks(self) -> int:
        return -(-self.samples // self.block)

    def rows(self, number: int) -> tuple[int, int]:
        """First and one past last corpus index of a block."""
        start = self.start + number * self.block
        return start, min(start + self.block, self.stop)

    def forward_size(self, number: int) -> int:
        """Samples per forward in this block: as planned, or what memory allowed since an earlier block."""
        size = self.forward or self.block
        for first, halved in self.halvings:
            if number >= first:
                size = halved
        return size

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Plan:
        pairs = tuple((int(first), int(size)) for first, size in values["halvings"])
        return cls(**{**values, "halvings": pairs})


@dataclass(frozen=True)
class TopK:
    """The strongest samples of one query, strongest first.

    Attributes:
        indices: (K,) int64, positions in the corpus.
        influence: (K,) float32 or float64, positive = helpful.
    """

    indices: Any
    influence: Any = field(repr=False)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self):
        return iter((self.indices, self.influence))
