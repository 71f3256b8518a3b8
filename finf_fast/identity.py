"""What a sweep's numbers depend on: versions, fingerprints, settings. Two runs that agree here give the same bits."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import nn

import finf_fast
from finf_fast import ops
from finf_fast.corpus import Corpus
from finf_fast.loss import Loss
from finf_fast.update import Update, model_fingerprint


def of(
    model: nn.Module, updates: Sequence[Update], corpus: Corpus, loss: Loss, engine: dict[str, Any]
) -> dict[str, Any]:
    """The part of a manifest that a resumed run must share, key by key."""
    return {
        "versions": {
            "finf_fast": finf_fast.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "machine": platform.machine(),
            **_home(model),
        },
        "fingerprints": {
            "model": model_fingerprint(model),
            "updates": [update.fingerprint for update in updates],
            "corpus": corpus.fingerprint,
        },
        "settings": {
            **loss.settings(),
            **engine,
            "cpu": torch.backends.cpu.get_cpu_capability(),
            **_faces(),
            **_precision(),
        },
    }


def names_of(updates: Sequence[Update]) -> list[str]:
    """A different name for every query: its own, or its number; a repeated name has its number added."""
    names = [update.name or f"query {q}" for q, update in enumerate(updates)]
    return [name if names.count(name) == 1 else f"{name} ({q})" for q, name in enumerate(names)]


def shared_record(updates: Sequence[Update]) -> dict[str, Any]:
    """What the records of all updates agree on: how the mirror steps were made."""
    first, *others = [json.loads(json.dumps(dict(update.record), default=str)) for update in updates]
    return {key: value for key, value in first.items() if all(key in o and o[key] == value for o in others)}


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's intra-op threads set to ``count`` for the time of a sweep: another number may round another way."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _home(model: nn.Module) -> dict[str, str]:
    """The package that the model's class comes from, with its version, where it is an installed one."""
    package = type(model).__module__.partition(".")[0]
    with contextlib.suppress(metadata.PackageNotFoundError, ValueError):
        return {package: metadata.version(package)}
    return {}


def _precision() -> dict[str, Any]:
    """Global switches of torch under which a float32 product is not one."""
    return {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
    }


def _faces() -> dict[str, Any]:
    """Which face would run each operation of a sweep, and on which instruction set."""
    ready = {op: next(v.face for v in ops.faces(op) if v.available) for op in ("cross_entropy_delta", "segment_sum")}
    forced = os.environ.get("FINF_BACKEND", "auto")
    isa = ops.dispatch.compiled().isa() if "cpp" in ready.values() else None
    return {"faces": ready, "backend": forced, "isa": isa}
