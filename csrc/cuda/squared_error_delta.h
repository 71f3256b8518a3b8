// Sum of squared errors of N rows of predictions, and for Q changes of the predictions the exact change of that sum.
#pragma once

#include <cstdint>

#include "../check.h"
#include "place.h"

namespace finf::cuda {

// Rows of numbers that lie side by side, on the device; strides in numbers.
struct ErrorRows {
    const void* first;
    DType dtype;
    int64_t stride_q, stride_n;
};

struct SquaredErrorDelta {
    ErrorRows p;   // (N, D)
    ErrorRows dp;  // (Q, N, D)
    ErrorRows y;   // (N, D)
    float* base;   // (N), written
    float* delta;  // (Q, N), written
    int64_t delta_stride_q;
    int64_t N, D, Q;
};

// Throws std::invalid_argument for sizes, std::runtime_error if the launch failed.
void squared_error_delta(const SquaredErrorDelta& op, const Place& place);

}  // namespace finf::cuda
