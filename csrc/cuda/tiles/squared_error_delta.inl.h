// The row of squared_error_delta, written once over Group: p - y with the sum of its squares, and for every query the
// sum of d (2 (p - y) + d). Sums are float32 in a lane, where eight terms join before they are added, and double over
// the lanes.
#pragma once

#include "../elements.h"
#include "../group.h"
#include "../squared_error_delta.h"

namespace finf::cuda {

template <class T>
FINF_ROW const T* error_row(const ErrorRows& x, int64_t q, int64_t n) {
    return static_cast<const T*>(x.first) + q * x.stride_q + n * x.stride_n;
}

// p - y into `gap`, and the sum of its squares.
template <class P, class Y>
FINF_ROW float take_gaps(const P* p, const Y* y, int64_t v, int64_t D, int start, float (&gap)[COLUMNS]) {
    float to[COLUMNS], square[COLUMNS];
    load_columns(p, v, D, true, 0.0f, gap);
    load_columns(y, v, D, fits(y, start), 0.0f, to);
    for (int i = 0; i < COLUMNS; ++i) {
        gap[i] -= to[i];
        square[i] = gap[i] * gap[i];
    }
    return joined(square);
}

template <class T>
FINF_ROW float take_change(const T* row, int64_t v, int64_t D, int start, const float (&gap)[COLUMNS]) {
    float d[COLUMNS];
    load_columns(row, v, D, fits(row, start), 0.0f, d);
    for (int i = 0; i < COLUMNS; ++i) d[i] *= fmaf(2.0f, gap[i], d[i]);
    return joined(d);
}

// Row n, and up to QUERIES of its changes from query `first` on.
template <int QUERIES, class P, class Y, class T, class Group>
FINF_ROW void square_row(const SquaredErrorDelta& op, const Group& group, int64_t n, int64_t first) {
    const P* p = error_row<P>(op.p, 0, n);
    const Y* y = error_row<Y>(op.y, 0, n);
    const int start = phase(p);
    float base = 0, delta[QUERIES] = {};
    for (int64_t v = group.rank() * COLUMNS - start; v < op.D; v += group.size() * COLUMNS) {
        float gap[COLUMNS];
        base += take_gaps(p, y, v, op.D, start, gap);
        FINF_UNROLL
        for (int q = 0; q < QUERIES; ++q) {
            if (first + q >= op.Q) break;
            delta[q] += take_change(error_row<T>(op.dp, first + q, n), v, op.D, start, gap);
        }
    }
    const double squares = group.sum(static_cast<double>(base));
    if (group.rank() == 0 && first == 0) op.base[n] = static_cast<float>(squares);
    FINF_UNROLL
    for (int q = 0; q < QUERIES; ++q) {
        if (first + q >= op.Q) break;
        const double change = group.sum(static_cast<double>(delta[q]));
        if (group.rank() == 0) op.delta[(first + q) * op.delta_stride_q + n] = static_cast<float>(change);
    }
}

}  // namespace finf::cuda
