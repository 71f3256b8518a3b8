// A panel of W is packed once for the values and all changes of a block of rows; what a changed weight adds joins in
// the same registers before anything is rounded or written.
#include "linear_delta.h"

#include <algorithm>
#include <vector>

#include "isa/kernels.h"
#include "pages.h"
#include "panel_product.h"
#include "parallel.h"

namespace finf {
namespace {

// A packed panel takes four fifths of a second-level cache of 1 MiB; its row of sums fits the first-level cache.
constexpr int64_t PANEL_BYTES = 832 << 10, MOST_COLUMNS = 384;
// Rows, of values and of changes, that share a packed panel: packing then costs a hundredth of multiplying. Of a
// query's own panel, which so many positions share, a twentieth.
constexpr int64_t BLOCK_ROWS = 2048, BLOCK_POSITIONS = 512, BLOCK_BYTES = 8 << 20;
// Pieces of work a thread: with fewer, one that is left alone at the end costs more than smaller panels.
constexpr int64_t ENOUGH = 4;

struct Term {
    Product product;
    bool own;      // its panel is the query's own, not the layer's
    int64_t step;  // added to q: x holds the change of query q in row 1 + q
};

// What one query's rows are a sum of; the values count as a query before the first.
struct Layer {
    explicit Layer(const LinearDelta& op) : op(op), size(op.dtype == DType::bf16 ? 2 : 4) {
        const bool pairs = op.dtype == DType::bf16 && kernels().pairs;
        loops = pairs ? kernels().pairs : kernels().panels;
        const Matrix x0 = {op.x, op.dtype, 0, op.x_stride_n}, moved = {op.x, op.dtype, op.x_stride_q, op.x_stride_n};
        const Matrix W = {op.W, op.dtype, 0, op.W_stride};
        value = {{x0, {}, W, op.D, loops, nullptr, true, op.W_turned}, false, 0};
        if (op.x_moves) changes.push_back({{moved, {}, W, op.D, loops, nullptr, true, op.W_turned}, false, 1});
        if (op.U) add_low_rank(x0, moved);
        if (op.dW) add_dense(x0, moved);
    }

    int64_t own_units() const {
        int64_t total = 0;
        for (const Term& term : changes) total += term.own ? term.product.units() : 0;
        return total;
    }

    const LinearDelta& op;
    const int64_t size;
    const PanelLoops* loops;
    Term value;
    std::vector<Term> changes, within;  // `within`: what U's rows are multiplied with
    std::vector<float> inner;

  private:
    // dy_q += (x0 + dx_q) R_qᵀ U_qᵀ, the changed input never formed.
    void add_low_rank(const Matrix& x0, const Matrix& moved) {
        const Matrix R = {op.R, op.dtype, op.r * op.D, op.D}, U = {op.U, op.dtype, op.V * op.r, op.r};
        within.push_back({{x0, {}, R, op.D, loops, nullptr, false, false}, true, 0});
        if (op.x_moves) within.push_back({{next(moved), {}, R, op.D, loops, nullptr, false, false}, true, 0});
        inner.resize(static_cast<size_t>(op.Q * op.N * op.r));  // enough for either type
        const Matrix rows = {inner.data(), op.dtype, op.N * op.r, op.r};
        changes.push_back({{rows, {}, U, op.r, loops, nullptr, false, false}, true, 0});
    }

    void add_dense(const Matrix& x0, const Matrix& moved) {
        const Matrix dW = {op.dW, op.dtype, op.V * op.D, op.D};
        changes.push_back({{x0, op.x_moves ? next(moved) : Matrix(), dW, op.D, loops, nullptr, false, false}, true, 0});
    }

    // The same with the first query in place of the values.
    Matrix next(Matrix x) const {
        x.first = x.row(1, 0);
        return x;
    }
};

// Rows written in panels of columns.
struct Target {
    char* first;
    int64_t stride_q, stride;  // bytes

    void* at(int64_t q, int64_t n, int64_t column, int64_t size) const {
        return first + q * stride_q + n * stride + column * size;
    }
};

// Some rows at a time: the sum of some products in one panel, rounded once.
class Former {
  public:
    Former(const Layer& layer, int64_t columns)
        : layer_(layer),
          columns_(columns),
          multiply_(std::max({(layer.op.D + 1), layer.op.r + 1, int64_t{1}})),
          out_(layer.loops->group * columns) {}

    void form(const std::vector<Term>& terms, const std::vector<const float*>& panels, int64_t q, int64_t begin,
              int64_t end, int64_t start, int64_t n, const float* shift, const Target& to, int64_t row_q) const {
        const auto finish = layer_.loops->finish[static_cast<int>(layer_.op.dtype)];
        const int64_t group = layer_.loops->group;
        int64_t rows[MOST_GROUP];
        for (int64_t i = begin; i < end; i += group) {
            const int64_t count = std::min(group, end - i);
            for (int64_t j = 0; j < count; ++j) rows[j] = i + j;
            if (terms.empty()) std::fill_n(out_.get(), count * columns_, 0.0f);
            for (size_t p = 0; p < terms.size(); ++p)
                multiply_(terms[p].product, q + terms[p].step, rows, count, panels[p], n, out_.get(), columns_, p > 0);
            for (int64_t j = 0; j < count; ++j)
                finish(out_.get() + j * columns_, shift, n, to.at(row_q, i + j, start, layer_.size));
        }
    }

