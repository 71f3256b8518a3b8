// Numbers of a row as the device reads them: eight columns at a time, in 16-byte loads where the row's address allows.
#pragma once

#include <cstdint>
#include <cstring>

#include "../numerics.h"
#include "group.h"

namespace finf::cuda {

struct Bf16 {
    uint16_t bits;
};

// Columns that a lane takes at a time: a 16-byte load of bfloat16, two of float32.
constexpr int COLUMNS = 8;
// Threads of a block; a wide row's group is the block, a narrow one's a warp.
constexpr int ROW_THREADS = 256;
// Rows no wider than this go to a warp each: eight rounds of it.
constexpr int64_t NARROW = 8 * 32 * COLUMNS;
// Queries that share one pass over a row of values; further ones find them in the second-level cache.
constexpr int TOGETHER = 4;

// Without a query there is still the base.
template <int QUERIES>
FINF_ROW int64_t tiles_of(int64_t Q) {
    return Q > 0 ? (Q + QUERIES - 1) / QUERIES : 1;
}

struct alignas(16) Words {
    uint32_t word[4];
};

FINF_ROW float float_of_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
#endif
}

FINF_ROW float to_float(float x) { return x; }
FINF_ROW float to_float(Bf16 x) { return float_of_bits(static_cast<uint32_t>(x.bits) << 16); }

// A lane's columns as they lie in memory, so that those under way hold no more registers than their bytes.
template <class T>
struct Packed {
    Words words[COLUMNS * sizeof(T) / sizeof(Words)];
};

template <class T>
FINF_ROW Packed<T> load_aligned(const T* from) {
    Packed<T> packed;
    FINF_UNROLL
    for (size_t i = 0; i < sizeof packed / sizeof(Words); ++i)
        packed.words[i] = reinterpret_cast<const Words*>(from)[i];
    return packed;
}

FINF_ROW void unpack(const Packed<float>& packed, float (&x)[COLUMNS]) {
    FINF_UNROLL
    for (int i = 0; i < COLUMNS; ++i) x[i] = float_of_bits(packed.words[i / 4].word[i % 4]);
}
FINF_ROW void unpack(const Packed<Bf16>& packed, float (&x)[COLUMNS]) {
    FINF_UNROLL
    for (int i = 0; i < 4; ++i) {
        x[2 * i] = float_of_bits(packed.words[0].word[i] << 16);
        x[2 * i + 1] = float_of_bits(packed.words[0].word[i] & 0xffff0000u);
    }
}

// Columns v to v + COLUMNS - 1 of a row of V, `fill` where there are none.
template <class T, class Column>
FINF_ROW void load_columns(const T* row, Column v, Column V, bool aligned, float fill, float (&x)[COLUMNS]) {
    if (aligned && v >= 0 && v + COLUMNS <= V) {
        unpack(load_aligned(row + v), x);
    } else {
        for (int i = 0; i < COLUMNS; ++i) x[i] = v + i >= 0 && v + i < V ? to_float(row[v + i]) : fill;
    }
}

// Sum of a lane's columns, always in this order.
FINF_ROW float joined(const float (&x)[COLUMNS]) {
    return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

// Columns from the 16-byte border at or before the row's first number to that number: 0 for a row that starts on one.
template <class T>
FINF_ROW int phase(const T* row) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
}

// Whether 16-byte loads fit this row when a lane's columns start `phase` before it, or any multiple of COLUMNS after.
template <class T>
FINF_ROW bool fits(const T* row, int phase) {
    return reinterpret_cast<uintptr_t>(row) % 16 == phase * sizeof(T) % 16;
}

}  // namespace finf::cuda
