#include "decode_tokens.h"

#include "launch.h"
#include "tiles/decode_tokens.inl.h"

namespace finf::cuda {
namespace {

constexpr int THREADS = 256;

template <class T>
__global__ void __launch_bounds__(THREADS) decode_tokens_kernel(const DecodeTokens op, int64_t chunks) {
    const int64_t first = int64_t{blockIdx.x} * THREADS + threadIdx.x;
    for (int64_t i = first; i < chunks; i += int64_t{gridDim.x} * THREADS) decode_chunk<T>(op, i);
}

template <class T>
void start(const DecodeTokens& op, const Place& place) {
    const int64_t chunks = op.L > 0 ? op.B * chunks_of<T>(op.L) : 0;
    launch("decode_tokens", place, decode_tokens_kernel<T>, blocks_for(chunks, THREADS), THREADS, op, chunks);
}

void check(const DecodeTokens& op) {
    require_size("B", op.B);
    require_size("L", op.L);
    require_memory("raw", op.raw, op.B > 0 && op.L > 0);
    require_memory("out", op.out, op.B > 0 && op.L > 0);
}

}  // namespace

void decode_tokens(const DecodeTokens& op, const Place& place) {
    check(op);
    with_stored(op.stored, [&](auto number) { start<decltype(number)>(op, place); });
}

}  // namespace finf::cuda
