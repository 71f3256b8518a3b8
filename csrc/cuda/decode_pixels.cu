#include "decode_pixels.h"

#include "launch.h"
#include "tiles/decode_pixels.inl.h"

namespace finf::cuda {
namespace {

constexpr int THREADS = 256;

template <class T>
__global__ void __launch_bounds__(THREADS) decode_pixels_kernel(const DecodePixels op, int64_t chunks) {
    const int64_t first = int64_t{blockIdx.x} * THREADS + threadIdx.x;
    for (int64_t i = first; i < chunks; i += int64_t{gridDim.x} * THREADS) decode_chunk<T>(op, i);
}

template <class T>
void start(const DecodePixels& op, const Place& place) {
    const int64_t chunks = (op.M + PIXELS - 1) / PIXELS;
    launch("decode_pixels", place, decode_pixels_kernel<T>, blocks_for(chunks, THREADS), THREADS, op, chunks);
}

void check(const DecodePixels& op) {
    require_size("M", op.M);
    require_size("C", op.C, 1);
    require_size("run", op.run, 1);
    require_memory("raw", op.raw, op.M > 0);
    require_memory("table", op.table, op.M > 0);
    require_memory("out", op.out, op.M > 0);
}

}  // namespace

void decode_pixels(const DecodePixels& op, const Place& place) {
    check(op);
    op.dtype == DType::bf16 ? start<uint16_t>(op, place) : start<uint32_t>(op, place);
}

}  // namespace finf::cuda
