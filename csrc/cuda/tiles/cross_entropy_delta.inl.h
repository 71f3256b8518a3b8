// The row of cross_entropy_delta, written once over Group; formulas and letters as in numerics.h.
//
// A lane takes eight columns of z and of each of its queries' changes at a time, and keeps its own running maximum, so
// that lanes meet only at the end of the row. The target's column is weighted by zero and so counts nowhere. A lane's
// sums are float32: eight terms join before they are added to it, which keeps its chain short; lanes join in double,
// and so do the parts of a long row, which are groups of their own.
#pragma once

#include <cfloat>
#include <cmath>

#include "../cross_entropy_delta.h"
#include "../elements.h"
#include "../group.h"
#include "../splits.h"

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

// What has been summed of some columns, e^(z - m) scaled by their own m; the sums of z and d serve label smoothing.
template <int QUERIES, class T>
struct Sums {
    T rest, gaps, u[QUERIES], moves[QUERIES];
    float m, largest_step[QUERIES];

    FINF_ROW static Sums nothing() {
        Sums sums = {};
        sums.m = -FLT_MAX;
        return sums;
    }
};
template <int QUERIES>
using LaneSums = Sums<QUERIES, float>;
template <int QUERIES>
using PartSums = Sums<QUERIES, double>;

// Turns eight logits into e^(z - m), the target's into 0. A larger m scales what was summed before.
template <int QUERIES>
FINF_ROW void take_values(float (&z)[COLUMNS], int to_target, LaneSums<QUERIES>& lane) {
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
FINF_ROW float gaps_of(const float (&x)[COLUMNS], float anchor, int v, int V) {
    float gap[COLUMNS];
    for (int i = 0; i < COLUMNS; ++i) gap[i] = v + i >= 0 && v + i < V ? x[i] - anchor : 0.0f;
    return joined(gap);
}

// What z_t or d_t is measured from where all columns are summed: itself, unless it is infinite.
FINF_ROW float anchor_of(float at_target) { return fabsf(at_target) <= FLT_MAX ? at_target : 0.0f; }

// Rounds that a part of a row should have: with one, nothing would be asked for while another is computed.
constexpr int64_t LEAST_ROUNDS = 2;

template <int QUERIES>
Splits cross_entropy_delta_splits_of(int64_t multiprocessors, int64_t N, int64_t V, int64_t Q) {
    const int64_t pieces = N * tiles_of<QUERIES>(Q), most = V / (LEAST_ROUNDS * ROW_THREADS * COLUMNS);
    return splits_of(pieces, most, multiprocessors, sizeof(PartSums<QUERIES>));
}

inline Splits cross_entropy_delta_splits(int64_t multiprocessors, int64_t N, int64_t V, int64_t Q) {
    return (Q > 1 ? cross_entropy_delta_splits_of<TOGETHER> : cross_entropy_delta_splits_of<1>)(multiprocessors, N, V,
                                                                                                Q);
}

template <int QUERIES>
FINF_ROW PartSums<QUERIES>* parts_of(const CrossEntropyDelta& op, int64_t n, int64_t first) {
    const int64_t tiles = tiles_of<QUERIES>(op.Q);
    return static_cast<PartSums<QUERIES>*>(op.parts) + (n * tiles + first / QUERIES) * op.splits;
}

// One row and up to QUERIES of its changes, from query `first` on; `n` is a row that is not ignored.
template <int QUERIES, class Z, class D, class Group>
struct CrossEntropyRow {
    const CrossEntropyDelta& op;
    const Group& group;
    int64_t n, first;
    int queries, t, V;
    const Z* z;
    const D* d;
    float z_t;

    FINF_ROW CrossEntropyRow(const CrossEntropyDelta& op, const Group& group, int64_t n, int64_t first)
        : op(op),
          group(group),
          n(n),
          first(first),
          queries(count_of(op.Q - first)),
          t(static_cast<int>(op.target[n])),
          V(static_cast<int>(op.V)) {
        z = static_cast<const Z*>(op.z) + n * op.z_stride;
        d = static_cast<const D*>(op.dz) + first * op.dz_stride_q + n * op.dz_stride_n;
        z_t = to_float(z[t]);
    }

    FINF_ROW const D* change(int q) const { return d + q * op.dz_stride_q; }
    FINF_ROW static int count_of(int64_t left) { return static_cast<int>(left < QUERIES ? left : QUERIES); }
    FINF_ROW bool has(int q) const { return q < queries; }

    FINF_ROW void take_z(float (&e)[COLUMNS], int v, LaneSums<QUERIES>& lane) const {
        if (op.label_smoothing != 0) lane.gaps += gaps_of(e, anchor_of(z_t), v, V);
        take_values(e, t - v, lane);
    }
    FINF_ROW void take_d(const float (&e)[COLUMNS], const float (&d)[COLUMNS], float d_t, int v, int q,
                         LaneSums<QUERIES>& lane) const {
        lane.u[q] += take_changes(e, d, d_t, lane.largest_step[q]);
        if (op.label_smoothing != 0) lane.moves[q] += gaps_of(d, anchor_of(d_t), v, V);
    }

    // Whether 16-byte loads fit the changes where they fit z.
    FINF_ROW bool all_fit() const {
        bool fit = true;
        for (int q = 0; q < QUERIES && has(q); ++q) fit = fit && fits(change(q), phase(z));
        return fit;
    }

    // The columns from v on, at any address.
    FINF_ROW void take_any(int v, const float (&d_t)[QUERIES], LaneSums<QUERIES>& lane) const {
        float e[COLUMNS];
        load_columns(z, v, V, true, -HUGE_VALF, e);
        take_z(e, v, lane);
        FINF_UNROLL
        for (int q = 0; q < QUERIES; ++q) {
            if (!has(q)) break;
            float d[COLUMNS];
            const D* row = change(q);
            load_columns(row, v, V, fits(row, phase(z)), d_t[q], d);
            take_d(e, d, d_t[q], v, q, lane);
        }
    }

    // From v on every `step` columns, as long as all eight are there; 16-byte loads fit. What a round needs has been
    // asked for by the one before, as soon as that had taken its own; the last asks for its own again.
    FINF_ROW int take_aligned(int v, int step, const float (&d_t)[QUERIES], LaneSums<QUERIES>& lane) const {
        Packed<Z> z_ahead = load_aligned(z + v);
        Packed<D> d_ahead[QUERIES];
        FINF_UNROLL
        for (int q = 0; q < QUERIES; ++q) {
            if (!has(q)) break;
            d_ahead[q] = load_aligned(change(q) + v);
        }
        for (; has_all(v); v += step) {
            const int next = has_all(v + step) ? v + step : v;
            float e[COLUMNS];
            unpack(z_ahead, e);
            z_ahead = load_aligned(z + next);
            take_z(e, v, lane);
            FINF_UNROLL
            for (int q = 0; q < QUERIES; ++q) {
                if (!has(q)) break;
                float d[COLUMNS];
                unpack(d_ahead[q], d);
                d_ahead[q] = load_aligned(change(q) + next);
                take_d(e, d, d_t[q], v, q, lane);
            }
        }
        return v;
    }
    FINF_ROW bool has_all(int v) const { return v >= 0 && v + COLUMNS <= V; }

    FINF_ROW int first_column(Part part) const {
        return (part.rank * group.size() + group.rank()) * COLUMNS - phase(z);
    }

    FINF_ROW void take_columns(Part part, LaneSums<QUERIES>& lane) const {
        float d_t[QUERIES];
        FINF_UNROLL
        for (int q = 0; q < QUERIES; ++q) d_t[q] = has(q) ? to_float(change(q)[t]) : 0.0f;
        const bool fit = all_fit();
        const int step = part.size * group.size() * COLUMNS;
        for (int v = first_column(part); v < V;) {
            if (fit && has_all(v)) {
                v = take_aligned(v, step, d_t, lane);
            } else {
                take_any(v, d_t, lane);
                v += step;
            }
        }
    }

    template <class T>
    FINF_ROW void put(T x, T& to) const {
        if (group.rank() == 0) to = x;
    }

    // `next`, whose m is no larger than `to.m`, added to it.
    template <class T>
    FINF_ROW void add(const Sums<QUERIES, T>& next, PartSums<QUERIES>& to) const {
        const double scale = exp(static_cast<double>(next.m) - to.m);
        to.rest += next.rest * scale;
        to.gaps += next.gaps;
        FINF_UNROLL
        for (int q = 0; q < QUERIES; ++q) {
            if (!has(q)) break;
            to.u[q] += next.u[q] * scale;
            to.moves[q] += next.moves[q];
            to.largest_step[q] = fmaxf(to.largest_step[q], next.largest_step[q]);
        }
    }

    // Sums of all lanes together to where every lane can read them: held by each, they would cost too many registers.
    FINF_ROW void join_lanes(const PartSums<QUERIES>& lane, PartSums<QUERIES>& to) const {
        put(lane.m, to.m);
        put(group.sum(lane.rest), to.rest);
        put(op.label_smoothing != 0 ? group.sum(lane.gaps) : 0.0, to.gaps);
        FINF_UNROLL
        for (int q = 0; q < QUERIES; ++q) {
            if (!has(q)) break;
            put(group.sum(lane.u[q]), to.u[q]);
            put(op.label_smoothing != 0 ? group.sum(lane.moves[q]) : 0.0, to.moves[q]);
            put(group.max(lane.largest_step[q]), to.largest_step[q]);
        }
        group.sync();
    }

    // Of a part's columns.
    FINF_ROW void sum(Part part, PartSums<QUERIES>& to) const {
        auto lane = LaneSums<QUERIES>::nothing();
        take_columns(part, lane);
        PartSums<QUERIES> scaled = {};
        scaled.m = group.max(lane.m);
        add(lane, scaled);
        join_lanes(scaled, to);
    }

    // Of all parts, whose sums lie side by side.
    FINF_ROW void join_parts(const PartSums<QUERIES>* parts, PartSums<QUERIES>& to) const {
        auto lane = PartSums<QUERIES>::nothing();
        for (int64_t i = group.rank(); i < op.splits; i += group.size()) lane.m = fmaxf(lane.m, parts[i].m);
        lane.m = group.max(lane.m);
        for (int64_t i = group.rank(); i < op.splits; i += group.size()) add(parts[i], lane);
        join_lanes(lane, to);
    }

    // g1 of large_change. Each difference is taken first: at an offset of 1e4 the sum z + d would have lost the change.
    FINF_ROW double after(int q) const {
        const D* row = change(q);
        const float d_t = to_float(row[t]);
        auto lane = LaneSums<1>::nothing();
        for (int v = first_column({0, 1}); v < V; v += group.size() * COLUMNS) {
            float gap[COLUMNS], d[COLUMNS];
            load_columns(z, v, V, true, -HUGE_VALF, gap);
            load_columns(row, v, V, fits(row, phase(z)), d_t, d);
            for (int i = 0; i < COLUMNS; ++i) gap[i] = (gap[i] - z_t) + (d[i] - d_t);
            take_values(gap, t - v, lane);
        }
        const float top = group.max(lane.m);
        return log(group.sum(static_cast<double>(lane.rest) * exp(static_cast<double>(lane.m) - top))) + top;
    }

    FINF_ROW double smoothing(float at_target, double sum_of_gaps) const {
        if (op.label_smoothing == 0) return 0;
        const double mean = sum_of_gaps / static_cast<double>(op.V);
        return smoothing_term(op.label_smoothing, static_cast<double>(at_target) - anchor_of(at_target), mean);
    }

    FINF_ROW double change_of_loss(int q, const PartSums<QUERIES>& row) const {
        const double gap = static_cast<double>(z_t) - row.m, s = row.rest + exp(gap);
        if (is_small_change(row.u[q], s, row.largest_step[q])) return small_change(row.u[q], s);
        return large_change(log(row.rest) - gap, after(q));
    }

    FINF_ROW void score(const PartSums<QUERIES>& row) const {
        const double base = loss_of_sums(row.rest, static_cast<double>(row.m), static_cast<double>(z_t));
        const double smoothed = base + smoothing(z_t, row.gaps);
        if (group.rank() == 0 && first == 0) op.base[n] = static_cast<float>(smoothed);
        for (int q = 0; q < QUERIES && has(q); ++q) {
            const double delta = change_of_loss(q, row) + smoothing(to_float(change(q)[t]), row.moves[q]);
            if (group.rank() == 0) op.delta[(first + q) * op.delta_stride_q + n] = static_cast<float>(delta);
        }
        group.sync();
    }
};

// A row without a target counts for nothing.
template <int QUERIES, class Group>
FINF_ROW void ignore_row(const CrossEntropyDelta& op, const Group& group, int64_t n, int64_t first) {
    if (group.rank() != 0) return;
    if (first == 0) op.base[n] = 0.0f;
    for (int64_t q = first; q < first + QUERIES && q < op.Q; ++q) op.delta[q * op.delta_stride_q + n] = 0.0f;
}

// `room` is shared by the lanes.
template <int QUERIES, class Z, class D, class Group>
FINF_ROW void score_row(const CrossEntropyDelta& op, const Group& group, int64_t n, int64_t first,
                        PartSums<QUERIES>& room) {
    if (op.target[n] == op.ignore_index) return ignore_row<QUERIES>(op, group, n, first);
    const CrossEntropyRow<QUERIES, Z, D, Group> row(op, group, n, first);
    row.sum({0, 1}, room);
    row.score(room);
}

// The sums of a row's part into their place of op.parts, where those of one row and the same queries are neighbours.
template <int QUERIES, class Z, class D, class Group>
FINF_ROW void sum_part(const CrossEntropyDelta& op, const Group& group, int64_t n, int64_t first, Part part) {
    if (op.target[n] == op.ignore_index) return;
    CrossEntropyRow<QUERIES, Z, D, Group>(op, group, n, first).sum(part, parts_of<QUERIES>(op, n, first)[part.rank]);
}

template <int QUERIES, class Z, class D, class Group>
FINF_ROW void finish_row(const CrossEntropyDelta& op, const Group& group, int64_t n, int64_t first,
                         PartSums<QUERIES>& room) {
    if (op.target[n] == op.ignore_index) return ignore_row<QUERIES>(op, group, n, first);
    const CrossEntropyRow<QUERIES, Z, D, Group> row(op, group, n, first);
    row.join_parts(parts_of<QUERIES>(op, n, first), room);
    row.score(room);
}

}  // namespace finf::cuda
