#include "squared_error_delta.h"

#include "launch.h"
#include "tiles/squared_error_delta.inl.h"

namespace finf::cuda {
namespace {

// Blocks that a multiprocessor should hold: 64 registers a thread at the most, and 32 warps with loads under way.
constexpr int BLOCKS_HELD = 4;

template <class P, class Y, class T>
__global__ void __launch_bounds__(ROW_THREADS, BLOCKS_HELD)
    squared_error_delta_wide(const SquaredErrorDelta op, int64_t tiles) {
    __shared__ double room[ROW_THREADS / 32];
    for (int64_t i = blockIdx.x; i < op.N * tiles; i += gridDim.x)
        square_row<TOGETHER, P, Y, T>(op, Block<ROW_THREADS>{room}, i / tiles, i % tiles * TOGETHER);
}

template <class P, class Y, class T>
__global__ void __launch_bounds__(ROW_THREADS, BLOCKS_HELD)
    squared_error_delta_narrow(const SquaredErrorDelta op, int64_t tiles) {
    const int64_t warp = (int64_t{blockIdx.x} * ROW_THREADS + threadIdx.x) / 32,
                  warps = int64_t{gridDim.x} * ROW_THREADS / 32;
    for (int64_t i = warp; i < op.N * tiles; i += warps)
        square_row<TOGETHER, P, Y, T>(op, Lanes<32>(), i / tiles, i % tiles * TOGETHER);
}

template <class P, class Y, class T>
void start(const SquaredErrorDelta& op, const Place& place) {
    const int64_t tiles = tiles_of<TOGETHER>(op.Q);
    if (op.D > NARROW) {
        launch("squared_error_delta", place, squared_error_delta_wide<P, Y, T>, blocks_for(op.N * tiles, 1),
               ROW_THREADS, op, tiles);
    } else {
        launch("squared_error_delta", place, squared_error_delta_narrow<P, Y, T>,
               blocks_for(op.N * tiles, ROW_THREADS / 32), ROW_THREADS, op, tiles);
    }
}

template <class P, class Y>
void start(const SquaredErrorDelta& op, const Place& place) {
    op.dp.dtype == DType::bf16 ? start<P, Y, Bf16>(op, place) : start<P, Y, float>(op, place);
}

template <class P>
void start(const SquaredErrorDelta& op, const Place& place) {
    op.y.dtype == DType::bf16 ? start<P, Bf16>(op, place) : start<P, float>(op, place);
}

void check(const SquaredErrorDelta& op) {
    require_size("N", op.N);
    require_size("D", op.D);
    require_size("Q", op.Q);
    require_size("delta_stride_q", op.delta_stride_q, op.Q > 1 ? op.N : 0);
    require_memory("p", op.p.first, op.N > 0 && op.D > 0);
    require_memory("dp", op.dp.first, op.N > 0 && op.D > 0 && op.Q > 0);
    require_memory("y", op.y.first, op.N > 0 && op.D > 0);
    require_memory("base", op.base, op.N > 0);
    require_memory("delta", op.delta, op.N > 0 && op.Q > 0);
}

}  // namespace

void squared_error_delta(const SquaredErrorDelta& op, const Place& place) {
    check(op);
    op.p.dtype == DType::bf16 ? start<Bf16>(op, place) : start<float>(op, place);
}

}  // namespace finf::cuda
