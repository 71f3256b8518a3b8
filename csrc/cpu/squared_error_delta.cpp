#include "squared_error_delta.h"

#include <algorithm>
#include <vector>

#include "isa/kernels.h"
#include "parallel.h"

namespace finf {
namespace {

// Numbers of a task: about 20 microseconds of reading, a few times what it takes to wake a thread.
constexpr int64_t TASK_NUMBERS = 1 << 17;

const void* at(const ErrorRows& x, int64_t q, int64_t n, int64_t v) {
    const int64_t offset = q * x.stride_q + n * x.stride_n + v;
    if (x.dtype == DType::bf16) return static_cast<const Bf16*>(x.first) + offset;
    return static_cast<const float*>(x.first) + offset;
}

class Rows {
  public:
    explicit Rows(const SquaredErrorDelta& op)
        : op_(op),
          gap_(kernels().squared_error_delta->gap[static_cast<int>(op.p.dtype)][static_cast<int>(op.y.dtype)]),
          change_(kernels().squared_error_delta->change[static_cast<int>(op.dp.dtype)]) {}

    void score(int64_t begin, int64_t end) const {
        alignas(64) float gap[ERROR_BLOCK];
        std::vector<double> delta(static_cast<size_t>(op_.Q));
        for (int64_t n = begin; n < end; ++n) {
            std::fill(delta.begin(), delta.end(), 0.0);
            double base = 0;
            for (int64_t v = 0; v < op_.D; v += ERROR_BLOCK) {
                const int64_t count = std::min(ERROR_BLOCK, op_.D - v);
                base += gap_(at(op_.p, 0, n, v), at(op_.y, 0, n, v), count, gap);
                for (int64_t q = 0; q < op_.Q; ++q) delta[q] += change_(at(op_.dp, q, n, v), count, gap);
            }
            op_.base[n] = static_cast<float>(base);
            for (int64_t q = 0; q < op_.Q; ++q) op_.delta[q * op_.delta_stride_q + n] = static_cast<float>(delta[q]);
        }
    }

  private:
    const SquaredErrorDelta& op_;
    double (*gap_)(const void*, const void*, int64_t, float*);
    double (*change_)(const void*, int64_t, const float*);
};

void check(const SquaredErrorDelta& op) {
    require_size("N", op.N);
    require_size("D", op.D);
    require_size("Q", op.Q);
    for (const ErrorRows& x : {op.p, op.dp, op.y}) {
        require_size("stride_q", x.stride_q);
        require_size("stride_n", x.stride_n);
    }
    require_size("delta_stride_q", op.delta_stride_q, op.Q > 1 ? op.N : 0);
    require_size("threads", op.threads, 1);
    require_memory("p", op.p.first, op.N > 0 && op.D > 0);
    require_memory("dp", op.dp.first, op.N > 0 && op.D > 0 && op.Q > 0);
    require_memory("y", op.y.first, op.N > 0 && op.D > 0);
    require_memory("base", op.base, op.N > 0);
    require_memory("delta", op.delta, op.N > 0 && op.Q > 0);
}

}  // namespace

void squared_error_delta(const SquaredErrorDelta& op) {
    check(op);
    const Rows rows(op);
    const int64_t step = std::max<int64_t>(1, TASK_NUMBERS / std::max<int64_t>(1, op.D * (2 + op.Q)));
    parallel_for((op.N + step - 1) / step, op.threads,
                 [&](int64_t task) { rows.score(task * step, std::min(op.N, task * step + step)); });
}

}  // namespace finf
