"""What the GPU suite times: every operation, its shapes, what it has to multiply or to move, and who runs beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gpu_peers
from finf_fast import ops

__all__ = ["CASES", "Work"]

STEP = 1e-3  # size of changes beside values of size 1
Q = 4
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Work:
    """One case.

    Attributes:
        name: its shape, in a few words.
        make: draws one set of inputs on the current device.
        ours: the operation over a set.
        beside: plain torch and peers over the same set, by name.
        flop: products that are needed, 2 for a multiply and add; 0 where bytes are what bounds.
        moved: bytes of ours that have to be read and written, each once.
        missing: peers that are not there, and why.
        case: what rivals' times are looked up by, where there are rivals; see `finf_fast.ops.measured`.
    """

    name: str
    make: Callable[[], tuple]
    ours: Callable
    beside: dict[str, Callable]
    flop: float = 0
    moved: float = 0
    missing: dict[str, str] = field(default_factory=dict)
    case: dict[str, Any] = field(default_factory=dict)


def stack(*shape: int, dtype: torch.dtype = BF16, queries: int = Q) -> Tensor:
    """(1+Q, *shape): values of size 1, changes of size STEP."""
    x = torch.randn(1 + queries, *shape, dtype=dtype)
    x[1:] *= STEP
    return x


def linear_cross_entropy_delta(dry: bool) -> Iterator[Work]:
    # The three of design section 3 first. The compiled pair runs beside one of them: a compilation takes it some 20 s.
    shapes = [(768, 50257), (2048, 128256), (4096, 128256), (768, 128256), (2048, 50257), (4096, 50257)]
    for number, (D, V) in enumerate([(16, 40)] if dry else shapes):
        yield _head(8 if dry else 8192, D, V, *gpu_peers.heads(dry, compiled=number < 1))
    # What peers have no word for is measured beside the hybrid alone: a changed weight, more queries, fewer rows.
    for D, V in [(16, 40)] if dry else shapes[:2]:
        for form, T, queries in [("input", 8192, Q), ("low rank", 8192, Q), ("dense", 8192, 1), ("input", 1024, 1)]:
            yield _rivals(form, 8 if dry else T, D, V, queries)
    # Multiply-adds without tensor cores: a tenth of the rows takes as long.
    D, V = (16, 40) if dry else shapes[0]
    for form, queries in [("input", 1), ("input", Q), ("low rank", 1)]:
        yield _rivals(form, 8 if dry else 1024, D, V, queries, torch.float32)


def _head(T: int, D: int, V: int, beside: dict[str, Callable], missing: dict[str, str]) -> Work:
    name, flop, case = f"T={T} D={D} V={V} Q=1 bf16", 4.0 * T * D * V, _case("input", T, D, V, 1, BF16)
    return Work(
        name, lambda: _drawn(T, D, V, 1, BF16), ops.linear_cross_entropy_delta, beside, flop, missing=missing, case=case
    )


def _rivals(form: str, T: int, D: int, V: int, queries: int, dtype: torch.dtype = BF16) -> Work:
    rank, products = 32, {"input": 1 + queries, "low rank": 1 + queries, "dense": 1 + 2 * queries}[form]

    def make():
        changes = {"low rank": [(V, rank), (D, rank)], "dense": [(V, D)]}.get(form, [])
        drawn = (torch.randn(queries, *shape, dtype=dtype).mul_(STEP) for shape in changes)
        return *_drawn(T, D, V, queries, dtype), *drawn

    def given(changes: tuple[Tensor, ...]) -> dict[str, Any]:
        return {"low rank": {"dW_factors": changes}, "dense": {"dW": changes[0] if changes else None}}.get(form, {})

    return Work(
        name=f"T={T} D={D} V={V} Q={queries} {'bf16' if dtype == BF16 else 'float32'} {form}",
        make=make,
        ours=lambda x, dx, W, target, *changes: ops.linear_cross_entropy_delta(x, dx, W, target, **given(changes)),
        beside={"hybrid": lambda x, dx, W, target, *changes: gpu_peers.hybrid(x, dx, W, target, **given(changes))},
        flop=2.0 * T * V * (D * products + (rank * queries if form == "low rank" else 0)),
        case=_case(form, T, D, V, queries, dtype),
    )


def _drawn(T: int, D: int, V: int, queries: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x, W = torch.randn(T, D, dtype=dtype), torch.randn(V, D, dtype=dtype).mul_(2 / D**0.5)
    return x, torch.randn(queries, T, D, dtype=dtype).mul_(STEP), W, torch.randint(V, (T,))


def _case(form: str, T: int, D: int, V: int, queries: int, dtype: torch.dtype) -> dict[str, Any]:
    return {"form": form, "dtype": str(dtype).removeprefix("torch."), "T": T, "D": D, "V": V, "Q": queries}


def linear_delta(dry: bool) -> Iterator[Work]:
    for D in (16,) if dry else (768, 2048, 4096):
        N, E, r = (8, 24, 4) if dry else (8192, 4 * D, 32)

        def make(N=N, D=D, E=E, r=r):
            W = torch.randn(E, D, dtype=BF16).mul_(D**-0.5)
            return stack(N, D), W, torch.randn(Q, E, r, dtype=BF16).mul_(STEP), torch.randn(Q, D, r, dtype=BF16)

        yield Work(
            name=f"(1+{Q})x{N}x{D} to {E}, rank {r}, bf16",
            make=make,
            ours=lambda x, W, U, V: ops.linear_delta(x, W, dW_factors=(U, V)),
            beside={"F.linear without the weight's change": lambda x, W, U, V: F.linear(x, W)},
            flop=2.0 * N * ((1 + Q) * D * E + Q * r * (D + E)),
        )


def attention_delta(dry: bool) -> Iterator[Work]:
    for E in (64, 128):
        for T in (16,) if dry else (512, 1024, 2048, 4096, 8192):
            yield _attention(1 if dry else 8192 // T, 2 if dry else 16, T, 16 if dry else E)
        if dry:
            return


def _attention(B: int, H: int, T: int, E: int) -> Work:
    def plain(q, k, v):
        return F.scaled_dot_product_attention(*(x.flatten(0, 1) for x in (q, k, v)), is_causal=True)

    seen = T * (T + 1) // 2
    return Work(
        name=f"B={B} H={H} T={T} E={E} Q={Q} bf16 causal",
        make=lambda: tuple(stack(B, H, T, E) for _ in "qkv"),
        ours=lambda q, k, v: ops.attention_delta(q, k, v, causal=True),
        beside={"1+Q plain ones": plain},
        flop=2.0 * B * H * seen * E * 2 * (1 + 2 * Q),
    )


def _rows(dry: bool) -> list[tuple[int, int, torch.dtype]]:
    """(N, D, dtype) of the operations by row."""
    if dry:
        return [(4, 24, BF16)]
    return [*((8192, D, BF16) for D in (768, 1024, 2048, 4096)), (8192, 2048, torch.float32)]


def _row_work(
    N: int, D: int, dtype: torch.dtype, ours: Callable, plain: Callable, word: str = "", more: int = 0
) -> Work:
    """A case that reads 1 + `more` stacks and a weight, and writes one stack, with a second one read two."""
    size = (1 + Q) * N * D * dtype.itemsize

    def make():
        return *(stack(N, D, dtype=dtype) for _ in range(1 + more)), torch.randn(D, dtype=dtype)

    name = f"(1+{Q})x{N}x{D} {str(dtype).removeprefix('torch.')} {word}".rstrip()
    beside = {"1+Q plain ones": plain}
    return Work(name, make, ours, beside, moved=size * (2 + more * (2 if word == "residual" else 1)))


def layer_norm_delta(dry: bool) -> Iterator[Work]:
    for N, D, dtype in _rows(dry):
        plain = lambda x, w: F.layer_norm(x, w.shape, w)  # noqa: E731
        yield _row_work(N, D, dtype, lambda x, w: ops.layer_norm_delta(x, w), plain)
        both = lambda x, r, w: (x + r, F.layer_norm(x + r, w.shape, w))  # noqa: E731
        ours = lambda x, r, w: ops.layer_norm_delta(x, w, residual=r)  # noqa: E731
        yield _row_work(N, D, dtype, ours, both, "residual", 1)


def rms_norm_delta(dry: bool) -> Iterator[Work]:
    for N, D, dtype in _rows(dry):
        plain = lambda x, w: F.rms_norm(x, w.shape, w)  # noqa: E731
        yield _row_work(N, D, dtype, lambda x, w: ops.rms_norm_delta(x, w), plain)


def activation_delta(dry: bool) -> Iterator[Work]:
    for N, D, dtype in _rows(dry):
        yield _row_work(N, D, dtype, lambda x, w: ops.activation_delta(x, "gelu"), lambda x, w: F.gelu(x), "gelu")
        gated = lambda x, g, w: ops.activation_delta(x, "silu", g)  # noqa: E731
        yield _row_work(N, D, dtype, gated, lambda x, g, w: F.silu(x) * g, "swiglu", 1)


def group_norm_delta(dry: bool) -> Iterator[Work]:
    B, C, side, groups = (2, 8, 4, 2) if dry else (128, 256, 32, 32)
    yield Work(
        name=f"(1+{Q})x{B}x{C}x{side}x{side}, {groups} groups, bf16",
        make=lambda: (stack(B, C, side, side), torch.randn(C, dtype=BF16)),
        ours=lambda x, w: ops.group_norm_delta(x, groups, w),
        beside={"1+Q plain ones": lambda x, w: F.group_norm(x.flatten(0, 1), groups, w)},
        moved=2 * (1 + Q) * B * C * side * side * BF16.itemsize,
    )


def cross_entropy_delta(dry: bool) -> Iterator[Work]:
    def plain(z, dz, target):
        base = F.cross_entropy(z, target, reduction="none")
        return base, F.cross_entropy(z + dz[0], target, reduction="none") - base

    # Images' classes, GPT-2, Llama 3: a row to a warp, to a block, a longer one; and few, which blocks share.
    for N, V in [(4, 50)] if dry else [(65536, 1000), (8192, 50257), (4096, 128256), (64, 128256)]:
        for dtype in (BF16, torch.float32):

            def make(N=N, V=V, dtype=dtype):
                z = stack(N, V, dtype=dtype, queries=1)
                return z[0], z[1:], torch.randint(V, (N,))

            name = f"N={N} V={V} Q=1 {str(dtype).removeprefix('torch.')}"
            moved = 2 * N * V * dtype.itemsize
            yield Work(name, make, ops.cross_entropy_delta, {"plain pair": plain}, moved=moved)


def squared_error_delta(dry: bool) -> Iterator[Work]:
    def plain(p, dp, y):
        base = (p - y).square().sum(1)
        return base, (p + dp - y).square().sum(2) - base

    N, D = (4, 24) if dry else (8192, 4096)
    for dtype in (BF16, torch.float32):

        def make(dtype=dtype):
            p = stack(N, D, dtype=dtype)
            return p[0], p[1:], torch.randn(N, D, dtype=dtype)

        name = f"N={N} D={D} Q={Q} {str(dtype).removeprefix('torch.')}"
        moved = (2 + Q) * N * D * dtype.itemsize
        yield Work(name, make, ops.squared_error_delta, {"1+Q plain ones": plain}, moved=moved)


def segment_sum(dry: bool) -> Iterator[Work]:
    S, length = (3, 5) if dry else (16384, 512)

    def make():
        return torch.randn(Q, S * length), torch.arange(0, S * length + 1, length)

    def plain(values, offsets):
        return values.view(Q, S, length).sum(2, dtype=torch.float64).float()

    name = f"Q={Q}, {S} samples of {length} tokens, float32"
    yield Work(name, make, ops.segment_sum, {"sum of equal lengths": plain}, moved=4.0 * Q * S * length)


def topk_merge(dry: bool) -> Iterator[Work]:
    lists, K, S = (2, 3, 20) if dry else (16, 100, 1 << 20)

    def make():
        values = torch.randn(lists, K).sort(1, descending=True)[0]
        return values, torch.arange(K).repeat(lists, 1), torch.randn(lists, S)

    yield Work(
        name=f"Q={lists} K={K} S={S} float32",
        make=make,
        ours=lambda values, indices, scores: ops.topk_merge(values, indices, scores, K),
        beside={"torch.topk": lambda values, indices, scores: torch.topk(scores, K)},
        moved=4.0 * lists * S,
    )


def noise(dry: bool) -> Iterator[Work]:
    S, shape = (2, (3, 4)) if dry else (256, (4, 256, 256))
    yield Work(
        name=f"{S} samples of {'x'.join(map(str, shape))}",
        make=lambda: (torch.arange(S),),
        ours=lambda samples: ops.noise(1, samples, 0, shape),
        beside={"torch.randn": lambda samples: torch.randn(S, *shape, device=samples.device)},
        moved=4.0 * S * math.prod(shape),
    )


def decode_pixels(dry: bool) -> Iterator[Work]:
    N, side = (2, 4) if dry else (4096, 224)
    for dtype in (BF16, torch.float32):
        for word, shape, run in [("NCHW", (N, 3, side, side), side * side), ("NHWC", (N, side, side, 3), 1)]:

            def make(dtype=dtype, shape=shape):
                return torch.randint(256, shape, dtype=torch.uint8), torch.randn(3, 256).to(dtype)

            def plain(raw, table, word=word):
                return raw.to(table.dtype).sub_(127.5).mul_(0.01)

            yield Work(
                name=f"{N}x3x{side}x{side} as {word} to {str(dtype).removeprefix('torch.')}",
                make=make,
                ours=lambda raw, table, run=run: ops.decode_pixels(raw, table, run),
                beside={"to, sub_, mul_ of one mean": plain},
                moved=math.prod(shape) * (1 + dtype.itemsize),
            )


def decode_tokens(dry: bool) -> Iterator[Work]:
    # Windows of an even length begin on 16-byte borders of what is written; of an odd one every second does not.
    for B, L in [(3, 10)] if dry else [(16384, 1024), (16384, 1023)]:
        for dtype in (torch.uint16, torch.uint32):
            yield Work(
                name=f"{B} windows of {L} as {str(dtype).removeprefix('torch.')}",
                make=lambda B=B, L=L, dtype=dtype: (torch.randint(50257, (B * L + 1,)).to(dtype)[1:].view(B, L),),
                ours=ops.decode_tokens,
                beside={"to int64": lambda raw: raw.to(torch.int64)},
                moved=B * L * (8.0 + dtype.itemsize),
            )


# What matters most first: time may run out.
CASES: dict[str, Callable[[bool], Iterator[Work]]] = {
    function.__name__: function
    for function in (
        *(linear_cross_entropy_delta, layer_norm_delta, attention_delta, cross_entropy_delta, linear_delta),
        *(activation_delta, rms_norm_delta, group_norm_delta),
        *(squared_error_delta, segment_sum, topk_merge, noise, decode_pixels, decode_tokens),
    )
}
