// The border of the operations with Python (border.h).
#include "border.h"

#include <pybind11/stl.h>

#include <array>

#include "check.h"
#include "cpu/activation_delta.h"
#include "cpu/attention_delta.h"
#include "cpu/cross_entropy_delta.h"
#include "cpu/fma_peak.h"
#include "cpu/group_norm_delta.h"
#include "cpu/isa/kernels.h"
#include "cpu/layer_norm_delta.h"
#include "cpu/linear_cross_entropy_delta.h"
#include "cpu/linear_delta.h"
#include "cpu/noise.h"
#include "cpu/rms_norm_delta.h"
#include "cpu/segment_sum.h"
#include "cpu/squared_error_delta.h"
#include "cpu/topk_merge.h"

namespace {

using finf::memory;

void cross_entropy_delta(uintptr_t z, int z_dtype, int64_t z_stride, uintptr_t dz, int dz_dtype, int64_t dz_stride_q,
                         int64_t dz_stride_n, uintptr_t target, uintptr_t base, uintptr_t delta, int64_t delta_stride_q,
                         int64_t N, int64_t V, int64_t Q, int64_t ignore_index, double label_smoothing,
                         int64_t threads) {
    finf::cross_entropy_delta({memory<void>(z), finf::require_float_or_bf16("z_dtype", z_dtype), z_stride,
                               memory<void>(dz), finf::require_float_or_bf16("dz_dtype", dz_dtype), dz_stride_q,
                               dz_stride_n, memory<int64_t>(target), memory<float>(base), memory<float>(delta),
                               delta_stride_q, N, V, Q, ignore_index, label_smoothing, threads});
}

void linear_cross_entropy_delta(int dtype, uintptr_t x, int64_t x_stride, uintptr_t dx, int64_t dx_stride_q,
                                int64_t dx_stride_n, uintptr_t W, int64_t W_stride, uintptr_t target, uintptr_t bias,
                                uintptr_t db, int64_t db_stride_q, uintptr_t dW, int dW_dtype, int64_t dW_stride_q,
                                int64_t dW_stride_v, uintptr_t U, int U_dtype, int64_t U_stride_q, int64_t U_stride_v,
                                uintptr_t R, int64_t r, uintptr_t base, uintptr_t delta, int64_t delta_stride_q,
                                int64_t N, int64_t D, int64_t V, int64_t Q, double softcap, int64_t ignore_index,
                                double label_smoothing, int64_t threads) {
    finf::linear_cross_entropy_delta({finf::require_float_or_bf16("dtype", dtype),
                                      memory<void>(x),
                                      x_stride,
                                      memory<void>(dx),
                                      dx_stride_q,
                                      dx_stride_n,
                                      memory<void>(W),
                                      W_stride,
                                      memory<int64_t>(target),
                                      memory<float>(bias),
                                      memory<float>(db),
                                      db_stride_q,
                                      memory<void>(dW),
                                      finf::require_float_or_bf16("dW_dtype", dW_dtype),
                                      dW_stride_q,
                                      dW_stride_v,
                                      memory<void>(U),
                                      finf::require_float_or_bf16("U_dtype", U_dtype),
                                      U_stride_q,
                                      U_stride_v,
                                      memory<float>(R),
                                      r,
                                      memory<float>(base),
                                      memory<float>(delta),
                                      delta_stride_q,
                                      N,
                                      D,
                                      V,
                                      Q,
                                      softcap,
                                      ignore_index,
                                      label_smoothing,
                                      threads});
}

void noise(uint64_t seed, uintptr_t samples, uint32_t draw, uintptr_t out, int64_t S, int64_t M, int64_t threads) {
    finf::noise({seed, memory<int64_t>(samples), draw, memory<float>(out), S, M, threads});
}

void segment_sum(uintptr_t values, int values_dtype, int64_t values_stride_q, uintptr_t offsets, uintptr_t out,
                 int64_t out_stride_q, int64_t Q, int64_t N, int64_t S, int64_t threads) {
    finf::segment_sum({memory<void>(values), finf::require_float_or_double("values_dtype", values_dtype),
                       values_stride_q, memory<int64_t>(offsets), memory<void>(out), out_stride_q, Q, N, S, threads});
}

void linear_delta(int dtype, uintptr_t x, int64_t x_stride_q, int64_t x_stride_n, bool x_moves, uintptr_t W,
                  int64_t W_stride, bool W_turned, uintptr_t bias, uintptr_t db, uintptr_t dW, uintptr_t U, uintptr_t R,
                  uintptr_t y, int64_t N, int64_t D, int64_t V, int64_t Q, int64_t r, int64_t threads) {
    finf::linear_delta({finf::require_float_or_bf16("dtype", dtype),
                        memory<void>(x),
                        x_stride_q,
                        x_stride_n,
                        x_moves,
                        memory<void>(W),
                        W_stride,
                        W_turned,
                        memory<float>(bias),
                        memory<float>(db),
                        memory<void>(dW),
                        memory<void>(U),
                        memory<void>(R),
                        memory<void>(y),
                        N,
                        D,
                        V,
                        Q,
                        r,
                        threads});
}

void squared_error_delta(uintptr_t p, int p_dtype, int64_t p_stride_n, uintptr_t dp, int dp_dtype, int64_t dp_stride_q,
                         int64_t dp_stride_n, uintptr_t y, int y_dtype, int64_t y_stride_n, uintptr_t base,
                         uintptr_t delta, int64_t delta_stride_q, int64_t N, int64_t D, int64_t Q, int64_t threads) {
    finf::squared_error_delta(
        {{memory<void>(p), finf::require_float_or_bf16("p_dtype", p_dtype), 0, p_stride_n},
         {memory<void>(dp), finf::require_float_or_bf16("dp_dtype", dp_dtype), dp_stride_q, dp_stride_n},
         {memory<void>(y), finf::require_float_or_bf16("y_dtype", y_dtype), 0, y_stride_n},
         memory<float>(base),
         memory<float>(delta),
         delta_stride_q,
         N,
         D,
         Q,
         threads});
}

void topk_merge(uintptr_t values, uintptr_t indices, uintptr_t scores, int scores_dtype, int64_t scores_stride_q,
                int64_t start, int64_t Q, int64_t K, int64_t S, int64_t threads) {
    finf::topk_merge({memory<void>(values), memory<int64_t>(indices), memory<void>(scores),
                      finf::require_float_or_double("scores_dtype", scores_dtype), scores_stride_q, start, Q, K, S,
                      threads});
}

void activation_delta(const std::string& kind, int dtype, uintptr_t x, int64_t x_stride_q, bool x_moves, uintptr_t gate,
                      int64_t gate_stride_q, bool gate_moves, uintptr_t y, int64_t M, int64_t Q, int64_t threads) {
    finf::activation_delta(kind,
                           {memory<void>(x), x_stride_q, x_moves, memory<void>(gate), gate_stride_q, gate_moves,
                            memory<void>(y), M, Q, false},
                           finf::require_float_or_bf16("dtype", dtype), threads);
}

finf::NormRows row_norm(uintptr_t x, int64_t x_stride_q, int64_t x_stride_n, bool x_moves, uintptr_t residual,
                        int64_t residual_stride_q, int64_t residual_stride_n, bool residual_moves, uintptr_t weight,
                        uintptr_t bias, uintptr_t dweight, uintptr_t dbias, uintptr_t y, uintptr_t sum, int64_t N,
                        int64_t D, int64_t Q, double eps) {
    finf::NormRows rows = {};
    rows.x = memory<void>(x);
    rows.x_stride_q = x_stride_q;
    rows.x_stride_n = x_stride_n;
    rows.x_moves = x_moves;
    rows.residual = memory<void>(residual);
    rows.residual_stride_q = residual_stride_q;
    rows.residual_stride_n = residual_stride_n;
    rows.residual_moves = residual_moves;
    rows.weight = memory<float>(weight);
    rows.bias = memory<float>(bias);
    rows.dweight = memory<float>(dweight);
    rows.dbias = memory<float>(dbias);
    rows.y = memory<void>(y);
    rows.sum = memory<void>(sum);
    rows.N = N;
    rows.D = D;
    rows.Q = Q;
    rows.eps = eps;
    return rows;
}

void layer_norm_delta(int dtype, uintptr_t x, int64_t x_stride_q, int64_t x_stride_n, bool x_moves, uintptr_t residual,
                      int64_t residual_stride_q, int64_t residual_stride_n, bool residual_moves, uintptr_t weight,
                      uintptr_t bias, uintptr_t dweight, uintptr_t dbias, uintptr_t y, uintptr_t sum, int64_t N,
                      int64_t D, int64_t Q, double eps, int64_t threads) {
    finf::layer_norm_delta(row_norm(x, x_stride_q, x_stride_n, x_moves, residual, residual_stride_q, residual_stride_n,
                                    residual_moves, weight, bias, dweight, dbias, y, sum, N, D, Q, eps),
                           finf::require_float_or_bf16("dtype", dtype), threads);
}

void rms_norm_delta(int dtype, uintptr_t x, int64_t x_stride_q, int64_t x_stride_n, bool x_moves, uintptr_t residual,
                    int64_t residual_stride_q, int64_t residual_stride_n, bool residual_moves, uintptr_t weight,
                    uintptr_t dweight, uintptr_t y, uintptr_t sum, int64_t N, int64_t D, int64_t Q, double eps,
                    int64_t threads) {
    finf::rms_norm_delta(row_norm(x, x_stride_q, x_stride_n, x_moves, residual, residual_stride_q, residual_stride_n,
                                  residual_moves, weight, 0, dweight, 0, y, sum, N, D, Q, eps),
                         finf::require_float_or_bf16("dtype", dtype), threads);
}

void group_norm_delta(int dtype, uintptr_t x, int64_t x_stride_q, int64_t x_stride_n, bool x_moves, uintptr_t weight,
                      uintptr_t bias, uintptr_t dweight, uintptr_t dbias, uintptr_t y, int64_t N, int64_t D, int64_t Q,
                      int64_t groups, int64_t run, double eps, int64_t threads) {
    finf::NormRows rows =
        row_norm(x, x_stride_q, x_stride_n, x_moves, 0, 0, 0, false, weight, bias, dweight, dbias, y, 0, N, D, Q, eps);
    rows.groups = groups;
    rows.run = run;
    finf::group_norm_delta(rows, finf::require_float_or_bf16("dtype", dtype), threads);
}

using Strides = std::array<int64_t, 4>;

finf::HeadStack heads(uintptr_t first, const Strides& strides, bool moves) {
    return {memory<void>(first), strides[0], strides[1], strides[2], strides[3], moves};
}

void attention_delta(int dtype, uintptr_t q, const Strides& q_strides, bool q_moves, uintptr_t k,
                     const Strides& k_strides, bool k_moves, uintptr_t v, const Strides& v_strides, bool v_moves,
                     uintptr_t mask, bool mask_boolean, const Strides& mask_strides, uintptr_t cu_seqlens, int64_t S,
                     uintptr_t y, int64_t Q, int64_t B, int64_t H, int64_t Hk, int64_t T, int64_t Tk, int64_t E,
                     int64_t Ev, float scale, float softcap, bool causal, int64_t threads) {
    const auto& [mask_b, mask_h, mask_t, mask_k] = mask_strides;
    finf::attention_delta({heads(q, q_strides, q_moves),
                           heads(k, k_strides, k_moves),
                           heads(v, v_strides, v_moves),
                           {memory<void>(mask), mask_boolean, mask_b, mask_h, mask_t, mask_k},
                           memory<int64_t>(cu_seqlens),
                           S,
                           memory<void>(y),
                           Q,
                           B,
                           H,
                           Hk,
                           T,
                           Tk,
                           E,
                           Ev,
                           scale,
                           softcap,
                           causal},
                          finf::require_float_or_bf16("dtype", dtype), threads);
}

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const finf::Kernels* found : finf::available_kernels()) names.emplace_back(found->name);
    return names;
}

