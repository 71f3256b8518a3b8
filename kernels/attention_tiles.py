"""How attention_delta's kernels are cut on each architecture: tiles, warps, stages of loads, registers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from finf_fast.kernels.configurations import INTERPRETER, alone, newer_assembler, roomy


@dataclass(frozen=True)
class Tile:
    """Rows of queries and keys that a program holds at a time, and its warps and stages of loads."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Tiles:
    """For heads up to 64, 128, 256 and 512 wide, by the wider of their two widths."""

    plain: tuple[Tile, ...]  # bfloat16
    busy: tuple[Tile, ...]  # with a mask, a soft cap or texts behind each other
    long: tuple[Tile, ...]  # float32

    def of(self, dtype: torch.dtype, width: int, busy: bool) -> Tile:
        tiles = self.long if dtype == torch.float32 else self.busy if busy else self.plain
        return tiles[sum(width > limit for limit in (64, 128, 256))]


# A thread holds its share of N, of scores, their gains and both weights: as many keys as leave nothing for the stack,
# half as many where a mask or a soft cap takes registers too. Above 128 the queries alone fill shared memory, and
# blocks of 32 rows are multiplied in the older way (HMMA). float32 holds operands in registers too: small blocks.
# Heads beyond 256 are spread over more threads, and loaded two blocks at a time where shared memory has room for them:
# with one, Triton 3.6 spilt three registers of a masked and capped change; with two 70 are left over.
_BEYOND, _AHEAD = Tile(16, 16, 8, 1), Tile(16, 16, 8, 2)
_LONG = (Tile(32, 16, 8, 1), Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), _BEYOND)
_AMPERE = Tiles(
    plain=(Tile(64, 32, 4, 2), Tile(128, 16, 8, 2), Tile(32, 32, 8, 2), _AHEAD),
    # Triton 3.6 spills twelve registers of 32 keys.
    busy=(Tile(32, 16, 4, 2), Tile(32, 16, 4, 2), Tile(32, 32 if newer_assembler() else 16, 8, 2), _AHEAD),
    long=(Tile(16, 16, 8, 1), *_LONG[1:]),
)
# Less shared memory: 99 KiB.
_ADA = Tiles(
    plain=(Tile(64, 32, 4, 2), Tile(64, 16, 8, 2), Tile(32, 16, 8, 2), _BEYOND),
    busy=(Tile(32, 16, 4, 2), Tile(32, 16, 4, 2), Tile(32, 16, 8, 2), _BEYOND),
    long=(Tile(16, 16, 8, 1), *_LONG[1:]),
)
_HOPPER = Tiles(
    plain=(Tile(64, 32, 4, 2), Tile(128, 32, 8, 2), Tile(32, 32, 8, 2), _AHEAD),
    busy=(Tile(64, 16, 4, 2), Tile(128, 16, 8, 2), Tile(32, 32, 8, 2), _AHEAD),
    long=_LONG,
)
_FEW = (Tile(64, 64, 1, 1),) * 4
TILES = {INTERPRETER: Tiles(_FEW, _FEW, _FEW), 80: _AMPERE, 89: _ADA, 90: _HOPPER, 100: _HOPPER}


def registers(architecture: int, dtype: torch.dtype, width: int, tile: Tile) -> dict[str, int]:
    """Options on registers: before 9.0 any assembler spills a few of a wide head's, and of a narrow one's in float32
    behind a bool mask, to fit in another program, and that of Triton 3.6 a few of any narrow one's."""
    narrow = width <= 64 and (dtype == torch.float32 or not newer_assembler())
    if 0 < architecture < 90 and (width > 128 or narrow):
        return alone(tile.num_warps)
    return roomy(tile.num_warps) if dtype == torch.float32 else {}


def width(E: int) -> int:
    """Numbers of a head that a tile holds: a power of two from 16, the least that a product takes."""
    return max(16, triton.next_power_of_2(E))
