// What is done with a row of a panel's logits, or of their changes, while it is in the first-level cache; written once
// over Vec and included inside each instruction set's namespace, after gemm_panel.inl.h and cross_entropy_delta.inl.h.
//
// Rows are padded to a multiple of WIDTH. The target's column and the padding are overwritten so that they count for
// nothing: their logits by -inf, their changes by the target's. Sums are float32 inside a panel, double beyond.

// A row is walked three vectors at a time, each with sums of its own.
template <class Body>
FINF_INLINE void each_triple(int64_t padded, Body body) {
    for (int64_t v = 0; v < padded; v += WIDTH)
#pragma GCC unroll 3
        for (int j = 0; j < TILE_VECS; ++j) body(v + j * Vec::W, j);
}

FINF_INLINE Vec joined(const Vec (&sums)[TILE_VECS]) { return (sums[0] + sums[1]) + sums[2]; }
FINF_INLINE Vec highest(const Vec (&tops)[TILE_VECS]) { return max(max(tops[0], tops[1]), tops[2]); }

FINF_INLINE void put_aside(const HeadRow& row, float* y, float value) {
    if (row.target >= 0 && row.target < row.n) y[row.target] = value;
    for (int64_t v = row.n; v < row.padded; ++v) y[v] = value;
}

FINF_INLINE double sum_from_target(const HeadRow& row, const float* y) {
    Vec sums[TILE_VECS] = {Vec(0.0f), Vec(0.0f), Vec(0.0f)};
    each_triple(row.padded, [&](int64_t v, int j) __attribute__((always_inline)) {
        sums[j] = sums[j] + (load(y + v) - Vec(row.at_target));
    });
    return sum(joined(sums));
}

// 1 / (1 + e^-x): the numerator is 1 or e^x, so that nothing overflows and both tails keep their digits.
FINF_INLINE Vec sigmoid_of(Vec x) {
    return exp_of(Vec(0.0f) - max(Vec(0.0f), Vec(0.0f) - x)) / (Vec(1.0f) + exp_of(Vec(0.0f) - abs(x)));
}

// c tanh(z / c) of row z, with z kept in `raw`.
FINF_INLINE void cap(const HeadRow& row, float* z, float* raw) {
    const Vec c(row.softcap), twice(2.0f / row.softcap);
    each_triple(row.padded, [&](int64_t v, int) __attribute__((always_inline)) {
        const Vec before = load(z + v), shrunk = expm1_of(Vec(0.0f) - abs(before * twice));
        store(raw + v, before);
        store(z + v, copy_sign(c * shrunk / (Vec(2.0f) + shrunk), before));
    });
}

// By how much c tanh(z / c) moves where z moves by d: softcap_change of numerics.h.
FINF_INLINE void cap_changes(const HeadRow& row, float* d, const float* raw) {
    const Vec c(2.0f * row.softcap), twice(2.0f / row.softcap);
    each_triple(row.padded, [&](int64_t v, int) __attribute__((always_inline)) {
        const Vec y = load(raw + v) * twice, e = load(d + v) * twice, y1 = y + e;
        const Vec up = max(y, y1), down = max(Vec(0.0f) - y, Vec(0.0f) - y1);  // the upper end, and minus the lower
        const Vec size = expm1_of(Vec(0.0f) - abs(e)) * sigmoid_of(up) * sigmoid_of(down);
        store(d + v, copy_sign(c * size, e));
    });
}

FINF_INLINE void shift_row(const HeadRow& row, float* y) {
    each_triple(row.padded, [&](int64_t v, int)
                                __attribute__((always_inline)) { store(y + v, load(y + v) + load(row.shift + v)); });
}

FINF_INLINE float largest_of(const float* y, int64_t padded) {
    Vec tops[TILE_VECS] = {Vec(-FLT_MAX), Vec(-FLT_MAX), Vec(-FLT_MAX)};
    each_triple(padded, [&](int64_t v, int j) __attribute__((always_inline)) { tops[j] = max(tops[j], load(y + v)); });
    return top(highest(tops));
}

