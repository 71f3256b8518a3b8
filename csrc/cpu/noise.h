// Standard normal numbers as a function of (seed, sample, draw, position); see philox.inl.h.
#pragma once

#include <cstdint>

namespace finf {

struct Noise {
    uint64_t seed;
    const int64_t* samples;  // (S)
    uint32_t draw;
    float* out;  // (S, M), written, side by side
    int64_t S, M;
    int64_t threads;
};

// Throws std::invalid_argument, and then nothing has been written.
void noise(const Noise& op);

}  // namespace finf
