// Loss of N rows behind a linear layer, and for Q changes of rows and layer the exact change of that loss.
#pragma once

#include <cstdint>

#include "../check.h"

namespace finf {

// Addresses of first elements; strides in elements; the last dimension lies side by side. A null pointer: not given.
struct LinearCrossEntropyDelta {
    DType dtype;    // of x, dx and W
    const void* x;  // (N, D)
    int64_t x_stride;
    const void* dx;  // (Q, N, D) or null
    int64_t dx_stride_q, dx_stride_n;
    const void* W;  // (V, D)
    int64_t W_stride;
    const int64_t* target;  // (N)
    const float* bias;      // (V) or null
    const float* db;        // (Q, V) or null
    int64_t db_stride_q;
    const void* dW;  // (Q, V, D) or null
    DType dW_dtype;
    int64_t dW_stride_q, dW_stride_v;
    const void* U;  // (Q, V, r) or null: W changes by U_q R_q
    DType U_dtype;
    int64_t U_stride_q, U_stride_v;
    const float* R;  // (Q, r, D)
    int64_t r;
    float* base;   // (N), written
    float* delta;  // (Q, N), written
    int64_t delta_stride_q;
    int64_t N, D, V, Q;
    double softcap;  // 0: none
    int64_t ignore_index;
    double label_smoothing;
    int64_t threads;
};

// Throws std::invalid_argument for sizes and settings, std::out_of_range for a target; then nothing has been written.
void linear_cross_entropy_delta(const LinearCrossEntropyDelta& op);

}  // namespace finf
