"""How often a kernel would be compiled: once for batches of any length, and never without knowing its loads' alignment.

Triton compiles anew where an integer is 1, where it is a multiple of 16, and where a pointer is one of 16 bytes, unless
the kernel says of an argument that nothing hangs on it. Launches are recorded here instead of being made.
"""

from __future__ import annotations

import importlib
import os
import re
import sys

import pytest
import torch
from torch import Tensor

pytestmark = [
    pytest.mark.prove,  # Triton is a large download: `make prove` installs it
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted, none is compiled"),
]

DTYPE = torch.bfloat16  # of all stacks
SIZES = (1, 2, 15, 16, 48, 77)


class Recorder:
    """A kernel whose launches are only written down."""

    def __init__(self, kernel):
        self.kernel, self.fn, self.launches = kernel, kernel.fn, []

    def __getitem__(self, grid):
        names = self.kernel.arg_names
        return lambda *values, **named: self.launches.append(dict(zip(names, values, strict=False)) | named)

    def variants(self) -> set[tuple]:
        return {
            tuple(self._told(param, launch[param.name]) for param in self.kernel.params) for launch in self.launches
        }

    def ragged(self) -> set[str]:
        """Arguments that loads hang on and that a launch has brought as no multiple of 16; 1 is a stride."""
        told = [param.name for param in self.kernel.params if not (param.do_not_specialize or param.is_constexpr)]
        return {name for launch in self.launches for name in told if not _whole(launch[name])}

    @staticmethod
    def _told(param, value):
        if param.is_constexpr or value is None:
            return value
        if isinstance(value, Tensor):
            return value.dtype, value.data_ptr() % 16 == 0
        return None if param.do_not_specialize or not isinstance(value, int) else (value == 1, value % 16 == 0)


def _whole(value) -> bool:
    if isinstance(value, Tensor):
        return value.data_ptr() % 16 == 0
    return not isinstance(value, int) or value == 1 or value % 16 == 0


@pytest.fixture
def recorded(monkeypatch):
    """Every kernel that a file of kernels launches, under a recorder, by name."""
    pytest.importorskip("triton")

    def install(file: str) -> dict[str, Recorder]:
        module, found = importlib.import_module(f"finf_fast.kernels.{file}"), {}
        for name in [name for name in vars(module) if re.fullmatch(r"_?\w+_kernel", name)]:
            found[name] = Recorder(getattr(module, name))
            monkeypatch.setattr(module, name, found[name])
        return found

    return install


def stack(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=DTYPE)


def launch_head(N: int, D: int, V: int, Q: int, r: int) -> None:
    from finf_fast.kernels.linear_cross_entropy_delta import linear_cross_entropy_delta

    factors = (stack(Q, V, r), stack(Q, D, r))
    base, delta, target = torch.zeros(N), torch.zeros(Q, N), torch.zeros(N, dtype=torch.int64)
    x, dx, W = stack(N, D), stack(Q, N, D), stack(V, D)
    linear_cross_entropy_delta(x, dx, W, target, base, delta, None, None, None, *factors, None, N - 100, 0.0)


def launch_linear(N: int, D: int, E: int, Q: int, r: int) -> None:
    from finf_fast.kernels.linear_delta import linear_delta

    factors = (stack(Q, E, r), stack(Q, D, r))
    linear_delta(stack(1 + Q, N, D), stack(E, D), None, None, factors, stack(Q, E), stack(1 + Q, N, E))


def launch_attention(T: int, TK: int, H: int, Q: int, E: int = 64, EV: int = 64, **options) -> None:
    from finf_fast.kernels.attention_delta import attention_delta

    q, k, v, out = (
        stack(1 + Q, 2, H, T, E),
        stack(1 + Q, 2, H, TK, E),
        stack(1 + Q, 2, H, TK, EV),
        stack(1 + Q, 2, H, T, EV),
    )
    plain = {"causal": True, "scale": 1.0, "mask": None, "cap": None, "cu_seqlens": None}
    attention_delta(q, k, v, out, **(plain | options))


def launch_plain_attention(E: int) -> None:
    launch_attention(9, 9, 2, 2, E, E)


