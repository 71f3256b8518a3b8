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

// Bytes that are fetched before their turn. Measured (Zen 5, bfloat16): the next row of 768 takes less time than memory
// does to answer, and two to three rows ahead norms run 15 % faster; of rows of 16,384 the next one is too far, 25 %.
constexpr int64_t FETCHED = 4096;

// The same in numbers: whole rows where they are short, for they may lie apart.
template <class T>
FINF_INLINE int64_t ahead_of(int64_t D, int64_t stride) {
    const int64_t numbers = FETCHED / static_cast<int64_t>(sizeof(T));
    return D < numbers ? numbers / D * stride : numbers;
}

// A row, and how far ahead of it what comes next is fetched; `p` is null for zeros.
template <class T>
struct Coming {
    const T* p;
    int64_t ahead;
};

// x into `buffer` as float32; returns its sum.
template <class T>
FINF_INLINE double take(Coming<T> x, int64_t D, float* buffer) {
    return sums(D,
                [&](int64_t v, int64_t count, Vec& total, Vec&, Vec&) FINF_LAMBDA {
                    fetch(x.p + v, x.ahead);
                    const Vec h = load_up_to(x.p + v, count, T{});
                    store(buffer + v, h);
                    total = total + h;
                })
        .a;
}

// x + residual into `buffer` as float32 and into `both` rounded.
template <class T>
FINF_INLINE double take_both(Coming<T> x, Coming<T> residual, Result<T> both, int64_t D, float* buffer) {
    const Coming<T> first = x.p ? x : residual, second = x.p ? residual : x;
    return sums(D,
                [&](int64_t v, int64_t count, Vec& total, Vec&, Vec&) FINF_LAMBDA {
                    fetch(first.p + v, first.ahead);
                    Vec h = load_up_to(first.p + v, count, T{});
                    if (second.p) {
                        fetch(second.p + v, second.ahead);
                        h = h + load_up_to(second.p + v, count, T{});
                    }
                    store(buffer + v, h);
                    put(both, v, h, count);
                    total = total + h;
                })
        .a;
}

