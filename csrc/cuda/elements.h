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

FINF_ROW void load_aligned(const float* from, float (&x)[COLUMNS]) {
    const Words first = reinterpret_cast<const Words*>(from)[0], second = reinterpret_cast<const Words*>(from)[1];
    for (int i = 0; i < 4; ++i) {
        x[i] = float_of_bits(first.word[i]);
        x[4 + i] = float_of_bits(second.word[i]);
    }
}
FINF_ROW void load_aligned(const Bf16* from, float (&x)[COLUMNS]) {
    const Words words = *reinterpret_cast<const Words*>(from);
    for (int i = 0; i < 4; ++i) {
        x[2 * i] = float_of_bits(words.word[i] << 16);
        x[2 * i + 1] = float_of_bits(words.word[i] & 0xffff0000u);
    }
}

// Columns v to v + COLUMNS - 1 of a row of V, `fill` where there are none.
template <class T>
FINF_ROW void load_columns(const T* row, int64_t v, int64_t V, bool aligned, float fill, float (&x)[COLUMNS]) {
    if (aligned && v >= 0 && v + COLUMNS <= V) {
        load_aligned(row + v, x);
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
