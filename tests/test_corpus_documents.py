"""Corpora of documents (Megatron, datatrove): each document its own tokens, and every way to be wrong named."""

from __future__ import annotations

import itertools
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import finf_fast as ff
from corpus_files import flip_byte, megatron_bytes, state
from finf_fast.corpus import open_corpus
from finf_fast.records import DamagedFile
from nets import language_model

DRAW = np.random.default_rng(0)
LENGTHS = [3, 7, 1, 5, 0, 4, 9, 2]  # of sequences; documents are [0,2), [2,3), [3,3) empty, [3,8)
DOCUMENTS = [0, 2, 3, 3, 8]


def sequences(dtype="<u2", lengths=LENGTHS, most=50257):
    return [DRAW.integers(0, most, length).astype(dtype) for length in lengths]


def megatron(folder: Path, parts, documents=DOCUMENTS, code=8, **more) -> Path:
    index, data = megatron_bytes(parts, documents, code, **more)
    (folder / "text.idx").write_bytes(index)
    (folder / "text.bin").write_bytes(data)
    return folder / "text.bin"


def datatrove(folder: Path, parts, ends=None) -> Path:
    (folder / "text.ds").write_bytes(b"".join(part.tobytes() for part in parts))
    ends = np.cumsum([len(part) for part in parts]) if ends is None else ends
    (folder / "text.ds.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    return folder / "text.ds"


def texts(corpus, start=0, stop=None):
    """The documents of a batch without their padding, after a look at the padding."""
    batch = corpus.read(start, len(corpus) if stop is None else stop)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids.dtype == mask.dtype == torch.int64 and ids.shape == mask.shape
    counts = mask.sum(1)
    assert torch.equal(mask, (torch.arange(ids.shape[1]) < counts[:, None]).long()) and not (ids * (1 - mask)).any()
    assert ids.shape[1] == max(1, int(counts.max()))
    return [row[:count].tolist() for row, count in zip(ids, counts.tolist(), strict=True)]


def together(parts, documents):
    whole = [np.concatenate([*parts[a:b], np.empty(0, parts[0].dtype)]) for a, b in itertools.pairwise(documents)]
    return [document.tolist() for document in whole]


@pytest.mark.parametrize("modes", [False, True])
@pytest.mark.parametrize(
    ("code", "dtype"),
    [(1, "<u1"), (2, "<i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2"), (6, "<u2"), (7, "<u4"), (8, "<u8")],
)
def test_megatron_documents_and_sequences_in_every_dtype(tmp_path, code, dtype, modes):
    parts = sequences(dtype, most=120)
    path = megatron(tmp_path, parts, code=code, modes=modes)
    for name in (path, path.with_suffix(".idx"), path.with_suffix("")):
        corpus = open_corpus(name)
        assert (corpus.format, len(corpus)) == ("megatron", 4)
    assert texts(corpus) == together(parts, DOCUMENTS)
    assert texts(corpus, 1, 3) == together(parts, DOCUMENTS)[1:3] and texts(corpus, 2, 3) == [[]]
    assert corpus.lengths(0, 4).tolist() == [10, 1, 0, 20]
    single = open_corpus(path, sample="sequence")
    assert texts(single) == [part.tolist() for part in parts] and texts(single, 4, 5) == [[]]
    assert corpus[3]["input_ids"].tolist() == together(parts, DOCUMENTS)[3]


@pytest.mark.parametrize(("code", "dtype"), [(4, "<i4"), (5, "<i8"), (8, "<u2"), (7, "<u4")])
def test_windows_of_a_megatron_stream_in_its_own_dtype(tmp_path, code, dtype):
    """Its `.bin` looks like any file of uint16; its index knows better."""
    parts = sequences(dtype, most=50257 if dtype == "<u2" else 200_000)
    corpus = open_corpus(megatron(tmp_path, parts, code=code), window=5)
    stream = np.concatenate(parts).astype(np.int64)
    assert corpus.format == "tokens" and corpus.read(0, len(corpus)).tolist() == stream[:30].reshape(-1, 5).tolist()


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_datatrove_documents(tmp_path, dtype):
    parts = sequences(dtype)
    path = datatrove(tmp_path, parts)
    before = state(path)
    corpus = open_corpus(path)
    assert (corpus.format, len(corpus)) == ("datatrove", 8)
    assert texts(corpus) == [part.tolist() for part in parts] and texts(corpus, 5, 7) == [
        p.tolist() for p in parts[5:7]
    ]
    assert corpus.lengths(3, 6).tolist() == [5, 0, 4]
    assert state(path) == before
    assert corpus.describe()["tokens"] == sum(LENGTHS) and len(corpus.describe()["paths"]) == 2


@pytest.mark.prove
@pytest.mark.parametrize("size", [2, 4])
def test_what_datatrove_itself_writes(tmp_path, size):
    from datatrove.pipeline.tokens import tokenizer as writer

    parts = [part.tolist() for part in sequences("<u2")]
    file = writer.TokenizedFile(str(tmp_path), "own.ds", save_loss_metadata=True, token_size=size)
    for part in parts:
        file.write(part, np.ones(len(part), bool))
    file.close()
    corpus = open_corpus(tmp_path / "own.ds")
    assert texts(corpus) == parts and corpus.describe()["stored_dtype"] == f"uint{8 * size}"
    assert corpus.describe()["not_read"] == f"{tmp_path / 'own.ds.loss'}: every token is scored"


@pytest.mark.parametrize("write", [megatron, datatrove])
def test_long_documents_are_cut_where_asked(tmp_path, write):
    path = write(tmp_path, sequences())
    whole, cut = open_corpus(path), open_corpus(path, max_length=4)
    assert texts(cut) == [text[:4] for text in texts(whole)]
    assert cut.lengths(0, len(cut)).max() == 4 and cut.describe()["max_length"] == 4
    assert cut.fingerprint != whole.fingerprint
    for wrong, error in (
        (0, ValueError),
        (2**63, ValueError),
        (10**30, ValueError),
        (2.5, TypeError),
        (True, TypeError),
    ):
        with pytest.raises(error, match="max_length: wanted"):
            open_corpus(path, max_length=wrong)


@pytest.mark.parametrize("write", [megatron, datatrove])
def test_either_file_is_part_of_the_fingerprint(tmp_path, write):
    path = write(tmp_path, sequences())
    found = {open_corpus(path).fingerprint}
    flip_byte(path, 0)
    found.add(open_corpus(path).fingerprint)
    index = path.with_suffix(".idx") if write is megatron else Path(f"{path}.index")
    content = bytearray(index.read_bytes())
    if write is megatron:
        content[34 + 12 * 8 + 8] = 1  # another first document
    else:
        content[0] = 2  # another end of the first
    index.write_bytes(content)
    found.add(open_corpus(path).fingerprint)
    assert len(found) == 3


def test_a_place_is_a_file_and_a_byte(tmp_path):
    path = megatron(tmp_path, sequences())
    assert open_corpus(path).locate(3) == f"{path}, byte 22"
    assert open_corpus(datatrove(tmp_path, sequences())).locate(2) == f"{tmp_path / 'text.ds'}, byte 20"


HEADERS = {
    "magic": (0, b"X", "byte 0: wanted the magic"),
    "version": (9, b"\2", "byte 9: wanted version 1, got 2"),
    "a dtype of floats": (17, b"\x63", "byte 17: wanted the code of an integer dtype, got 99"),
    "too many sequences": (18, b"\xff" * 8, r"text.idx: wanted \d+ bytes for 18446744073709551615 sequences"),
    "too few documents": (26, b"\1", "text.idx: wanted .* 1 documents"),
}


@pytest.mark.parametrize(("at", "new", "words"), HEADERS.values(), ids=HEADERS)
def test_a_megatron_header_that_lies(tmp_path, at, new, words):
    path = megatron(tmp_path, sequences())
    index = path.with_suffix(".idx")
    content = bytearray(index.read_bytes())
    content[at : at + len(new)] = new
    index.write_bytes(content)
    with pytest.raises(DamagedFile, match=words):
        open_corpus(path, format="megatron")


ROWS = {
    "a negative length": ({"lengths": [3, -7, 1, 5, 0, 4, 9, 2]}, "byte 38: wanted a length of 0 or more, got -7"),
    "a pointer past the end": (
        {"pointers": [0, 6, 900, 22, 32, 32, 40, 58]},
        "byte 82: wanted a whole token",
    ),
    "a pointer inside a token": ({"pointers": [0, 5, 20, 22, 32, 32, 40, 58]}, "byte 74: wanted a whole token"),
    "an overlap": (
        {"pointers": [0, 6, 18, 22, 32, 32, 40, 58]},
        "byte 82: wanted the end of .* before, got 18",
    ),
    "a first sequence that begins late": (
        {"pointers": [4, 6, 20, 22, 32, 32, 40, 58]},
        "byte 66: wanted the end of .* before, got 4",
    ),
    "a length into the next sequence": (
        {"lengths": [3, 9, 1, 5, 0, 4, 9, 2]},
        "byte 82: wanted the end of .* before, got 20",
    ),
    "a step back": (
        {"pointers": [0, 6, 20, 22, 32, 0, 40, 58]},
        "byte 106: wanted the end of .* before, got 0",
    ),
    "documents out of order": ({"documents": [0, 3, 2, 3, 8]}, "byte 146: .* got sequence 2 after 3"),
    "a document past the end": ({"documents": [0, 2, 3, 99, 8]}, "byte 154: .* got sequence 99 after 3"),
}


@pytest.mark.parametrize(("wrong", "words"), ROWS.values(), ids=ROWS)
def test_megatron_rows_that_cannot_be_true(tmp_path, wrong, words):
    path = megatron(tmp_path, sequences(), **{"documents": DOCUMENTS, **wrong})
    with pytest.raises(DamagedFile, match=rf"text\.idx, {words}"):
        open_corpus(path).read(0, 4)


ONE = (lambda corpus, k: corpus.read(k, k + 1), lambda corpus, k: corpus.take([k]))


@pytest.mark.parametrize("sample", ["document", "sequence"])
@pytest.mark.parametrize("wrong", [wrong for wrong, _ in ROWS.values()], ids=ROWS)
def test_megatron_samples_beside_such_a_row(tmp_path, wrong, sample):
    """Of a damaged index each sample, read alone, is what it was or is refused."""
    parts = sequences()
    whole = together(parts, DOCUMENTS) if sample == "document" else [part.tolist() for part in parts]
    path = megatron(tmp_path, parts, **{"documents": DOCUMENTS, **wrong})
    for ask in ONE:
        found = [alone(path, ask, k, sample=sample) for k in range(len(whole))]
        assert [text for text, true in zip(found, whole, strict=True) if text not in ("refused", true)] == []
        assert "refused" in found or (sample == "sequence" and "documents" in wrong)


def alone(path, ask, k, **options):
    """The tokens of sample k, or that it was refused."""
    try:
        batch = ask(open_corpus(path, **options), k)
    except DamagedFile as error:
        assert str(path.with_suffix("")) in str(error) and ", byte " in str(error)
        return "refused"
    return batch["input_ids"][0, : int(batch["attention_mask"].sum())].tolist()


def test_megatron_ends(tmp_path):
    path = megatron(tmp_path, sequences(), documents=[0, 2, 3, 3, 7])
    with pytest.raises(DamagedFile, match="wanted documents from sequence 0 to 8, got 0 to 7"):
        open_corpus(path)
    path = megatron(tmp_path, sequences())
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DamagedFile, match=r"text\.bin: wanted .* sequence 7 \(2 tokens from byte 58"):
        open_corpus(path)
    empty = megatron(tmp_path, sequences(lengths=[0, 0]), documents=[0, 1, 2])
    with pytest.raises(ValueError, match="empty corpus"):
        open_corpus(empty)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        open_corpus(path.with_suffix(".idx"))
    with pytest.raises(ValueError, match="sample: wanted 'document' or 'sequence'"):
        open_corpus(megatron(tmp_path, sequences()), sample="page")


