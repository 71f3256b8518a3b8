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

struct Kernels {
    const char* name;
    const CrossEntropyLoops (*cross_entropy_delta)[2];  // [type of z][type of d]: 0 = float32, 1 = bfloat16
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
