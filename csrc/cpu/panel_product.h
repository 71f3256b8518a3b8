// Products of rows of one matrix with rows of another, a packed panel of the latter at a time.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "../check.h"
#include "isa/kernels.h"
#include "ordered_sum.h"

namespace finf {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Uninitialized numbers on a cache line's border.
class Buffer {
  public:
    explicit Buffer(int64_t count) : memory_(new float[static_cast<size_t>(count) + LINE]) {}

    float* get() const {
        const uintptr_t address = reinterpret_cast<uintptr_t>(memory_.get());
        return memory_.get() + (LINE - address / sizeof(float) % LINE) % LINE;
    }

  private:
    static constexpr size_t LINE = 16;
    std::unique_ptr<float[]> memory_;
};

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

    // to[k] += row n of query q, over as many numbers as `to` has.
    void add_row(int64_t q, int64_t n, std::vector<double>& to) const {
        if (dtype == DType::bf16) {
            add(static_cast<const Bf16*>(row(q, n)), to);
        } else {
            add(static_cast<const float*>(row(q, n)), to);
        }
    }

  private:
    template <class T>
    static void add(const T* from, std::vector<double>& to) {
        for (size_t k = 0; k < to.size(); ++k) to[k] += to_double(from[k]);
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

    // Asks for a row, into the second-level cache: a panel that passes through the first would push it out again.
    void fetch(int64_t q, int64_t n) const {
        constexpr int64_t LINE = 64;
        const char* from = static_cast<const char*>(rows.row(q, n));
        for (int64_t at = 0; at < rows.bytes(D); at += LINE) __builtin_prefetch(from + at, 0, 2);
    }

    void pack(int64_t q, int64_t begin, int64_t end, float* panel) const {
        if (turned) {
            loops->pack_turned[static_cast<int>(W.dtype)](W.row(q, 0, begin), W.stride, end - begin, D, panel);
        } else {
            loops->pack[static_cast<int>(W.dtype)](W.row(q, begin), W.stride, end - begin, D, centre, panel);
        }
    }

    // In double: an error of the target's logit would be one of all the row's weights.
    double at(int64_t q, int64_t n, int64_t column) const {
        std::vector<double> x(static_cast<size_t>(D)), w(x);
        rows.add_row(q, n, x);
        if (moved.first) moved.add_row(q, n, x);
        W.add_row(q, column, w);
        for (int64_t k = 0; k < D; ++k) x[k] *= centre ? w[k] - static_cast<double>(centre[k]) : w[k];
        return ordered_sum(x.data(), D);
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
        for (int64_t i = 0; i < count; ++i) units[i] = product.units_of(q, rows[i], room_.get() + i * stride_);
        if (product.loops->evenly && !lie_evenly(units, count)) gather(units, count, product.units());
        product.loops->multiply(units, count, product.units(), panel, columns, out, out_stride, add);
    }

  private:
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
