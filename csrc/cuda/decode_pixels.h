// Stored bytes to the numbers that a model reads: a table of 256 for each channel, looked up.
#pragma once

#include <cstdint>

#include "../check.h"
#include "place.h"

namespace finf::cuda {

struct DecodePixels {
    const uint8_t* raw;  // (M), side by side
    const void* table;   // (C, 256) of dtype
    DType dtype;         // f32 or bf16
    void* out;           // (M) of dtype, written
    int64_t M, C;
    int64_t run;  // neighbours of one channel; then the next channel's, and after the last the first's again
};

// Throws std::invalid_argument for sizes, std::runtime_error if the launch failed.
void decode_pixels(const DecodePixels& op, const Place& place);

}  // namespace finf::cuda
