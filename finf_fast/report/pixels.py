"""Pictures inside the page: a tensor of pixels to PNG bytes (W3C PNG, third edition, 5 and 11) to a data URI."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import numpy as np

GRAY, RGB = 0, 2  # PNG colour types
SMALLEST = 4  # pixels a side below which a table of numbers is not taken for a picture


def as_picture(value: Any) -> np.ndarray | None:
    """(H, W) or (H, W, 3) uint8 of an image-like tensor (H, W), (1, H, W) or (3, H, W); None for anything else.

    Floats inside [0, 1] are taken as they are; others, as after normalising, are stretched to the full range.
    """
    pixels = np.asarray(value)
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3):
        pixels = pixels[0] if pixels.shape[0] == 1 else np.moveaxis(pixels, 0, -1)
    image = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] == 3)
    if not image or min(pixels.shape[:2]) < SMALLEST or not (pixels.dtype == np.uint8 or pixels.dtype.kind == "f"):
        return None
    return pixels if pixels.dtype == np.uint8 else _as_bytes(pixels)


def _as_bytes(pixels: np.ndarray) -> np.ndarray:
    pixels = np.nan_to_num(pixels.astype(np.float64))
    low, high = pixels.min(), pixels.max()
    if low < 0 or high > 1:
        pixels = (pixels - low) / (high - low) if high > low else np.zeros_like(pixels)
    return np.rint(pixels * 255).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    """A PNG file of (H, W) gray or (H, W, 3) RGB uint8 pixels."""
    height, width = pixels.shape[:2]
    lines = pixels.reshape(height, -1)
    filtered = np.concatenate([np.zeros((height, 1), np.uint8), lines], 1)  # filter type 0 before each line
    header = struct.pack(">IIBBBBB", width, height, 8, GRAY if pixels.ndim == 2 else RGB, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(filtered.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, body) for kind, body in parts)


def data_uri(pixels: np.ndarray) -> str:
    """The picture as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode()


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
