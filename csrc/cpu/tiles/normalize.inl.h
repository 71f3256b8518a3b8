// The loops of layer, RMS and group norm, written once over Vec and included inside each instruction set's namespace.
//
// A row's value is centred in a buffer, c0, where all queries find it. Then each change is read once into a second
// buffer while its mean is taken, and goes twice more through the first-level cache: for the two sums that the new root
// needs, and into the result. With s the root of the mean square and 0, 1 for before and after (numerics.h):
//     dv = mean dc (c0 + c1)     n1 - n0 = dc / s1 - c0 dv / ((s0 + s1) s0 s1)
// Sums are float32 inside a block and double from block to block.
#pragma once

#include "elements.inl.h"

// Numbers summed in float32, and partial sums side by side: they hide an addition's latency and shorten each sum.
constexpr int64_t SUMMED = 2048;
constexpr int SUMS = 4;

FINF_INLINE float joined(const Vec (&part)[SUMS]) { return sum((part[0] + part[1]) + (part[2] + part[3])); }

// Sum over [0, D) of term(v, count), a vector of the numbers from v on of which `count` are there and the others 0.
template <class Term>
FINF_INLINE double summed(int64_t D, Term term) {
    double total = 0;
    for (int64_t start = 0; start < D; start += SUMMED) {
        const int64_t end = D - start < SUMMED ? D : start + SUMMED;
        Vec part[SUMS] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};
        int64_t v = start;
        for (; v + SUMS * Vec::W <= end; v += SUMS * Vec::W)
            for (int k = 0; k < SUMS; ++k) part[k] = part[k] + term(v + k * Vec::W, int64_t{Vec::W});
        for (; v < end; v += Vec::W) part[0] = part[0] + term(v, end - v);
        total += joined(part);
    }
    return total;
}

// One row of a stack and of the residual added to it; a null pointer stands for zeros.
template <class T>
struct Addends {
    const T *x, *residual;
    int64_t ahead;  // to the row that comes next, asked for while this one is read
};

template <class T>
FINF_INLINE Vec added(const Addends<T>& from, int64_t v, int64_t count) {
    if (!from.residual || !from.x) {
        const T* only = from.x ? from.x : from.residual;
        __builtin_prefetch(only + from.ahead + v);
        return load_up_to(only + v, count, T{});
    }
    return load_up_to(from.x + v, count, T{}) + load_up_to(from.residual + v, count, T{});
}

// The row into `buffer`, as float32, and into `sum` where that is wanted, rounded; returns its own sum.
template <class T>
FINF_INLINE double take(const Addends<T>& from, Result<T> sum, int64_t D, float* buffer) {
    return summed(D, [&](int64_t v, int64_t count) {
        const Vec x = added(from, v, count);
        store(buffer + v, x);
        if (sum.p) put(sum, v, x, count);
        return x;
    });
}

// buffer - middle in its place; returns what is left of the sum, the middle's last digit times D.
FINF_INLINE double centre(float* buffer, float middle, int64_t D) {
    return summed(D, [&](int64_t v, int64_t count) {
        const Vec c = load_up_to(buffer + v, count, middle) - Vec(middle);
        store(buffer + v, c);
        return c;
    });
}

FINF_INLINE double squares(const float* c, int64_t D) {
    return summed(D, [&](int64_t v, int64_t) {
        const Vec x = load(c + v);
        return x * x;
    });
}

struct Moved {
    double squares;  // sum of c1^2
    double change;   // sum of dc (c0 + c1)
};

// d becomes dc = d - middle in its place.
FINF_INLINE Moved moved_sums(const float* c0, float* d, float middle, int64_t D) {
    Moved total = {0, 0};
    for (int64_t start = 0; start < D; start += SUMMED) {
        const int64_t end = D - start < SUMMED ? D : start + SUMMED;
        Vec squares[SUMS], change[SUMS];
        for (int k = 0; k < SUMS; ++k) squares[k] = change[k] = Vec(0.0f);
        const auto add = [&](int64_t v, int64_t count, int k) {
            const Vec c = load(c0 + v), dc = load_up_to(d + v, count, middle) - Vec(middle), c1 = c + dc;
            store(d + v, dc);
            squares[k] = fma(c1, c1, squares[k]);
            change[k] = fma(dc, c + c1, change[k]);
        };
        int64_t v = start;
        for (; v + SUMS * Vec::W <= end; v += SUMS * Vec::W)
            for (int k = 0; k < SUMS; ++k) add(v + k * Vec::W, Vec::W, k);
        for (; v < end; v += Vec::W) add(v, end - v, 0);
        total.squares += joined(squares);
        total.change += joined(change);
    }
    return total;
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
    for (int64_t v = 0; v < D; v += Vec::W) {
        const int64_t count = D - v;
        put(y, v, fma(load(c + v) * Vec(r), weight.at(v, count), bias.at(v, count)), count);
    }
}

struct Slopes {
    float r1, dr;  // 1 / s1 and 1 / s1 - 1 / s0
};

// y = (dc r1 + c0 dr) weight
template <class T, class Param>
FINF_INLINE void write_change(Result<T> y, const float* c0, const float* dc, Slopes s, Param weight, int64_t D) {
    for (int64_t v = 0; v < D; v += Vec::W) {
        const int64_t count = D - v;
        const Vec dn = fma(load(dc + v), Vec(s.r1), load(c0 + v) * Vec(s.dr));
        put(y, v, dn * weight.at(v, count), count);
    }
}