  private:
    const Layer& layer_;
    const int64_t columns_;
    const Multiplier multiply_;
    const Buffer out_;
};

// One block of rows and one panel of columns.
class Piece {
  public:
    Piece(const Layer& layer, int64_t columns, int64_t begin, int64_t end, int64_t start)
        : layer_(layer),
          op_(layer.op),
          begin_(begin),
          end_(end),
          start_(start),
          n_(std::min(columns, op_.V - start)),
          form_(layer, columns),
          panel_(columns * layer.value.product.units()),
          own_(columns * layer.own_units()) {
        const float* free = own_.get();
        for (const Term& term : layer.changes) {
            panels_.push_back(term.own ? free : panel_.get());
            if (term.own) free += columns * term.product.units();
        }
    }

    void write() const {
        const Target y = {static_cast<char*>(op_.y), op_.N * op_.V * layer_.size, op_.V * layer_.size};
        layer_.value.product.pack(0, start_, start_ + n_, panel_.get());
        form_.form({layer_.value}, {panel_.get()}, 0, begin_, end_, start_, n_, shift(op_.bias, 0), y, 0);
        for (int64_t q = 0; q < op_.Q; ++q) {
            for (size_t p = 0; p < panels_.size(); ++p)
                if (layer_.changes[p].own)
                    layer_.changes[p].product.pack(q, start_, start_ + n_, const_cast<float*>(panels_[p]));
            form_.form(layer_.changes, panels_, q, begin_, end_, start_, n_, shift(op_.db, q), y, 1 + q);
        }
    }

  private:
    const float* shift(const float* whole, int64_t q) const { return whole ? whole + q * op_.V + start_ : nullptr; }

    const Layer& layer_;
    const LinearDelta& op_;
    const int64_t begin_, end_, start_, n_;
    const Former form_;
    const Buffer panel_, own_;
    std::vector<const float*> panels_;
};

// Columns of a panel in whole strips: what fits the caches, and fewer where the threads then share the work evenly.
int64_t panel_columns(const Layer& layer, int64_t blocks) {
    const int64_t width = layer.loops->width, strips = ceil_div(layer.op.V, width);
    const int64_t units = std::max<int64_t>(1, layer.value.product.units() + layer.own_units());
    const int64_t fitting = PANEL_BYTES / static_cast<int64_t>(sizeof(float)) / units;
    const int64_t most = std::max<int64_t>(1, std::min(MOST_COLUMNS, fitting) / width);
    int64_t panels = ceil_div(strips, most);
    while (panels * blocks < ENOUGH * layer.op.threads && panels * blocks % layer.op.threads && panels < strips)
        ++panels;
    return ceil_div(strips, panels) * width;
}

// Positions of a block, each with its value and its changes.
int64_t block_positions(const Layer& layer) {
    const int64_t bytes = std::max<int64_t>(1, layer.op.D * layer.size) * (1 + layer.op.Q);
    const int64_t positions = std::max(BLOCK_POSITIONS, BLOCK_ROWS / (1 + layer.op.Q));
    const int64_t group = layer.loops->group;
    return std::max(group, std::min(positions, BLOCK_BYTES / bytes / group * group));
}

void write_inner(Layer& layer) {
    const LinearDelta& op = layer.op;
    const int64_t columns = std::min(MOST_COLUMNS, ceil_div(op.r, layer.loops->width) * layer.loops->width);
    const int64_t blocks = ceil_div(op.N, BLOCK_POSITIONS);
    const Target to = {reinterpret_cast<char*>(layer.inner.data()), op.N * op.r * layer.size, op.r * layer.size};
    parallel_for(op.Q * blocks, op.threads, [&](int64_t task) {
        const int64_t q = task / blocks, begin = task % blocks * BLOCK_POSITIONS;
        const Former form(layer, columns);
        const Buffer panel(columns * layer.within[0].product.units());
        for (int64_t start = 0; start < op.r; start += columns) {
            const int64_t n = std::min(columns, op.r - start);
            layer.within[0].product.pack(q, start, start + n, panel.get());
            form.form(layer.within, std::vector<const float*>(layer.within.size(), panel.get()), q, begin,
                      std::min(begin + BLOCK_POSITIONS, op.N), start, n, nullptr, to, q);
        }
    });
}

void check(const LinearDelta& op) {
    require_size("N", op.N);
    require_size("D", op.D);
    require_size("V", op.V);
    require_size("Q", op.Q);
    require_size("r", op.r);
    require_size("threads", op.threads, 1);
    const bool some = op.N > 0 && op.V > 0;
    require_memory("x", op.x, some && op.D > 0);
    require_memory("W", op.W, some && op.D > 0);
    require_memory("R", op.R, some && op.U && op.Q * op.r * op.D > 0);
    require_memory("y", op.y, some);
}

}  // namespace

void linear_delta(const LinearDelta& op) {
    check(op);
    if (op.N == 0 || op.V == 0) return;
    Layer layer(op);
    expect_writing(op.y, (1 + op.Q) * op.N * op.V * layer.size);
    if (op.U && op.r > 0) write_inner(layer);
    const int64_t positions = block_positions(layer), blocks = ceil_div(op.N, positions);
    const int64_t columns = panel_columns(layer, blocks), panels = ceil_div(op.V, columns);
    parallel_for(blocks * panels, op.threads, [&](int64_t task) {
        const int64_t begin = task / panels * positions;
        Piece(layer, columns, begin, std::min(begin + positions, op.N), task % panels * columns).write();
    });
}

}  // namespace finf
