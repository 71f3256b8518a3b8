// Pixels to the numbers that a model reads: computed where that gives the bits of their tables, else looked up.
#pragma once

#include <cstdint>
#include <vector>

#include "../cpu/isa/kernels.h"

namespace finf {

// What stands for a byte: tables (C, 256) of words of 2 or 4 bytes, table c for `run` bytes of a row, then the next,
// and the first again. Where the words are (x / 255 - mean) / std in float32 or bfloat16, mean and std (C) make it
// fast: the numbers are then computed, if that gives the tables' to the last bit.
class Shades {
  public:
    // mean, std: or null. Keeps copies.
    Shades(const void* tables, int64_t word, int64_t C, int64_t run, const float* mean, const float* std);
    int64_t word() const { return word_; }
    int64_t round() const { return C_ * run_; }
    // `count` bytes, of which the first is number `place` of a row.
    template <class Word>
    void apply(const uint8_t* from, int64_t count, int64_t place, Word* to) const;

  private:
    template <class Word>
    void find_rules(const float* mean, const float* std);
    // Bytes of channel c alone.
    template <class Word>
    void apply_one(const uint8_t* from, int64_t count, int64_t c, Word* to) const;

    const int64_t word_, C_, run_;
    std::vector<uint8_t> tables_;
    std::vector<PixelRule> rules_;  // of all channels that take turns, or of each; none: looked up
};

}  // namespace finf