// buffer - middle in its place; returns what is left of the sum, the middle's last digit times D, and the squares' sum.
FINF_INLINE Totals centre(float* buffer, double middle, int64_t D) {
    return sums(D, [&](int64_t v, int64_t count, Vec& total, Vec& squares, Vec&) FINF_LAMBDA {
        const Vec c = first_of(load(buffer + v) - Vec(static_cast<float>(middle)), count);
        store(buffer + v, c);
        total = total + c;
        squares = fma(c, c, squares);
    });
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
FINF_INLINE Moved moved_sums(const float* c0, Coming<S> d, double squares0, int64_t D, bool centred) {
    const Totals of = sums(D, [&](int64_t v, int64_t count, Vec& total, Vec& product, Vec& squares) FINF_LAMBDA {
        fetch(d.p + v, d.ahead);
        const Vec x = load_up_to(d.p + v, count, S{});
        total = total + x;
        product = fma(x, load(c0 + v), product);
        squares = fma(x, x, squares);
    });
    const double mean = centred ? of.a / static_cast<double>(D) : 0.0, change = 2 * of.b + (of.c - mean * of.a);
    const bool cancels = mean * of.a > 0.5 * of.c || change < -0.5 * squares0;
    if (cancels) return moved_after_centring(c0, d.p, static_cast<float>(mean), D);
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

template <class T>
FINF_INLINE Coming<T> row_of(const void* stack, int64_t stride_q, int64_t stride_n, bool moves, int64_t D, int64_t n,
                             int64_t k) {
    if (!stack || (k > 0 && !moves)) return {nullptr, 0};
    return {static_cast<const T*>(stack) + k * stride_q + n * stride_n, ahead_of<T>(D, stride_n)};
}

template <class T>
FINF_INLINE Coming<T> x_of(const NormRows& op, int64_t n, int64_t k) {
    return row_of<T>(op.x, op.x_stride_q, op.x_stride_n, op.x_moves, op.D, n, k);
}

template <class T>
FINF_INLINE Coming<T> residual_of(const NormRows& op, int64_t n, int64_t k) {
    return row_of<T>(op.residual, op.residual_stride_q, op.residual_stride_n, op.residual_moves, op.D, n, k);
}

// The value's row of the result.
template <class T, class Param>
FINF_INLINE void write_value_row(const NormRows& op, const NormValue& value, int64_t n) {
    const Result<T> y = result<T>(op.y, op, n, 0);
    const int64_t P = op.D / op.run, first = n % op.groups * P, length = Param::whole_row ? op.D : op.run;
    for (int64_t v = 0, p = first; v < op.D; v += length, ++p)
        write_value<T>({y.p + v, y.past_cache}, value.c0 + v, static_cast<float>(1 / value.s0), Param(op.weight + p),
                       Param(op.bias + p), length);
}

template <class T, class Param, class S>
FINF_INLINE void write_change_row(const NormRows& op, const float* c0, Step<S> by, int64_t n, int64_t k) {
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

// The step of a row whose change is d.
template <class S>
FINF_INLINE Step<S> step_of(const NormRows& op, const NormValue& value, Coming<S> d) {
    const double D = static_cast<double>(op.D);
    const Moved moved = moved_sums(value.c0, d, value.squares, op.D, op.centred);
    const double s0 = value.s0, s1 = std::sqrt(moved.squares / D + op.eps), r0 = 1 / s0, r1 = 1 / s1;
    const double dr = -moved.change / D / (s0 + s1) * r0 * r1;
    return {d.p, moved.mean, static_cast<float>(r1), static_cast<float>(dr)};
}

// Some rows' values. The second centring takes off the first mean's last digit, which a large common part would leave
// in every number.
template <class T, class Param>
FINF_INLINE void norm_values(const NormRows& op, int64_t begin, int64_t end, float* c0, NormValue* values) {
    const double D = static_cast<double>(op.D);
    const int64_t width = finf::vectors(op.D);
    double rest[finf::MOST_TOGETHER];
    for (int64_t n = begin, i = 0; n < end; ++n, ++i) {
        const Coming<T> x = x_of<T>(op, n, 0), residual = residual_of<T>(op, n, 0);
        float* c = c0 + i * width;
        rest[i] = residual.p ? take_both(x, residual, result<T>(op.sum, op, n, 0), op.D, c) : take(x, op.D, c);
        values[i].c0 = c;
    }
    if (op.centred)
        for (int64_t i = 0; i < end - begin; ++i) rest[i] = centre(c0 + i * width, rest[i] / D, op.D).a;
    for (int64_t i = 0; i < end - begin; ++i) {
        float* c = c0 + i * width;
        values[i].squares = op.centred ? centre(c, rest[i] / D, op.D).b : squares(c, op.D);
        values[i].s0 = std::sqrt(values[i].squares / D + op.eps);
    }
    for (int64_t n = begin; n < end; ++n) write_value_row<T, Param>(op, values[n - begin], n);
}

// Some rows' changes under query k - 1: their steps, step_at(n, i) being that of row n, the i-th of them.
template <class T, class Param, class S, class StepAt>
FINF_INLINE void write_changes_by(const NormRows& op, int64_t begin, int64_t end, const NormValue* values, int64_t k,
                                  StepAt step_at) {
    Step<S> steps[finf::MOST_TOGETHER];
    for (int64_t n = begin; n < end; ++n) steps[n - begin] = step_at(n, n - begin);
    for (int64_t n = begin; n < end; ++n) write_change_row<T, Param>(op, values[n - begin].c0, steps[n - begin], n, k);
}

template <class T, class Param>
FINF_INLINE void norm_changes(const NormRows& op, int64_t begin, int64_t end, const NormValue* values, float* sum,
                              int64_t k) {
    if (!op.x_moves && !(op.residual && op.residual_moves)) {  // only the parameters, and the sum's room is all zeros
        return write_changes_by<T, Param, float>(op, begin, end, values, k, [&](int64_t, int64_t i) FINF_LAMBDA {
            return Step<float>{sum, 0, static_cast<float>(1 / values[i].s0), 0};
        });
    }
    if (!op.residual) {
        return write_changes_by<T, Param, T>(op, begin, end, values, k, [&](int64_t n, int64_t i) FINF_LAMBDA {
            return step_of(op, values[i], x_of<T>(op, n, k));
        });
    }
    write_changes_by<T, Param, float>(op, begin, end, values, k, [&](int64_t n, int64_t i) FINF_LAMBDA {
        float* both = sum + i * finf::vectors(op.D);
        take_both(x_of<T>(op, n, k), residual_of<T>(op, n, k), result<T>(op.sum, op, n, k), op.D, both);
        return step_of<float>(op, values[i], {both, 0});
    });
}

// Rows [begin, end): first all their values, then query by query all their changes, so that memory is read and written
// in long stretches; the centred values wait in the second-level cache.
template <class T, class Param>
FINF_INLINE void norm_row_block(const NormRows& op, int64_t begin, int64_t end, const NormScratch& room) {
    const int64_t some = finf::rows_together(op.D * static_cast<int64_t>(sizeof(T)));
    for (int64_t k = 0; k <= op.Q; ++k)
        for (int64_t n = begin; n < end; n += some) {
            const int64_t stop = end - n < some ? end : n + some;
            NormValue* values = room.values + (n - begin);
            if (k == 0) {
                norm_values<T, Param>(op, n, stop, room.c0 + (n - begin) * finf::vectors(op.D), values);
            } else {
                norm_changes<T, Param>(op, n, stop, values, room.sum, k);
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
