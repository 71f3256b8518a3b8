"""Where the columns of an Arrow stream lie in its file.

A stream is a schema and then batches, each a head (its length, then its metadata) and a body with the columns'
buffers. pyarrow parses the heads; of the bodies it is shown untouched memory, whose addresses tell the places.
Source: the Arrow columnar format, "IPC streaming format".
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np

from finf_fast.corpus.files import MappedFile
from finf_fast.records import DamagedFile

__all__ = ["STREAM", "Column", "map_stream"]

STREAM = b"\xff\xff\xff\xff"  # before the length of a head, since Arrow 0.15
END = STREAM + bytes(4)
LONGEST_HEAD = 64 << 20  # bytes; a head has a few hundred, and a length that lies would be read into memory
POSITIONS = "position_ids"
USUAL = ("input_ids", "attention_mask", "token_type_ids", "labels")  # what tokenizers and collators write


@dataclass(frozen=True)
class Column:
    """One column of K batches, which rows are counted by.

    Attributes:
        name: as in the schema.
        dtype: of its items, as stored.
        size: items a row; None where rows are lists of differing lengths.
        is_number: a row is a number, not a list of one.
        edges: dtype of the places where lists begin and end; None where lists do not differ.
        values, offsets: (K,) int64, where items and edges begin in the file, counted in items of their own dtype.
        counts: (K,) int64 items of a batch.
    """

    name: str
    dtype: np.dtype
    size: int | None
    is_number: bool
    edges: np.dtype | None
    values: np.ndarray
    offsets: np.ndarray
    counts: np.ndarray

    @property
    def is_ragged(self) -> bool:
        return self.size is None

    @property
    def shape(self) -> str:
        """What has to agree between files, in words."""
        kind = "integers" if self.dtype.kind in "iu" else self.dtype.name
        return kind if self.is_number else f"lists of {'any' if self.is_ragged else self.size} {kind}"


def map_stream(file: MappedFile, names: list[str] | None) -> tuple[np.ndarray, list[Column]]:
    """The first row of each batch, and one past the last, (K + 1,) int64; and the columns.

    Args:
        file: the stream.
        names: of columns; None for those that are usual and there.

    Raises:
        ImportError: pyarrow is missing.
        DamagedFile: no whole Arrow stream.
        ValueError: no rows, or columns that are not there, or hold something else than numbers and lists of them.
    """
    heads = _Heads(file)
    messages = _Messages(heads)
    schema = messages.schema()
    chosen = _chosen(file.name, messages.names(schema), names)
    pairs, rows, places = [(name, messages.shape(schema, name)) for name in chosen], [0], []
    while (batch := messages.batch(schema)) is not None:
        if batch.num_rows:
            places.append([messages.place(batch, name, shape) for name, shape in pairs])
            rows.append(rows[-1] + batch.num_rows)
    if not places:
        raise ValueError(f"source: empty corpus, wanted rows in {file.name}, got none")
    found = np.array(places, np.int64)
    columns = [Column(name, *shape, *found[:, k].T.copy()) for k, (name, shape) in enumerate(pairs)]
    return np.array(rows, np.int64), columns


Shape = tuple[np.dtype, int | None, bool, np.dtype | None]  # Column's dtype, size, is_number, edges


class _Heads:
    """The file as pyarrow reads it, front to back: heads as they are, bodies as memory that nothing was written to."""

    closed = False

    def __init__(self, file: MappedFile):
        self.file, self.at, self.message = file, 0, 0

    def read(self, count: int) -> Any:
        """The next bytes, fewer where the file ends."""
        count = min(count, self.file.size - self.at)
        start, self.at = self.at, self.at + count
        if count and start >= self._body():
            return mmap.mmap(-1, count)
        if count > LONGEST_HEAD:
            raise DamagedFile(f"{self.file.name}, byte {self.message + 4}: a head of {count} bytes cannot be true")
        with self.file.view(start, self.at) as raw:
            return raw.tobytes()

    def begin(self) -> None:
        """A message begins here."""
        self.message = self.at

    def length(self) -> int:
        """Of the head of this message; 0 at the end of the stream."""
        with self.file.view(self.message, min(self.message + 8, self.file.size)) as raw:
            prefix = raw.tobytes()
        if len(prefix) < 8 or not prefix.startswith(STREAM):
            wanted = f"the mark {STREAM.hex(' ')} and a length"
            raise DamagedFile(f"{self.file.name}, byte {self.message}: wanted {wanted}, got {prefix.hex(' ')!r}")
        return int.from_bytes(prefix[4:], "little", signed=True)

    def _body(self) -> int:
        return self.message + 8 + max(0, self.length())


class _Messages:
    """The messages of a stream, one by one; every error of pyarrow becomes one that names the file.

    What it says of a damaged one may fail late: a name is decoded, and a length looked at, when it is asked for.
    """

    def __init__(self, heads: _Heads):
        self._pa = _pyarrow()
        self._heads = heads
        self._reader = self._pa.ipc.MessageReader.open_stream(self._pa.PythonFile(heads, mode="r"))
        self._body: Any = None

    def schema(self) -> Any:
        message = self._next()
        if message is None:
            raise DamagedFile(f"{self._heads.file.name}, byte 0: wanted a schema, got the end of a stream")
        kind = self._parsed(lambda: message.type)
        if kind != "schema":  # pyarrow checks a message as what it says it is, and would then read it as a schema
            raise DamagedFile(f"{self._where()}: wanted a schema, got a message of type {kind!r}")
        return self._parsed(lambda: self._pa.ipc.read_schema(message))

    def names(self, schema: Any) -> list[str]:
        return self._parsed(lambda: schema.names)

    def shape(self, schema: Any, name: str) -> Shape:
        kind, text = self._parsed(lambda: (schema.field(name).type, str(schema.field(name).type)))
        shape = self._parsed(lambda: _shape(kind))
        if shape is None:
            wanted = "numbers, or lists of integers"
            raise ValueError(f"columns: wanted columns of {wanted}, got {name!r} of {text} in {self._heads.file.name}")
        return shape

    def batch(self, schema: Any) -> Any:
        """The next record batch, whose buffers tell where they are and hold nothing; None at the end."""
        message = self._next()
        if message is None:
            return None
        kind = self._parsed(lambda: message.type)
        if kind != "record batch":
            raise ValueError(f"source: wanted columns that are stored plainly in {self._heads.file.name}, got a "
                             f"{kind}: cast columns with a dictionary to their values")  # fmt: skip
        self._body = self._parsed(lambda: message.body)
        batch = self._parsed(lambda: self._pa.ipc.read_record_batch(message, schema))
        rows = batch.num_rows
        wrong = [count for count in self._parsed(lambda: [len(column) for column in batch.columns]) if count != rows]
        if rows < 0 or wrong:
            raise DamagedFile(f"{self._where()}: wanted {rows} rows in every column, got {[*wrong, rows][0]}")
        return batch

    def place(self, batch: Any, name: str, shape: Shape) -> tuple[int, int, int]:
        """Where the values and the edges of a column begin, in items of theirs, and how many values there are."""
        dtype, size, is_number, edges = shape
        nulls, count, buffers = self._parsed(lambda: _parts(batch.column(name), is_number))
        if nulls:
            raise ValueError(f"columns: wanted a value in every row of {name!r}, got nulls in {self._where()}")
        first = self._begin(name, buffers[-1], dtype, batch.num_rows * size if size is not None else count)
        offset = 0 if edges is None else self._begin(name, buffers[1], edges, batch.num_rows + 1)
        return first, offset, count

    def _begin(self, name: str, buffer: tuple[int, int], dtype: np.dtype, count: int) -> int:
        needed = count * dtype.itemsize
        if needed == 0:
            return 0
        body = (0, 0) if self._body is None else (self._body.address, self._body.size)
        at, size = (buffer[0] - body[0], buffer[1]) if buffer[1] else (0, 0)
        place = self._heads.at - body[1] + at
        if not 0 <= at <= at + needed <= body[1] or size < needed or place % dtype.itemsize:
            wanted = f"{needed} bytes of column {name!r} inside the batch, not compressed"
            raise DamagedFile(f"{self._where()}: wanted {wanted}, got {size} bytes at {at} of {body[1]}")
        return place // dtype.itemsize

    def _next(self) -> Any:
        self._heads.begin()
        if self._heads.length() == 0:
            self._heads.read(len(END))
            if self._heads.at != self._heads.file.size:
                name, at = self._heads.file.name, self._heads.at
                raise DamagedFile(f"{name}: the stream ends at byte {at}, got {self._heads.file.size} bytes")
            return None
        return self._parsed(self._reader.read_next_message)

    def _parsed(self, parse: Any) -> Any:
        try:
            return parse()
        except DamagedFile:
            raise
        except Exception as error:  # whatever the parser stumbles over, the file is what is wrong
            raise DamagedFile(
                f"{self._where()}: the Arrow message cannot be read, or is compressed: {error}"
            ) from error

    def _where(self) -> str:
        return f"{self._heads.file.name}, byte {self._heads.message}"


def _chosen(file: str, there: list[str], names: list[str] | None) -> list[str]:
    chosen = [name for name in USUAL if name in there] if names is None else names
    missing = [name for name in (chosen if names is not None else USUAL[:1]) if there.count(name) != 1]
    if missing:
        wanted = f"names of columns in {file}, which has {there}"
        raise ValueError(f"columns: wanted {wanted}, got {names}: {missing[0]!r} is not there once")
    if POSITIONS in (there if names is None else names) and "input_ids" in chosen and "attention_mask" not in chosen:
        # A mask would be made, under which no model looks for texts that are packed in a row.
        cure = f"name columns without {POSITIONS!r} if each row is one text, else give the dataset itself for the path"
        raise ValueError(f"columns: wanted an attention_mask beside {POSITIONS!r} in {file}, got {names}; {cure}")
    return chosen


def _shape(kind: Any) -> Shape | None:
    """Of a column of an Arrow type; None where no sample can be made of it."""
    types = _pyarrow().types
    lists = types.is_list(kind) or types.is_large_list(kind)
    fixed = types.is_fixed_size_list(kind)
    value = kind.value_type if lists or fixed else kind
    if (not types.is_integer(value) and (lists or not types.is_floating(value))) or (fixed and kind.list_size < 1):
        return None  # of lists without items a stream may have any number of rows, and hold nothing
    dtype = np.dtype(value.to_pandas_dtype()).newbyteorder("<")
    if lists:
        return dtype, None, False, np.dtype("<i8" if types.is_large_list(kind) else "<i4")
    return dtype, kind.list_size if fixed else 1, not fixed, None


def _parts(column: Any, is_number: bool) -> tuple[bool, int, list[tuple[int, int]]]:
    """Of a column: whether it has nulls, how many values, and each buffer's address and size."""
    values = column if is_number else column.values
    buffers = [(buffer.address, buffer.size) if buffer is not None else (0, 0) for buffer in column.buffers()]
    return bool(column.null_count or values.null_count), len(values), buffers


def _pyarrow() -> Any:
    try:
        import pyarrow as pa
        import pyarrow.ipc
    except ImportError as error:
        raise ImportError("source: reading Arrow files takes pyarrow: pip install finf_fast[arrow]") from error
    return pa
