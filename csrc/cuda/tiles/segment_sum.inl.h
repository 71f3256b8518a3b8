// One segment of segment_sum, written once over Group.
#pragma once

#include "../group.h"
#include "../segment_sum.h"

namespace finf::cuda {

// Running sums of a segment, as many as on the CPU.
constexpr int SUMS = 8;

// The CPU's order and so its bits (cpu/ordered_sum.h): value i into sum i mod 8, the sums joined by a tree, then what
// is left of eight one by one. The group is eight lanes,
// whose butterfly is that tree.
template <class T, class Group>
FINF_ROW double ordered_sum(const T* x, int64_t count, const Group& group) {
    const int64_t whole = count / SUMS * SUMS;
    double total = 0;
    for (int64_t i = group.rank(); i < whole; i += SUMS) total += static_cast<double>(x[i]);
    if (whole > 0) total = group.sum(total);
    for (int64_t i = whole; i < count; ++i) total += static_cast<double>(x[i]);
    return total;
}

template <class T, class Group>
FINF_ROW void sum_segment(const SegmentSum& op, const Group& group, int64_t q, int64_t s) {
    const T* values = static_cast<const T*>(op.values) + q * op.values_stride_q;
    const double total = ordered_sum(values + op.offsets[s], op.offsets[s + 1] - op.offsets[s], group);
    if (group.rank() == 0) static_cast<T*>(op.out)[q * op.out_stride_q + s] = static_cast<T>(total);
}

}  // namespace finf::cuda
