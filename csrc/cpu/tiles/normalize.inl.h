// The loops of layer, RMS and group norm, written once over Vec and included inside each instruction set's namespace.
//
// A row's value is centred in a buffer, c0, where all queries find it. A change d is read once for all its sums, and
// once more, out of the first-level cache, into the result. With dc the centred change, c1 = c0 + dc, s the root of the
// mean square plus eps, and 0, 1 for before and after:
//     dv = mean dc (c0 + c1)     n1 - n0 = dc / s1 - c0 dv / ((s0 + s1) s0 s1)
// Sums are float32 inside a block and double from block to block.
#pragma once

#include "elements.inl.h"
#include "sums.inl.h"

// x into `buffer` as float32; returns its sum.
template <class T>
FINF_INLINE double take(const T* x, int64_t D, int64_t ahead, float* buffer) {
    return sums(D,
                [&](int64_t v, int64_t count, Vec& total, Vec&, Vec&) FINF_LAMBDA {
                    fetch(x + v, ahead);
                    const Vec h = load_up_to(x + v, count, T{});
                    store(buffer + v, h);
                    total = total + h;
                })
        .a;
}

// x + residual, of which either may be null for zeros, into `buffer` as float32 and into `both` rounded.
template <class T>
FINF_INLINE double take_both(const T* x, const T* residual, Result<T> both, int64_t D, float* buffer) {
    const T *first = x ? x : residual, *second = x ? residual : nullptr;
    return sums(D,
                [&](int64_t v, int64_t count, Vec& total, Vec&, Vec&) FINF_LAMBDA {
                    Vec h = load_up_to(first + v, count, T{});
                    if (second) h = h + load_up_to(second + v, count, T{});
                    store(buffer + v, h);
                    put(both, v, h, count);
                    total = total + h;
                })
        .a;
}

// buffer - middle in its place; returns what is left of the sum, the middle's last digit times D.
FINF_INLINE double centre(float* buffer, float middle, int64_t D) {
    return sums(D,
                [&](int64_t v, int64_t count, Vec& total, Vec&, Vec&) FINF_LAMBDA {
                    const Vec c = first_of(load(buffer + v) - Vec(middle), count);
                    store(buffer + v, c);
                    total = total + c;
                })
        .a;
}

FINF_INLINE double squares(const float* c, int64_t D) {
    return sums(D,
                [&](int64_t v, int64_t, Vec& total, Vec&, Vec&) FINF_LAMBDA {
                    const Vec x = load(c + v);
                    total = fma(x, x, total);
                })
        .a;
}

// What a change does to a row: the mean that is to be taken off it, and the sums of c1^2 and of dc (c0 + c1).
struct Moved {
    float mean;
    double squares, change;
};

template <class S>
FINF_INLINE Moved moved_after_centring(const float* c0, const S* d, float mean, int64_t D) {
    const Totals of = sums(D, [&](int64_t v, int64_t count, Vec& squares, Vec& change, Vec&) FINF_LAMBDA {
        const Vec c = load(c0 + v), dc = first_of(load_up_to(d + v, count, S{}) - Vec(mean), count), c1 = c + dc;
        squares = fma(c1, c1, squares);
        change = fma(dc, c + c1, change);
    });
    return {mean, of.a, of.b};
}

// From the sums of d as it is, unless those would cancel: where it is all but the same everywhere, and where it leaves
// little of the row.
template <class S>
FINF_INLINE Moved moved_sums(const float* c0, const S* d, double squares0, int64_t D, int64_t ahead, bool centred) {
    const Totals of = sums(D, [&](int64_t v, int64_t count, Vec& total, Vec& product, Vec& squares) FINF_LAMBDA {
        fetch(d + v, ahead);
        const Vec x = load_up_to(d + v, count, S{});
        total = total + x;
        product = fma(x, load(c0 + v), product);
        squares = fma(x, x, squares);
    });
    const double mean = centred ? of.a / static_cast<double>(D) : 0.0, change = 2 * of.b + (of.c - mean * of.a);
    const bool cancels = mean * of.a > 0.5 * of.c || change < -0.5 * squares0;
    if (cancels) return moved_after_centring(c0, d, static_cast<float>(mean), D);
    return {static_cast<float>(mean), squares0 + change, change};
}

