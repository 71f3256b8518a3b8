// Stored integers to the int64 that a model reads.
#pragma once

#include <cstdint>

#include "../check.h"
#include "place.h"

namespace finf::cuda {

struct DecodeTokens {
    const void* raw;  // (B, L), of a row's numbers side by side
    Stored stored;    // all but i64
    int64_t* out;     // (B, L), written
    int64_t B, L;
    int64_t raw_stride;  // numbers from one row to the next
};

// Throws std::invalid_argument for sizes, std::runtime_error if the launch failed.
void decode_tokens(const DecodeTokens& op, const Place& place);

}  // namespace finf::cuda
