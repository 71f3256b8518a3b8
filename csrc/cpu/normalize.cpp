#include "normalize.h"

#include <algorithm>
#include <vector>

#include "pages.h"
#include "parallel.h"
#include "past_cache.h"
#include "scratch.h"

namespace finf {
namespace {

// Numbers of a task: about 20 microseconds, a few times what it takes to wake a thread.
constexpr int64_t TASK_NUMBERS = 1 << 17;
// Values of a task: 128 KiB, which wait in the second-level cache for the changes.
constexpr int64_t TASK_VALUES = 1 << 15;

void check(const NormRows& op, int64_t threads) {
    require_size("N", op.N);
    require_size("D", op.D);
    require_size("Q", op.Q);
    require_size("x_stride_q", op.x_stride_q);
    require_size("x_stride_n", op.x_stride_n);
    require_size("residual_stride_q", op.residual_stride_q);
    require_size("residual_stride_n", op.residual_stride_n);
    require_size("groups", op.groups, 1);
    require_size("run", op.run, 1);
    require_size("threads", threads, 1);
    require(op.D % op.run == 0, "run", "a divisor of D", op.run);
    require(op.eps >= 0, "eps", "a number from 0", op.eps);
    const bool any = op.N > 0 && op.D > 0;
    require_memory("x", op.x, any);
    require_memory("y", op.y, any);
    require_memory("sum", op.sum, any && op.residual);
}

// A parameter that is not there, written out, so that the loops have one case less.
void fill_in(const float*& p, float value, int64_t count, std::vector<float>& room) {
    if (p) return;
    room.assign(static_cast<size_t>(count), value);
    p = room.data();
}

bool goes_past_cache(const NormRows& op, DType dtype) {
    const int64_t size = dtype == DType::bf16 ? 2 : 4, run = op.run == 1 ? op.D : op.run;
    const int64_t bytes = (1 + op.Q) * op.N * op.D * size;
    return finf::goes_past_cache(op.y, run * size, bytes) && (!op.sum || finf::goes_past_cache(op.sum, 0, bytes));
}

}  // namespace

void normalize(NormRows op, DType dtype, int64_t threads) {
    check(op, threads);
    if (op.N == 0 || op.D == 0) return;
    std::vector<float> weight, bias, dweight, dbias;
    const int64_t P = op.groups * (op.D / op.run);
    fill_in(op.weight, 1.0f, P, weight);
    fill_in(op.bias, 0.0f, P, bias);
    if (op.dweight || op.dbias) {
        fill_in(op.dweight, 0.0f, op.Q * P, dweight);
        fill_in(op.dbias, 0.0f, op.Q * P, dbias);
    }
    const int64_t row_bytes = op.N * op.D * (dtype == DType::bf16 ? 2 : 4);
    expect_writing(op.y, (1 + op.Q) * row_bytes);
    if (op.sum) expect_writing(op.sum, (op.x_moves || op.residual_moves ? 1 + op.Q : 1) * row_bytes);
    op.past_cache = goes_past_cache(op, dtype);
    const auto rows = kernels().norm_rows[static_cast<int>(dtype)];
    const int64_t step = std::max<int64_t>(1, std::min(TASK_NUMBERS / (op.D * (1 + op.Q)), TASK_VALUES / op.D));
    parallel_for((op.N + step - 1) / step, threads, [&](int64_t task) {
        const int64_t width = vectors(op.D);
        const Buffer c0(step * width);
        Scratch sum(std::min(step, MOST_TOGETHER) * width);
        std::vector<NormValue> values(static_cast<size_t>(step));
        rows(op, task * step, std::min(op.N, task * step + step), {c0.get(), sum.data(), values.data()});
    });
}

}  // namespace finf
