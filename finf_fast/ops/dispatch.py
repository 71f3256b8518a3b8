"""Which face of an operation runs: one table, one choice, and a reason for every face that is refused.

``FINF_BACKEND`` chooses: ``auto`` (default) takes the first face of the operation's row below that is built and takes
the inputs, after the one that `finf_fast.ops.measured` knows to be faster where there are rivals; a face's name forces
it, and what it cannot take is then an error. The first choice of each kind is logged at INFO to the logger
``finf_fast``, with the reasons against the faces before it.

A new face is a word in `TABLE` here and a runner in the operation's file.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from finf_fast.ops import measured

__all__ = [
    "RIVALS",
    "TABLE",
    "Face",
    "Verdict",
    "backends",
    "choose",
    "chosen",
    "compiled",
    "compiled_cuda",
    "faces",
    "interpreted",
]

log = logging.getLogger("finf_fast")


@dataclass(frozen=True)
class Face:
    """What one face of one operation takes: kinds of device (None: any) and dtypes of its floating inputs; and how many
    numbers of a head, where its programs hold all of them."""

    devices: tuple[str, ...] | None
    dtypes: tuple[torch.dtype, ...]
    widest: float = math.inf


@dataclass(frozen=True)
class Verdict:
    """Whether a face can run, and why not (or, in a word, why)."""

    face: str
    available: bool
    reason: str


_ANY = Face(None, (torch.float32, torch.float64, torch.bfloat16, torch.float16))
_SHORT = Face(("cpu",), (torch.float32, torch.bfloat16))
_GPU = Face(("cuda",), (torch.float32, torch.bfloat16))
# Twice as wide, a block's keys and values, before and changed, take 192 KiB, more shared memory than an A100 has.
_HEADS = replace(_GPU, widest=512)
_STORED = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32)

# Faces in order of preference: what is listed first is fastest where it runs at all.
TABLE: dict[str, dict[str, Face]] = {
    "cross_entropy_delta": {"cpp": _SHORT, "cuda": _GPU, "reference": _ANY},
    "activation_delta": {"cpp": _SHORT, "triton": _GPU, "reference": _ANY},
    "attention_delta": {"cpp": _SHORT, "triton": _HEADS, "reference": _ANY},
    "decode_pixels": {"cuda": _GPU, "reference": _ANY},  # on a CPU staging decodes as it reads
    "decode_tokens": {"cuda": Face(("cuda",), _STORED), "reference": Face(None, _STORED)},
    "group_norm_delta": {"cpp": _SHORT, "triton": _GPU, "reference": _ANY},
    "layer_norm_delta": {"cpp": _SHORT, "triton": _GPU, "reference": _ANY},
    "linear_cross_entropy_delta": {"cpp": _SHORT, "triton": _GPU, "hybrid": _GPU, "reference": _ANY},
    "linear_delta": {"cpp": _SHORT, "triton": _GPU, "reference": _ANY},
    "noise": {
        "cpp": Face(("cpu",), (torch.int64,)),
        "cuda": Face(("cuda",), (torch.int64,)),
        "reference": Face(None, (torch.int64,)),
    },
    "rms_norm_delta": {"cpp": _SHORT, "triton": _GPU, "reference": _ANY},
    "segment_sum": {
        "cpp": Face(("cpu",), (torch.float32, torch.float64)),
        "cuda": Face(("cuda",), (torch.float32, torch.float64)),
        "reference": _ANY,
    },
    "squared_error_delta": {"cpp": _SHORT, "cuda": _GPU, "reference": _ANY},
    "topk_merge": {
        "cpp": Face(("cpu",), (torch.float32, torch.float64)),
        "cuda": Face(("cuda",), (torch.float32, torch.float64)),
        "reference": Face(None, (torch.float32, torch.float64)),
    },
}

# Faces of which none is faster everywhere: what was measured decides, and without that their order above.
RIVALS: dict[str, tuple[str, ...]] = {"linear_cross_entropy_delta": ("triton", "hybrid")}

# Of compute capabilities, without the dot.
OLDEST = 80


@functools.cache
def compiled() -> ModuleType:
    """The compiled module; ImportError if it was not built for this Python."""
    from finf_fast import _C

    return _C


def _unbuilt() -> str:
    """Why the compiled faces are missing, or nothing."""
    try:
        compiled()
    except ImportError as error:
        return f"_C not built: {error}"
    return ""


@functools.cache
def compiled_cuda() -> ModuleType:
    """The module of CUDA kernels; ImportError if it was not built: no nvcc was there."""
    from finf_fast import _cuda

    return _cuda


def _unbuilt_cuda() -> str:
    try:
        compiled_cuda()
    except ImportError as error:
        return f"_cuda not built: {error}"
    return _without_device()


def _without_triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return "" if interpreted() else _without_device()


def _without_device() -> str:
    if torch.version.hip:
        return f"written for CUDA, and this torch is for ROCm {torch.version.hip}"
    return "" if torch.cuda.is_available() else "no CUDA device"


def _too_old(takes: Face, inputs: tuple[Tensor, ...]) -> str:
    """Why a face for GPUs does not run on the inputs', or without inputs on the current one. Asynchronous copies,
    products of bfloat16 and what nvcc compiles begin with 8.0."""
    devices = [x.device for x in inputs] or [torch.device("cuda" if torch.cuda.is_available() else "cpu")]
    found = [_architecture(device) for device in devices if device.type == "cuda" and "cuda" in (takes.devices or ())]
    return next((f"compute capability {n / 10:.1f}: wanted 8.0 or newer" for n in found if n < OLDEST), "")


def interpreted() -> bool:
    """Whether Triton's kernels were asked for without a GPU: on CPU tensors, through Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1" and _asked_for("triton")


