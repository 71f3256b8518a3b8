"""How linear_cross_entropy_delta cuts the vocabulary for its programs, and in which order they start.

Every program walks over its part's tiles of W and reads its rows of x and dx again beside each. As many as there are
multiprocessors run at a time: were they of all blocks of rows, each tile would bring all of x and dx past a cache that
does not hold them (T = 8192, D = 4096: 134 MB, a thousand times). So they are of a few blocks and of many parts: these
rows stay in the second-level cache, and W comes once for each such group.
"""

from __future__ import annotations

from dataclasses import dataclass

# Of the cache for a group's rows; the tiles of W that are under way in all parts take about as much.
SHARE = 3


@dataclass(frozen=True)
class Order:
    """`group` blocks of rows start together, with all parts of the vocabulary, of `tiles` tiles each."""

    parts: int
    tiles: int
    group: int


def choose_order(blocks: int, tiles: int, block_bytes: int, processors: int, cache: int) -> Order:
    """The order after which `processors` programs at a time are done after the fewest tiles.

    Args:
        blocks: of rows; tiles: of the vocabulary.
        block_bytes: that a program reads again beside each tile.
        cache: bytes.
    """
    fitting = max(1, cache // SHARE // max(1, block_bytes))
    if fitting >= blocks:  # past four rounds nothing is gained, and partials grow
        choice = range(1, max(1, 4 * processors // blocks) + 1)
    else:  # so many parts that a group fills the device; in three times as many there is one without a rest to wait for
        least = -(-processors // fitting)
        choice = range(least, 3 * least + 1)
    sizes = {-(-tiles // min(parts, tiles)) for parts in choice}

    def steps(size: int) -> tuple[int, int]:
        return -(-blocks * -(-tiles // size) // processors) * size, -size

    size = min(sizes, key=steps)
    parts = -(-tiles // size)
    return Order(parts, size, blocks if fitting >= blocks else max(1, min(fitting, processors // parts)))
