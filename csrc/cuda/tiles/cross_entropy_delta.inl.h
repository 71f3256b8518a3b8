// The row of cross_entropy_delta, written once over Group; formulas and letters as in numerics.h.
//
// A lane takes eight columns of z and of each of its queries' changes at a time, and keeps its own running maximum, so
// that lanes meet only at the end of the row. The target's column is weighted by zero and so counts nowhere. A lane's
// sums are float32: eight terms join before they are added to it, which keeps its chain short; lanes join in double.
#pragma once

#include <cfloat>
#include <cmath>

#include "../cross_entropy_delta.h"
#include "../elements.h"
#include "../group.h"

namespace finf::cuda {

// Up to here the polynomial below is e^x - 1 to 8.5e-8; it is the one of the CPU's loops.
constexpr float SHORT_REACH = 0.25f;

FINF_ROW float short_expm1(float x) {
    float p = fmaf(0.00833333004f, x, 0.04177515209f);
    p = fmaf(p, x, 0.16666738689f);
    p = fmaf(p, x, 0.49999826127f);
    return x * fmaf(p, x, 1.0f);
}

FINF_ROW float top_of(const float (&x)[COLUMNS]) {
    return fmaxf(fmaxf(fmaxf(x[0], x[4]), fmaxf(x[2], x[6])), fmaxf(fmaxf(x[1], x[5]), fmaxf(x[3], x[7])));
}

// What a lane has summed of its columns, e^(z - m) scaled by its own m; the sums of z and d serve label smoothing.
template <int QUERIES>
struct LaneSums {
    float m = -FLT_MAX, rest = 0, gaps = 0;
    float u[QUERIES] = {}, moves[QUERIES] = {}, largest_step[QUERIES] = {};
};

// Turns eight logits into e^(z - m), the target's into 0. A larger m scales what was summed before.
template <int QUERIES>
FINF_ROW void take_values(float (&z)[COLUMNS], int64_t to_target, LaneSums<QUERIES>& lane) {
    const float top = top_of(z);
    if (top > lane.m) {
        const float rescale = expf(lane.m - top);
        lane.m = top;
        lane.rest *= rescale;
        FINF_UNROLL
        for (int q = 0; q < QUERIES; ++q) lane.u[q] *= rescale;
    }
    for (int i = 0; i < COLUMNS; ++i) z[i] = expf(z[i] - lane.m);
    if (to_target >= 0 && to_target < COLUMNS)
        for (int i = 0; i < COLUMNS; ++i) z[i] = i == to_target ? 0.0f : z[i];
    lane.rest += joined(z);
}

// Most changes are small and need the short polynomial only.
FINF_ROW float take_changes(const float (&e)[COLUMNS], const float (&d)[COLUMNS], float d_t, float& largest_step) {
    float reach = 0, term[COLUMNS];
    for (int i = 0; i < COLUMNS; ++i) reach = fmaxf(reach, fabsf(d[i] - d_t));
    if (reach <= SHORT_REACH) {
        for (int i = 0; i < COLUMNS; ++i) term[i] = e[i] * short_expm1(d[i] - d_t);
    } else {
        for (int i = 0; i < COLUMNS; ++i) {
            largest_step = fmaxf(largest_step, d[i] - d_t);
            term[i] = e[i] * expm1f(d[i] - d_t);
        }
    }
    return joined(term);
}

// Sum of x - anchor over the columns that are there: those of a row's ends may not be.
FINF_ROW float gaps_of(const float (&x)[COLUMNS], float anchor, int64_t v, int64_t V) {
    float gap[COLUMNS];
    for (int i = 0; i < COLUMNS; ++i) gap[i] = v + i >= 0 && v + i < V ? x[i] - anchor : 0.0f;
    return joined(gap);
}

// What z_t or d_t is measured from where all columns are summed: itself, unless it is infinite.
FINF_ROW float anchor_of(float at_target) { return fabsf(at_target) <= FLT_MAX ? at_target : 0.0f; }

// One row and up to QUERIES of its changes, from query `first` on; `n` is a row that is not ignored.
template <int QUERIES, class Z, class D, class Group>
struct CrossEntropyRow {
    const CrossEntropyDelta& op;
    const Group& group;
    int64_t n, first, t;
    const Z* z;
    float z_t;

    FINF_ROW CrossEntropyRow(const CrossEntropyDelta& op, const Group& group, int64_t n, int64_t first)
        : op(op), group(group), n(n), first(first), t(op.target[n]) {
        z = static_cast<const Z*>(op.z) + n * op.z_stride;
        z_t = to_float(z[t]);
    }