def _without_wide_products() -> str:
    if "dtype_out" not in torch.ops.aten.mm.overloads():
        return f"torch.mm has no out_dtype before torch 2.8, and this is {torch.__version__}"
    return _unbuilt_cuda()


def _asked_for(face: str) -> bool:
    return os.environ.get("FINF_BACKEND") == face


# A face that needs more than torch says here what it misses.
_MISSING: dict[str, Callable[[], str]] = {
    "cpp": _unbuilt,
    "triton": _without_triton,
    "cuda": _unbuilt_cuda,
    "hybrid": _without_wide_products,
}

_choices: dict[tuple, str] = {}
_logged: set[tuple[str, str, str]] = set()


def backends() -> list[str]:
    """The words that FINF_BACKEND understands."""
    return ["auto", *dict.fromkeys(face for row in TABLE.values() for face in row)]


def choose(op: str, *inputs: Tensor, case: measured.Case | None = None, width: int = 0) -> str:
    """Name of the face that runs `op` on these floating inputs.

    A choice is made once per (FINF_BACKEND, case, width, devices, dtypes) and remembered: afterwards a call costs a
    look-up.

    Args:
        case: what measurements of rivals are looked up by; None where there are none.
        width: of the widest head, where the operation has heads.

    Raises:
        ValueError: FINF_BACKEND is no face's name, or names a face that refuses these inputs.
    """
    key = (op, os.environ.get("FINF_BACKEND") or "auto", case, width, *[(x.device, x.dtype) for x in inputs])
    face = _choices.get(key)
    if face is None:
        face = _choices[key] = _decide(op, key[1], case, inputs, width)
    return face


def faces(op: str, *inputs: Tensor, width: int = 0) -> list[Verdict]:
    """Every face of `op` in order of preference; without inputs, whether it can run here at all."""
    return [_judge(op, face, inputs, width) for face in _row(op)]


def chosen() -> dict[str, str]:
    """What ran in this process: operation to face, for a run's record; several, in order of first use, by comma."""
    record: dict[str, list[str]] = {}
    # Of a copy, for another thread may be making its first choice.
    for (op, *_), face in list(_choices.items()):
        if face not in record.setdefault(op, []):
            record[op].append(face)
    return {op: ",".join(names) for op, names in record.items()}