def launch_busy_attention(E: int) -> None:
    """A mask that is added before texts behind each other, and a bool one."""
    added, seen, texts = torch.zeros(2, 2, 9, 9), torch.ones(2, 2, 9, 9, dtype=torch.bool), torch.tensor([0, 4, 9])
    launch_attention(9, 9, 2, 2, E, E, mask=added, cap=3.0, cu_seqlens=texts)
    launch_attention(9, 9, 2, 2, E, E, mask=added, cap=3.0)
    launch_attention(9, 9, 2, 2, E, E, mask=seen, cap=3.0)


def launch_norm(N: int, Q: int, D: int = 64, residual: bool = False) -> None:
    from finf_fast.kernels.normalize import normalize

    x, y = stack(1 + Q, N, D), stack(1 + Q, N, D)
    other, total = (torch.zeros_like(x), torch.empty_like(y)) if residual else (None, None)
    normalize(x, other, (torch.zeros(D), None, None, None), y, total, 1e-5, centred=True)


def launch_activation(Q: int) -> None:
    from finf_fast.kernels.activation_delta import activation_delta

    activation_delta(stack(1 + Q, 1, 64), None, stack(1 + Q, 64), "gelu")


# By file of kernels and what varies: rows and vocabulary, or how many queries and heads there are.
VARIED = {
    ("linear_cross_entropy_delta", "lengths"): lambda n: launch_head(n, 64, n + 3, 2, 16),
    ("linear_delta", "lengths"): lambda n: launch_linear(n, 64, 32, 2, 16),
    ("attention_delta", "lengths"): lambda n: launch_attention(n, n + 1, 4, 2),
    ("normalize", "lengths"): lambda n: launch_norm(n, 2),
    ("linear_delta", "queries"): lambda n: launch_linear(9, 64, 32, n, 16),
    ("attention_delta", "queries"): lambda n: launch_attention(9, 9, n, n),
    ("normalize", "queries"): lambda n: launch_norm(9, n),
    ("activation_delta", "queries"): launch_activation,
}


def variants(kernels: dict[str, Recorder]) -> dict[str, int]:
    return {name: len(kernel.variants()) for name, kernel in kernels.items()}


@pytest.mark.parametrize("file, varies", VARIED)
def test_batches_of_any_size_are_compiled_for_once(recorded, file, varies):
    kernels = recorded(file)
    VARIED[file, varies](SIZES[0])
    first = variants(kernels)
    for n in SIZES[1:]:
        VARIED[file, varies](n)
    assert any(first.values()) and variants(kernels) == first


# One axis after another is no multiple of 16.
@pytest.mark.parametrize("D, r", [(60, 16), (64, 5), (60, 5), (1, 1)])
def test_a_head_is_launched_with_whole_loads_only(recorded, D, r):
    kernels = recorded("linear_cross_entropy_delta")
    for N, V, Q in [(9, 33, 1), (9, 33, 3), (16, 32, 2)]:
        launch_head(N, D, V, Q, r)
    assert {name: kernel.ragged() for name, kernel in kernels.items()} == {name: set() for name in kernels}
    (sums,) = [kernel for name, kernel in kernels.items() if name == "sums_kernel"]
    assert all(launch["DESCRIPTORS"] for launch in sums.launches)


def test_a_triton_that_has_no_descriptors_is_not_asked_for_them(recorded, monkeypatch):
    """Those before 3.4, on whatever GPU."""
    configurations, word = importlib.import_module("finf_fast.kernels.configurations"), "triton.tools.tensor_descriptor"
    monkeypatch.setitem(sys.modules, word, None)  # an import of it fails
    monkeypatch.setattr(configurations, "_descriptors_known", configurations._descriptors_known.__wrapped__)
    assert not any(configurations.has_descriptors(number) for number in (0, 80, 90, 100))
    kernels = recorded("linear_cross_entropy_delta")
    launch_head(9, 64, 33, 1, 16)
    assert not any(launch["DESCRIPTORS"] for launch in kernels["sums_kernel"].launches)


