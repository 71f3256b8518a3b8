// Standard normal numbers as a function of (seed, sample, draw, position), with the CPU's bits; see philox.inl.h.
#pragma once

#include <cstdint>

#include "place.h"

namespace finf::cuda {

struct Noise {
    uint64_t seed;
    const int64_t* samples;  // (S), on the device
    uint32_t draw;
    float* out;  // (S, M), written, side by side
    int64_t S, M;
};

// Throws std::invalid_argument for sizes, std::runtime_error if the launch failed.
void noise(const Noise& op, const Place& place);

}  // namespace finf::cuda
