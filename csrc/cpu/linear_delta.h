// A linear layer on a stack of values and changes, whose weight and bias may have changed too.
#pragma once

#include <cstdint>

#include "../check.h"

namespace finf {

// Strides in numbers; rows lie side by side.
struct LinearDelta {
    DType dtype;    // of everything but bias and db
    const void* x;  // (1+Q, N, D), or (1, N, D) where it does not move
    int64_t x_stride_q, x_stride_n;
    bool x_moves;
    const void* W;  // (V, D), or (D, V) where it is turned
    int64_t W_stride;
    bool W_turned;
    const float* bias;  // (V) or null
    const float* db;    // (Q, V), without gaps, or null
    const void* dW;     // (Q, V, D), without gaps, or null
    const void* U;      // (Q, V, r), without gaps, or null: the change is U R
    const void* R;      // (Q, r, D), without gaps
    void* y;            // (1+Q, N, V), without gaps, written
    int64_t N, D, V, Q, r, threads;
};

// Throws std::invalid_argument for sizes and addresses; then nothing has been written.
void linear_delta(const LinearDelta& op);

}  // namespace finf
