#include "noise.h"

#include "../check.h"
#include "launch.h"
#include "tiles/noise.inl.h"

namespace finf::cuda {
namespace {

constexpr int THREADS = 256;
// Positions that a block's 31 bits can count.
constexpr int64_t MOST_NUMBERS = int64_t{1} << 33;

__global__ void __launch_bounds__(THREADS) noise_kernel(const Noise op, int64_t blocks) {
    const int64_t first = int64_t{blockIdx.x} * THREADS + threadIdx.x;
    for (int64_t i = first; i < op.S * blocks; i += int64_t{gridDim.x} * THREADS) write_block(op, i, blocks);
}

void check(const Noise& op) {
    require_size("S", op.S);
    require_size("M", op.M);
    require(op.M <= MOST_NUMBERS, "M", "at most 2^33", op.M);
    require_memory("samples", op.samples, op.S > 0);
    require_memory("out", op.out, op.S > 0 && op.M > 0);
}

}  // namespace

void noise(const Noise& op, const Place& place) {
    check(op);
    const int64_t blocks = (op.M + 3) / 4;
    launch("noise", place, noise_kernel, blocks_for(op.S * blocks, THREADS), THREADS, op, blocks);
}

}  // namespace finf::cuda
