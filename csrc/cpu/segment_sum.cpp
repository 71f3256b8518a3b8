#include "segment_sum.h"

#include <cstring>

#include "ordered_sum.h"
#include "parallel.h"

namespace finf {
namespace {

// Values of a task, about 10 microseconds of adding.
constexpr int64_t TASK_VALUES = 1 << 16;

// All bits of a number that is there, none of one that is not: MASKS + 8 - n for n numbers of eight.
constexpr uint64_t ALL = ~uint64_t{0};
constexpr uint64_t MASKS[16] = {ALL, ALL, ALL, ALL, ALL, ALL, ALL, ALL};

inline double masked(double x, uint64_t mask) {
    uint64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits &= mask;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// ordered_sum, bit for bit, of fewer than 16 values before eight more that may be read: without a branch on their
// number, which nobody can guess where segments are short. A sum that began at 0 is never -0, so a 0 more changes none.
template <class T>
double short_sum(const T* x, int64_t count) {
    double lane[8];
    for (int k = 0; k < 8; ++k) lane[k] = to_double(x[k]);
    const double eight = ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
    const int64_t first = count & 8;
    double total = masked(0.0 + eight, MASKS[8 - first]);
    const uint64_t* mask = MASKS + 8 - (count - first);
    for (int k = 0; k < 7; ++k) total += masked(to_double(x[first + k]), mask[k]);
    return total;
}

template <class T>
void sum_segments(const SegmentSum& op, int64_t q, int64_t begin, int64_t end) {
    const T* values = static_cast<const T*>(op.values) + q * op.values_stride_q;
    T* out = static_cast<T*>(op.out) + q * op.out_stride_q;
    for (int64_t s = begin; s < end; ++s) {
        const int64_t first = op.offsets[s], count = op.offsets[s + 1] - first;
        const bool brief = count < 16 && first + 16 <= op.N;
        out[s] = static_cast<T>(brief ? short_sum(values + first, count) : ordered_sum(values + first, count));
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
