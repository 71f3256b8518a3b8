// The vocabulary is walked in panels of columns that fit the second-level cache: a panel of W is packed once, the
// logits of some rows are formed from it, turned into e^(z - m) and kept, and then query by query their changes (the
// first query's with the logits, where they need nothing but W), which are summed as they come. Logits exist for one
// panel and one block of rows at a time.
//
// The work is cut into blocks of rows times parts of the vocabulary, by the sizes alone, and what the parts of a row
// add up to is joined in their order: the number of threads changes no bit.
#include "linear_cross_entropy_delta.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "../numerics.h"
#include "isa/kernels.h"
#include "linear_cross_entropy_delta.head.h"
#include "panel_product.h"
#include "parallel.h"
#include "targets.h"

namespace finf {
namespace {

// A packed panel takes four fifths of a second-level cache of 1 MiB: half of it is up to 4 % slower where D = 2048.
constexpr int64_t PANEL_BYTES = 832 << 10;
// Past this a wider panel saves nothing, and the logits of all rows of a block, kept for each query's panel, take more
// memory. Where there is but one panel, twice as many: 1 to 2 % faster with one query, 1 % slower with four (Zen 5).
constexpr int64_t MOST_COLUMNS = 384, MOST_OF_ONE_PANEL = 768;
// Pieces of work, for a few to each thread of a large machine; none, but for the last, with fewer columns than are
// worth a start.
constexpr int64_t TASKS = 64, LEAST_COLUMNS = 2048;

// Columns of a panel: what fits the caches, in whole strips.
int64_t panel_columns(const Head& head) {
    const int64_t width = head.value.loops->width, all = ceil_div(head.op.V, width) * width;
    const int64_t fitting = PANEL_BYTES / static_cast<int64_t>(sizeof(float)) / head.units();
    const int64_t most = head.walks_one_panel() ? MOST_OF_ONE_PANEL : MOST_COLUMNS;
    return std::max(width, std::min({most, all, fitting}) / width * width);
}

// What a walk over the vocabulary adds up for `rows`: once for the loss and small changes, again, for rows that have a
// large one, for the row after it.
struct Sums {
    Sums(const Head& head, std::vector<int64_t> which, bool after)
        : head(head),
          rows(std::move(which)),
          after(after),
          columns(panel_columns(head)),
          panels(ceil_div(head.op.V, columns)),
          count(static_cast<int64_t>(rows.size())),
          block(head.block_rows()),
          blocks(ceil_div(count, block)),
          panels_of_part(std::max<int64_t>(1, ceil_div(panels, most_parts()))),
          parts(ceil_div(panels, panels_of_part)),
          values(static_cast<size_t>(after ? 0 : parts * count)),
          changes(static_cast<size_t>(after ? 0 : parts * head.op.Q * count)),
          afters(static_cast<size_t>(after ? parts * head.op.Q * count : 0), RowSums().rest) {}

    int64_t most_parts() const {
        const int64_t wanted = ceil_div(TASKS, std::max<int64_t>(blocks, 1));
        return std::max<int64_t>(1, std::min(wanted, head.op.V / LEAST_COLUMNS));
    }

    int64_t at(int64_t part, int64_t q, int64_t i) const { return (part * head.op.Q + q) * count + i; }

    const Head& head;
    const std::vector<int64_t> rows;
    const bool after;
    const int64_t columns, panels;       // of a panel; in all
    const int64_t count, block, blocks;  // rows; of a block; blocks
    // Of the vocabulary, all alike but the last: a few threads then come to an end together.
    const int64_t panels_of_part, parts;
    std::vector<RowSums> values;      // (parts, rows)
    std::vector<ChangeSums> changes;  // (parts, Q, rows)
    std::vector<ScaledSum> afters;    // (parts, Q, rows)
};

// One block of rows and one part of the vocabulary.
class Piece {
  public:
    Piece(Sums& sums, int64_t task)
        : sums_(sums),
          head_(sums.head),
          op_(sums.head.op),
          part_(task % sums.parts),
          first_(task / sums.parts * sums.block),
          count_(std::min(sums.block, sums.count - first_)),
          group_(head_.group()),
          multiply_(std::max(head_.units(), op_.D)),
          panel_(sums.columns * head_.value.units()),
          shift_(sums.columns),
          rows_at_once_(head_.packs_by_query() ? count_ : group_),
          z_((rows_at_once_ + group_) * sums.columns),
          raw_(op_.softcap > 0 ? rows_at_once_ * sums.columns : 0),
          d_(z_.get() + rows_at_once_ * sums.columns),
          rescale_(static_cast<size_t>(count_)) {
        for (const Product& change : head_.changes)
            own_panels_.emplace_back(change.shares_panel ? 0 : sums.columns * change.units());
    }

