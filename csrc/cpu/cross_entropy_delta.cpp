#include "cross_entropy_delta.h"

#include <vector>

#include "../numerics.h"
#include "isa/kernels.h"
#include "ordered_sum.h"
#include "parallel.h"
#include "targets.h"

namespace finf {
namespace {

// Elements of a task: about 20 microseconds of reading, a few times what it takes to wake a thread.
constexpr int64_t TASK_ELEMENTS = 1 << 17;

const void* element(const void* first, DType dtype, int64_t offset) {
    if (dtype == DType::bf16) return static_cast<const Bf16*>(first) + offset;
    return static_cast<const float*>(first) + offset;
}

double value(const void* row, DType dtype, int64_t v) {
    const void* at = element(row, dtype, v);
    return dtype == DType::bf16 ? to_double(*static_cast<const Bf16*>(at)) : to_double(*static_cast<const float*>(at));
}

double mean(const void* row, DType dtype, int64_t V) {
    const double total = dtype == DType::bf16 ? ordered_sum(static_cast<const Bf16*>(row), V)
                                              : ordered_sum(static_cast<const float*>(row), V);
    return total / static_cast<double>(V);
}

class Rows {
  public:
    explicit Rows(const CrossEntropyDelta& op)
        : op_(op), loops_(kernels().cross_entropy_delta[static_cast<int>(op.z_dtype)][static_cast<int>(op.dz_dtype)]) {}

    void score(int64_t begin, int64_t end) const {
        std::vector<Change> changes(static_cast<size_t>(op_.Q));
        for (int64_t n = begin; n < end; ++n) {
            if (op_.target[n] == op_.ignore_index) {
                ignore(n);
            } else {
                score_row(n, changes);
            }
        }
    }

  private:
    void ignore(int64_t n) const {
        op_.base[n] = 0.0f;
        for (int64_t q = 0; q < op_.Q; ++q) op_.delta[q * op_.delta_stride_q + n] = 0.0f;
    }

    void score_row(int64_t n, std::vector<Change>& changes) const {
        const Row row = {element(op_.z, op_.z_dtype, n * op_.z_stride), op_.V, op_.target[n]};
        for (int64_t q = 0; q < op_.Q; ++q) {
            changes[q] = Change{element(op_.dz, op_.dz_dtype, q * op_.dz_stride_q + n * op_.dz_stride_n)};
        }
        const ScaledSum rest = loops_.sums(row, changes.data(), op_.Q);
        const double z_t = value(row.z, op_.z_dtype, row.target), m = rest.top;
        op_.base[n] = static_cast<float>(loss_of_sums(rest.sum, m, z_t) + smoothing(row.z, op_.z_dtype, row.target));
        for (int64_t q = 0; q < op_.Q; ++q) {
            const double change = change_of_loss(row, changes[q], rest, z_t);
            op_.delta[q * op_.delta_stride_q + n] =
                static_cast<float>(change + smoothing(changes[q].d, op_.dz_dtype, row.target));
        }
    }

    double change_of_loss(const Row& row, const Change& change, const ScaledSum& rest, double z_t) const {
        const double m = rest.top, s = rest.sum + exp(z_t - m);
        if (is_small_change(change.u, s, change.largest_step)) return small_change(change.u, s);
        const ScaledSum after = loops_.after(row, change);
        return large_change(log(rest.sum) + (m - z_t), log(after.sum) + after.top);
    }

    double smoothing(const void* row, DType dtype, int64_t target) const {
        if (op_.label_smoothing == 0) return 0;
        return smoothing_term(op_.label_smoothing, value(row, dtype, target), mean(row, dtype, op_.V));
    }

    const CrossEntropyDelta& op_;
    const CrossEntropyLoops& loops_;
};

void check(const CrossEntropyDelta& op) {
    require_size("N", op.N);
    require_size("V", op.V, op.N > 0 ? 1 : 0);
    require_size("Q", op.Q);
    require_size("z_stride", op.z_stride);
    require_size("dz_stride_q", op.dz_stride_q);
    require_size("dz_stride_n", op.dz_stride_n);
    require_size("delta_stride_q", op.delta_stride_q, op.Q > 1 ? op.N : 0);
    require_size("threads", op.threads, 1);
    require(op.label_smoothing >= 0 && op.label_smoothing <= 1, "label_smoothing", "0 to 1", op.label_smoothing);
    require_memory("z", op.z, op.N > 0);
    require_memory("dz", op.dz, op.N > 0 && op.Q > 0);
    require_memory("target", op.target, op.N > 0);
    require_memory("base", op.base, op.N > 0);
    require_memory("delta", op.delta, op.N > 0 && op.Q > 0);
}

}  // namespace

void cross_entropy_delta(const CrossEntropyDelta& op) {
    check(op);
    check_targets(op.target, op.N, op.V, op.ignore_index);
    const Rows rows(op);
    const int64_t elements_of_row = op.V * (1 + op.Q);
    const int64_t step = elements_of_row > 0 && elements_of_row < TASK_ELEMENTS ? TASK_ELEMENTS / elements_of_row : 1;
    parallel_for((op.N + step - 1) / step, op.threads,
                 [&](int64_t task) { rows.score(task * step, task * step + step < op.N ? task * step + step : op.N); });
}

}  // namespace finf
