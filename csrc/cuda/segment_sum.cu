#include "segment_sum.h"

#include "launch.h"
#include "tiles/segment_sum.inl.h"

namespace finf::cuda {
namespace {

constexpr int THREADS = 256;

template <class T>
__global__ void __launch_bounds__(THREADS) segment_sum_kernel(const SegmentSum op) {
    const int64_t group = (int64_t{blockIdx.x} * THREADS + threadIdx.x) / SUMS;
    const int64_t groups = int64_t{gridDim.x} * THREADS / SUMS;
    for (int64_t i = group; i < op.Q * op.S; i += groups) sum_segment<T>(op, Lanes<SUMS>(), i / op.S, i % op.S);
}

template <class T>
void start(const SegmentSum& op, const Place& place) {
    launch("segment_sum", place, segment_sum_kernel<T>, blocks_for(op.Q * op.S, THREADS / SUMS), THREADS, op);
}

void check(const SegmentSum& op) {
    require_size("Q", op.Q);
    require_size("N", op.N);
    require_size("S", op.S);
    require_size("out_stride_q", op.out_stride_q, op.Q > 1 ? op.S : 0);
    require_memory("values", op.values, op.Q > 0 && op.N > 0);
    require_memory("offsets", op.offsets, true);
    require_memory("out", op.out, op.Q > 0 && op.S > 0);
}

}  // namespace

void segment_sum(const SegmentSum& op, const Place& place) {
    check(op);
    op.dtype == DType::f64 ? start<double>(op, place) : start<float>(op, place);
}

}  // namespace finf::cuda