@pytest.mark.parametrize("D, r", [(60, 16), (64, 5), (60, 5), (1, 1)])
def test_a_layer_is_launched_with_whole_loads_only(recorded, D, r):
    kernels = recorded("linear_delta")
    launch_linear(9, D, 32, 3, r)
    assert {name: kernel.ragged() for name, kernel in kernels.items()} == {name: set() for name in kernels}


# Widths of Stable Diffusion's, PixArt's and ViT-g's heads; as they are, a change spilt up to a kilobyte of them.
@pytest.mark.parametrize("E, EV", [(40, 40), (72, 64), (64, 88), (1, 1)])
def test_attention_is_launched_with_whole_loads_only(recorded, E, EV):
    kernels = recorded("attention_delta")
    launch_attention(9, 11, 3, 2, E, EV)
    assert {name: kernel.ragged() for name, kernel in kernels.items()} == {name: set() for name in kernels}


def test_parameters_of_a_norm_are_read_by_whole_loads_only(recorded):
    """Also of one that is part of another tensor; a stack in such a place is read as it lies."""
    from finf_fast.kernels.normalize import normalize

    kernels, within = recorded("normalize"), torch.arange(65.0)[1:]
    x, y = stack(3 * 3 * 64 + 1)[1:].view(3, 3, 64), stack(3, 3, 64)
    normalize(x, None, (within, within, within[None], within[None]), y, None, 1e-5, centred=True)
    kernel = kernels["_norm_rows_kernel"]
    assert kernel.ragged() == {"X"}
    assert torch.equal(kernel.launches[0]["WEIGHT"], within) and torch.equal(kernel.launches[0]["DBIAS"][0], within)


# Each file's launches whose sizes are a specimen's, and the file of its specimens.
COMPILED = {
    "linear_cross_entropy_delta": ("head_specimens", lambda: [launch_head(9, 64, 33, Q, 16) for Q in (1, 2)]),
    "linear_delta": ("linear_delta", lambda: [launch_linear(9, 64, E, 2, 16) for E in (32, 33)]),
    "attention_delta": (
        "attention_specimens",
        lambda: [launch(E) for E in (64, 128, 256, 512) for launch in (launch_plain_attention, launch_busy_attention)],
    ),
    "normalize": ("normalize", lambda: [launch_norm(9, 2, D, True) for D in (1, 20, 64, 2001, 2049, 8192, 8208)]),
    "activation_delta": ("activation_delta", lambda: launch_activation(2)),
}


@pytest.mark.parametrize("architecture", (80, 89, 90, 100))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("file", COMPILED)
def test_what_is_launched_is_what_a_specimen_compiles(recorded, monkeypatch, file, dtype, architecture):
    """The same tiles, warps, stages and registers, without which a specimen would tell nothing about a launch."""
    place, launch = COMPILED[file]
    specimens = importlib.import_module(f"finf_fast.kernels.{place}").specimens(architecture)
    short = {one.name: "bf16" in str(one.signature) for one in specimens}
    both = {one.kernel for one in specimens if short[one.name]} & {
        one.kernel for one in specimens if not short[one.name]
    }
    known = [
        _told(one.kernel, {**one.constexprs, "num_warps": one.num_warps, "num_stages": one.num_stages, **one.options})
        for one in specimens
        if one.kernel not in both or short[one.name] == (dtype == torch.bfloat16)
    ]
    monkeypatch.setattr(sys.modules[__name__], "DTYPE", dtype)
    kernels, module = recorded(file), importlib.import_module(f"finf_fast.kernels.{file}")
    monkeypatch.setattr(module, "architecture", lambda device: architecture)
    launch()
    launched = [_told(recorder.kernel, given) for recorder in kernels.values() for given in recorder.launches]
    assert launched and [one for one in launched if one not in known] == []


def _told(kernel, given: dict) -> tuple:
    """Kernel, sizes of its tiles, and options; those left out are Triton's own."""
    sizes = [given[param.name] for param in kernel.params if param.is_constexpr and type(given[param.name]) is int]
    options = {"num_warps": 4, "num_stages": 3, "maxnreg": None}
    return kernel.fn.__name__, sizes, [given.get(name, default) for name, default in options.items()]
