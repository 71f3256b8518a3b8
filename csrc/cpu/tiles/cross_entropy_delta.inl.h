// The loops of cross_entropy_delta, written once over Vec and included inside each instruction set's namespace.
//
// A row is taken in blocks that stay in the first-level cache: e^(z - m) into a buffer, then the buffer's sum, then for
// every query the sum of buffer times expm1(d - d_t). m is the first block's largest logit, and that of a later block
// which goes beyond it by more than float32 has room for. The target's own column
// is zeroed in the buffer and so counts nowhere. Sums are float32 inside a block and double from block to block, so
// their error does not grow with V.

#include "elements.inl.h"
#include "exponentials.inl.h"

// Columns of a block: its z, d and buffer are 24 KiB of a first-level cache of 32 or 48. The next block is fetched
// meanwhile. One length whatever the number of queries, since a query's last bits depend on it.
constexpr int64_t BLOCK = 2048;
// Partial sums side by side: they hide the latency of an addition and shorten each sum's chain.
constexpr int LANES = 4;
constexpr int64_t STRIDE = LANES * Vec::W;

FINF_INLINE float lowest(float) { return -FLT_MAX; }
FINF_INLINE Bf16 lowest(Bf16) { return Bf16{0xff7f}; }

template <class T>
FINF_INLINE float block_top(const T* z, int64_t n) {
    Vec best[LANES];
    for (Vec& b : best) b = Vec(-FLT_MAX);
    int64_t v = 0;
    for (; v + STRIDE <= n; v += STRIDE)
        for (int k = 0; k < LANES; ++k) best[k] = max(best[k], load(z + v + k * Vec::W));
    for (; v < n; v += Vec::W) best[0] = max(best[0], load_up_to(z + v, n - v, lowest(T())));
    return top(max(max(best[0], best[1]), max(best[2], best[3])));
}

// e[v] = e^(z[v] - m), and zeros up to a whole number of vectors; returns the largest z.
template <class T>
FINF_INLINE float block_exponentials(const T* z, int64_t n, float m, float* e) {
    Vec best[LANES];
    for (Vec& b : best) b = Vec(-FLT_MAX);
    const auto put_one = [&](Vec& highest, int64_t v, int64_t count) FINF_LAMBDA {
        fetch(z + v, BLOCK);
        const Vec x = load_up_to(z + v, count, lowest(T()));
        highest = max(highest, x);
        store(e + v, exp_of(x - Vec(m)));
    };
    int64_t v = 0;
    for (; v + STRIDE <= n; v += STRIDE)
        for (int k = 0; k < LANES; ++k) put_one(best[k], v + k * Vec::W, int64_t{Vec::W});
    for (; v < n; v += Vec::W) put_one(best[0], v, n - v);
    for (; n < v; ++n) e[n] = 0.0f;
    return top(max(max(best[0], best[1]), max(best[2], best[3])));
}

FINF_INLINE float block_sum(const float* e, int64_t n) {
    Vec total[LANES];
    for (Vec& t : total) t = Vec(0.0f);
    int64_t v = 0;
    for (; v + STRIDE <= n; v += STRIDE)
        for (int k = 0; k < LANES; ++k) total[k] = total[k] + load(e + v + k * Vec::W);
    for (; v < n; v += Vec::W) total[0] = total[0] + load(e + v);
    return sum((total[0] + total[1]) + (total[2] + total[3]));
}

struct BlockChange {
    float u;
    float largest;  // of |d - d_t| where SHORT, of d - d_t where not
};

template <bool SHORT>
FINF_INLINE void add_change(Vec d, Vec e, Vec d_t, Vec& u, Vec& largest) {
    const Vec step = d - d_t;
    largest = max(largest, SHORT ? abs(step) : step);
    u = fma(e, SHORT ? short_expm1_of(step) : expm1_of(step), u);
}

template <bool SHORT, class T>
FINF_INLINE BlockChange block_change(const T* d, const float* e, int64_t n, T at_target) {
    const Vec d_t(to_float(at_target));
    Vec u[LANES], largest[LANES];
    for (int k = 0; k < LANES; ++k) {
        u[k] = Vec(0.0f);
        largest[k] = Vec(-FLT_MAX);
    }
    int64_t v = 0;
    for (; v + STRIDE <= n; v += STRIDE)
        for (int k = 0; k < LANES; ++k) {
            fetch(d + v + k * Vec::W, BLOCK);
            add_change<SHORT>(load(d + v + k * Vec::W), load(e + v + k * Vec::W), d_t, u[k], largest[k]);
        }
    for (; v < n; v += Vec::W) {
        fetch(d + v, BLOCK);
        add_change<SHORT>(load_up_to(d + v, n - v, at_target), load(e + v), d_t, u[0], largest[0]);
    }
    return {sum((u[0] + u[1]) + (u[2] + u[3])), top(max(max(largest[0], largest[1]), max(largest[2], largest[3])))};
}

