// What every instruction set offers: the table of loops, and the choice among the tables at first use.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace finf {

struct Bf16 {
    uint16_t bits;
};

// One row as a loop sees it. `target` is a column of it.
struct Row {
    const void* z;
    int64_t V;
    int64_t target;
};

// sum e^(x - top), with top the largest x met so far, starting below every finite number but above -inf.
struct ScaledSum {
    float top;
    double sum;
};

// One query's change of a row, and what the loop finds out about it.
struct Change {
    const void* d;
    double u = 0;                // see numerics.h, scaled by the row's largest logit
    float largest_step = 0;      // largest d_v - d_t, exact once it has passed the reach of the short polynomial
    bool outgrew_short = false;  // some |d_v - d_t| has passed that reach
};

struct CrossEntropyLoops {
    // rest and the u of each change (numerics.h), in one pass over the row; all queries share the e^(z - m) of a block.
    ScaledSum (*sums)(const Row&, Change* changes, int64_t Q);
    // sum over v other than t of e^(z_v - z_t + d_v - d_t): the row after a large change.
    ScaledSum (*after)(const Row&, const Change&);
};

// The numbers of as many of the widest vectors as hold `count`: a buffer of this size can be used by whole vectors.
constexpr int64_t vectors(int64_t count) { return (count + 15) / 16 * 16; }

// A norm of N rows of D numbers and of Q changes of each, with its residual. Strides in numbers; a row, and every row
// of a result, lies side by side. Row n belongs to group n mod `groups`, which has a parameter for every `run` numbers
// of a row; parameters and their changes (Q, groups D / run) are float32. `dweight` and `dbias` are both there or none.
struct NormRows {
    const void* x;  // (1+Q, N, D), or (1, N, D) where it does not move
    int64_t x_stride_q, x_stride_n;
    bool x_moves;
    const void* residual;  // the same, or null
    int64_t residual_stride_q, residual_stride_n;
    bool residual_moves;
    const float *weight, *bias, *dweight, *dbias;
    void* y;    // (1+Q, N, D), written
    void* sum;  // written where there is a residual: (1+Q, N, D), or (1, N, D) if neither moves
    int64_t N, D, Q, groups, run;
    double eps;
    bool centred;
    bool past_cache;  // y and sum go past the cache, see Result in tiles/elements.inl.h
};

// A row's value as all its changes find it: centred, the sum of its squares, and the root of their mean plus eps.
struct NormValue {
    const float* c0;
    double squares, s0;
};

// Room for a block of R rows, each buffer from the start of a cache line on.
struct NormScratch {
    float* c0;          // R vectors(D)
    float* sum;         // vectors(D), of a change and its residual; zero at the start
    NormValue* values;  // R
};

// The functions that activation_delta knows, in the order of the loops.
constexpr const char* ACTIVATIONS[] = {"relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "quick_gelu"};

// M numbers, Q changes of each, and a gate that multiplies the result or is null. Strides in numbers; a row, and the
// whole result, lies side by side. What does not move has the value's row only.
struct ActivationRows {
    const void* x;  // (1+Q, M) or (1, M)
    int64_t x_stride_q;
    bool x_moves;
    const void* gate;  // the same, or null
    int64_t gate_stride_q;
    bool gate_moves;
    void* y;  // (1+Q, M), written
    int64_t M, Q;
    bool past_cache;  // y goes past the cache, see Result in tiles/elements.inl.h
};

// A stack of heads (1+Q, B, H, T, E), or (1, B, H, T, E) where it does not move. Strides in numbers; a row's E numbers
// lie side by side.
struct HeadStack {
    const void* first;
    int64_t stride_q, stride_b, stride_h, stride_t;
    bool moves;
};

// (B, H, T, Tk): a byte each, 0 where a row may not look, or a float32 each that is added; strides 0 where it is
// shared.
struct AttentionMask {
    const void* first;  // null: there is none
    bool boolean;
    int64_t stride_b, stride_h, stride_t, stride_k;
};

struct Attention {
    HeadStack q, k, v;  // of H, Hk and Hk heads, of T, Tk and Tk rows, of E, E and Ev numbers
    AttentionMask mask;
    void* y;  // (1+Q, B, H, T, Ev), side by side, written
    int64_t Q, B, H, Hk, T, Tk, E, Ev;
    float scale;
    float softcap;  // 0: there is none
    bool causal;
};

// Rows of queries that are worked on together: four of the widest vectors.
constexpr int64_t ATTENTION_ROWS = 64;
constexpr int64_t attention_blocks(const Attention& op) { return (op.T + ATTENTION_ROWS - 1) / ATTENTION_ROWS; }

struct AttentionLoops {
    int64_t (*room)(const Attention&);  // float32 numbers that `attend` needs, zeros at first
    // Blocks [begin, end) of B H attention_blocks(op), the last of a head first.
    void (*attend)(const Attention&, int64_t begin, int64_t end, float* room);
};

struct Kernels {
    const char* name;
    const CrossEntropyLoops (*cross_entropy_delta)[2];  // [type of z][type of d]: 0 = float32, 1 = bfloat16
    // [type]: rows [begin, end).
    void (*const* norm_rows)(const NormRows&, int64_t begin, int64_t end, const NormScratch&);
    // [function][type]: numbers [begin, end) of every row, begin being a whole number of vectors.
    void (*const (*activate)[2])(const ActivationRows&, int64_t begin, int64_t end);
    const AttentionLoops* attention_delta;  // [type]
};

extern const Kernels BASELINE;
#if defined(__x86_64__) || defined(__i386__)
extern const Kernels AVX2;
extern const Kernels AVX512;
#endif

// Those this processor can run, best first.
std::vector<const Kernels*> available_kernels();

// The best one, or the one FINF_FORCE_ISA names; std::invalid_argument if that is unknown or cannot run here.
const Kernels& kernels();

}  // namespace finf
