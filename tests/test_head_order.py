"""The order of the head's programs on a GPU: every piece of work once, and fewer bytes past the cache."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from finf_fast.kernels.head_order import SHARE, choose_order

H200 = {"processors": 132, "cache": 50 << 20}
WIDTHS, VOCABULARIES = (768, 2048, 4096), (50_257, 128_256)


def placed(program: int, blocks: int, parts: int, group: int) -> tuple[int, int]:
    """The kernel's `_place`, in whole numbers of Python's."""
    first = program // (group * parts) * group
    size, within = min(group, blocks - first), program - first * parts
    return first + within % size, within // size


def bytes_from_memory(blocks: int, found, block_bytes: int, tile_bytes: int, processors: int, cache: int) -> int:
    """What the programs bring in, wave by wave: rows once a wave if they fit beside W, else beside each tile."""
    total = 0
    programs = [placed(n, blocks, found.parts, found.group) for n in range(blocks * found.parts)]
    for start in range(0, len(programs), processors):
        wave = programs[start : start + processors]
        rows, parts = len({block for block, _ in wave}), len({part for _, part in wave})
        again = 1 if rows * block_bytes <= cache // 2 else found.tiles
        total += rows * block_bytes * again + parts * found.tiles * tile_bytes
    return total


@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("V", VOCABULARIES)
@pytest.mark.parametrize("T", [100, 2048, 8192, 65_536])
@pytest.mark.parametrize("Q", [1, 16])
def test_every_block_meets_every_part_once_and_rows_stay_in_the_cache(T, D, V, Q):
    blocks, tiles, block_bytes = -(-T // 128), -(-V // 128), 128 * D * 2 * (1 + Q)
    found = choose_order(blocks, tiles, block_bytes, **H200)
    everything = [placed(n, blocks, found.parts, found.group) for n in range(blocks * found.parts)]
    assert sorted(everything) == [(block, part) for block in range(blocks) for part in range(found.parts)]
    assert (found.parts - 1) * found.tiles < tiles <= found.parts * found.tiles
    assert found.group == 1 or found.group * block_bytes <= H200["cache"] // SHARE


def steps(blocks: int, found) -> int:
    """Tiles that one processor takes after another until all is done."""
    return -(-blocks * found.parts // H200["processors"]) * found.tiles


@pytest.mark.parametrize(("D", "most", "before"), [(2048, 4e9, 3e10), (4096, 2e10, 6e10)])
def test_rows_are_not_brought_again_beside_every_tile(D, most, before):
    """8,192 rows and their change; all of them at once are more than the cache holds."""
    blocks, tiles, block_bytes, tile_bytes = 64, 1002, 128 * D * 4, 128 * D * 2
    found, all_rows = (choose_order(blocks, tiles, size, **H200) for size in (block_bytes, 0))
    assert bytes_from_memory(blocks, found, block_bytes, tile_bytes, **H200) < most
    assert bytes_from_memory(blocks, all_rows, block_bytes, tile_bytes, **H200) > before
    assert all_rows.group == blocks and steps(blocks, found) <= 1.02 * steps(blocks, all_rows)


def test_few_rows_start_together():
    assert choose_order(4, 786, 128 * 768 * 4, **H200).group == 4