    void walk() {
        const int64_t begin = part_ * sums_.panels_of_part, end = std::min(begin + sums_.panels_of_part, sums_.panels);
        for (int64_t panel = begin; panel < end; ++panel) {
            start_ = panel * sums_.columns;
            n_ = std::min(sums_.columns, op_.V - start_);
            padded_ = ceil_div(n_, head_.value.loops->width) * head_.value.loops->width;
            head_.value.pack(0, start_, start_ + n_, panel_.get());
            for (first_row_ = 0; first_row_ < count_; first_row_ += rows_at_once_) walk_rows();
        }
    }

  private:
    // Values, then query by query the changes of some rows in this panel.
    void walk_rows() {
        last_row_ = std::min(first_row_ + rows_at_once_, count_);
        form_values(shift_from(op_.bias));
        for (int64_t q = 0; q < op_.Q; ++q) {
            if (first_row_ == 0) pack_changes(q);
            form_changes(q, shift_from(op_.db ? op_.db + q * op_.db_stride_q : nullptr));
        }
    }

    void form_values(const float* shift) {
        for (int64_t i = first_row_; i < last_row_; i += group_) {
            const int64_t count = std::min(group_, last_row_ - i);
            fetch_after(head_.value, 0, i);
            if (brings_changes(count)) {
                fetch_after(head_.changes[0], 0, i);
                multiply_.both(head_.value, head_.changes[0], row(i), count, panel_.get(), padded_, z(i),
                               sums_.columns);
            } else {
                multiply_(head_.value, 0, row(i), count, panel_.get(), padded_, z(i), sums_.columns, false);
            }
            for (int64_t j = i; j < i + count; ++j) take_values(j, shift);
        }
    }

    // A group that is short goes the longer way: what it leaves free lies between its values and its changes.
    bool brings_changes(int64_t count) const { return count == group_ && head_.values_bring_changes(); }

    void take_values(int64_t i, const float* shift) {
        const HeadRow about = describe(*row(i), static_cast<float>(head_.z_t[*row(i)]), shift);
        if (sums_.after) {
            head_.loops.gaps(about, z(i), raw(i));
        } else {
            rescale_[i] = head_.loops.values(about, z(i), raw(i), sums_.values[part_ * sums_.count + first_ + i]);
        }
    }

    void pack_changes(int64_t q) {
        for (size_t p = 0; p < head_.changes.size(); ++p)
            if (!head_.changes[p].shares_panel) head_.changes[p].pack(q, start_, start_ + n_, own_panels_[p].get());
    }

    void form_changes(int64_t q, const float* shift) {
        for (int64_t i = first_row_; i < last_row_; i += group_) {
            const int64_t count = std::min(group_, last_row_ - i);
            if (head_.changes.empty()) std::fill_n(d_, count * sums_.columns, 0.0f);
            const size_t first = q == 0 && brings_changes(count) ? 1 : 0;
            for (size_t p = first; p < head_.changes.size(); ++p) {
                const Product& change = head_.changes[p];
                const float* panel = change.shares_panel ? panel_.get() : own_panels_[p].get();
                fetch_after(change, q, i);
                multiply_(change, q, row(i), count, panel, padded_, d_, sums_.columns, p > 0);
            }
            for (int64_t j = 0; j < count; ++j) take_changes(q, i + j, d_ + j * sums_.columns, shift);
        }
    }

