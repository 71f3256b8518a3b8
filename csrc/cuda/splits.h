// How many blocks share a piece of work where there are too few pieces to keep a device busy.
#pragma once

#include <algorithm>
#include <cstdint>

namespace finf::cuda {

// Blocks that share one piece, and what they leave for the block that joins their parts.
struct Splits {
    int64_t count;  // 1: a block does the whole piece and leaves nothing
    int64_t bytes;  // of all pieces, on the device
};

// Blocks to a multiprocessor below which pieces are shared: with two it has loads under way while one block joins sums.
constexpr int64_t BLOCKS_WANTED = 2;

// `most`: into how many parts a piece may go and each still be worth a block; `bytes`: what one leaves.
inline Splits splits_of(int64_t pieces, int64_t most, int64_t multiprocessors, int64_t bytes) {
    const int64_t wanted = BLOCKS_WANTED * multiprocessors;
    if (pieces < 1 || pieces >= wanted || most < 2) return {1, 0};
    const int64_t count = std::min((wanted + pieces - 1) / pieces, most);
    return {count, pieces * count * bytes};
}

}  // namespace finf::cuda