// How far a block may go beyond m: times the largest expm1 that counts, e^40, and the columns of a row, e^20 is far
// from float32's end.
constexpr float ROOM = 20.0f;

// Adds a block of x to a running sum of e^(x - top), leaving e^(x - top) in `e` with column `left_out` zeroed.
// Returns what sums taken before have to be multiplied by: 1 unless the block brought another top.
template <class T>
FINF_INLINE double absorb(ScaledSum& total, const T* x, int64_t n, int64_t left_out, float* e) {
    double rescale = 1.0;
    const bool nothing_yet = total.top == -FLT_MAX;  // or nothing but the lowest number there is
    if (nothing_yet) {
        total.top = block_top(x, n);
        if (total.top > -FLT_MAX) rescale = 0.0;
    }
    const float highest = block_exponentials(x, n, total.top, e);
    if (!nothing_yet && highest > total.top + ROOM) {
        rescale = exp(static_cast<double>(total.top) - highest);
        total.top = highest;
        block_exponentials(x, n, highest, e);
    }
    if (left_out >= 0 && left_out < n) e[left_out] = 0.0f;
    total.sum = total.sum * rescale + block_sum(e, n);
    return rescale;
}

// Most changes are small and need the short polynomial only; a row that has shown a larger one keeps to the long one.
template <class T>
FINF_INLINE double change_of_block(Change& change, const T* d, int64_t n, T at_target, const float* e) {
    if (!change.outgrew_short) {
        const BlockChange quick = block_change<true>(d, e, n, at_target);
        if (quick.largest <= SHORT_REACH) return quick.u;
        change.outgrew_short = true;
    }
    const BlockChange block = block_change<false>(d, e, n, at_target);
    if (block.largest > change.largest_step) change.largest_step = block.largest;
    return block.u;
}

template <class Z, class D>
ScaledSum row_sums(const Row& row, Change* changes, int64_t Q) {
    alignas(64) float e[BLOCK];
    ScaledSum rest = {-FLT_MAX, 0.0};
    for (int64_t v = 0; v < row.V; v += BLOCK) {
        const int64_t n = row.V - v < BLOCK ? row.V - v : BLOCK;
        const double rescale = absorb(rest, static_cast<const Z*>(row.z) + v, n, row.target - v, e);
        for (int64_t q = 0; q < Q; ++q) {
            const D* d = static_cast<const D*>(changes[q].d);
            changes[q].u = changes[q].u * rescale + change_of_block(changes[q], d + v, n, d[row.target], e);
        }
    }
    return rest;
}

// Each difference is taken first: at an offset of 1e4 the sum z + d would have lost the change.
template <class Z, class D>
FINF_INLINE void block_gaps(const Z* z, const D* d, int64_t n, Vec z_t, Vec d_t, float* gap) {
    for (int64_t v = 0; v < n; v += Vec::W) {
        const Vec before = load_up_to(z + v, n - v, Z{}) - z_t;
        store(gap + v, before + (load_up_to(d + v, n - v, D{}) - d_t));
    }
}

template <class Z, class D>
ScaledSum row_after(const Row& row, const Change& change) {
    const Z* z = static_cast<const Z*>(row.z);
    const D* d = static_cast<const D*>(change.d);
    const Vec z_t(to_float(z[row.target])), d_t(to_float(d[row.target]));
    alignas(64) float gap[BLOCK], e[BLOCK];
    ScaledSum total = {-FLT_MAX, 0.0};
    for (int64_t v = 0; v < row.V; v += BLOCK) {
        const int64_t n = row.V - v < BLOCK ? row.V - v : BLOCK;
        block_gaps(z + v, d + v, n, z_t, d_t, gap);
        absorb(total, gap, n, row.target - v, e);
    }
    return total;
}

const finf::CrossEntropyLoops CROSS_ENTROPY_DELTA[2][2] = {
    {{row_sums<float, float>, row_after<float, float>}, {row_sums<float, Bf16>, row_after<float, Bf16>}},
    {{row_sums<Bf16, float>, row_after<Bf16, float>}, {row_sums<Bf16, Bf16>, row_after<Bf16, Bf16>}},
};
