// Sums of consecutive values: tokens to samples, in one fixed order.
#pragma once

#include <cstdint>

#include "../check.h"
#include "place.h"

namespace finf::cuda {

// Addresses on the device, of first elements; strides in elements; a row lies side by side. values and out share the
// dtype, f32 or f64.
struct SegmentSum {
    const void* values;  // (Q, N)
    DType dtype;
    int64_t values_stride_q;
    const int64_t* offsets;  // (S + 1), segment s is [offsets[s], offsets[s + 1]); not looked at before
    void* out;               // (Q, S), written
    int64_t out_stride_q;
    int64_t Q, N, S;
};

// Throws std::invalid_argument for sizes, std::runtime_error if the launch failed.
void segment_sum(const SegmentSum& op, const Place& place);

}  // namespace finf::cuda
