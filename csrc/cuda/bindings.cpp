// The border of the CUDA kernels with Python: addresses and the stream come in as whole numbers. Nothing waits for the
// device.
#include "../border.h"
#include "../check.h"
#include "cross_entropy_delta.h"
#include "decode_pixels.h"
#include "decode_tokens.h"
#include "noise.h"
#include "segment_sum.h"
#include "squared_error_delta.h"
#include "tiles/cross_entropy_delta.inl.h"
#include "tiles/topk_merge.inl.h"

namespace {

using finf::memory;

finf::cuda::Place place(int device, uintptr_t stream) { return {device, memory<void>(stream)}; }

std::pair<int64_t, int64_t> both(const finf::cuda::Splits& splits) { return {splits.count, splits.bytes}; }

void cross_entropy_delta(int device, uintptr_t stream, uintptr_t z, int z_dtype, int64_t z_stride, uintptr_t dz,
                         int dz_dtype, int64_t dz_stride_q, int64_t dz_stride_n, uintptr_t target, uintptr_t base,
                         uintptr_t delta, int64_t delta_stride_q, int64_t N, int64_t V, int64_t Q, int64_t ignore_index,
                         double label_smoothing, int64_t splits, uintptr_t parts) {
    finf::cuda::cross_entropy_delta(
        {memory<void>(z), finf::require_float_or_bf16("z_dtype", z_dtype), z_stride, memory<void>(dz),
         finf::require_float_or_bf16("dz_dtype", dz_dtype), dz_stride_q, dz_stride_n, memory<int64_t>(target),
         memory<float>(base), memory<float>(delta), delta_stride_q, N, V, Q, ignore_index, label_smoothing, splits,
         memory<void>(parts)},
        place(device, stream));
}

std::pair<int64_t, int64_t> cross_entropy_delta_splits(int64_t multiprocessors, int64_t N, int64_t V, int64_t Q) {
    return both(finf::cuda::cross_entropy_delta_splits(multiprocessors, N, V, Q));
}

void decode_pixels(int device, uintptr_t stream, uintptr_t raw, uintptr_t table, int dtype, uintptr_t out, int64_t M,
                   int64_t C, int64_t run) {
    finf::cuda::decode_pixels({memory<uint8_t>(raw), memory<void>(table), finf::require_float_or_bf16("dtype", dtype),
                               memory<void>(out), M, C, run},
                              place(device, stream));
}

void decode_tokens(int device, uintptr_t stream, uintptr_t raw, int stored, uintptr_t out, int64_t B, int64_t L,
                   int64_t raw_stride) {
    finf::cuda::decode_tokens(
        {memory<void>(raw), finf::require_stored("stored", stored), memory<int64_t>(out), B, L, raw_stride},
        place(device, stream));
}

void noise(int device, uintptr_t stream, uint64_t seed, uintptr_t samples, uint32_t draw, uintptr_t out, int64_t S,
           int64_t M) {
    finf::cuda::noise({seed, memory<int64_t>(samples), draw, memory<float>(out), S, M}, place(device, stream));
}

void segment_sum(int device, uintptr_t stream, uintptr_t values, int values_dtype, int64_t values_stride_q,
                 uintptr_t offsets, uintptr_t out, int64_t out_stride_q, int64_t Q, int64_t N, int64_t S) {
    finf::cuda::segment_sum({memory<void>(values), finf::require_float_or_double("values_dtype", values_dtype),
                             values_stride_q, memory<int64_t>(offsets), memory<void>(out), out_stride_q, Q, N, S},
                            place(device, stream));
}

void squared_error_delta(int device, uintptr_t stream, uintptr_t p, int p_dtype, int64_t p_stride_n, uintptr_t dp,
                         int dp_dtype, int64_t dp_stride_q, int64_t dp_stride_n, uintptr_t y, int y_dtype,
                         int64_t y_stride_n, uintptr_t base, uintptr_t delta, int64_t delta_stride_q, int64_t N,
                         int64_t D, int64_t Q) {
    finf::cuda::squared_error_delta(
        {{memory<void>(p), finf::require_float_or_bf16("p_dtype", p_dtype), 0, p_stride_n},
         {memory<void>(dp), finf::require_float_or_bf16("dp_dtype", dp_dtype), dp_stride_q, dp_stride_n},
         {memory<void>(y), finf::require_float_or_bf16("y_dtype", y_dtype), 0, y_stride_n},
         memory<float>(base),
         memory<float>(delta),
         delta_stride_q,
         N,
         D,
         Q},
        place(device, stream));
}

void topk_merge(int device, uintptr_t stream, uintptr_t values, uintptr_t indices, uintptr_t scores, int scores_dtype,
                int64_t scores_stride_q, int64_t start, int64_t Q, int64_t K, int64_t S, int64_t splits,
                uintptr_t parts) {
    finf::cuda::topk_merge({memory<void>(values), memory<int64_t>(indices), memory<void>(scores),
                            finf::require_float_or_double("scores_dtype", scores_dtype), scores_stride_q, start, Q, K,
                            S, splits, memory<void>(parts)},
                           place(device, stream));
}

std::pair<int64_t, int64_t> topk_merge_splits(int64_t multiprocessors, int64_t Q, int64_t K, int64_t S,
                                              int scores_dtype) {
    const finf::DType dtype = finf::require_float_or_double("scores_dtype", scores_dtype);
    return both(finf::cuda::topk_merge_splits(multiprocessors, Q, K, S, dtype));
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    module.doc() =
        "CUDA kernels of finf_fast. Addresses on the device, of first elements; sizes and strides in elements.";
    const auto unlocked = py::call_guard<py::gil_scoped_release>();

    module.def("cross_entropy_delta", cross_entropy_delta, unlocked, "device"_a, "stream"_a, "z"_a, "z_dtype"_a,
               "z_stride"_a, "dz"_a, "dz_dtype"_a, "dz_stride_q"_a, "dz_stride_n"_a, "target"_a, "base"_a, "delta"_a,
               "delta_stride_q"_a, "N"_a, "V"_a, "Q"_a, "ignore_index"_a, "label_smoothing"_a, "splits"_a, "parts"_a,
               "z (N,V), dz (Q,N,V), target (N) int64 -> base (N), delta (Q,N) float32. dtype: 0 float32, 1 bfloat16.");
    module.def("cross_entropy_delta_splits", cross_entropy_delta_splits, "multiprocessors"_a, "N"_a, "V"_a, "Q"_a,
               "How many blocks should share a row, and the bytes of `parts` that they then need.");
    module.def("decode_pixels", decode_pixels, unlocked, "device"_a, "stream"_a, "raw"_a, "table"_a, "dtype"_a, "out"_a,
               "M"_a, "C"_a, "run"_a, "raw (M) uint8, table (C,256) -> out (M). dtype: 0 float32, 1 bfloat16.");
    module.def("decode_tokens", decode_tokens, unlocked, "device"_a, "stream"_a, "raw"_a, "stored"_a, "out"_a, "B"_a,
               "L"_a, "raw_stride"_a,
               "raw (B,L) -> out (B,L) int64. stored: 0 uint8, 1 int8, 2 uint16, 3 int16, 4 uint32, 5 int32.");
    module.def("noise", noise, unlocked, "device"_a, "stream"_a, "seed"_a, "samples"_a, "draw"_a, "out"_a, "S"_a, "M"_a,
               "samples (S) int64 -> out (S,M) float32, standard normal.");
    module.def("segment_sum", segment_sum, unlocked, "device"_a, "stream"_a, "values"_a, "values_dtype"_a,
               "values_stride_q"_a, "offsets"_a, "out"_a, "out_stride_q"_a, "Q"_a, "N"_a, "S"_a,
               "values (Q,N), offsets (S+1) int64 -> out (Q,S). dtype: 0 float32, 2 float64.");
    module.def("squared_error_delta", squared_error_delta, unlocked, "device"_a, "stream"_a, "p"_a, "p_dtype"_a,
               "p_stride_n"_a, "dp"_a, "dp_dtype"_a, "dp_stride_q"_a, "dp_stride_n"_a, "y"_a, "y_dtype"_a,
               "y_stride_n"_a, "base"_a, "delta"_a, "delta_stride_q"_a, "N"_a, "D"_a, "Q"_a,
               "p, y (N,D), dp (Q,N,D) -> base (N), delta (Q,N) float32. dtype: 0 float32, 1 bfloat16.");
    module.def("topk_merge", topk_merge, unlocked, "device"_a, "stream"_a, "values"_a, "indices"_a, "scores"_a,
               "scores_dtype"_a, "scores_stride_q"_a, "start"_a, "Q"_a, "K"_a, "S"_a, "splits"_a, "parts"_a,
               "values, indices (Q,K) updated in place with scores (Q,S). dtype: 0 float32, 2 float64.");
    module.def("topk_merge_splits", topk_merge_splits, "multiprocessors"_a, "Q"_a, "K"_a, "S"_a, "scores_dtype"_a,
               "How many blocks should share a query, and the bytes of `parts` that they then need.");
}
