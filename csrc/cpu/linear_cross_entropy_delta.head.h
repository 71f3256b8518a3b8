// The linear layer under linear_cross_entropy_delta, taken apart into products with packed panels.
//
// A shift of all logits is not felt, so W is freed of what its rows have in common: logits that stand near -100, or
// change together, then cost no digits. Two cases keep the shift: a soft cap, which feels it, and pairs of bfloat16,
// which W less its common row would no longer be. Their products are exact, so they come off well all the same: at
// D = 512 logits near -270 cost 5e-6 of a change, logits near -1100 2e-5.
#pragma once

#include <algorithm>
#include <vector>

#include "../numerics.h"
#include "isa/kernels.h"
#include "linear_cross_entropy_delta.h"
#include "panel_product.h"
#include "parallel.h"

namespace finf {

// Rows, of values and of changes, that share a packed panel: packing it then costs a hundredth of multiplying. Fewer
// where they are long: they are read once a panel, from a third-level cache that others use too.
constexpr int64_t BLOCK_ROWS = 2048, BLOCK_BYTES = 8 << 20;
// Rows whose sums are finished, or whose targets are looked up, at once.
constexpr int64_t FEW_ROWS = 32;
// Targets' rows of W lie anywhere in memory: each is asked for while this many others are looked up.
constexpr int64_t AHEAD = 4;
// Rows of W whose median stands for what all have in common: within an eighth of their spread, and that is enough.
constexpr int64_t SAMPLED = 129;

// The median of some rows of W, column by column.
inline std::vector<float> common_row(const Matrix& W, int64_t V, int64_t D) {
    const int64_t step = ceil_div(V, SAMPLED), count = ceil_div(V, step);
    std::vector<float> sample(static_cast<size_t>(D * count)), centre(static_cast<size_t>(D));
    for (int64_t i = 0; i < count; ++i) {
        for (int64_t k = 0; k < D; ++k) sample[k * count + i] = W.number(0, i * step, k);
    }
    for (int64_t k = 0; k < D; ++k) {
        float *begin = sample.data() + k * count, *middle = begin + (count - 1) / 2;
        std::nth_element(begin, middle, begin + count, [](float a, float b) { return a < b || (b != b && a == a); });
        centre[k] = *middle;
    }
    return centre;
}

// The layer, taken apart into products, and the rows that count.
class Head {
  public:
    explicit Head(const LinearCrossEntropyDelta& op) : op(op), loops(*kernels().head) {
        for (int64_t n = 0; n < op.N; ++n)
            if (op.target[n] != op.ignore_index) kept.push_back(n);
        const Matrix x = {op.x, op.dtype, 0, op.x_stride}, W = {op.W, op.dtype, 0, op.W_stride};
        const Matrix dx = {op.dx, op.dtype, op.dx_stride_q, op.dx_stride_n};
        value = product(x, {}, W, op.D);
        if (op.softcap == 0 && value.loops->in_unit == 1 && !kept.empty()) centre_ = common_row(W, op.V, op.D);
        value.centre = centre_.empty() ? nullptr : centre_.data();
        if (op.dx) changes.push_back({dx, {}, W, op.D, value.loops, value.centre, true});
        if (op.dW) changes.push_back(product(x, dx, {op.dW, op.dW_dtype, op.dW_stride_q, op.dW_stride_v}, op.D));
        if (op.U) add_low_rank(product(x, dx, {op.R, DType::f32, op.r * op.D, op.D}, op.D));
        look_up_targets();
    }

    const LinearCrossEntropyDelta& op;
    const HeadLoops& loops;
    std::vector<int64_t> kept;
    Product value;
    std::vector<Product> changes;
    std::vector<double> z_t;  // (N)
    std::vector<float> d_t;   // (Q, N)

    // Whether panels are packed for each query; then many rows pass by each, and their logits have to be kept.
    bool packs_by_query() const {
        return op.Q > 1 && std::any_of(changes.begin(), changes.end(), [](auto& one) { return !one.shares_panel; });
    }

    // Whether the values' product brings the first query's changes too: a strip of the panel then comes from the
    // second-level cache once for both. Measured (Zen 5, one thread): 1 % at D = 256, 2 % at D = 768.
    bool values_bring_changes() const {
        return op.Q > 0 && !changes.empty() && changes[0].shares_panel && !packs_by_query() && fits_twice();
    }