    FINF_ROW const D* change(int q) const {
        return static_cast<const D*>(op.dz) + (first + q) * op.dz_stride_q + n * op.dz_stride_n;
    }
    FINF_ROW bool has(int q) const { return first + q < op.Q; }

    FINF_ROW void sums(LaneSums<QUERIES>& lane) const {
        const int start = phase(z);
        const float z_anchor = anchor_of(z_t);
        for (int64_t v = group.rank() * COLUMNS - start; v < op.V; v += group.size() * COLUMNS) {
            float e[COLUMNS];
            load_columns(z, v, op.V, true, -HUGE_VALF, e);
            if (op.label_smoothing != 0) lane.gaps += gaps_of(e, z_anchor, v, op.V);
            take_values(e, t - v, lane);
            FINF_UNROLL
            for (int q = 0; q < QUERIES; ++q) {
                if (!has(q)) break;
                float d[COLUMNS];
                const D* row = change(q);
                const float d_t = to_float(row[t]);
                load_columns(row, v, op.V, fits(row, start), d_t, d);
                lane.u[q] += take_changes(e, d, d_t, lane.largest_step[q]);
                if (op.label_smoothing != 0) lane.moves[q] += gaps_of(d, anchor_of(d_t), v, op.V);
            }
        }
    }

    // g1 of large_change. Each difference is taken first: at an offset of 1e4 the sum z + d would have lost the change.
    FINF_ROW double after(int q) const {
        const D* row = change(q);
        const float d_t = to_float(row[t]);
        const int start = phase(z);
        LaneSums<1> lane;
        for (int64_t v = group.rank() * COLUMNS - start; v < op.V; v += group.size() * COLUMNS) {
            float gap[COLUMNS], d[COLUMNS];
            load_columns(z, v, op.V, true, -HUGE_VALF, gap);
            load_columns(row, v, op.V, fits(row, start), d_t, d);
            for (int i = 0; i < COLUMNS; ++i) gap[i] = (gap[i] - z_t) + (d[i] - d_t);
            take_values(gap, t - v, lane);
        }
        const float top = group.max(lane.m);
        return log(group.sum(static_cast<double>(lane.rest) * exp(static_cast<double>(lane.m) - top))) + top;
    }

    FINF_ROW double smoothing(float at_target, float sum_of_gaps) const {
        if (op.label_smoothing == 0) return 0;
        const double mean = group.sum(static_cast<double>(sum_of_gaps)) / static_cast<double>(op.V);
        return smoothing_term(op.label_smoothing, static_cast<double>(at_target) - anchor_of(at_target), mean);
    }

    FINF_ROW double change_of_loss(int q, double rest, double u, float m, float largest_step) const {
        const double gap = static_cast<double>(z_t) - m, s = rest + exp(gap);
        if (is_small_change(u, s, largest_step)) return small_change(u, s);
        return large_change(log(rest) - gap, after(q));
    }

    FINF_ROW void score() const {
        LaneSums<QUERIES> lane;
        sums(lane);
        const float m = group.max(lane.m);
        const double scale = exp(static_cast<double>(lane.m) - m), rest = group.sum(lane.rest * scale);
        const double base = loss_of_sums(rest, static_cast<double>(m), static_cast<double>(z_t));
        const double smoothed = base + smoothing(z_t, lane.gaps);
        if (group.rank() == 0 && first == 0) op.base[n] = static_cast<float>(smoothed);
        FINF_UNROLL
        for (int q = 0; q < QUERIES; ++q) {
            if (!has(q)) break;
            const double u = group.sum(lane.u[q] * scale);
            const double delta = change_of_loss(q, rest, u, m, group.max(lane.largest_step[q])) +
                                 smoothing(to_float(change(q)[t]), lane.moves[q]);
            if (group.rank() == 0) op.delta[(first + q) * op.delta_stride_q + n] = static_cast<float>(delta);
        }
    }
};

// A row without a target counts for nothing.
template <int QUERIES, class Group>
FINF_ROW void ignore_row(const CrossEntropyDelta& op, const Group& group, int64_t n, int64_t first) {
    if (group.rank() != 0) return;
    if (first == 0) op.base[n] = 0.0f;
    for (int64_t q = first; q < first + QUERIES && q < op.Q; ++q) op.delta[q * op.delta_stride_q + n] = 0.0f;
}

template <int QUERIES, class Z, class D, class Group>
FINF_ROW void score_row(const CrossEntropyDelta& op, const Group& group, int64_t n, int64_t first) {
    if (op.target[n] == op.ignore_index) {
        ignore_row<QUERIES>(op, group, n, first);
    } else {
        CrossEntropyRow<QUERIES, Z, D, Group>(op, group, n, first).score();
    }
}

}  // namespace finf::cuda
