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

// Rows multiplied with a panel at once.
constexpr int64_t GROUP = 8;

// One way to multiply rows with a panel, which is some rows of a matrix W (n, D) packed so that the numbers that meet
// the same number of a row are neighbours. Packed rows and panels are made of units of 32 bits: a float32, or two
// bfloat16 where the processor multiplies these. Arrays are indexed by type: 0 = float32, 1 = bfloat16.
struct PanelLoops {
    int64_t width;    // a panel has a multiple of this many columns, those past n zero
    int64_t in_unit;  // numbers in a unit, 1 or 2; the last may be padded by a zero
    // Leaves `centre` (D), which may be null, out of each row of W. Pairs take bfloat16 only, and no centre.
    void (*pack[2])(const void* W, int64_t stride, int64_t n, int64_t D, const float* centre, float* panel);
    // Brings a row x of D numbers, or x + dx where dx is not null, into units.
    void (*stage[2])(const void* x, const void* dx, int64_t D, float* row);
    // out (rows, columns) = rows times panel, or added to what is there.
    void (*multiply)(const float* const* rows, int64_t count, int64_t units, const float* panel, int64_t columns,
                     float* out, int64_t out_stride, bool add);
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

struct Kernels {
    const char* name;
    const CrossEntropyLoops (*cross_entropy_delta)[2];  // [type of z][type of d]: 0 = float32, 1 = bfloat16
    const HeadLoops* head;
    const PanelLoops* panels;                            // of float32 units
    const PanelLoops* pairs;                             // of bfloat16 units, or null
    double (*flops_of_fma)(bool pairs, int64_t rounds);  // multiplies and adds in registers; how many there were
};

extern const Kernels BASELINE;
#if defined(__x86_64__) || defined(__i386__)
extern const Kernels AVX2;
extern const Kernels AVX512;
extern const Kernels AVX512_BF16;
#endif

// Those this processor can run, best first.
std::vector<const Kernels*> available_kernels();

// The best one, or the one FINF_FORCE_ISA names; std::invalid_argument if that is unknown or cannot run here.
const Kernels& kernels();

}  // namespace finf