    // Whether all products share the values' panel; of loops that were measured so. Without regard to Q: a query's
    // numbers have the same bits with others beside it.
    bool walks_one_panel() const {
        return fits_twice() && std::all_of(changes.begin(), changes.end(), [](auto& one) { return one.shares_panel; });
    }

    // Rows that share a packed panel, each with its value and its changes, or with one change at a time.
    int64_t block_rows() const {
        const int64_t bytes = std::max<int64_t>(1, op.D * (op.dtype == DType::bf16 ? 2 : 4));
        const int64_t rows = std::min(BLOCK_ROWS, BLOCK_BYTES / bytes) / (packs_by_query() ? 2 : 1 + op.Q);
        return std::max(group(), rows / group() * group());
    }

    // Rows taken through a panel together: the values', which the changes follow.
    int64_t group() const { return value.loops->group; }

    // Of all panels that are in use at once.
    int64_t units() const {
        int64_t total = value.units();
        for (const Product& change : changes) total += change.shares_panel ? 0 : change.units();
        return std::max<int64_t>(total, 1);
    }

  private:
    bool fits_twice() const { return 2 * group() <= MOST_GROUP; }

    static Product product(const Matrix& rows, const Matrix& moved, const Matrix& W, int64_t D) {
        const bool pairs = kernels().pairs && rows.dtype == DType::bf16 && W.dtype == DType::bf16;
        return {rows, moved, W, D, pairs ? kernels().pairs : kernels().panels, nullptr, false};
    }

    // (x + dx_q) R_qᵀ is known before the walk; what is left is r numbers a row.
    void add_low_rank(const Product& within) {
        inner_.resize(static_cast<size_t>(op.Q * op.N * op.r));
        const int64_t count = static_cast<int64_t>(kept.size()), blocks = ceil_div(count, BLOCK_ROWS);
        parallel_for(op.Q * blocks, op.threads, [&](int64_t task) {
            const int64_t q = task / std::max<int64_t>(blocks, 1), begin = task % blocks * BLOCK_ROWS;
            fill_inner(within, q, begin, std::min(begin + BLOCK_ROWS, count));
        });
        const Matrix rows = {inner_.data(), DType::f32, op.N * op.r, op.r};
        changes.push_back(product(rows, {}, {op.U, op.U_dtype, op.U_stride_q, op.U_stride_v}, op.r));
    }

    void fill_inner(const Product& within, int64_t q, int64_t begin, int64_t end) {
        const int64_t width = within.loops->width, group = within.loops->group;
        const Multiplier multiply(within.units());
        const Buffer panel(width * within.units()), out(group * width);
        for (int64_t c = 0; c < op.r; c += width) {
            const int64_t n = std::min(width, op.r - c);
            within.pack(q, c, c + n, panel.get());
            for (int64_t i = begin; i < end; i += group) {
                const int64_t count = std::min(group, end - i);
                multiply(within, q, &kept[i], count, panel.get(), width, out.get(), width, false);
                for (int64_t row = 0; row < count; ++row)
                    std::copy_n(out.get() + row * width, n, &inner_[(q * op.N + kept[i + row]) * op.r + c]);
            }
        }
    }

    void look_up_targets() {
        z_t.resize(static_cast<size_t>(op.N));
        d_t.resize(static_cast<size_t>(op.Q * op.N));
        const int64_t count = static_cast<int64_t>(kept.size());
        parallel_for(ceil_div(count, FEW_ROWS), op.threads, [&](int64_t task) {
            const int64_t end = std::min(task * FEW_ROWS + FEW_ROWS, count);
            for (int64_t i = task * FEW_ROWS; i < end; ++i) {
                if (i + AHEAD < end) value.fetch_column(op.target[kept[i + AHEAD]]);
                look_up(kept[i]);
            }
        });
    }

    void look_up(int64_t n) {
        const int64_t t = op.target[n];
        const double z = value.at(0, n, t) + (op.bias ? op.bias[t] : 0.0f);
        z_t[n] = op.softcap > 0 ? softcap(op.softcap, z) : z;
        for (int64_t q = 0; q < op.Q; ++q) {
            double d = op.db ? op.db[q * op.db_stride_q + t] : 0.0f;
            for (const Product& change : changes) d += change.at(q, n, t);
            d_t[q * op.N + n] = static_cast<float>(op.softcap > 0 ? softcap_change(op.softcap, z, d) : d);
        }
    }

    std::vector<float> centre_, inner_;
};

}  // namespace finf
