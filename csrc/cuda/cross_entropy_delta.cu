#include "cross_entropy_delta.h"

#include <cassert>

#include "launch.h"
#include "tiles/cross_entropy_delta.inl.h"

namespace finf::cuda {
namespace {

// Columns are counted in 31 bits, and rounds go past the last.
constexpr int64_t MOST_COLUMNS = int64_t{1} << 30;
constexpr int WARPS = ROW_THREADS / 32;
// Threads of a block of narrow rows, a warp each: of smaller blocks more fit beside each other.
constexpr int NARROW_THREADS = 128, NARROW_WARPS = NARROW_THREADS / 32;

// Whether a thread's loads are two of 16 bytes, one for the row and one for its change: then it takes more of them on a
// multiprocessor to have enough under way, and each may have fewer registers, 80 of a wide row's and 96 of a narrow
// one's instead of 128.
template <int QUERIES, class Z, class D>
constexpr bool LIGHT = sizeof(Z) + QUERIES * sizeof(D) <= 4;

__device__ void check_target(const CrossEntropyDelta& op, int64_t n) {
    assert(op.target[n] == op.ignore_index || (op.target[n] >= 0 && op.target[n] < op.V));
}

// Tiles of one row's queries are neighbours, and so run at about the same time.
template <int QUERIES, class Z, class D>
__global__ void __launch_bounds__(ROW_THREADS, LIGHT<QUERIES, Z, D> ? 3 : 2)
    cross_entropy_delta_wide(const CrossEntropyDelta op, int64_t tiles) {
    __shared__ double room[WARPS];
    __shared__ PartSums<QUERIES> sums;
    for (int64_t i = blockIdx.x; i < op.N * tiles; i += gridDim.x) {
        check_target(op, i / tiles);
        score_row<QUERIES, Z, D>(op, Block<ROW_THREADS>{room}, i / tiles, i % tiles * QUERIES, sums);
    }
}

template <int QUERIES, class Z, class D>
__global__ void __launch_bounds__(NARROW_THREADS, LIGHT<QUERIES, Z, D> ? 5 : 4)
    cross_entropy_delta_narrow(const CrossEntropyDelta op, int64_t tiles) {
    __shared__ PartSums<QUERIES> sums[NARROW_WARPS];
    const int warp = threadIdx.x / 32;
    for (int64_t i = int64_t{blockIdx.x} * NARROW_WARPS + warp; i < op.N * tiles;
         i += int64_t{gridDim.x} * NARROW_WARPS) {
        check_target(op, i / tiles);
        score_row<QUERIES, Z, D>(op, Lanes<32>(), i / tiles, i % tiles * QUERIES, sums[warp]);
    }
}

template <int QUERIES, class Z, class D>
__global__ void __launch_bounds__(ROW_THREADS, LIGHT<QUERIES, Z, D> ? 3 : 2)
    cross_entropy_delta_part(const CrossEntropyDelta op, int64_t tiles) {
    __shared__ double room[WARPS];
    for (int64_t i = blockIdx.x; i < op.N * tiles * op.splits; i += gridDim.x) {
        const int64_t piece = i / op.splits;
        check_target(op, piece / tiles);
        sum_part<QUERIES, Z, D>(op, Block<ROW_THREADS>{room}, piece / tiles, piece % tiles * QUERIES,
                                Part::of(i, op.splits));
    }
}

template <int QUERIES, class Z, class D>
__global__ void __launch_bounds__(ROW_THREADS, 2)
    cross_entropy_delta_finish(const CrossEntropyDelta op, int64_t tiles) {
    __shared__ double room[WARPS];
    __shared__ PartSums<QUERIES> sums;
    for (int64_t i = blockIdx.x; i < op.N * tiles; i += gridDim.x)
        finish_row<QUERIES, Z, D>(op, Block<ROW_THREADS>{room}, i / tiles, i % tiles * QUERIES, sums);
}

template <int QUERIES, class Z, class D>
void start_parts(const CrossEntropyDelta& op, const Place& place) {
    const int64_t tiles = tiles_of<QUERIES>(op.Q), pieces = op.N * tiles;
    launch("cross_entropy_delta", place, cross_entropy_delta_part<QUERIES, Z, D>, blocks_for(pieces * op.splits, 1),
           ROW_THREADS, op, tiles);
    launch("cross_entropy_delta", place, cross_entropy_delta_finish<QUERIES, Z, D>, blocks_for(pieces, 1), ROW_THREADS,
           op, tiles);
}

template <int QUERIES, class Z, class D>
void start(const CrossEntropyDelta& op, const Place& place) {
    const int64_t tiles = tiles_of<QUERIES>(op.Q);
    if (op.splits > 1) {
        start_parts<QUERIES, Z, D>(op, place);
    } else if (op.V > NARROW) {
        launch("cross_entropy_delta", place, cross_entropy_delta_wide<QUERIES, Z, D>, blocks_for(op.N * tiles, 1),
               ROW_THREADS, op, tiles);
    } else {
        launch("cross_entropy_delta", place, cross_entropy_delta_narrow<QUERIES, Z, D>,
               blocks_for(op.N * tiles, NARROW_WARPS), NARROW_THREADS, op, tiles);
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
    require(op.V <= MOST_COLUMNS, "V", "at most 2^30", op.V);
    require_size("splits", op.splits, 1);
    require_memory("parts", op.parts, op.N > 0 && op.splits > 1);
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
