"""From a list of samples to a batch: stacked as DataLoader does, and dict samples of differing lengths padded right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import default_collate

__all__ = ["collate", "joined", "unmasked_length"]

# What fills the end of a row shorter than the longest: -100 is the losses' ignore_index; ids of 0 hide behind the mask.
FILLER = {"labels": -100}
OF_TOKENS = {"input_ids", "attention_mask", "token_type_ids", "position_ids", "labels"}  # as long as their text


def collate(samples: Sequence[Any], mask: bool = False) -> Any:
    """Samples to a batch: a tensor, a tuple of tensors, or a dict of tensors.

    Args:
        samples: B samples of one structure. Dict values of one dimension (tensors, arrays, lists of numbers) may differ
            in length: ``labels`` are padded right with -100, everything else, ``attention_mask`` too, with 0.
        mask: make an ``attention_mask`` (B, L) int64, 1 where ``input_ids`` were given, though this batch needs no
            padding; it is always made when ``input_ids`` were padded, unless the samples bring one.

    Raises:
        TypeError: a value that is no tensor, array or number.
        ValueError: shapes that differ where they may not; a mask would have to be made over several texts in a row.
    """
    if isinstance(samples[0], Mapping):
        return _collate_dicts(samples, mask)
    try:
        batch = default_collate(list(samples))
    except RuntimeError as error:
        raise ValueError(f"source: wanted samples of one shape, got {error}; give collate_fn to join others") from error
    return tuple(batch) if isinstance(batch, list) else batch


def joined(batches: Sequence[Any]) -> Any:
    """Batches of one structure, one below the other; in dicts, rows of differing lengths are padded as samples are."""
    first = batches[0]
    if len(batches) == 1:
        return first
    if isinstance(first, Mapping):
        return {key: _rows_joined([batch[key] for batch in batches], FILLER.get(key, 0)) for key in first}
    if isinstance(first, tuple):
        return tuple(map(torch.cat, zip(*batches, strict=True)))
    return torch.cat(list(batches))


def unmasked_length(sample: Any) -> int | None:
    """Length of a dict sample's one-dimensional ``input_ids`` that no ``attention_mask`` goes with; else None."""
    if not isinstance(sample, Mapping) or "input_ids" not in sample or "attention_mask" in sample:
        return None
    row = _row("input_ids", sample["input_ids"])
    return len(row) if row.ndim == 1 else None


def _collate_dicts(samples: Sequence[Mapping], mask: bool) -> dict[str, torch.Tensor]:
    keys = samples[0].keys()
    for sample in samples:
        if sample.keys() != keys:
            raise ValueError(f"source: wanted the keys {sorted(keys)} in every sample, got {sorted(sample.keys())}")
    columns = {key: [_row(key, sample[key]) for sample in samples] for key in keys}
    batch = {key: _join(key, rows) for key, rows in columns.items()}
    ids = columns.get("input_ids")
    if unmasked_length(samples[0]) is not None and (mask or {len(row) for row in ids} != {batch["input_ids"].shape[1]}):
        _require_one_text(columns.get("position_ids", ()))
        batch["attention_mask"] = _pad([torch.ones(len(row), dtype=torch.int64) for row in ids], 0)
    return batch


def _require_one_text(positions: Iterable[torch.Tensor]) -> None:
    """Texts packed in a row are told by positions that restart, which a model looks at where it is given no mask."""
    if any(row.ndim == 1 and (row.diff() < 0).any() for row in positions):
        wanted = "rows of one length where position_ids restart, or an attention_mask of their own"
        raise ValueError(f"source: wanted {wanted}, got rows that differ: a mask made for them would join their texts")


def _row(key: str, value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, list) and not value:
        return torch.empty(0, dtype=torch.int64)  # an empty text; torch alone would call it float
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        wanted = "a tensor, an array, a number or a list of numbers"
        hint = "leave the column out or give collate_fn"
        raise TypeError(f"source[…][{key!r}]: wanted {wanted}, got {type(value).__name__}; {hint}") from None


def _join(key: str, rows: list[torch.Tensor]) -> torch.Tensor:
    shapes = {tuple(row.shape) for row in rows}
    if len(shapes) == 1 and not (shapes == {(0,)} and key in OF_TOKENS):
        return torch.stack(rows)
    if any(row.ndim != 1 for row in rows):
        raise ValueError(f"source[…][{key!r}]: wanted one shape, or one dimension to pad, got {sorted(shapes)}")
    return _pad(rows, FILLER.get(key, 0))


def _pad(rows: list[torch.Tensor], filler: int) -> torch.Tensor:
    """(B, L), L the longest row, 1 at least: of empty texts alone models make no logits."""
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)
    return batch if batch.shape[1] else F.pad(batch, (0, 1), value=filler)


def _rows_joined(parts: list[torch.Tensor], filler: int) -> torch.Tensor:
    """(B_i, L_i) to (sum B_i, max L_i); of other dimensions as they are."""
    if parts[0].dim() == 2:
        longest = max(part.shape[1] for part in parts)
        parts = [F.pad(part, (0, longest - part.shape[1]), value=filler) for part in parts]
    return torch.cat(parts)