// y = (dc r1 + c0 dr) weight + c1 r1 dweight + dbias
template <class T, class Param>
FINF_INLINE void write_full_change(Result<T> y, const float* c0, const float* dc, Slopes s, Param weight, Param dweight,
                                   Param dbias, int64_t D) {
    for (int64_t v = 0; v < D; v += Vec::W) {
        const int64_t count = D - v;
        const Vec c = load(c0 + v), d = load(dc + v);
        const Vec dn = fma(d, Vec(s.r1), c * Vec(s.dr)), n1 = (c + d) * Vec(s.r1);
        put(y, v, fma(dn, weight.at(v, count), fma(n1, dweight.at(v, count), dbias.at(v, count))), count);
    }
}

template <class T>
FINF_INLINE Addends<T> addends(const NormRows& op, int64_t n, int64_t k) {
    const T* x = static_cast<const T*>(op.x) + k * op.x_stride_q + n * op.x_stride_n;
    const T* residual = static_cast<const T*>(op.residual) + k * op.residual_stride_q + n * op.residual_stride_n;
    return {op.x && (k == 0 || op.x_moves) ? x : nullptr,
            op.residual && (k == 0 || op.residual_moves) ? residual : nullptr, op.x_stride_n};
}

template <class T>
FINF_INLINE Result<T> result(void* first, const NormRows& op, int64_t n, int64_t k) {
    return {first ? static_cast<T*>(first) + (k * op.N + n) * op.D : nullptr, op.past_cache};
}

// s0, with the centred values left in c0. The second centring takes off the first mean's last digit, which a large
// common part would leave in every value.
template <class T>
FINF_INLINE double take_value(const NormRows& op, int64_t n, float* c0) {
    const double D = static_cast<double>(op.D);
    double rest = take(addends<T>(op, n, 0), result<T>(op.sum, op, n, 0), op.D, c0);
    if (op.centred)
        for (int twice = 0; twice < 2; ++twice) rest = centre(c0, static_cast<float>(rest / D), op.D);
    return std::sqrt(squares(c0, op.D) / D + op.eps);
}

// The change of query k - 1, with dc left in `dc`.
template <class T>
FINF_INLINE Slopes take_change(const NormRows& op, int64_t n, int64_t k, double s0, const float* c0, float* dc) {
    if (!op.x_moves && !op.residual_moves) return {static_cast<float>(1 / s0), 0.0f};  // dc is zeros then
    const double D = static_cast<double>(op.D);
    const double total = take(addends<T>(op, n, k), result<T>(op.sum, op, n, k), op.D, dc);
    const Moved moved = moved_sums(c0, dc, op.centred ? static_cast<float>(total / D) : 0.0f, op.D);
    const double s1 = std::sqrt(moved.squares / D + op.eps);
    return {static_cast<float>(1 / s1), static_cast<float>(-moved.change / D / (s0 + s1) / s0 / s1)};
}

template <class T, class Param>
FINF_INLINE void write_row(const NormRows& op, Result<T> y, const float* c0, const float* dc, Slopes s, int64_t n,
                           int64_t k) {
    const int64_t P = op.D / op.run, first = n % op.groups * P, dfirst = (k - 1) * op.groups * P + first;
    const int64_t runs = Param::whole_row ? 1 : P, length = Param::whole_row ? op.D : op.run;
    for (int64_t p = 0; p < runs; ++p) {
        const int64_t v = p * length;
        const Result<T> at = {y.p + v, y.past_cache};
        const Param weight(op.weight + first + p);
        if (k == 0) {
            write_value(at, c0 + v, s.r1, weight, Param(op.bias + first + p), length);
        } else if (op.dweight) {
            const Param dweight(op.dweight + dfirst + p), dbias(op.dbias + dfirst + p);
            write_full_change(at, c0 + v, dc + v, s, weight, dweight, dbias, length);
        } else {
            write_change(at, c0 + v, dc + v, s, weight, length);
        }
    }
}

template <class T, class Param>
FINF_INLINE void norm_row(const NormRows& op, int64_t n, float* c0, float* dc) {
    const double s0 = take_value<T>(op, n, c0);
    write_row<T, Param>(op, result<T>(op.y, op, n, 0), c0, dc, {static_cast<float>(1 / s0), 0.0f}, n, 0);
    for (int64_t k = 1; k <= op.Q; ++k) {
        const Slopes s = take_change<T>(op, n, k, s0, c0, dc);
        write_row<T, Param>(op, result<T>(op.y, op, n, k), c0, dc, s, n, k);
    }
}

// Rows [begin, end). `scratch` is 2 (D + WIDEST) numbers, all zero.
template <class T>
void norm_rows(const NormRows& op, int64_t begin, int64_t end, float* scratch) {
    float *c0 = scratch, *dc = scratch + op.D + finf::WIDEST;
    for (int64_t n = begin; n < end; ++n) {
        if (op.run == 1) {
            norm_row<T, Along>(op, n, c0, dc);
        } else {
            norm_row<T, Throughout>(op, n, c0, dc);
        }
    }
    if (op.past_cache) fence();
}

void (*const NORM_ROWS[2])(const NormRows&, int64_t, int64_t, float*) = {norm_rows<float>, norm_rows<Bf16>};
