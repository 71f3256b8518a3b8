// The K best scores of each query so far, updated with a stretch of new ones.
#pragma once

#include <cstdint>

#include "../check.h"
#include "place.h"

namespace finf::cuda {

// Addresses on the device, of first elements; strides in elements. values and scores share the dtype, f32 or f64.
struct TopKMerge {
    void* values;        // (Q, K), side by side, sorted, updated
    int64_t* indices;    // (Q, K), side by side, updated
    const void* scores;  // (Q, S), a row side by side
    DType dtype;
    int64_t scores_stride_q;
    int64_t start;  // index of the first new score
    int64_t Q, K, S;
    int64_t splits;  // blocks that share a query, and where they leave their lists: topk_merge_splits
    void* parts;     // aligned for int64
};

// Order: larger score first, then smaller index; empty places (-inf, index -1) last. NaN scores are left out.
// Throws std::invalid_argument for sizes, std::runtime_error if the launch failed.
void topk_merge(const TopKMerge& op, const Place& place);

}  // namespace finf::cuda
