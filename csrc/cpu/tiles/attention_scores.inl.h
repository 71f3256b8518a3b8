// The first half of attention_delta's loops: the scores of a block of rows with their changes, and what masks and texts
// hide of them. Included inside an instruction set's namespace.
#pragma once

#include "activations.inl.h"
#include "attention_room.inl.h"

namespace attention {

// A score this far below the largest so far is one that a mask has pushed there, by the lowest float32 as a rule.
constexpr float HIDDEN = -1e30f;
// What a mask adds to a score to push it that far down, whatever the score.
constexpr float UNSEEN = -1e38f;

using finf::AttentionMask;
enum class Sight { none, some, all };

// A block of rows of one head, the tile of keys that passes by, and which of them the rows see.
template <class Products>
class Scores : protected Products {
  protected:
    Scores(const Attention& op, const Room& room, int64_t b, int64_t h, int64_t t0)
        : Products(op, room, b, h, t0),
          moves_(op.Q > 0 && (op.q.moves || op.k.moves)),
          first_segment_(op.cu_seqlens ? segment(t0) : 0),
          last_segment_(op.cu_seqlens ? segment(t0 + rows_ - 1) : 0) {}

    // Calls add() for every tile that some row sees, as far as segments, `causal` and the mask alone can tell.
    template <class Add>
    void walk(Add add) {
        const int64_t begin = op_.cu_seqlens ? op_.cu_seqlens[first_segment_] : 0;
        const int64_t there = op_.cu_seqlens ? op_.cu_seqlens[last_segment_ + 1] : op_.Tk;
        const int64_t last = t0_ + rows_, end = op_.causal && last < there ? last : there;
        for (key0_ = begin; key0_ < end; key0_ += KEYS) {
            count_ = end - key0_ < KEYS ? end - key0_ : KEYS;
            sight_ = sight();
            if (sight_ == Sight::none) continue;
            this->take_keys();
            add();
        }
    }
    // The segment that a row lies in: the last one that begins no later.
    int64_t segment(int64_t t) const {
        int64_t low = 0, high = op_.S;
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (op_.cu_seqlens[middle] <= t ? low : high) = middle;
        }
        return low;
    }
    // What the mask shows of the tile. The lowest float32 hides a key from rows that have seen another.
    Sight sight() const {
        if (!op_.mask.first) return Sight::all;
        if (op_.mask.boolean) return sight_through<uint8_t>([](uint8_t x) { return x != 0; });
        const Sight found = sight_through<float>([](float x) { return !(x <= UNSEEN); });
        if (found != Sight::none || all_have_seen()) return found;
        return sight_through<float>([](float x) { return x != -INF; });
    }
    bool all_have_seen() const {
        bool all = true;
        for (int64_t r = 0; r < rows_; ++r) all &= room_.m[r] > HIDDEN;
        return all;
    }
    template <class X, class Shows>
    Sight sight_through(Shows shows) const {
        const AttentionMask& mask = op_.mask;
        const X* row = static_cast<const X*>(mask.first) + mask_place(0, 0);
        const int64_t rows = mask.stride_t ? rows_ : 1, keys = mask.stride_k ? count_ : 1;
        bool any = false, all = mask.boolean;  // numbers have to be added
        for (int64_t r = 0; r < rows && (all || !any); ++r, row += mask.stride_t) {
            if (mask.stride_k == 1) {  // in vectors
                for (int64_t key = 0; key < keys; ++key) any |= shows(row[key]), all &= shows(row[key]);
            } else {
                for (int64_t key = 0; key < keys; ++key)
                    any |= shows(row[key * mask.stride_k]), all &= shows(row[key * mask.stride_k]);
            }
        }
        return all ? Sight::all : any ? Sight::some : Sight::none;
    }
    int64_t mask_place(int64_t r, int64_t key) const {
        const AttentionMask& mask = op_.mask;
        return b_ * mask.stride_b + h_ * mask.stride_h + (t0_ + r) * mask.stride_t + (key0_ + key) * mask.stride_k;
    }
    // Whether some row sees a key of the tile; only then its values are taken.
    bool score() {
        this->form_scores();
        if (op_.softcap > 0) cap();
        if (first_segment_ != last_segment_) separate();
        if (sight_ == Sight::some && !mask()) return false;
        this->take_values();
        return true;
    }
    void score_change(int64_t n) {
        this->form_changes(n);
        if (op_.softcap > 0) cap_change();
    }
    // body(i) for every vector of the tile's scores that is seen.
    template <class Body>
    FINF_MEMBER void each_score(Body body) {
        each_lane(ld_, [&](int64_t lane) FINF_LAMBDA {
            for (int64_t key = 0, end = seen(lane); key < end; ++key) body(key * ld_ + lane);
        });
    }
    void cap() {
        const Vec c(op_.softcap);
        each_score([&](int64_t i) FINF_LAMBDA {
            const Vec h = load(room_.s + i) / c;
            store(room_.uncapped + i, h);
            store(room_.s + i, c * prepared<Tanh>(h).f);
        });
    }
    void cap_change() {
        const Vec c(op_.softcap);
        each_score([&](int64_t i) FINF_LAMBDA {
            const Vec h = load(room_.uncapped + i), d = load(room_.ds + i) / c;
            Vec change = Tanh::by_series(prepared<Tanh>(h), d);
            if (!all_at_most(abs(d), Vec(Tanh::REACH))) change = mended<Tanh>(change, abs(d), h, d);
            store(room_.ds + i, c * change);
        });
    }
    // Hides the keys of other segments.
    void separate() {
        for (int64_t r = 0, at = first_segment_; r < ld_; ++r) {
            while (at < last_segment_ && op_.cu_seqlens[at + 1] <= t0_ + r) ++at;
            room_.low[r] = inside_tile(op_.cu_seqlens[at]);
            room_.high[r] = inside_tile(op_.cu_seqlens[at + 1]);
        }
        each_lane(ld_, [&](int64_t lane) FINF_LAMBDA {
            const Vec low = load(room_.low + lane), high = load(room_.high + lane);
            for (int64_t key = 0, end = seen(lane); key < end; ++key) {
                float* at = room_.s + key * ld_ + lane;
                const Vec k(static_cast<float>(key));
                store(at, select_less(k, low, Vec(-INF), select_less(k, high, load(at), Vec(-INF))));
            }
        });
    }
    float inside_tile(int64_t key) const {
        const int64_t at = key - key0_;
        return static_cast<float>(at < 0 ? 0 : at > count_ ? count_ : at);
    }
    bool mask() {
        for (int64_t key = 0; key < count_; ++key)
            for (int64_t r = 0; r < ld_; ++r) mask_one(room_.s[key * ld_ + r], key, r);
        bool any = false;
        each_lane(ld_, [&](int64_t lane) FINF_LAMBDA {
            const Vec m = finite(load(room_.m + lane));
            for (int64_t at = lane, end = seen(lane) * ld_ + lane; at < end; at += ld_) {
                const Vec s = load(room_.s + at);
                any |= !(all_at_most(s, -INF) || all_at_most(finite(s) - m, HIDDEN));
            }
        });
        return any;
    }
    FINF_MEMBER void mask_one(float& s, int64_t key, int64_t r) const {
        const AttentionMask& mask = op_.mask;
        if (r >= rows_) {
            s = -INF;
        } else if (!mask.boolean) {
            s += static_cast<const float*>(mask.first)[mask_place(r, key)];
        } else if (!static_cast<const uint8_t*>(mask.first)[mask_place(r, key)]) {
            s = -INF;
        }
    }
    // A row that has seen nothing yet has m at -inf, from which nothing can be taken away.
    static FINF_MEMBER Vec finite(Vec m) { return max(Vec(-FLT_MAX), m); }

    using Products::b_;
    using Products::count_;
    using Products::h_;
    using Products::key0_;
    using Products::ld_;
    using Products::op_;
    using Products::room_;
    using Products::rows_;
    using Products::seen;
    using Products::t0_;

    const bool moves_;  // whether scores do
    const int64_t first_segment_, last_segment_;
    Sight sight_ = Sight::all;
};

}  // namespace attention
