"""OLMo's raw tokens and their table of documents."""

from __future__ import annotations

import gzip
import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corpus_files import flip_byte, state
from finf_fast.corpus import open_corpus
from finf_fast.records import DamagedFile
from test_corpus_documents import LENGTHS, sequences, texts

EDGES = np.cumsum([0, *LENGTHS]).tolist()


def table(edges=None):
    edges = list(itertools.pairwise(EDGES)) if edges is None else edges
    return "".join(f'{start},{end},"a, ""b""\nc",s3://x/y.json.gz,{k}\r\n' for k, (start, end) in enumerate(edges))


def olmo(folder, parts, text=None, packed=None):
    content = gzip.compress((table() if text is None else text).encode()) if packed is None else packed
    (folder / "part-0-00000.csv.gz").write_bytes(content)
    (folder / "part-0-00000.npy").write_bytes(b"".join(part.tobytes() for part in parts))
    return folder / "part-0-00000.npy"


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_documents(tmp_path, dtype):
    parts = sequences(dtype)
    path = olmo(tmp_path, parts)
    before = state(path)
    corpus = open_corpus(path)
    assert (corpus.format, len(corpus)) == ("olmo", len(LENGTHS))
    assert texts(corpus) == [part.tolist() for part in parts] and texts(corpus, 4, 5) == [[]]
    assert corpus.lengths(3, 6).tolist() == LENGTHS[3:6] and state(path) == before
    assert corpus.locate(2) == f"{path}, byte {10 * parts[0].itemsize}"
    assert texts(open_corpus(tmp_path, max_length=2)) == [part[:2].tolist() for part in parts]


def test_with_a_window_the_same_file_is_a_stream(tmp_path):
    parts = sequences()
    corpus = open_corpus(olmo(tmp_path, parts), window=5, dtype="uint16")
    assert corpus.format == "tokens" and corpus[1].tolist() == np.concatenate(parts)[5:10].tolist()


def test_documents_with_gaps(tmp_path):
    parts = sequences()
    stream = np.concatenate(parts).tolist()
    corpus = open_corpus(olmo(tmp_path, parts, table([(1, 3), (7, 7), (9, 31)])))
    assert texts(corpus) == [stream[1:3], [], stream[9:31]]


def test_both_files_are_part_of_the_fingerprint(tmp_path):
    path = olmo(tmp_path, sequences(), table([(0, 4), (4, 31)]))
    found = {open_corpus(path).fingerprint}
    flip_byte(path, 3)
    found.add(open_corpus(path).fingerprint)
    (tmp_path / "part-0-00000.csv.gz").write_bytes(gzip.compress(table([(0, 5), (5, 31)]).encode()))
    found.add(open_corpus(path).fingerprint)
    assert len(found) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0,4\n3,31\n", "csv.gz, row 2: wanted 4 <= start <= end, got 3, 31"),
        ("0,4\n5,4\n", "row 2: .* got 5, 4"),
        ("-1,31\n", "row 1: .* got -1, 31"),
        ("start,end\n0,31\n", r"row 1: wanted start and end, got \['start', 'end'\]"),
        ("0\n", r"row 1: wanted start and end, got \['0'\]"),
        ("0,31\n\n", r"row 2: wanted start and end, got \[\]"),
        (f"0,{10**30}\n", "row 1: wanted 0 <= start <= end, got"),
        ("0,32\n", r"npy: wanted 32 tokens of 2 or 4 bytes, as .*csv\.gz ends, got 62 bytes"),
        ("0,5\n", "npy: wanted 5 tokens"),
        (f"0,{'x' * 200000}\n", "after row 0: the table cannot be read: field larger than"),
        (f"0,4\n4,31{',x' * 600000}\n", "after row 1: .* wanted rows of fewer than 1048576 characters, got a longer"),
        ("0,31" + ',"a\n"' * 300000, "after row 0: .* got a longer one"),
        ('0,4,"a,s,0\n4,31,b,s,1\n', "after row 0: the table cannot be read: unexpected end of data"),
        ('0,4,a,s,0\n4,9,"b,s,1\n9,31,"c",s,2\n', "after row 1: the table cannot be read: ',' expected after '\"'"),
        ('0,4,a,s,0\n4,9,b,"s,1\n9,31,c,s,"\n', "row 2: wanted 5 columns, as in the rows before, got 4"),
    ],
)
def test_tables_that_cannot_be_true(tmp_path, text, words):
    with pytest.raises(DamagedFile, match=words):
        open_corpus(olmo(tmp_path, sequences(), text))


def test_a_line_that_fills_the_memory_is_not_read_whole(tmp_path):
    path = olmo(tmp_path, sequences(), f"0,31,{'x' * (64 << 20)}\n")
    tracemalloc.start()
    try:
        with pytest.raises(DamagedFile, match="after row 0: the table cannot be read: (field larger|.* got a longer)"):
            open_corpus(path)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_tables_without_a_token(tmp_path):
    for text in ("", "0,0\n"):
        with pytest.raises(ValueError, match="empty corpus, wanted a document with tokens in .*csv.gz"):
            open_corpus(olmo(tmp_path, sequences(), text))
    (tmp_path / "part-0-00000.csv.gz").unlink()
    with pytest.raises(FileNotFoundError):
        open_corpus(tmp_path / "part-0-00000.npy", format="olmo")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_a_table_holds_is_read_or_refused(tmp_path, data):
    packed, plain = bytearray(gzip.compress(table().encode(), mtime=0)), bytearray(table().encode())
    content = data.draw(st.sampled_from([packed, plain]))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    whole = bytes(content[: data.draw(st.sampled_from([len(content), data.draw(st.integers(0, len(content)))]))])
    parts = sequences()
    path = olmo(tmp_path, parts, packed=gzip.compress(whole) if content is plain else whole)
    try:
        found = texts(open_corpus(path, format="olmo"))
    except ValueError as error:
        assert isinstance(error, DamagedFile) or "empty corpus" in str(error)
    else:
        assert sum(map(len, found)) <= sum(LENGTHS)
