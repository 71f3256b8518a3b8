// Products of rows of one matrix with rows of another, a packed panel of the latter at a time.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "../check.h"
#include "isa/kernels.h"
#include "ordered_sum.h"
#include "scratch.h"

namespace finf {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows side by side, float32 or bfloat16, for each query; stride_q is 0 where all share them.
struct Matrix {
    const void* first = nullptr;
    DType dtype = DType::f32;
    int64_t stride_q = 0, stride = 0;

    const void* row(int64_t q, int64_t n, int64_t column = 0) const {
        const int64_t offset = q * stride_q + n * stride + column;
        if (dtype == DType::bf16) return static_cast<const Bf16*>(first) + offset;
        return static_cast<const float*>(first) + offset;
    }

    int64_t bytes(int64_t numbers) const { return numbers * (dtype == DType::bf16 ? 2 : 4); }

    float number(int64_t q, int64_t n, int64_t column) const {
        const void* at = row(q, n, column);
        return dtype == DType::bf16 ? static_cast<float>(to_double(*static_cast<const Bf16*>(at)))
                                    : *static_cast<const float*>(at);
    }

    // Asks for the first numbers of a row, into the second-level cache: a panel that passes through the first would
    // push them out again.
    void fetch(int64_t q, int64_t n, int64_t numbers) const {
        constexpr int64_t LINE = 64;
        const char* from = static_cast<const char*>(row(q, n));
        for (int64_t at = 0; at < bytes(numbers); at += LINE) __builtin_prefetch(from + at, 0, 2);
    }
};

// A product that logits or their changes are made of: rows, or rows + moved, times the rows of W.
struct Product {
    Matrix rows, moved, W;
    int64_t D;
    const PanelLoops* loops;
    const float* centre;  // (D), taken from every row of W, or null
    bool shares_panel;    // W is packed for another product already
    bool turned = false;  // W is (D, columns), and has no centre

    int64_t units() const { return ceil_div(D, loops->in_unit); }

    // Row n of query q in units: where it lies if it can be read there, else in `room`.
    const float* units_of(int64_t q, int64_t n, float* room) const {
        const bool in_place = loops->in_unit == 1 ? rows.dtype == DType::f32 : D % loops->in_unit == 0;
        if (in_place && !moved.first) return static_cast<const float*>(rows.row(q, n));
        loops->stage[static_cast<int>(rows.dtype)](rows.row(q, n), moved.first ? moved.row(q, n) : nullptr, D, room);
        return room;
    }

    void fetch(int64_t q, int64_t n) const { rows.fetch(q, n, D); }
    void fetch_column(int64_t column) const { W.fetch(0, column, D); }

    void pack(int64_t q, int64_t begin, int64_t end, float* panel) const {
        if (turned) {
            loops->pack_turned[static_cast<int>(W.dtype)](W.row(q, 0, begin), W.stride, end - begin, D, panel);
        } else {
            loops->pack[static_cast<int>(W.dtype)](W.row(q, begin), W.stride, end - begin, D, centre, panel);
        }
    }

    // In double: an error of the target's logit would be one of all the row's weights.
    double at(int64_t q, int64_t n, int64_t column) const {
        const void *x = rows.row(q, n), *dx = moved.first ? moved.row(q, n) : nullptr, *w = W.row(q, column);
        if (rows.dtype == DType::f32) return meet(static_cast<const float*>(x), static_cast<const float*>(dx), w);
        return meet(static_cast<const Bf16*>(x), static_cast<const Bf16*>(dx), w);
    }

  private:
    template <class X>
    double meet(const X* x, const X* dx, const void* w) const {
        if (W.dtype == DType::f32) return meet(x, dx, static_cast<const float*>(w));
        return meet(x, dx, static_cast<const Bf16*>(w));
    }

    template <class X, class Y>
    double meet(const X* x, const X* dx, const Y* w) const {
        const auto of_row = [&](int64_t k) { return to_double(x[k]) + (dx ? to_double(dx[k]) : 0.0); };
        if (!centre) return ordered_sum_of([&](int64_t k) { return of_row(k) * to_double(w[k]); }, D);
        return ordered_sum_of([&](int64_t k) { return of_row(k) * (to_double(w[k]) - to_double(centre[k])); }, D);
    }
};

// Some rows at a time, at most MOST_GROUP, times a panel.
class Multiplier {
  public:
    explicit Multiplier(int64_t most_units)
        : stride_((ceil_div(most_units, WIDEST) | 1) * WIDEST), room_(MOST_GROUP * stride_) {}

    void operator()(const Product& product, int64_t q, const int64_t* rows, int64_t count, const float* panel,
                    int64_t columns, float* out, int64_t out_stride, bool add) const {
        const float* units[MOST_GROUP];
        look_up(product, q, rows, count, units, 0);
        multiply(product, units, count, panel, columns, out, out_stride, add);
    }

    // Rows of the first query of two products with the same panel, the other's results behind the first's.
    void both(const Product& one, const Product& other, const int64_t* rows, int64_t count, const float* panel,
              int64_t columns, float* out, int64_t out_stride) const {
        const float* units[MOST_GROUP];
        look_up(one, 0, rows, count, units, 0);
        look_up(other, 0, rows, count, units, count);
        multiply(one, units, 2 * count, panel, columns, out, out_stride, false);
    }

  private:
    void look_up(const Product& product, int64_t q, const int64_t* rows, int64_t count, const float** units,
                 int64_t from) const {
        for (int64_t i = 0; i < count; ++i)
            units[from + i] = product.units_of(q, rows[i], room_.get() + (from + i) * stride_);
    }

    void multiply(const Product& product, const float** units, int64_t count, const float* panel, int64_t columns,
                  float* out, int64_t out_stride, bool add) const {
        if (product.loops->evenly && !lie_evenly(units, count)) gather(units, count, product.units());
        product.loops->multiply(units, count, product.units(), panel, columns, out, out_stride, add);
    }

    static bool lie_evenly(const float* const* units, int64_t count) {
        const auto at = [&](int64_t i) { return reinterpret_cast<uintptr_t>(units[i]); };
        for (int64_t i = 2; i < count; ++i)
            if (at(i) - at(i - 1) != at(1) - at(0)) return false;
        return true;
    }

    void gather(const float** units, int64_t count, int64_t size) const {
        for (int64_t i = 0; i < count; ++i) {
            float* to = room_.get() + i * stride_;
            std::memcpy(to, units[i], static_cast<size_t>(size) * sizeof(float));
            units[i] = to;
        }
    }

    // Numbers in the widest vector, and a row is staged by whole vectors. An odd number of these apart, no two rows of
    // a group meet in the same set of a cache.
    static constexpr int64_t WIDEST = 16;
    int64_t stride_;
    Buffer room_;
};

}  // namespace finf
