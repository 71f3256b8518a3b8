"""Data files for the tests of the corpus, written byte by byte, so that no reader's idea of a format is trusted."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

SPECIAL = [0, 1, 2, 0x7F, 0x80, 0xFE, 0xFF]  # bytes that mean something in a header


def npy_bytes(shape: tuple[int, ...], descr: str, payload: bytes, *, fortran: bool = False, version: int = 1) -> bytes:
    """An `.npy` file: magic, version, header length, the dict padded with blanks to a multiple of 64, payload."""
    text = f"{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}".encode()
    before = 10 if version == 1 else 12
    text += b" " * (-(before + len(text) + 1) % 64) + b"\n"
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + payload


def idx_bytes(shape: tuple[int, ...], payload: bytes, code: int = 8) -> bytes:
    return bytes([0, 0, code, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + payload


def llmc_bytes(tokens: np.ndarray, magic: int, version: int, count: int | None = None) -> bytes:
    words = [magic, version, len(tokens) if count is None else count] + [0] * 253
    return struct.pack("<256i", *words) + tokens.tobytes()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def state(path: Path) -> tuple[bytes, int]:
    """What reading must leave alone: the bytes and the time of change."""
    return path.read_bytes(), os.stat(path).st_mtime_ns


def flip_byte(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def megatron_bytes(
    sequences: list[np.ndarray],
    documents: list[int],
    code: int,
    *,
    modes: bool = False,
    pointers: list[int] | None = None,
    lengths: list[int] | None = None,
) -> tuple[bytes, bytes]:
    """``P.idx`` and ``P.bin``: lengths in tokens, pointers in bytes, documents as the sequence each begins with."""
    data = b"".join(sequence.tobytes() for sequence in sequences)
    sizes = [len(sequence.tobytes()) for sequence in sequences]
    pointers = [sum(sizes[:k]) for k in range(len(sizes))] if pointers is None else pointers
    lengths = [len(sequence) for sequence in sequences] if lengths is None else lengths
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sequences), len(documents))
    index += struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(pointers)}q", *pointers)
    index += struct.pack(f"<{len(documents)}q", *documents) + (bytes(len(sequences)) if modes else b"")
    return index, data


@st.composite
def damage(draw, content):
    """A bytearray with bytes changed, most of them near the front, or words of all ones; perhaps cut or made longer."""
    length = len(content)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.one_of(st.integers(0, min(length, 80) - 1), st.integers(0, length - 1)))
        word = draw(st.sampled_from([1, 1, 4, 8]))
        byte = draw(st.one_of(st.sampled_from(SPECIAL), st.integers(0, 255)))
        content[at : at + word] = bytes([byte]) * len(content[at : at + word])
    end = draw(st.one_of(st.just(length), st.integers(0, length)))
    return bytes(content[:end]) + bytes(draw(st.sampled_from([0, 0, 0, 1, 8])))
