"""One sample as a person would want to see it: a picture, a text, or what Python says of it."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch

from finf_fast.report.markup import Html, join, tag
from finf_fast.report.pixels import as_picture, data_uri

INPUT_KEYS = ("input_ids", "pixel_values")  # what Hugging Face calls the thing to look at
LABEL_KEYS = ("labels", "label")
LEVELS = 4  # shades of a token, each way; the eye tells few more apart behind text
LONGEST = 600  # characters of a value that is neither picture nor text

Decode = Callable[[Sequence[int]], str]


class Viewer:
    """Turns samples into markup.

    Args:
        decode: token ids -> text; by default ids below 256 are bytes and others are shown as numbers.
        classes: name of each class, for integer labels; None shows the number.
    """

    def __init__(self, decode: Decode | None = None, classes: Sequence[str] | None = None):
        self._decode, self._classes = decode, classes

    def show(self, sample: Any, shades: np.ndarray | None = None) -> Html:
        """The sample; ``shades`` (L,) in [-1, 1] colours its tokens, positive = helpful."""
        value = _input(sample)
        picture = as_picture(value) if isinstance(value, torch.Tensor) else None
        if picture is not None:
            return tag("img", src=data_uri(picture), alt="sample", width=picture.shape[1], height=picture.shape[0])
        if is_text(sample):
            return tag("pre", self._text(value.tolist(), shades), class_="text")
        return tag("pre", _shortened(sample), class_="other")

    def label(self, sample: Any) -> str | None:
        """The sample's class, where it has one."""
        label = _label(sample)
        if label is None:
            return None
        if self._classes is not None and 0 <= label < len(self._classes):
            return self._classes[int(label)]
        return f"{label:.4g}" if isinstance(label, float) else str(label)

    def _text(self, ids: list[int], shades: np.ndarray | None) -> Html:
        if shades is None and self._decode is not None:
            return join([self._decode(ids)])
        pieces = self._pieces(ids)
        if shades is None:
            return join(text for text, _ in pieces)
        levels = np.rint(np.nan_to_num(shades) * LEVELS).astype(int)
        runs = groupby(pieces, key=lambda piece: levels[piece[1]] if piece[1] < len(levels) else 0)
        return join(_shaded("".join(text for text, _ in run), int(level)) for level, run in runs)

    def _pieces(self, ids: list[int]) -> list[tuple[str, int]]:
        """(text, number of the token that finished it): one a token, or one a character where tokens are bytes."""
        if self._decode is not None:
            return [(self._decode([token]), n) for n, token in enumerate(ids)]
        if max(ids, default=0) > 255:
            return [(f"{token} ", n) for n, token in enumerate(ids)]
        reader = codecs.getincrementaldecoder("utf-8")("replace")
        pieces = [(reader.decode(bytes([byte])), n) for n, byte in enumerate(ids)]
        return [*pieces, (reader.decode(b"", final=True), len(ids) - 1)]


def is_picture(sample: Any) -> bool:
    """Whether a sample is shown as a picture."""
    value = _input(sample)
    return isinstance(value, torch.Tensor) and as_picture(value) is not None


def is_text(sample: Any) -> bool:
    """Whether a sample is shown as text: one dimension of integers, more than a label."""
    value = _input(sample)
    integers = isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex())
    return integers and value.dim() == 1 and value.dtype is not torch.bool and len(value) > 1


def _input(sample: Any) -> Any:
    """The part to look at, a tensor where it can be one."""
    value = sample
    if isinstance(sample, Mapping):
        value = sample[next((key for key in INPUT_KEYS if key in sample), next(iter(sample)))]
    elif isinstance(sample, (tuple, list)) and len(sample):
        value = sample[0]
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _label(sample: Any) -> int | float | None:
    if isinstance(sample, Mapping):
        label = next((sample[key] for key in LABEL_KEYS if key in sample), None)
    else:
        label = sample[1] if isinstance(sample, (tuple, list)) and len(sample) == 2 else None
    return label.item() if isinstance(label, torch.Tensor) and label.numel() == 1 else None


def _shaded(text: str, level: int) -> Html | str:
    if level == 0:
        return text
    return tag("span", text, class_=f"{'p' if level > 0 else 'n'}{min(abs(level), LEVELS)}")


def _shortened(sample: Any) -> str:
    text = repr(sample)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"
