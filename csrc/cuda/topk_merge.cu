#include "topk_merge.h"

#include "launch.h"
#include "tiles/topk_merge.inl.h"

namespace finf::cuda {
namespace {

// A block to a query.
constexpr int THREADS = 256;
// Twice what a block looks at together; 32 KiB of shared memory in double, of the 48 that need not be asked for.
constexpr int ROOM = 2 * THREADS * GLANCE;

// Two blocks to a multiprocessor, so that registers are not saved for more: queries are few.
template <class T>
__global__ void __launch_bounds__(THREADS, 2) topk_merge_kernel(const TopKMerge op) {
    __shared__ double room[THREADS / 32];
    __shared__ T found[ROOM];
    __shared__ int64_t found_at[ROOM];
    const Block<THREADS> group = {room};
    for (int64_t q = blockIdx.x; q < op.Q; q += gridDim.x) merge_query<T, ROOM>(op, group, q, found, found_at);
}

void check(const TopKMerge& op) {
    require_size("Q", op.Q);
    require_size("K", op.K);
    require_size("S", op.S);
    require_size("start", op.start);
    const bool any = op.Q > 0 && op.K > 0;
    require_memory("values", op.values, any);
    require_memory("indices", op.indices, any);
    require_memory("scores", op.scores, any && op.S > 0);
}

}  // namespace

void topk_merge(const TopKMerge& op, const Place& place) {
    check(op);
    if (op.K == 0) return;
    const auto kernel = op.dtype == DType::f64 ? topk_merge_kernel<double> : topk_merge_kernel<float>;
    launch("topk_merge", place, kernel, blocks_for(op.Q, 1), THREADS, op);
}

}  // namespace finf::cuda
