#include "segment_sum.h"

#include "ordered_sum.h"
#include "parallel.h"

namespace finf {
namespace {

// Values of a task, about 10 microseconds of adding.
constexpr int64_t TASK_VALUES = 1 << 16;

template <class T>
void sum_segments(const SegmentSum& op, int64_t q, int64_t begin, int64_t end) {
    const T* values = static_cast<const T*>(op.values) + q * op.values_stride_q;
    T* out = static_cast<T*>(op.out) + q * op.out_stride_q;
    for (int64_t s = begin; s < end; ++s) {
        out[s] = static_cast<T>(ordered_sum(values + op.offsets[s], op.offsets[s + 1] - op.offsets[s]));
    }
}

void check(const SegmentSum& op) {
    require_size("Q", op.Q);
    require_size("N", op.N);
    require_size("S", op.S);
    require_size("values_stride_q", op.values_stride_q);
    require_size("out_stride_q", op.out_stride_q, op.Q > 1 ? op.S : 0);
    require_size("threads", op.threads, 1);
    require_memory("values", op.values, op.Q > 0 && op.N > 0);
    require_memory("offsets", op.offsets, true);
    require_memory("out", op.out, op.Q > 0 && op.S > 0);
    require(op.offsets[0] >= 0, "offsets[0]", "at least 0", op.offsets[0]);
    for (int64_t s = 0; s < op.S; ++s) {
        if (op.offsets[s + 1] >= op.offsets[s]) continue;
        const std::string wanted = "at least offsets[" + std::to_string(s) + "] = " + std::to_string(op.offsets[s]);
        reject(("offsets[" + std::to_string(s + 1) + "]").c_str(), wanted, op.offsets[s + 1]);
    }
    require(op.offsets[op.S] <= op.N, "offsets[S]", ("at most N = " + std::to_string(op.N)).c_str(), op.offsets[op.S]);
}

}  // namespace

void segment_sum(const SegmentSum& op) {
    check(op);
    const int64_t summed = op.offsets[op.S] - op.offsets[0] + op.S;
    const int64_t tasks_of_query = summed / TASK_VALUES + 1;
    const int64_t step = (op.S + tasks_of_query - 1) / tasks_of_query;
    parallel_for(op.Q * tasks_of_query, op.threads, [&](int64_t task) {
        const int64_t q = task / tasks_of_query, begin = task % tasks_of_query * step;
        const int64_t end = begin + step < op.S ? begin + step : op.S;
        if (op.dtype == DType::f64) {
            sum_segments<double>(op, q, begin, end);
        } else {
            sum_segments<float>(op, q, begin, end);
        }
    });
}

}  // namespace finf