// Puts e^(y - m) in the place of y and returns their sum.
FINF_INLINE float put_exponentials(float* y, int64_t padded, float m) {
    Vec sums[TILE_VECS] = {Vec(0.0f), Vec(0.0f), Vec(0.0f)};
    each_triple(padded, [&](int64_t v, int j) __attribute__((always_inline)) {
        const Vec e = exp_of(load(y + v) - Vec(m));
        store(y + v, e);
        sums[j] = sums[j] + e;
    });
    return sum(joined(sums));
}

// As `absorb`, for a row that holds no column to be left out.
FINF_INLINE double absorb_row(ScaledSum& total, float* y, int64_t padded) {
    const float most = largest_of(y, padded);
    double rescale = 1.0;
    if (most > total.top) {
        rescale = total.sum == 0 ? 0.0 : exp(static_cast<double>(total.top) - most);
        total.top = most;
    }
    total.sum = total.sum * rescale + put_exponentials(y, padded, total.top);
    return rescale;
}

FINF_INLINE void finish_values(const HeadRow& row, float* z, float* raw) {
    if (row.shift) shift_row(row, z);
    if (row.softcap > 0) cap(row, z, raw);
}

FINF_INLINE void finish_changes(const HeadRow& row, float* d, const float* raw) {
    if (row.shift) shift_row(row, d);
    if (row.softcap > 0) cap_changes(row, d, raw);
    put_aside(row, d, row.at_target);
}

double head_values(const HeadRow& row, float* z, float* raw, RowSums& sums) {
    finish_values(row, z, raw);
    if (row.smoothing) {
        put_aside(row, z, row.at_target);
        sums.gaps += sum_from_target(row, z);
    }
    put_aside(row, z, -HUGE_VALF);
    return absorb_row(sums.rest, z, row.padded);
}

template <bool SHORT>
FINF_INLINE BlockChange row_change(const HeadRow& row, const float* d, const float* e) {
    const Vec d_t(row.at_target);
    Vec u[TILE_VECS] = {Vec(0.0f), Vec(0.0f), Vec(0.0f)};
    Vec largest[TILE_VECS] = {Vec(-FLT_MAX), Vec(-FLT_MAX), Vec(-FLT_MAX)};
    each_triple(row.padded, [&](int64_t v, int j) __attribute__((always_inline)) {
        add_change<SHORT>(load(d + v), load(e + v), d_t, u[j], largest[j]);
    });
    return {sum(joined(u)), top(highest(largest))};
}

void head_changes(const HeadRow& row, float* d, const float* e, const float* raw, double rescale, ChangeSums& sums) {
    finish_changes(row, d, raw);
    if (row.smoothing) sums.moves += sum_from_target(row, d);
    sums.u *= rescale;
    if (!sums.outgrew_short) {
        const BlockChange quick = row_change<true>(row, d, e);
        if (quick.largest <= SHORT_REACH) {
            sums.u += quick.u;
            return;
        }
        sums.outgrew_short = true;
    }
    const BlockChange whole = row_change<false>(row, d, e);
    if (whole.largest > sums.largest_step) sums.largest_step = whole.largest;
    sums.u += whole.u;
}

void head_gaps(const HeadRow& row, float* z, float* raw) {
    finish_values(row, z, raw);
    each_triple(row.padded,
                [&](int64_t v, int) __attribute__((always_inline)) { store(z + v, load(z + v) - Vec(row.at_target)); });
    put_aside(row, z, -HUGE_VALF);
}

void head_after(const HeadRow& row, float* d, const float* gaps, const float* raw, ScaledSum& total) {
    finish_changes(row, d, raw);
    each_triple(row.padded, [&](int64_t v, int) __attribute__((always_inline)) {
        store(d + v, load(gaps + v) + (load(d + v) - Vec(row.at_target)));
    });
    absorb_row(total, d, row.padded);
}

const finf::HeadLoops HEAD = {head_values, head_changes, head_gaps, head_after};