def _row(op: str) -> dict[str, Face]:
    if op not in TABLE:
        raise ValueError(f"op: wanted one of {', '.join(TABLE)}, got {op!r}")
    return TABLE[op]


def _decide(op: str, backend: str, case: measured.Case | None, inputs: tuple[Tensor, ...], width: int) -> str:
    if backend not in backends():
        raise ValueError(f"FINF_BACKEND: wanted one of {', '.join(backends())}, got {backend!r}")
    verdicts, word = faces(op, *inputs, width=width), "first choice"
    if backend != "auto":
        verdicts = [v for v in verdicts if v.face == backend] or [Verdict(backend, False, "it has no such face")]
        word = f"FINF_BACKEND={backend}"
    elif case is not None:
        verdicts, word = _by_measurement(op, case, inputs[0], verdicts)
    refused = [v for v in verdicts if not v.available]
    taken = next((v for v in verdicts if v.available), None)
    if taken is None:
        reasons = "; ".join(f"{v.face}: {v.reason}" for v in refused)
        raise ValueError(f"FINF_BACKEND={backend}: no face of {op} takes these inputs ({reasons})")
    _tell(op, taken.face, word, [v for v in refused if verdicts.index(v) < verdicts.index(taken)])
    return taken.face


def _by_measurement(op: str, case: measured.Case, x: Tensor, verdicts: list[Verdict]) -> tuple[list[Verdict], str]:
    """The verdicts with the fastest of the rivals before all others, and a word on it."""
    rivals = [v for v in verdicts if v.available and v.face in RIVALS.get(op, ())]
    if len(rivals) < 2:
        return verdicts, "first choice"
    face = measured.fastest(op, _architecture(x.device), case)
    if face is None:
        return verdicts, f"{' and '.join(v.face for v in rivals)}: {measured.summary(_architecture(x.device))}"
    return sorted(verdicts, key=lambda v: v.face != face), "the faster one, as measured"


def _architecture(device: torch.device) -> int:
    """90 for compute capability 9.0; 0 for no such device."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _tell(op: str, face: str, word: str, passed: list[Verdict]) -> None:
    reason = "; ".join(f"not {v.face}: {v.reason}" for v in passed) or word
    if (op, face, reason) not in _logged:
        _logged.add((op, face, reason))
        log.info("%s runs on its %s face (%s)", op, face, reason)


def _judge(op: str, face: str, inputs: tuple[Tensor, ...], width: int) -> Verdict:
    takes = _row(op)[face]
    reason = "" if _at_home(face, inputs) else _MISSING.get(face, str)()
    for x in inputs:
        reason = reason or _refusal(face, takes, x)
    reason = reason or _too_old(takes, inputs)
    if width > takes.widest:
        reason = reason or f"heads of {width}: the {face} face takes up to {takes.widest}"
    rival = face in RIVALS.get(op, ())
    return Verdict(face, not reason, reason or (f"{_holds(takes)}; {_measured_here()}" if rival else _holds(takes)))


def _at_home(face: str, inputs: tuple[Tensor, ...]) -> bool:
    """Whether the hybrid was asked for on a CPU: its products of float32 there are those of any torch."""
    return face == "hybrid" and _asked_for("hybrid") and all(x.device.type == "cpu" for x in inputs)


def _measured_here() -> str:
    return measured.summary(_architecture(torch.device("cuda")) if torch.cuda.is_available() else None)


def _refusal(face: str, takes: Face, x: Tensor) -> str:
    devices = takes.devices
    if face == "triton" and interpreted():
        devices = ("cpu",)
    elif face == "hybrid" and _asked_for("hybrid"):
        devices = (*takes.devices, "cpu")
    if devices is not None and x.device.type not in devices:
        return f"{x.device.type}: the {face} face runs on {' and '.join(devices)} only"
    if x.dtype not in takes.dtypes:
        return f"{_words((x.dtype,))}: the {face} face takes {_words(takes.dtypes)} only"
    return ""


def _holds(takes: Face) -> str:
    return f"{' and '.join(takes.devices) if takes.devices else 'any device'}, {_words(takes.dtypes)}"


def _words(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