// A parameter along a row: one number each, or one number all along a run of them.
struct Along {
    static constexpr bool whole_row = true;
    const float* p;
    FINF_MEMBER explicit Along(const float* first) : p(first) {}
    FINF_MEMBER Vec at(int64_t v, int64_t count) const { return load_up_to(p + v, count, 0.0f); }
};
struct Throughout {
    static constexpr bool whole_row = false;
    Vec value;
    FINF_MEMBER explicit Throughout(const float* only) : value(*only) {}
    FINF_MEMBER Vec at(int64_t, int64_t) const { return value; }
};

// y = c r weight + bias
template <class T, class Param>
FINF_INLINE void write_value(Result<T> y, const float* c, float r, Param weight, Param bias, int64_t D) {
    each_vector(D, [&](int64_t v, int64_t count) FINF_LAMBDA {
        put(y, v, fma(load(c + v) * Vec(r), weight.at(v, count), bias.at(v, count)), count);
    });
}

// A change as the result needs it: dc = d - mean, r1 = 1 / s1, dr = 1 / s1 - 1 / s0.
template <class S>
struct Step {
    const S* d;
    float mean, r1, dr;
};

// y = (dc r1 + c0 dr) weight
template <class T, class S, class Param>
FINF_INLINE void write_change(Result<T> y, const float* c0, Step<S> by, Param weight, int64_t D) {
    each_vector(D, [&](int64_t v, int64_t count) FINF_LAMBDA {
        const Vec dc = load_up_to(by.d + v, count, S{}) - Vec(by.mean);
        const Vec dn = fma(dc, Vec(by.r1), load(c0 + v) * Vec(by.dr));
        put(y, v, dn * weight.at(v, count), count);
    });
}

// y = (dc r1 + c0 dr) weight + c1 r1 dweight + dbias
template <class T, class S, class Param>
FINF_INLINE void write_full_change(Result<T> y, const float* c0, Step<S> by, Param weight, Param dweight, Param dbias,
                                   int64_t D) {
    each_vector(D, [&](int64_t v, int64_t count) FINF_LAMBDA {
        const Vec c = load(c0 + v), dc = load_up_to(by.d + v, count, S{}) - Vec(by.mean);
        const Vec dn = fma(dc, Vec(by.r1), c * Vec(by.dr)), n1 = (c + dc) * Vec(by.r1);
        put(y, v, fma(dn, weight.at(v, count), fma(n1, dweight.at(v, count), dbias.at(v, count))), count);
    });
}

template <class T>
FINF_INLINE Result<T> result(void* first, const NormRows& op, int64_t n, int64_t k) {
    return {static_cast<T*>(first) + (k * op.N + n) * op.D, op.past_cache};
}

// The value's row of the result. The second centring takes off the first mean's last digit, which a large common part
// would leave in every number.
template <class T, class Param>
FINF_INLINE NormValue norm_value(const NormRows& op, const T* x, const T* residual, int64_t n, float* c0) {
    const double D = static_cast<double>(op.D);
    double rest =
        residual ? take_both(x, residual, result<T>(op.sum, op, n, 0), op.D, c0) : take(x, op.D, op.x_stride_n, c0);
    if (op.centred)
        for (int twice = 0; twice < 2; ++twice) rest = centre(c0, static_cast<float>(rest / D), op.D);
    const double squares0 = squares(c0, op.D), s0 = std::sqrt(squares0 / D + op.eps);
    const Result<T> y = result<T>(op.y, op, n, 0);
    const int64_t P = op.D / op.run, first = n % op.groups * P, length = Param::whole_row ? op.D : op.run;
    for (int64_t v = 0, p = first; v < op.D; v += length, ++p)
        write_value<T>({y.p + v, y.past_cache}, c0 + v, static_cast<float>(1 / s0), Param(op.weight + p),
                       Param(op.bias + p), length);
    return {c0, squares0, s0};
}

