// What every instruction set offers: the table of loops, and the choice among the tables at first use.
#pragma once

#include <cfloat>
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

// sum e^(x - top), with top the largest x met so far or one not far below it, starting below every finite number but
// above -inf.
struct ScaledSum {
    float top;
    double sum;
};

// One query's change of a row, and what the loop finds out about it.
struct Change {
    const void* d;
    double u = 0;                // see numerics.h, scaled by e^-top of the row's sum
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

// Rows that a norm takes each step of one after another: what ends a row's sums, a chain of a hundred cycles and more,
// passes while the next row's begin. More than 4 KiB at a time would read and write memory in turns too long for it.
// Measured (Zen 5, one row and two): group norm of 1,024 bfloat16 70 and 83 % of copying; of 768 float32 97 and 91 %.
constexpr int64_t MOST_TOGETHER = 8;
inline int64_t rows_together(int64_t row_bytes) {
    const int64_t some = 4096 / (row_bytes < 1 ? 1 : row_bytes);
    return some < 1 ? 1 : some < MOST_TOGETHER ? some : MOST_TOGETHER;
}

// Room for a block of R rows, each buffer from the start of a cache line on.
struct NormScratch {
    float* c0;          // R vectors(D)
    float* sum;         // MOST_TOGETHER vectors(D), of changes and their residuals; zero at the start
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

// Numbers of a row that squared_error_delta takes at a time.
constexpr int64_t ERROR_BLOCK = 2048;

struct SquaredErrorLoops {
    // [type of p][type of y]: n <= ERROR_BLOCK numbers p - y into `gap`, to a whole number of vectors; the sum of
    // squares.
    double (*gap[2][2])(const void* p, const void* y, int64_t n, float* gap);
    // [type of d]: the sum of d (2 gap + d).
    double (*change[2])(const void* d, int64_t n, const float* gap);
};

// Rows that are multiplied with a panel at once, by whatever loops there are.
constexpr int64_t MOST_GROUP = 32;

// One way to multiply rows with a panel, which is some rows of a matrix W (n, D) packed so that the numbers that
// meet the same number of a row are neighbours. Packed rows and panels are made of units of 32 bits: a float32, or
// two bfloat16 where the processor multiplies these. Arrays are indexed by type: 0 = float32, 1 = bfloat16.
struct PanelLoops {
    int64_t width;    // a panel has a multiple of this many columns, those past n zero
    int64_t in_unit;  // numbers in a unit, 1 or 2; the last may be padded by a zero
    int64_t group;    // rows to be multiplied at once, at most MOST_GROUP; more than that gain nothing
    bool evenly;      // these lie as far from one another each
    // Leaves `centre` (D), which may be null, out of each row of W. Pairs take bfloat16 only, and no centre.
    void (*pack[2])(const void* W, int64_t stride, int64_t n, int64_t D, const float* centre, float* panel);
    // The same of a W that lies the other way, (D, n).
    void (*pack_turned[2])(const void* W, int64_t stride, int64_t n, int64_t D, float* panel);
    // Brings a row x of D numbers, or x + dx where dx is not null, into units.
    void (*stage[2])(const void* x, const void* dx, int64_t D, float* row);
    // out (rows, columns, filled up to whole vectors) = rows times panel, or added to what is there.
    void (*multiply)(const float* const* rows, int64_t count, int64_t units, const float* panel, int64_t columns,
                     float* out, int64_t out_stride, bool add);
    // n numbers of a row that was multiplied, and of `shift` where it is not null, rounded into `to`.
    void (*finish[2])(const float* row, const float* shift, int64_t n, void* to);
};

// What the loops of linear_cross_entropy_delta are told about a row of logits, or of changes, in one panel.
struct HeadRow {
    int64_t n, padded;   // columns, and with those that fill up the panel
    int64_t target;      // the column of its target, outside 0 to n - 1 where another panel has it
    float at_target;     // z_t or d_t
    float softcap;       // 0: none
    const float* shift;  // (padded) bias or its change, or null
    bool smoothing;
};

struct RowSums {
    ScaledSum rest = {-FLT_MAX, 0};  // see numerics.h
    double gaps = 0;                 // sum of z_v - z_t, where there is smoothing
};

struct ChangeSums {
    double u = 0;                // see numerics.h, scaled by the row's largest logit
    double moves = 0;            // sum of d_v - d_t, where there is smoothing
    float largest_step = 0;      // as in Change
    bool outgrew_short = false;  // as in Change
};

// Each takes one row of a panel. `raw` is where logits before the soft cap are kept; null without one.
struct HeadLoops {
    // Turns logits into e^(z - m), the target's into 0; returns what sums taken before have to be multiplied by.
    double (*values)(const HeadRow&, float* z, float* raw, RowSums&);
    // Takes changes and the e^(z - m) of the same columns.
    void (*changes)(const HeadRow&, float* d, const float* e, const float* raw, double rescale, ChangeSums&);
    // For large changes: turns logits into z - z_t, and adds e^(z - z_t + d - d_t) to a sum.
    void (*gaps)(const HeadRow&, float* z, float* raw);
    void (*after)(const HeadRow&, float* d, const float* gaps, const float* raw, ScaledSum&);
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
    // (S+1) from 0 to T, ascending, and T = Tk: rows cu_seqlens[i] to cu_seqlens[i+1] see keys of the same numbers
    // alone. Null: one segment.
    const int64_t* cu_seqlens;
    int64_t S;
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

// (x / 255 - mean) / std of a pixel x, for channels that take turns: as x gain + offset, rounded once, of bfloat16 two
// vectors at a time; or exactly, 1 / 255 and 1 / std being floats and what these leave. Every array holds the channels
// over and over: a period, and what whole vectors reach past it from any phase on.
struct PixelRule {
    static constexpr int64_t MOST_CHANNELS = 4, SIZE = 16 * MOST_CHANNELS + MOST_CHANNELS + 16;
    enum Way { PAIRS, ONE_STEP, EXACT };  // the first that gives the right bits: of bfloat16 the first mostly does
    int64_t period;                       // 16 numbers a channel
    Way way;
    float gain[SIZE], offset[SIZE];
    float scale[SIZE], scale_rest[SIZE], mean[SIZE], spread[SIZE], spread_rest[SIZE];
};

struct DeliveryLoops {
    // [finf::Stored]: `count` integers from any byte on -> int64.
    void (*widen[7])(const uint8_t* from, int64_t count, int64_t* to);
    // `count` pixels, of which the first is of channel `phase`.
    void (*shade_f32)(const uint8_t* from, int64_t count, const PixelRule&, int64_t phase, float* to);
    void (*shade_bf16)(const uint8_t* from, int64_t count, const PixelRule&, int64_t phase, Bf16* to);
};

// Scores that topk_merge looks at together: if none reaches the worst kept one, all are passed over.
constexpr int64_t GLANCE = 64;

struct TopKLoops {
    int64_t (*passed_over_f32)(const float* scores, int64_t count, float worst);
    int64_t (*passed_over_f64)(const double* scores, int64_t count, double worst);
};

struct Kernels {
    const char* name;
    const CrossEntropyLoops (*cross_entropy_delta)[2];  // [type of z][type of d]: 0 = float32, 1 = bfloat16
    // [type]: rows [begin, end).
    void (*const* norm_rows)(const NormRows&, int64_t begin, int64_t end, const NormScratch&);
    // [function][type]: numbers [begin, end) of every row, begin being a whole number of vectors.
    void (*const (*activate)[2])(const ActivationRows&, int64_t begin, int64_t end);
    const SquaredErrorLoops* squared_error_delta;
    const AttentionLoops* attention_delta;  // [type]
    const HeadLoops* head;
    const PanelLoops* panels;                            // of float32 units
    const PanelLoops* pairs;                             // of bfloat16 units, or null
    double (*flops_of_fma)(bool pairs, int64_t rounds);  // multiplies and adds in registers; how many there were
    // `count` normal numbers of a sample and draw, from position 4 `block` on.
    void (*noise_row)(uint64_t seed, uint64_t sample, uint32_t draw, int64_t block, int64_t count, float* out);
    const DeliveryLoops* delivery;
    const TopKLoops* topk_merge;
};

extern const Kernels BASELINE;
#if defined(__x86_64__) || defined(__i386__)
extern const Kernels AVX2;
extern const Kernels AVX512;
extern const Kernels AVX512_BF16;
#endif
#if defined(__x86_64__)
extern const Kernels AMX_BF16;
#endif

// Those this processor can run, best first; whether the system lets this process is asked where one is chosen.
const std::vector<const Kernels*>& available_kernels();

// The best one, or the one FINF_FORCE_ISA names; std::invalid_argument if that is unknown or cannot run here.
const Kernels& kernels();

}  // namespace finf