py::dict build_info() {
#if defined(__clang__)
    const char* compiler = "clang " __clang_version__;
#else
    const char* compiler = "gcc " __VERSION__;
#endif
    return py::dict("compiler"_a = compiler, "version"_a = FINF_VERSION, "cuda"_a = false);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Compiled loops of finf_fast. Addresses of first elements; sizes and strides in elements.";
    const auto unlocked = py::call_guard<finf::Unlocked>();

    module.def("cross_entropy_delta", cross_entropy_delta, unlocked, "z"_a, "z_dtype"_a, "z_stride"_a, "dz"_a,
               "dz_dtype"_a, "dz_stride_q"_a, "dz_stride_n"_a, "target"_a, "base"_a, "delta"_a, "delta_stride_q"_a,
               "N"_a, "V"_a, "Q"_a, "ignore_index"_a, "label_smoothing"_a, "threads"_a,
               "z (N,V), dz (Q,N,V), target (N) int64 -> base (N), delta (Q,N) float32. dtype: 0 float32, 1 bfloat16.");
    module.def("activation_delta", activation_delta, unlocked, "kind"_a, "dtype"_a, "x"_a, "x_stride_q"_a, "x_moves"_a,
               "gate"_a, "gate_stride_q"_a, "gate_moves"_a, "y"_a, "M"_a, "Q"_a, "threads"_a,
               "x, gate (1+Q,M) or (1,M) -> y (1+Q,M). gate: 0 for none. dtype: 0 float32, 1 bfloat16.");
    module.def("layer_norm_delta", layer_norm_delta, unlocked, "dtype"_a, "x"_a, "x_stride_q"_a, "x_stride_n"_a,
               "x_moves"_a, "residual"_a, "residual_stride_q"_a, "residual_stride_n"_a, "residual_moves"_a, "weight"_a,
               "bias"_a, "dweight"_a, "dbias"_a, "y"_a, "sum"_a, "N"_a, "D"_a, "Q"_a, "eps"_a, "threads"_a,
               "x, residual (1+Q,N,D) or (1,N,D), weight, bias (D), dweight, dbias (Q,D) float32 -> y (1+Q,N,D), sum. "
               "0 for what is not there. dtype: 0 float32, 1 bfloat16.");
    module.def("rms_norm_delta", rms_norm_delta, unlocked, "dtype"_a, "x"_a, "x_stride_q"_a, "x_stride_n"_a,
               "x_moves"_a, "residual"_a, "residual_stride_q"_a, "residual_stride_n"_a, "residual_moves"_a, "weight"_a,
               "dweight"_a, "y"_a, "sum"_a, "N"_a, "D"_a, "Q"_a, "eps"_a, "threads"_a,
               "As layer_norm_delta, without bias and dbias.");
    module.def("group_norm_delta", group_norm_delta, unlocked, "dtype"_a, "x"_a, "x_stride_q"_a, "x_stride_n"_a,
               "x_moves"_a, "weight"_a, "bias"_a, "dweight"_a, "dbias"_a, "y"_a, "N"_a, "D"_a, "Q"_a, "groups"_a,
               "run"_a, "eps"_a, "threads"_a,
               "x (1+Q,N,D) or (1,N,D), a row one group; a parameter for every `run` numbers of it -> y (1+Q,N,D).");
    module.def(
        "attention_delta", attention_delta, unlocked, "dtype"_a, "q"_a, "q_strides"_a, "q_moves"_a, "k"_a,
        "k_strides"_a, "k_moves"_a, "v"_a, "v_strides"_a, "v_moves"_a, "mask"_a, "mask_boolean"_a, "mask_strides"_a,
        "cu_seqlens"_a, "S"_a, "y"_a, "Q"_a, "B"_a, "H"_a, "Hk"_a, "T"_a, "Tk"_a, "E"_a, "Ev"_a, "scale"_a, "softcap"_a,
        "causal"_a, "threads"_a,
        "q (1+Q,B,H,T,E), k (1+Q,B,Hk,Tk,E), v (1+Q,B,Hk,Tk,Ev), or leading size 1 where it does not move; mask "
        "(B,H,T,Tk) of bytes or float32, 0 for none; cu_seqlens (S+1) int64, 0 for none -> y (1+Q,B,H,T,Ev). Strides "
        "of all dimensions but a stack's last. softcap: 0 for none. dtype: 0 float32, 1 bfloat16.");
    module.def("linear_delta", linear_delta, unlocked, "dtype"_a, "x"_a, "x_stride_q"_a, "x_stride_n"_a, "x_moves"_a,
               "W"_a, "W_stride"_a, "W_turned"_a, "bias"_a, "db"_a, "dW"_a, "U"_a, "R"_a, "y"_a, "N"_a, "D"_a, "V"_a,
               "Q"_a, "r"_a, "threads"_a,
               "x (1+Q,N,D) or (1,N,D), W (V,D) or turned (D,V), dW (Q,V,D), U (Q,V,r), R (Q,r,D) -> y (1+Q,N,V). "
               "bias (V), db (Q,V): float32. dtype: 0 float32, 1 bfloat16.");
    module.def("linear_cross_entropy_delta", linear_cross_entropy_delta, unlocked, "dtype"_a, "x"_a, "x_stride"_a,
               "dx"_a, "dx_stride_q"_a, "dx_stride_n"_a, "W"_a, "W_stride"_a, "target"_a, "bias"_a, "db"_a,
               "db_stride_q"_a, "dW"_a, "dW_dtype"_a, "dW_stride_q"_a, "dW_stride_v"_a, "U"_a, "U_dtype"_a,
               "U_stride_q"_a, "U_stride_v"_a, "R"_a, "r"_a, "base"_a, "delta"_a, "delta_stride_q"_a, "N"_a, "D"_a,
               "V"_a, "Q"_a, "softcap"_a, "ignore_index"_a, "label_smoothing"_a, "threads"_a,
               "x (N,D), dx (Q,N,D), W (V,D), target (N) int64, bias (V), db (Q,V), dW (Q,V,D) or U (Q,V,r) and "
               "R (Q,r,D) -> base (N), delta (Q,N) float32. Address 0: not given. dtype: 0 float32, 1 bfloat16.");
    module.def("fma_peak", finf::fma_peak, unlocked, "kind"_a,
               "GFLOP/s that one thread multiplies and adds in registers; kind: fp32 or bf16.");
    module.def("noise", noise, unlocked, "seed"_a, "samples"_a, "draw"_a, "out"_a, "S"_a, "M"_a, "threads"_a,
               "samples (S) int64 -> out (S,M) float32, standard normal.");
    module.def("segment_sum", segment_sum, unlocked, "values"_a, "values_dtype"_a, "values_stride_q"_a, "offsets"_a,
               "out"_a, "out_stride_q"_a, "Q"_a, "N"_a, "S"_a, "threads"_a,
               "values (Q,N), offsets (S+1) int64 -> out (Q,S). dtype: 0 float32, 2 float64.");
    module.def("squared_error_delta", squared_error_delta, unlocked, "p"_a, "p_dtype"_a, "p_stride_n"_a, "dp"_a,
               "dp_dtype"_a, "dp_stride_q"_a, "dp_stride_n"_a, "y"_a, "y_dtype"_a, "y_stride_n"_a, "base"_a, "delta"_a,
               "delta_stride_q"_a, "N"_a, "D"_a, "Q"_a, "threads"_a,
               "p, y (N,D), dp (Q,N,D) -> base (N), delta (Q,N) float32. dtype: 0 float32, 1 bfloat16.");
    module.def("topk_merge", topk_merge, unlocked, "values"_a, "indices"_a, "scores"_a, "scores_dtype"_a,
               "scores_stride_q"_a, "start"_a, "Q"_a, "K"_a, "S"_a, "threads"_a,
               "values, indices (Q,K) updated in place with scores (Q,S). dtype: 0 float32, 2 float64.");
    finf::bind_files(module);
    module.def("isa", [] { return finf::kernels().name; }, "The instruction set in use.");
    module.def("isas", isas, "The instruction sets this processor can run, best first.");
    module.def("build_info", build_info, "Compiler, version, and whether CUDA sources were built.");
}
