#include "topk_merge.h"

#include "launch.h"
#include "tiles/topk_merge.inl.h"

namespace finf::cuda {
namespace {

// Twice what a block adds together; 32 KiB of shared memory in double, of the 48 that need not be asked for.
constexpr int ROOM = 2 * MERGE_THREADS * GLANCE;

using Threads = Block<MERGE_THREADS>;

// Two blocks to a multiprocessor, so that registers are not saved for more: as many are started where queries are few.
template <class T>
__global__ void __launch_bounds__(MERGE_THREADS, 2) topk_merge_scores(const TopKMerge op) {
    __shared__ double room[Threads::WARPS];
    __shared__ T found[ROOM];
    __shared__ int64_t found_at[ROOM];
    for (int64_t i = blockIdx.x; i < op.Q * op.splits; i += gridDim.x)
        merge_scores<T, ROOM>(op, Threads{room}, i / op.splits, Part::of(i, op.splits), found, found_at);
}

template <class T>
__global__ void __launch_bounds__(MERGE_THREADS, 2) topk_merge_parts(const TopKMerge op) {
    __shared__ double room[Threads::WARPS];
    __shared__ T found[ROOM];
    __shared__ int64_t found_at[ROOM];
    for (int64_t q = blockIdx.x; q < op.Q; q += gridDim.x) merge_parts<T, ROOM>(op, Threads{room}, q, found, found_at);
}

template <class T>
void start(const TopKMerge& op, const Place& place) {
    launch("topk_merge", place, topk_merge_scores<T>, blocks_for(op.Q * op.splits, 1), MERGE_THREADS, op);
    if (op.splits > 1) launch("topk_merge", place, topk_merge_parts<T>, blocks_for(op.Q, 1), MERGE_THREADS, op);
}

void check(const TopKMerge& op) {
    require_size("Q", op.Q);
    require_size("K", op.K);
    require_size("S", op.S);
    require_size("start", op.start);
    const bool any = op.Q > 0 && op.K > 0;
    require_memory("values", op.values, any);
    require_memory("indices", op.indices, any);
    require_size("splits", op.splits, 1);
    require_memory("parts", op.parts, any && op.splits > 1);
    require_memory("scores", op.scores, any && op.S > 0);
}

}  // namespace

void topk_merge(const TopKMerge& op, const Place& place) {
    check(op);
    if (op.K == 0) return;
    op.dtype == DType::f64 ? start<double>(op, place) : start<float>(op, place);
}

}  // namespace finf::cuda