template <class T, class Param, class S>
FINF_INLINE void write_row(const NormRows& op, const float* c0, Step<S> by, int64_t n, int64_t k) {
    const Result<T> y = result<T>(op.y, op, n, k);
    const int64_t P = op.D / op.run, first = n % op.groups * P, length = Param::whole_row ? op.D : op.run;
    for (int64_t v = 0, p = first; v < op.D; v += length, ++p, by.d += length) {
        const Result<T> at = {y.p + v, y.past_cache};
        if (op.dweight) {
            const int64_t dp = (k - 1) * op.groups * P + p;
            write_full_change(at, c0 + v, by, Param(op.weight + p), Param(op.dweight + dp), Param(op.dbias + dp),
                              length);
        } else {
            write_change(at, c0 + v, by, Param(op.weight + p), length);
        }
    }
}

// The row of query k - 1, whose change is d.
template <class T, class Param, class S>
FINF_INLINE void norm_change(const NormRows& op, const NormValue& value, const S* d, int64_t ahead, int64_t n,
                             int64_t k) {
    const double D = static_cast<double>(op.D);
    const Moved moved = moved_sums(value.c0, d, value.squares, op.D, ahead, op.centred);
    const double s0 = value.s0, s1 = std::sqrt(moved.squares / D + op.eps), r0 = 1 / s0, r1 = 1 / s1;
    const double dr = -moved.change / D / (s0 + s1) * r0 * r1;
    write_row<T, Param>(op, value.c0, Step<S>{d, moved.mean, static_cast<float>(r1), static_cast<float>(dr)}, n, k);
}

template <class T>
FINF_INLINE const T* row_of(const void* stack, int64_t stride_q, int64_t stride_n, bool moves, int64_t n, int64_t k) {
    return stack && (k == 0 || moves) ? static_cast<const T*>(stack) + k * stride_q + n * stride_n : nullptr;
}

// Rows [begin, end): first all their values, then query by query all their changes, so that memory is read and written
// in long stretches; the centred values wait in the second-level cache.
template <class T, class Param>
FINF_INLINE void norm_row_block(const NormRows& op, int64_t begin, int64_t end, const NormScratch& room) {
    for (int64_t k = 0; k <= op.Q; ++k)
        for (int64_t n = begin; n < end; ++n) {
            const T* x = row_of<T>(op.x, op.x_stride_q, op.x_stride_n, op.x_moves, n, k);
            const T* residual =
                row_of<T>(op.residual, op.residual_stride_q, op.residual_stride_n, op.residual_moves, n, k);
            NormValue& value = room.values[n - begin];
            if (k == 0) {
                value = norm_value<T, Param>(op, x, residual, n, room.c0 + (n - begin) * finf::vectors(op.D));
            } else if (op.sum && (x || residual)) {
                take_both(x, residual, result<T>(op.sum, op, n, k), op.D, room.sum);
                norm_change<T, Param>(op, value, room.sum, 0, n, k);
            } else if (x) {
                norm_change<T, Param>(op, value, x, op.x_stride_n, n, k);
            } else {  // only the parameters move, and the sum's room is all zeros
                write_row<T, Param>(op, value.c0, Step<float>{room.sum, 0, static_cast<float>(1 / value.s0), 0}, n, k);
            }
        }
}

template <class T>
void norm_rows(const NormRows& op, int64_t begin, int64_t end, const NormScratch& room) {
    if (op.run == 1) {
        norm_row_block<T, Along>(op, begin, end, room);
    } else {
        norm_row_block<T, Throughout>(op, begin, end, room);
    }
    if (op.past_cache) fence();
}

template <class Half>
void (*const NORM_ROWS[2])(const NormRows&, int64_t, int64_t, const NormScratch&) = {norm_rows<float>, norm_rows<Half>};
