// Loss of N rows of logits, and for Q changes of the logits the exact change of that loss.
#pragma once

#include <cstdint>

#include "../check.h"
#include "place.h"

namespace finf::cuda {

// Addresses on the device, of first elements; strides in elements; columns lie side by side.
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
    int64_t splits;  // blocks that share a row, and where they leave their sums: cross_entropy_delta_splits
    void* parts;     // aligned for double
};

// Throws std::invalid_argument for sizes and settings, std::runtime_error if the launch failed. A target out of range
// stops the kernel, as torch's own does.
void cross_entropy_delta(const CrossEntropyDelta& op, const Place& place);

}  // namespace finf::cuda