    void take_changes(int64_t q, int64_t i, float* d, const float* shift) {
        const HeadRow about = describe(*row(i), head_.d_t[q * op_.N + *row(i)], shift);
        const int64_t at = sums_.at(part_, q, first_ + i);
        if (sums_.after) {
            head_.loops.after(about, d, z(i), raw(i), sums_.afters[at]);
        } else {
            head_.loops.changes(about, d, z(i), raw(i), rescale_[i], sums_.changes[at]);
        }
    }

    HeadRow describe(int64_t n, float at_target, const float* shift) const {
        return {n_,
                padded_,
                op_.target[n] - start_,
                at_target,
                static_cast<float>(op_.softcap),
                shift,
                op_.label_smoothing > 0};
    }

    // This panel's part of a bias, padded.
    const float* shift_from(const float* whole) {
        if (!whole) return nullptr;
        std::copy_n(whole + start_, n_, shift_.get());
        std::fill(shift_.get() + n_, shift_.get() + padded_, 0.0f);
        return shift_.get();
    }

    // The rows of the next group lie in a third-level cache: waiting for them cost 2 to 3 % at D = 256.
    void fetch_after(const Product& product, int64_t q, int64_t i) const {
        for (int64_t next = i + group_; next < std::min(i + 2 * group_, last_row_); ++next)
            product.fetch(q, *row(next));
    }

    const int64_t* row(int64_t i) const { return &sums_.rows[first_ + i]; }
    float* z(int64_t i) const { return z_.get() + (i - first_row_) * sums_.columns; }
    float* raw(int64_t i) const { return op_.softcap > 0 ? raw_.get() + (i - first_row_) * sums_.columns : nullptr; }

    Sums& sums_;
    const Head& head_;
    const LinearCrossEntropyDelta& op_;
    const int64_t part_, first_, count_, group_;
    const Multiplier multiply_;
    const Buffer panel_, shift_;
    const int64_t rows_at_once_;
    const Buffer z_, raw_;
    float* const d_;               // behind z_
    std::vector<double> rescale_;  // of the sums before this panel
    std::vector<Buffer> own_panels_;
    int64_t start_ = 0, n_ = 0, padded_ = 0;  // columns of this panel
    int64_t first_row_ = 0, last_row_ = 0;    // rows in hand, counted within the block
};

void walk(Sums& sums) {
    parallel_for(sums.blocks * sums.parts, sums.head.op.threads, [&](int64_t task) { Piece(sums, task).walk(); });
}

// A row's sums, of all parts of the vocabulary in their order, scaled by the largest logit, the target's among them.
class Total {
  public:
    Total(const Sums& sums, int64_t i) : z_t(sums.head.z_t[sums.rows[i]]), sums_(sums), i_(i) {
        for (int64_t part = 0; part < sums.parts; ++part) m = std::max<double>(m, of(part).rest.top);
        if (z_t > m) m = z_t;
        for (int64_t part = 0; part < sums.parts; ++part) {
            scales_.push_back(exp(of(part).rest.top - m));
            rest += of(part).rest.sum * scales_[part];
            gaps += of(part).gaps;
        }
    }

    double s() const { return rest + exp(z_t - m); }

    ChangeSums change(int64_t q) const {
        ChangeSums total;
        for (int64_t part = 0; part < sums_.parts; ++part) {
            const ChangeSums& one = sums_.changes[sums_.at(part, q, i_)];
            total.u += one.u * scales_[part];
            total.moves += one.moves;
            total.largest_step = std::max(total.largest_step, one.largest_step);
        }
        return total;
    }

    const double z_t;
    double m = RowSums().rest.top, rest = 0, gaps = 0;

  private:
    const RowSums& of(int64_t part) const { return sums_.values[part * sums_.count + i_]; }

    const Sums& sums_;
    const int64_t i_;
    std::vector<double> scales_;
};

class Losses {
  public:
    explicit Losses(const Head& head) : head_(head), op_(head.op), sums_(head, head.kept, false) {}

    void write() {
        walk(sums_);
        std::vector<char> large(sums_.rows.size());
        each_row(sums_.count, [&](int64_t i) { large[i] = write_row(i); });
        std::vector<int64_t> far, rows;
        for (int64_t i = 0; i < sums_.count; ++i) {
            if (!large[i]) continue;
            far.push_back(i);
            rows.push_back(sums_.rows[i]);
        }
        Sums after(head_, std::move(rows), true);
        walk(after);
        each_row(after.count, [&](int64_t j) { write_large(far[j], after, j); });
    }

