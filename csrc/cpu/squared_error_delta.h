// Sum of squared errors of N rows of predictions, and for Q changes of the predictions the exact change of that sum.
#pragma once

#include <cstdint>

#include "../check.h"

namespace finf {

// Rows of numbers that lie side by side; strides in numbers.
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
    int64_t threads;
};

// Throws std::invalid_argument, and then nothing has been written.
void squared_error_delta(const SquaredErrorDelta& op);

}  // namespace finf
