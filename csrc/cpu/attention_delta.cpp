#include "attention_delta.h"

#include <vector>

#include "isa/kernels.h"
#include "parallel.h"

namespace finf {
namespace {

void check(const AttentionDelta& op) {
    require_size("B", op.B);
    require_size("H", op.H);
    require_size("G", op.G, op.H > 0 ? 1 : 0);
    require(op.G == 0 || op.H % op.G == 0, "G", "a divisor of H", op.G);
    require_size("T", op.T);
    require_size("S", op.S, 1);
    require(op.S < int64_t{1} << 24, "S", "fewer than 2^24 keys, whose numbers float32 holds", op.S);
    require_size("E", op.E);
    require_size("F", op.F);
    require_size("Q", op.Q);
    require_size("threads", op.threads, 1);
    require(op.softcap >= 0, "softcap", "0 or more", op.softcap);
    const bool any = op.B > 0 && op.H > 0 && op.T > 0;
    require_memory("q", op.q.first, any && op.E > 0);
    require_memory("k", op.k.first, any && op.E > 0);
    require_memory("v", op.v.first, any && op.F > 0);
    require_memory("out", op.out, any && op.F > 0);
}

// The numbers that a block works in; tiles/attention_delta.inl.h takes them one buffer after another.
int64_t room_of(const AttentionDelta& op) {
    const int64_t rows = ATTENTION_ROWS, keys = ATTENTION_KEYS, F = attention_width(op.F);
    const int64_t queries = (3 + 2 * op.Q) * op.E * rows, keys_and_values = keys * (2 * op.E + 3 * F);
    const int64_t tiles = (4 * keys + attention_scores(op.S, op.softcap > 0)) * rows,
                  results = (2 + op.Q) * F * rows + F, statistics = (4 + 3 * op.Q) * rows;
    return queries + keys_and_values + tiles + results + statistics;
}

// Of this thread, kept from block to block: fresh memory of this size would be mapped and unmapped each time.
float* room(int64_t numbers) {
    constexpr int64_t LINE = 16;
    static thread_local std::vector<float> kept;
    if (static_cast<int64_t>(kept.size()) < numbers + LINE) kept.resize(static_cast<size_t>(numbers + LINE));
    const uintptr_t past = reinterpret_cast<uintptr_t>(kept.data()) / sizeof(float) % LINE;
    return kept.data() + (LINE - past) % LINE;
}

template <class T>
T* element(T* first, int64_t offset) {
    return first ? first + offset : nullptr;
}

AttentionInput input(const AttentionStack& x, DType dtype, int64_t b, int64_t h) {
    const int64_t size = dtype == DType::bf16 ? 2 : 4, offset = b * x.stride_b + h * x.stride_h;
    return {static_cast<const char*>(x.first) + size * offset, x.stride_q, x.stride_t, x.moves};
}

AttentionBlock block(const AttentionDelta& op, int64_t b, int64_t h, int64_t begin) {
    const int64_t size = op.dtype == DType::bf16 ? 2 : 4, g = h / (op.H / op.G);
    const int64_t mask = b * op.mask_stride_b + h * op.mask_stride_h, head = op.T * op.F;
    return {input(op.q, op.dtype, b, h),
            input(op.k, op.dtype, b, g),
            input(op.v, op.dtype, b, g),
            element(op.seen, mask),
            element(op.added, mask),
            op.mask_stride_t,
            op.mask_stride_s,
            static_cast<char*>(op.out) + size * (b * op.H + h) * head,
            op.B * op.H * head,
            op.T,
            op.S,
            op.E,
            op.F,
            op.Q,
            begin,
            op.causal,
            static_cast<float>(op.scale),
            static_cast<float>(op.softcap)};
}

}  // namespace

void attention_delta(const AttentionDelta& op) {
    check(op);
    const auto attend = kernels().attention_delta[static_cast<int>(op.dtype)];
    const int64_t blocks = (op.T + ATTENTION_ROWS - 1) / ATTENTION_ROWS;
    // The last rows of a causal head see the most keys: they go first, so that no thread is left with a long one.
    parallel_for(op.B * op.H * blocks, op.threads, [&](int64_t task) {
        const int64_t head = task / blocks, begin = (blocks - 1 - task % blocks) * ATTENTION_ROWS;
        attend(block(op, head / op.H, head % op.H, begin), room(room_of(op)));
    });
}

}  // namespace finf
