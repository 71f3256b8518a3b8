// Softmax attention of stacks of queries, keys and values, and the exact change of it; scores are never stored.
#pragma once

#include <cstdint>

#include "../check.h"

namespace finf {

// (1+Q, B, heads, rows, width), or leading size 1 where it does not move. Strides in numbers; a row lies side by side.
struct AttentionStack {
    const void* first;
    int64_t stride_q, stride_b, stride_h, stride_t;
    bool moves;
};

struct AttentionDelta {
    AttentionStack q, k, v;  // (H, T, E), (G, S, E), (G, S, F): G divides H
    DType dtype;
    // (B, H, T, S) by strides: true where a row may look, or what is added to the scores; null for none.
    const bool* seen;
    const float* added;
    int64_t mask_stride_b, mask_stride_h, mask_stride_t, mask_stride_s;
    void* out;  // (1+Q, B, H, T, F), written, without gaps
    int64_t B, H, G, T, S, E, F, Q;
    bool causal;
    double scale, softcap;  // no cap: 0
    int64_t threads;
};

// Throws std::invalid_argument for sizes and settings; then nothing has been written.
void attention_delta(const AttentionDelta& op);

}  // namespace finf
