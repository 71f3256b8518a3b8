#include "activation_delta.h"

#include <algorithm>

#include "pages.h"
#include "parallel.h"
#include "past_cache.h"

namespace finf {
namespace {

// Numbers of a task, some blocks: about 20 microseconds, a few times what it takes to wake a thread.
constexpr int64_t TASK_NUMBERS = 1 << 17, BLOCK = 1 << 10;

int64_t index_of(const std::string& kind) {
    std::string names;
    for (int64_t i = 0; i < static_cast<int64_t>(std::size(ACTIVATIONS)); ++i) {
        if (kind == ACTIVATIONS[i]) return i;
        names += (i ? ", " : "") + std::string(ACTIVATIONS[i]);
    }
    reject("kind", "one of " + names, "'" + kind + "'");
}

void check(const ActivationRows& op, int64_t threads) {
    require_size("M", op.M);
    require_size("Q", op.Q);
    require_size("x_stride_q", op.x_stride_q);
    require_size("gate_stride_q", op.gate_stride_q);
    require_size("threads", threads, 1);
    require(op.x_moves || op.gate_moves || op.Q == 0, "Q", "0 where nothing moves", op.Q);
    require_memory("x", op.x, op.M > 0);
    require_memory("y", op.y, op.M > 0);
}

}  // namespace

void activation_delta(const std::string& kind, ActivationRows op, DType dtype, int64_t threads) {
    check(op, threads);
    const int64_t size = dtype == DType::bf16 ? 2 : 4;
    expect_writing(op.y, (1 + op.Q) * op.M * size);
    op.past_cache = goes_past_cache(op.y, op.M * size, (1 + op.Q) * op.M * size);
    const auto activate = kernels().activate[index_of(kind)][static_cast<int>(dtype)];
    const int64_t blocks = std::max<int64_t>(1, TASK_NUMBERS / (BLOCK * (1 + op.Q))), step = blocks * BLOCK;
    parallel_for((op.M + step - 1) / step, threads,
                 [&](int64_t task) { activate(op, task * step, std::min(op.M, task * step + step)); });
}

}  // namespace finf
