// Loss of N rows of logits, and for Q changes of the logits the exact change of that loss.
#pragma once

#include <cstdint>

#include "../check.h"

namespace finf {

// Addresses of first elements; strides in elements; columns lie side by side.
struct CrossEntropyDelta {
    const void* z;  // (N, V)
    DType z_dtype;
    int64_t z_stride;
    const void* dz;  // (Q, N, V)
    DType dz_dtype;
    int64_t dz_stride_q, dz_stride_n;
    const int64_t* target;  // (N)
    float* base;            // (N), written
    float* delta;           // (Q, N), written
    int64_t delta_stride_q;
    int64_t N, V, Q;
    int64_t ignore_index;
    double label_smoothing;
    int64_t threads;
};

// Throws std::invalid_argument for sizes and settings, std::out_of_range for a target; then nothing has been written.
void cross_entropy_delta(const CrossEntropyDelta& op);

}  // namespace finf