  private:
    template <class Body>
    void each_row(int64_t count, const Body& body) const {
        parallel_for(ceil_div(count, FEW_ROWS), op_.threads, [&](int64_t task) {
            for (int64_t i = task * FEW_ROWS; i < std::min(task * FEW_ROWS + FEW_ROWS, count); ++i) body(i);
        });
    }

    // Loss and small changes; returns whether there is a large one, whose place is left as it was.
    bool write_row(int64_t i) const {
        const Total row(sums_, i);
        op_.base[sums_.rows[i]] = static_cast<float>(loss_of_sums(row.rest, row.m, row.z_t) + smoothing(row.gaps));
        bool large = false;
        for (int64_t q = 0; q < op_.Q; ++q) {
            const ChangeSums change = row.change(q);
            if (is_small_change(change.u, row.s(), change.largest_step)) {
                put(q, i, small_change(change.u, row.s()) + smoothing(change.moves));
            } else {
                large = true;
            }
        }
        return large;
    }

    void write_large(int64_t i, const Sums& after, int64_t j) const {
        const Total row(sums_, i);
        const double g0 = log(row.rest) + (row.m - row.z_t);
        for (int64_t q = 0; q < op_.Q; ++q) {
            const ChangeSums change = row.change(q);
            if (!is_small_change(change.u, row.s(), change.largest_step))
                put(q, i, large_change(g0, log_sum(after, q, j)) + smoothing(change.moves));
        }
    }

    static double log_sum(const Sums& after, int64_t q, int64_t j) {
        double m = RowSums().rest.top, total = 0;
        for (int64_t part = 0; part < after.parts; ++part)
            m = std::max<double>(m, after.afters[after.at(part, q, j)].top);
        for (int64_t part = 0; part < after.parts; ++part) {
            const ScaledSum& one = after.afters[after.at(part, q, j)];
            total += one.sum * exp(one.top - m);
        }
        return log(total) + m;
    }

    double smoothing(double sum) const {
        return op_.label_smoothing > 0 ? smoothing_term(op_.label_smoothing, 0.0, sum / static_cast<double>(op_.V)) : 0;
    }

    void put(int64_t q, int64_t i, double change) const {
        op_.delta[q * op_.delta_stride_q + sums_.rows[i]] = static_cast<float>(change);
    }

    const Head& head_;
    const LinearCrossEntropyDelta& op_;
    Sums sums_;
};

void check(const LinearCrossEntropyDelta& op) {
    const bool some = op.N > 0;
    require_size("N", op.N);
    require_size("D", op.D);
    require_size("V", op.V, some ? 1 : 0);
    require_size("Q", op.Q);
    require_size("r", op.r);
    require_size("delta_stride_q", op.delta_stride_q, op.Q > 1 ? op.N : 0);
    require_size("threads", op.threads, 1);
    require(op.softcap >= 0, "softcap", "above 0, or 0 for none", op.softcap);
    require(op.label_smoothing >= 0 && op.label_smoothing <= 1, "label_smoothing", "0 to 1", op.label_smoothing);
    require_memory("x", op.x, some && op.D > 0);
    require_memory("W", op.W, some && op.D > 0);
    require_memory("target", op.target, some);
    require_memory("base", op.base, some);
    require_memory("delta", op.delta, some && op.Q > 0);
    require_memory("R", op.R, some && op.U && op.Q * op.r * op.D > 0);
}

void write_ignored(const LinearCrossEntropyDelta& op) {
    for (int64_t n = 0; n < op.N; ++n) {
        if (op.target[n] != op.ignore_index) continue;
        op.base[n] = 0.0f;
        for (int64_t q = 0; q < op.Q; ++q) op.delta[q * op.delta_stride_q + n] = 0.0f;
    }
}

}  // namespace

void linear_cross_entropy_delta(const LinearCrossEntropyDelta& op) {
    check(op);
    check_targets(op.target, op.N, op.V, op.ignore_index);
    write_ignored(op);
    Losses(Head(op)).write();
}

}  // namespace finf