def test_datatrove_ends(tmp_path):
    parts = sequences()
    corpus = open_corpus(datatrove(tmp_path, parts, [3, 10, 8, 16, 16, 20, 29, 31]))
    with pytest.raises(DamagedFile, match=r"text\.ds\.index, byte 16: wanted an end from 10 to 31 tokens, got 8"):
        corpus.read(0, 8)
    corpus = open_corpus(datatrove(tmp_path, parts, [3, 10, 11, 2**63, 16, 20, 29, 31]))
    with pytest.raises(DamagedFile, match="byte 24: .* got 9223372036854775808"):
        corpus.read(2, 5)
    with pytest.raises(DamagedFile, match="wanted 32 tokens of 2 or 4 bytes, as its index ends, got 62 bytes"):
        open_corpus(datatrove(tmp_path, parts, [3, 10, 11, 16, 16, 20, 29, 32]))
    path = datatrove(tmp_path, parts)
    Path(f"{path}.index").write_bytes(b"1234567")
    with pytest.raises(DamagedFile, match="whole ends of 8 bytes, got 7"):
        open_corpus(path)


@pytest.mark.parametrize(("row", "end"), [(0, 11), (1, 12), (2, 8), (3, 2), (3, 2**63), (5, 3), (6, 32), (6, 12)])
def test_datatrove_samples_beside_an_end_out_of_order(tmp_path, row, end):
    parts = sequences()
    ends = np.cumsum([len(part) for part in parts]).tolist()
    path = datatrove(tmp_path, parts, [*ends[:row], end, *ends[row + 1 :]])
    for ask in ONE:
        found = [alone(path, ask, k) for k in range(len(parts))]
        assert [text for text, part in zip(found, parts, strict=True) if text not in ("refused", part.tolist())] == []
        assert found[row] == found[row + 1] == "refused"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_an_index_holds_is_read_or_refused(tmp_path, data):
    """Any damage gives documents inside the stream or a named error, never another exception."""
    parts = sequences()
    write = data.draw(st.sampled_from([megatron, datatrove]))
    path = write(tmp_path, parts)
    index = path.with_suffix(".idx") if write is megatron else Path(f"{path}.index")
    content = bytearray(index.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    index.write_bytes(content[: data.draw(st.sampled_from([len(content), data.draw(st.integers(0, len(content)))]))])
    stream = np.concatenate(parts).tolist()
    try:
        found = texts(open_corpus(path, format=write.__name__))
    except ValueError as error:
        assert isinstance(error, DamagedFile) or "empty corpus" in str(error)
    else:
        assert sum(map(len, found)) <= len(stream)
        assert all(any(stream[i : i + len(t)] == t for i in range(len(stream) + 1)) for t in found)


def test_a_document_past_four_billion_tokens(tmp_path):
    """A sparse file: two documents, of which the second begins past 2**32 bytes."""
    first, second = 2**32 + 3, 5
    path = tmp_path / "large.bin"
    with open(path, "wb") as file:
        file.truncate(2 * (first + second))
        file.seek(2 * first)
        file.write(np.arange(1, 6, dtype="<u2").tobytes())
    # A sequence's length is an int32: the first document is three of them.
    lengths = [2**31 - 1, 2**31 - 1, first - 2 * (2**31 - 1), second]
    pointers = np.concatenate([[0], np.cumsum(lengths[:-1])]) * 2
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 4, 3) + struct.pack("<4i", *lengths)
    (tmp_path / "large.idx").write_bytes(index + struct.pack("<4q", *pointers) + struct.pack("<3q", 0, 3, 4))
    corpus = open_corpus(path, max_length=6)
    assert len(corpus) == 2 and texts(corpus) == [[0] * 6, [1, 2, 3, 4, 5]]
    assert os.stat(path).st_blocks * 512 < 1 << 20


def test_a_sweep_over_documents_scores_each_as_alone(tmp_path):
    model, _ = language_model()
    parts = sequences(lengths=[5, 2, 9, 3, 3, 12, 4, 2], most=19)
    path = megatron(tmp_path, parts, documents=[0, 1, 2, 3, 4, 5, 6, 7, 8])
    update = ff.mirror(model, torch.tensor([[1, 2, 3]]), loss="causal_lm", lr=0.1)
    scores = ff.sweep(model, [update], open_corpus(path), loss="causal_lm", batch_size=3)
    for i, part in enumerate(parts):
        ids = torch.from_numpy(part.astype(np.int64))[None]
        alone = ff.sweep(model, [update], ids, loss="causal_lm")
        np.testing.assert_allclose(scores.delta[:, i], alone.delta[:, 0], rtol=1e-9)
