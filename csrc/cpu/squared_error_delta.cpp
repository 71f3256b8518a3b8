#include "squared_error_delta.h"

#include <algorithm>
#include <vector>

#include "isa/kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace finf {
namespace {

// Numbers of a task: about 40 microseconds of reading, some times what it takes to wake a thread.
constexpr int64_t TASK_NUMBERS = 1 << 18;
// Numbers p - y that wait for their changes, of some rows: each stack is then read on for a while before the next one's
// turn. Measured (Zen 5, 8192 rows of 768): row by row 65 to 77 % of the rate of reading, so 85 to 88 %.
constexpr int64_t GAPS = 1 << 12;

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
        const int64_t room = std::max<int64_t>(1, vectors(std::min(op_.D, ERROR_BLOCK)));
        const int64_t rows = std::min(std::max<int64_t>(1, GAPS / room), end - begin);
        const Buffer gaps(rows * room);
        std::vector<double> sums(static_cast<size_t>(rows * (1 + op_.Q)));
        for (int64_t n = begin; n < end; n += rows) score_some(n, std::min(rows, end - n), room, gaps.get(), sums);
    }

  private:
    void score_some(int64_t n, int64_t rows, int64_t room, float* gaps, std::vector<double>& sums) const {
        std::fill(sums.begin(), sums.end(), 0.0);
        for (int64_t v = 0; v < op_.D; v += ERROR_BLOCK) {
            const int64_t count = std::min(ERROR_BLOCK, op_.D - v);
            for (int64_t i = 0; i < rows; ++i)
                sums[i] += gap_(at(op_.p, 0, n + i, v), at(op_.y, 0, n + i, v), count, gaps + i * room);
            for (int64_t q = 0; q < op_.Q; ++q)
                for (int64_t i = 0; i < rows; ++i)
                    sums[(1 + q) * rows + i] += change_(at(op_.dp, q, n + i, v), count, gaps + i * room);
        }
        for (int64_t i = 0; i < rows; ++i) op_.base[n + i] = static_cast<float>(sums[i]);
        for (int64_t q = 0; q < op_.Q; ++q)
            for (int64_t i = 0; i < rows; ++i)
                op_.delta[q * op_.delta_stride_q + n + i] = static_cast<float>(sums[(1 + q) * rows + i]);
    }

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
