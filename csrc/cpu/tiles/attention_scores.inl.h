// The first half of attention_delta's loops: tiles of keys and values, and the scores of a block of rows with their
// changes. Included inside an instruction set's namespace.
#pragma once

#include "activations.inl.h"
#include "elements.inl.h"
#include "small_product.inl.h"

namespace attention {

constexpr int64_t ROWS = finf::ATTENTION_ROWS;
// Keys of a tile: 16 KiB of scores, which with as much of queries or values stay in a first-level cache of 48.
constexpr int64_t KEYS = 64;
// Rows of keys or values that are asked for ahead: heads that lie side by side keep a row's next one far away.
constexpr int64_t AHEAD = 8;
// A score this far below the largest so far is one that a mask has pushed there, by the lowest float32 as a rule.
constexpr float HIDDEN = -1e30f;
// What a mask adds to a score to push it that far down, whatever the score.
constexpr float UNSEEN = -1e38f;
constexpr float INF = __builtin_huge_valf();
alignas(64) constexpr float LANES_FROM_0[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Hands out pieces of one allocation; of none, to learn how much is needed.
class Pieces {
  public:
    explicit Pieces(float* first) : first_(first) {}
    float* take(int64_t count) {
        float* piece = first_ ? first_ + taken_ : nullptr;
        taken_ += finf::vectors(count);
        return piece;
    }
    int64_t taken() const { return taken_; }

  private:
    float* first_;
    int64_t taken_ = 0;
};

// Lanes are rows of queries, so "x ROWS" is the inner dimension. What belongs to queries lies one query after another.
struct Room {
    float *q0, *dq, *q1;            // E x ROWS, times the scale
    float *k, *v;                   // stacks of KEYS x keys' and values' width
    float *s, *p, *ds, *w;          // KEYS x ROWS: scores, weights, gains and e^g p, expm1(g) p
    float* uncapped;                // KEYS x ROWS, with a soft cap: scores before it over the cap
    float *n0, *n, *after;          // values' width x ROWS: sums before, changes of the sums, sums of the second walk
    float *m, *d0, *fresh;          // ROWS: largest score, sum, and what a tile adds to it
    float *lead, *shrink;           // ROWS: the tile's key that leads now, or -1; e^(m before - m)
    float *back, *gained, *fresh1;  // ROWS: -c, sum of p expm1(g) over a tile, and of p e^g
    float *shift, *b, *d, *d1, *large;  // ROWS: ds_j, b, D, D1, 1 where the second walk is needed
    float *low, *high;                  // ROWS, with segments: first and one past last key of the tile that is a row's
};

int64_t moving(const HeadStack& stack, int64_t Q) { return stack.moves ? Q : 0; }

Room furnish(const Attention& op, Pieces& all) {
    const int64_t E = op.E, Ek = finf::vectors(op.E), Ev = finf::vectors(op.Ev), tile = KEYS * ROWS;
    const int64_t moves = op.q.moves || op.k.moves ? op.Q : 0;
    Room room;
    room.q0 = all.take(E * ROWS);
    room.dq = all.take(moving(op.q, op.Q) * E * ROWS);
    room.q1 = all.take(op.k.moves ? moving(op.q, op.Q) * E * ROWS : 0);
    room.k = all.take((1 + moving(op.k, op.Q)) * KEYS * Ek);
    room.v = all.take((1 + moving(op.v, op.Q)) * KEYS * Ev);
    for (float** each : {&room.s, &room.p, &room.ds, &room.w}) *each = all.take(tile);
    room.uncapped = all.take(op.softcap > 0 ? tile : 0);
    room.n0 = all.take(Ev * ROWS);
    room.n = all.take(op.Q * Ev * ROWS);
    room.after = all.take(moves ? Ev * ROWS : 0);
    for (float** each : {&room.m, &room.d0, &room.fresh, &room.lead, &room.shrink}) *each = all.take(ROWS);
    for (float** each : {&room.back, &room.gained, &room.fresh1}) *each = all.take(ROWS);
    for (float** each : {&room.shift, &room.b, &room.d, &room.d1, &room.large}) *each = all.take(moves * ROWS);
    for (float** each : {&room.low, &room.high}) *each = all.take(op.cu_seqlens ? ROWS : 0);
    return room;
}

FINF_INLINE void fill(float* x, float value, int64_t count) {
    for (int64_t i = 0; i < count; ++i) x[i] = value;
}

// body(lane) for every vector of lanes.
template <class Body>
FINF_INLINE void each_lane(int64_t ld, Body body) {
    for (int64_t lane = 0; lane < ld; lane += Vec::W) body(lane);
}

template <class T>
const T* rows_of(const HeadStack& stack, int64_t k, int64_t b, int64_t h, int64_t t) {
    return static_cast<const T*>(stack.first) + k * stack.stride_q + b * stack.stride_b + h * stack.stride_h +
           t * stack.stride_t;
}

using finf::AttentionMask;
enum class Sight { none, some, all };

// A block of rows of one head, and the tile of keys that passes by.
template <class T>
class Scores {
  protected:
    Scores(const Attention& op, const Room& room, int64_t b, int64_t h, int64_t t0)
        : op_(op),
          room_(room),
          b_(b),
          h_(h),
          t0_(t0),
          rows_(op.T - t0 < ROWS ? op.T - t0 : ROWS),
          ld_((rows_ + Vec::W - 1) / Vec::W * Vec::W),
          Ek_(finf::vectors(op.E)),
          Ev_(finf::vectors(op.Ev)),
          moves_(op.Q > 0 && (op.q.moves || op.k.moves)),
          first_segment_(op.cu_seqlens ? segment(t0) : 0),
          last_segment_(op.cu_seqlens ? segment(t0 + rows_ - 1) : 0) {}

    // Queries, keys and values.
    void take_queries() {
        take_transposed(0, room_.q0);
        for (int64_t n = 0; n < moving(op_.q, op_.Q); ++n) {
            float* dq = room_.dq + n * op_.E * ROWS;
            take_transposed(1 + n, dq);
            if (op_.k.moves)
                for (int64_t i = 0; i < op_.E * ld_; i += Vec::W)
                    store(room_.q1 + n * op_.E * ROWS + i, load(room_.q0 + i) + load(dq + i));
        }
    }
    void take_transposed(int64_t k, float* to) {
        for (int64_t lane = 0; lane < ld_; lane += Vec::W)
            for (int64_t e = 0; e < op_.E; e += Vec::W) {
                Vec x[Vec::W];
                for (int64_t r = 0; r < Vec::W; ++r) x[r] = query(k, lane + r, e) * Vec(op_.scale);
                transpose(x);
                for (int64_t i = 0; i < Vec::W && e + i < op_.E; ++i) store(to + (e + i) * ld_ + lane, x[i]);
            }
    }
    FINF_MEMBER Vec query(int64_t k, int64_t r, int64_t e) const {
        if (r >= rows_) return Vec(0.0f);
        const T* row = rows_of<T>(op_.q, k, b_, h_, t0_ + r) + e;
        __builtin_prefetch(row + Vec::W * op_.q.stride_t);
        return load_up_to(row, op_.E - e, T{});
    }
    void take_tile(const HeadStack& stack, int64_t width, int64_t ld, float* to) {
        const int64_t head = h_ / (op_.H / op_.Hk);
        for (int64_t k = 0; k <= moving(stack, op_.Q); ++k)
            for (int64_t key = 0; key < count_; ++key) {
                const T* row = rows_of<T>(stack, k, b_, head, key0_ + key);
                const int64_t ahead = AHEAD * stack.stride_t;
                float* at = to + (k * KEYS + key) * ld;
                each_vector(width, [&](int64_t v, int64_t count) FINF_LAMBDA {
                    __builtin_prefetch(row + ahead + v);
                    store(at + v, load_up_to(row + v, count, T{}));
                });
            }
    }

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
            take_tile(op_.k, op_.E, Ek_, room_.k);
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
    // How many of the tile's keys the lanes [lane, lane + W) see; what lies behind them is neither written nor read.
    int64_t seen(int64_t lane) const {
        const int64_t reach = t0_ + lane + Vec::W - key0_;
        return !op_.causal || reach > count_ ? count_ : reach < 0 ? 0 : reach;
    }
    bool on_diagonal() const { return op_.causal && key0_ + count_ > t0_ + 1; }
    // The first vector of lanes that sees a key of the tile.
    int64_t first_lane(int64_t key) const {
        const int64_t ahead = key0_ + key - t0_;
        return op_.causal && ahead > 0 ? ahead / Vec::W * Vec::W : 0;
    }

    // Scores.
    void multiply_keys(const Term* terms, int count, float* out) {
        constexpr int64_t GROUP = WIDE * Vec::W;  // its queries stay in the first-level cache
        for (int64_t lane = 0; lane < ld_; lane += GROUP) {
            const int64_t end = lane + GROUP < ld_ ? lane + GROUP : ld_;
            for (int64_t key = 0; key < count_; key += TALL) {
                Term at[2];
                for (int t = 0; t < count; ++t) at[t] = {terms[t].a + key * Ek_, terms[t].b, op_.E};
                const int64_t first = first_lane(key), begin = first < lane ? lane : first;
                product_rows<Lies::rows, false>(at, count, Ek_, ld_, begin, end, out + key * ld_);
            }
        }
    }
    // Whether some row sees a key of the tile; only then its values are taken.
    bool score() {
        const Term value = {room_.k, room_.q0, op_.E};
        multiply_keys(&value, 1, room_.s);
        if (op_.softcap > 0) cap();
        if (first_segment_ != last_segment_) separate();
        if (sight_ == Sight::some && !mask()) return false;
        take_tile(op_.v, op_.Ev, Ev_, room_.v);
        return true;
    }
    // dq k0 + q1 dk
    void score_change(int64_t n) {
        const int64_t E = op_.E;
        Term terms[2];
        int count = 0;
        if (op_.q.moves) terms[count++] = {room_.k, room_.dq + n * E * ROWS, E};
        if (op_.k.moves) {
            const float* q1 = op_.q.moves ? room_.q1 + n * E * ROWS : room_.q0;
            terms[count++] = {room_.k + (1 + n) * KEYS * Ek_, q1, E};
        }
        multiply_keys(terms, count, room_.ds);
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
            store(room_.s + i, c * Sigmoid<2>::of(h).f);
        });
    }
    void cap_change() {
        const Vec c(op_.softcap);
        each_score([&](int64_t i) FINF_LAMBDA {
            const Vec h = load(room_.uncapped + i), d = load(room_.ds + i) / c;
            const Prepared at = Sigmoid<2>::of(h);
            Vec change = Sigmoid<2>::by_series(at, d);
            if (!all_at_most(abs(d), at.limit)) change = mended<Sigmoid<2>>(change, at.limit, h, d);
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

    const Attention& op_;
    const Room& room_;
    const int64_t b_, h_, t0_, rows_, ld_, Ek_, Ev_;
    const bool moves_;  // whether scores do
    const int64_t first_segment_, last_segment_;
    int64_t key0_ = 0, count_ = 0;  // the tile
    Sight sight_ = Sight::all;
};

}  // namespace attention
