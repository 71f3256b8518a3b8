#include "topk_merge.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "isa/kernels.h"
#include "parallel.h"

namespace finf {
namespace {

// Candidates gathered before they are sorted in; at least K, so that sorting stays cheap beside looking.
constexpr int64_t LEAST_GATHERED = 256;
// Scores that are worth another thread, which takes longer to wake than these to look at.
constexpr int64_t WORTH_WAKING = 1 << 14;
// Of a query's, for each of its places, that are worth a list of their own, which has to be joined with the others.
constexpr int64_t WORTH_A_LIST = 16;

template <class T>
struct Entry {
    T value;
    int64_t index;

    // An empty place has index -1, the largest unsigned one, and so comes after a real score of -inf.
    bool operator<(const Entry& other) const {
        if (value != other.value) return value > other.value;
        return static_cast<uint64_t>(index) < static_cast<uint64_t>(other.index);
    }
};

int64_t passed_over(const float* scores, int64_t count, float worst) {
    return kernels().topk_merge->passed_over_f32(scores, count, worst);
}
int64_t passed_over(const double* scores, int64_t count, double worst) {
    return kernels().topk_merge->passed_over_f64(scores, count, worst);
}

// The list of a row, while scores come; or of a stretch of a row, empty at first and without what the row's own list
// would not take.
template <class T>
class Running {
  public:
    Running(const TopKMerge& op, int64_t q, bool whole)
        : values_(static_cast<T*>(op.values) + q * op.K), indices_(op.indices + q * op.K), kept_(op.K, EMPTY) {
        if (!whole) bar_ = {values_[op.K - 1], indices_[op.K - 1]};
        for (int64_t k = 0; whole && k < op.K; ++k) kept_[k] = {values_[k], indices_[k]};
        room_ = static_cast<size_t>(std::max(op.K, LEAST_GATHERED));
    }

    void add(const T* scores, int64_t S, int64_t start) {
        for (int64_t s = 0; (s += passed_over(scores + s, S - s, worst().value)) < S; s += GLANCE) {
            gather(scores + s, std::min(GLANCE, S - s), start + s);
        }
        merge();
    }

    void add(const Running& stretch) {
        for (const Entry<T>& entry : stretch.kept_) {
            if (entry.index < 0) break;
            found_.push_back(entry);
        }
        merge_sorted();
    }

    void store() const {
        for (size_t k = 0; k < kept_.size(); ++k) {
            values_[k] = kept_[k].value;
            indices_[k] = kept_[k].index;
        }
    }

  private:
    static constexpr Entry<T> EMPTY = {-std::numeric_limits<T>::infinity(), -1};

    Entry<T> worst() const { return std::min(kept_.back(), bar_); }

    void gather(const T* scores, int64_t count, int64_t index) {
        const Entry<T> worst = this->worst();
        for (int64_t s = 0; s < count; ++s) {
            const Entry<T> entry = {scores[s], index + s};
            const bool is_nan = entry.value != entry.value;
            if (!is_nan && entry < worst) found_.push_back(entry);
        }
        if (found_.size() >= room_) merge();
    }

    void merge() {
        std::sort(found_.begin(), found_.end());
        merge_sorted();
    }

    void merge_sorted() {
        if (found_.empty()) return;
        std::vector<Entry<T>> both(kept_.size() + found_.size());
        std::merge(kept_.begin(), kept_.end(), found_.begin(), found_.end(), both.begin());
        std::copy_n(both.begin(), kept_.size(), kept_.begin());
        found_.clear();
    }

    T* values_;
    int64_t* indices_;
    std::vector<Entry<T>> kept_, found_;
    Entry<T> bar_ = EMPTY;
    size_t room_ = 0;
};

template <class T>
bool is_sorted(const T* values, const int64_t* indices, int64_t K) {
    for (int64_t k = 0; k < K; ++k) {
        if (values[k] != values[k]) return false;
        if (k > 0 && Entry<T>{values[k], indices[k]} < Entry<T>{values[k - 1], indices[k - 1]}) return false;
    }
    return true;
}

template <class T>
void merge_all(const TopKMerge& op) {
    for (int64_t q = 0; q < op.Q; ++q) {
        if (!is_sorted(static_cast<const T*>(op.values) + q * op.K, op.indices + q * op.K, op.K))
            reject("values", "each row sorted, best first, without NaN", "row " + std::to_string(q) + " out of order");
    }
    const int64_t threads = std::min(op.threads, 1 + op.Q * op.S / WORTH_WAKING);
    const int64_t parts = std::clamp<int64_t>(op.S / (WORTH_A_LIST * op.K), 1, std::max<int64_t>(1, threads / op.Q));
    const int64_t step = (op.S / parts / GLANCE + 1) * GLANCE;
    std::vector<std::optional<Running<T>>> lists(parts > 1 ? op.Q * parts : 0);
    parallel_for(op.Q * parts, threads, [&](int64_t task) {
        const int64_t q = task / parts, part = task % parts, first = std::min(op.S, part * step);
        const T* scores = static_cast<const T*>(op.scores) + q * op.scores_stride_q;
        Running<T> running(op, q, part == 0);
        running.add(scores + first, std::min(step, op.S - first), op.start + first);
        if (parts == 1) return running.store();
        lists[task] = std::move(running);
    });
    for (int64_t q = 0; q < op.Q && parts > 1; ++q) {
        for (int64_t part = 1; part < parts; ++part) lists[q * parts]->add(*lists[q * parts + part]);
        lists[q * parts]->store();
    }
}

void check(const TopKMerge& op) {
    require_size("Q", op.Q);
    require_size("K", op.K);
    require_size("S", op.S);
    require_size("start", op.start);
    require_size("scores_stride_q", op.scores_stride_q);
    require_size("threads", op.threads, 1);
    const bool any = op.Q > 0 && op.K > 0;
    require_memory("values", op.values, any);
    require_memory("indices", op.indices, any);
    require_memory("scores", op.scores, any && op.S > 0);
}

}  // namespace

void topk_merge(const TopKMerge& op) {
    check(op);
    if (op.K == 0 || op.Q == 0) return;
    if (op.dtype == DType::f64) {
        merge_all<double>(op);
    } else {
        merge_all<float>(op);
    }
}

}  // namespace finf
