#include "cross_entropy_delta.h"

#include <cassert>

#include "launch.h"
#include "tiles/cross_entropy_delta.inl.h"

namespace finf::cuda {
namespace {

// Threads of a block; a wide row's group is the block, a narrow one's a warp.
constexpr int THREADS = 256;
// Rows no wider than this go to a warp each: eight rounds of it.
constexpr int64_t NARROW = 8 * 32 * COLUMNS;
// Queries that share one pass over z; further ones find z in the second-level cache.
constexpr int TOGETHER = 4;

// Blocks that a multiprocessor should hold, so that enough loads are under way: 80 registers a thread at the most, 128
// where queries go together and a thread has more loads of its own; with 64 and 80 some were spilled.
constexpr int blocks_held(int queries) { return queries > 1 ? 2 : 3; }

__device__ void check_target(const CrossEntropyDelta& op, int64_t n) {
    assert(op.target[n] == op.ignore_index || (op.target[n] >= 0 && op.target[n] < op.V));
}

// Tiles of one row's queries are neighbours, and so run at about the same time.
template <int QUERIES, class Z, class D>
__global__ void __launch_bounds__(THREADS, blocks_held(QUERIES))
    cross_entropy_delta_wide(const CrossEntropyDelta op, int64_t tiles) {
    __shared__ double room[THREADS / 32];
    for (int64_t i = blockIdx.x; i < op.N * tiles; i += gridDim.x) {
        check_target(op, i / tiles);
        score_row<QUERIES, Z, D>(op, Block<THREADS>{room}, i / tiles, i % tiles * QUERIES);
    }
}

template <int QUERIES, class Z, class D>
__global__ void __launch_bounds__(THREADS, blocks_held(QUERIES))
    cross_entropy_delta_narrow(const CrossEntropyDelta op, int64_t tiles) {
    const int64_t warp = (int64_t{blockIdx.x} * THREADS + threadIdx.x) / 32, warps = int64_t{gridDim.x} * THREADS / 32;
    for (int64_t i = warp; i < op.N * tiles; i += warps) {
        check_target(op, i / tiles);
        score_row<QUERIES, Z, D>(op, Lanes<32>(), i / tiles, i % tiles * QUERIES);
    }
}

template <int QUERIES, class Z, class D>
void start(const CrossEntropyDelta& op, const Place& place) {
    const int64_t tiles = op.Q > 0 ? (op.Q + QUERIES - 1) / QUERIES : 1;  // without a query there is still the base
    if (op.V > NARROW) {
        launch("cross_entropy_delta", place, cross_entropy_delta_wide<QUERIES, Z, D>, blocks_for(op.N * tiles, 1),
               THREADS, op, tiles);
    } else {
        launch("cross_entropy_delta", place, cross_entropy_delta_narrow<QUERIES, Z, D>,
               blocks_for(op.N * tiles, THREADS / 32), THREADS, op, tiles);
    }
}

template <class Z, class D>
void start(const CrossEntropyDelta& op, const Place& place) {
    op.Q > 1 ? start<TOGETHER, Z, D>(op, place) : start<1, Z, D>(op, place);
}

void check(const CrossEntropyDelta& op) {
    require_size("N", op.N);
    require_size("V", op.V, op.N > 0 ? 1 : 0);
    require_size("Q", op.Q);
    require_size("delta_stride_q", op.delta_stride_q, op.Q > 1 ? op.N : 0);
    require(op.label_smoothing >= 0 && op.label_smoothing <= 1, "label_smoothing", "0 to 1", op.label_smoothing);
    require_memory("z", op.z, op.N > 0);
    require_memory("dz", op.dz, op.N > 0 && op.Q > 0);
    require_memory("target", op.target, op.N > 0);
    require_memory("base", op.base, op.N > 0);
    require_memory("delta", op.delta, op.N > 0 && op.Q > 0);
}

}  // namespace

void cross_entropy_delta(const CrossEntropyDelta& op, const Place& place) {
    check(op);
    const bool z = op.z_dtype == DType::bf16, d = op.dz_dtype == DType::bf16;
    if (z) {
        d ? start<Bf16, Bf16>(op, place) : start<Bf16, float>(op, place);
    } else {
        d ? start<float, Bf16>(op, place) : start<float, float>(op, place);
    }
}

}  // namespace finf::cuda
