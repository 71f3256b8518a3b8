// The loops of attention_delta, written once over Vec and included inside each instruction set's namespace.
//
// A block of rows of queries lies across the lanes; keys and values pass by in tiles, as in an online softmax. With s
// the scores, m the largest so far, j its key, p = e^(s - m), and g = ds - ds_j what a key gains on j, the change of
// p / sum p is p (expm1(g) - u) / sum p e^g with u the mean of expm1(g) under p. A softmax does not feel that g is
// counted from j; j itself then gains exactly 0, so that a row which looks at hardly anything else keeps the digits of
// what little moves. A row's sums are
//     N0 = sum p v0     N = sum (p (expm1(g) - b) v0 + p e^g dv)
//     D0 = sum p        D = sum  p (expm1(g) - b)                  D1 = sum p e^g
// and in the end y = N0 / D0 and its change is (N - y D) / D1, whatever b is: with b near u, N and y D are no large
// numbers of which little is left. When a tile brings a new j, whose change lies c above the old one's, b becomes what
// u looks like from there and the sums follow exactly:
//     N <- e^-c N + (e^-c b + expm1(-c) - new b) N0, the same with D for N     D1 <- e^-c D1
//
// After a large change, one softmax less the other loses nothing, and a second walk takes it.
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
// Past this gain the second walk is taken. A key whose p is zero in float32, below e^-87, counts for less than e^-27
// after it, and e^64 p stays far inside the range.
constexpr float LARGEST_GAIN = 60.0f, CAPPED_GAIN = 64.0f;
// A key this far behind the leading one after the change counts for nothing, however much it has gained.
constexpr float OUT_OF_SIGHT = -40.0f;
// Where so little of D0 is left, N - y D is a small difference of large sums.
constexpr float LEAST_LEFT = 1.0f / 16;
// A score this far below the largest so far is one that a mask has pushed there, by the lowest float32 as a rule.
constexpr float HIDDEN = -1e30f;
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

// A block of rows of one head.
template <class T>
class Block {
  public:
    Block(const Attention& op, const Room& room, int64_t b, int64_t h, int64_t t0)
        : op_(op),
          room_(room),
          b_(b),
          h_(h),
          t0_(t0),
          rows_(op.T - t0 < ROWS ? op.T - t0 : ROWS),
          ld_((rows_ + Vec::W - 1) / Vec::W * Vec::W),
          Ek_(finf::vectors(op.E)),
          Ev_(finf::vectors(op.Ev)),
          moves_(op.Q > 0 && (op.q.moves || op.k.moves)) {}

    void attend() {
        take_queries();
        start();
        walk([&] { add_tile(); });
        finish();
    }

  private:
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

    // Calls add() for every tile that some row sees.
    template <class Add>
    void walk(Add add) {
        const int64_t last = t0_ + rows_, end = op_.causal && last < op_.Tk ? last : op_.Tk;
        for (key0_ = 0; key0_ < end; key0_ += KEYS) {
            count_ = end - key0_ < KEYS ? end - key0_ : KEYS;
            take_tile(op_.k, op_.E, Ek_, room_.k);
            add();
        }
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
        if (op_.mask.first && !mask()) return false;
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
            store(room_.s + i, c * Tanh::of(h).f);
        });
    }
    void cap_change() {
        const Vec c(op_.softcap);
        each_score([&](int64_t i) FINF_LAMBDA {
            const Vec h = load(room_.uncapped + i), d = load(room_.ds + i) / c;
            const Prepared at = Tanh::of(h);
            const Vec change = select_less(Vec(Tanh::REACH), Tanh::reach(at, d), Tanh::far(h, d), Tanh::near(at, d));
            store(room_.ds + i, c * change);
        });
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
        const auto& mask = op_.mask;
        const int64_t at =
            b_ * mask.stride_b + h_ * mask.stride_h + (t0_ + r) * mask.stride_t + (key0_ + key) * mask.stride_k;
        if (r >= rows_) {
            s = -INF;
        } else if (!mask.boolean) {
            s += static_cast<const float*>(mask.first)[at];
        } else if (!static_cast<const uint8_t*>(mask.first)[at]) {
            s = -INF;
        }
    }

    // The softmax.
    void start() {
        fill(room_.m, -INF, ROWS);
        fill(room_.d0, 0.0f, ROWS);
        fill(room_.n0, 0.0f, Ev_ * ROWS);
        fill(room_.n, 0.0f, op_.Q * Ev_ * ROWS);
        if (!moves_) return;
        for (float* each : {room_.shift, room_.b, room_.d, room_.d1, room_.large}) fill(each, 0.0f, op_.Q * ROWS);
    }
    void add_tile() {
        if (!score()) return;
        const bool turned = find_leaders();
        weigh();
        for (int64_t n = 0; n < op_.Q; ++n) add_change(n, turned);
        if (turned) shrink(room_.n0);
        add_fresh(room_.d0);
        const Term value = {room_.v, room_.p, count_};
        multiply_values(&value, 1, room_.n0);
    }
    void add_fresh(float* total) {
        each_lane(ld_, [&](int64_t lane) FINF_LAMBDA {
            store(total + lane, fma(load(total + lane), load(room_.shrink + lane), load(room_.fresh + lane)));
        });
    }
    // Hides what lies behind the diagonal, and moves m to the largest score; whether it moved anywhere.
    bool find_leaders() {
        bool turned = false;
        each_lane(ld_, [&](int64_t lane) FINF_LAMBDA {
            const bool hides = op_.causal && key0_ + count_ > t0_ + lane + 1;
            const Vec row = load(LANES_FROM_0) + Vec(static_cast<float>(t0_ + lane - key0_));
            Vec best(-INF), lead(-1.0f);
            for (int64_t key = 0, end = seen(lane); key < end; ++key) {
                float* at = room_.s + key * ld_ + lane;
                const Vec k(static_cast<float>(key));
                if (hides) store(at, select_less(row, k, Vec(-INF), load(at)));
                const Vec s = load(at);
                lead = select_less(best, s, k, lead);
                best = max(best, s);
            }
            const Vec old = load(room_.m + lane), m = select_less(old, best, best, old);
            lead = select_less(old, best, lead, Vec(-1.0f));
            turned |= !all_at_most(lead, -1.0f);
            store(room_.lead + lane, lead);
            store(room_.shrink + lane, exp_of(finite(old) - finite(m)));
            store(room_.m + lane, m);
        });
        return turned;
    }
    // A row that has seen nothing yet has m at -inf, from which nothing can be taken away.
    static FINF_MEMBER Vec finite(Vec m) { return max(Vec(-FLT_MAX), m); }

    // p and its sum over the tile.
    void weigh() {
        each_lane(ld_, [&](int64_t lane) FINF_LAMBDA {
            const Vec m = finite(load(room_.m + lane));
            const int64_t end = seen(lane);
            Vec total(0.0f);
            for (int64_t key = 0; key < end; ++key) {
                const Vec p = exp_of(load(room_.s + key * ld_ + lane) - m);
                store(room_.p + key * ld_ + lane, p);
                total = total + p;
            }
            for (int64_t key = end; key < count_; ++key) store(room_.p + key * ld_ + lane, Vec(0.0f));
            store(room_.fresh + lane, total);
        });
    }
    void shrink(float* sums) {
        each_lane(ld_, [&](int64_t lane) FINF_LAMBDA {
            const Vec by = load(room_.shrink + lane);
            for (int64_t e = 0; e < op_.Ev; ++e) store(sums + e * ld_ + lane, load(sums + e * ld_ + lane) * by);
        });
    }
    void multiply_values(const Term* terms, int count, float* sums) {
        // Behind the diagonal p is zero; two vectors of lanes at a time save a part of that.
        const int64_t step = (on_diagonal() ? 2 : WIDE) * Vec::W;
        for (int64_t lane = 0; lane < ld_; lane += step) {
            const int64_t end = lane + step < ld_ ? lane + step : ld_, keys = seen(end - Vec::W);
            for (int64_t e = 0; e < op_.Ev; e += TALL) {
                Term at[2];
                for (int t = 0; t < count; ++t) at[t] = {terms[t].a + e, terms[t].b, keys};
                product_rows<Lies::columns, true>(at, count, Ev_, ld_, lane, end, sums + e * ld_);
            }
        }
    }

    // Changes.
    void add_change(int64_t n, bool turned) {
        float* sums = room_.n + n * Ev_ * ROWS;
        Term terms[2];
        int count = 0;
        if (moves_) {
            score_change(n);
            if (turned) follow(n);
            gain(n);
            if (turned) settle(n, sums);
            centre(n);
            terms[count++] = {room_.v, room_.w, count_};
        } else if (turned) {
            shrink(sums);
        }
        if (op_.v.moves) terms[count++] = {room_.v + (1 + n) * KEYS * Ev_, moves_ ? room_.ds : room_.p, count_};
        multiply_values(terms, count, sums);
    }
    // The new leaders' changes, and -c.
    void follow(int64_t n) {
        float *shift = room_.shift + n * ROWS, *large = room_.large + n * ROWS;
        for (int64_t r = 0; r < ld_; ++r) {
            const float lead = room_.lead[r], old = shift[r];
            if (lead >= 0) shift[r] = room_.ds[static_cast<int64_t>(lead) * ld_ + r];
            room_.back[r] = old - shift[r];
            if (room_.back[r] > LARGEST_GAIN && room_.d0[r] > 0) large[r] = 1.0f;
        }
    }
    static FINF_MEMBER Vec at_most(float bound, Vec x) { return select_less(Vec(bound), x, Vec(bound), x); }

    // p expm1(g) into w, p e^g in place of ds, and their sums.
    void gain(int64_t n) {
        each_lane(ld_, [&](int64_t lane) FINF_LAMBDA {
            const int64_t i = n * ROWS + lane, end = seen(lane) * ld_ + lane;
            const Vec shift = load(room_.shift + i), m = finite(load(room_.m + lane));
            Vec gained(0.0f), d1(0.0f), largest(-INF);
            for (int64_t at = lane; at < end; at += ld_) {
                const Vec g = load(room_.ds + at) - shift, p = load(room_.p + at);
                Vec w;
                if (all_at_most(abs(g), SHORT_REACH)) {
                    w = p * short_expm1_of(g);
                } else {
                    w = p * expm1_of(at_most(CAPPED_GAIN, g));
                    const Vec after = load(room_.s + at) - m + g;
                    largest = max(largest, select_less(Vec(OUT_OF_SIGHT), after, g, Vec(-INF)));
                }
                gained = gained + w;
                d1 = d1 + (p + w);
                store(room_.w + at, w);
                store(room_.ds + at, p + w);
            }
            for (int64_t at = end; at < count_ * ld_; at += ld_) store(room_.ds + at, Vec(0.0f));
            store(room_.gained + lane, gained);
            store(room_.fresh1 + lane, d1);
            store(room_.large + i, select_less(Vec(LARGEST_GAIN), largest, Vec(1.0f), load(room_.large + i)));
        });
    }
    // What the sums before the tile become under its leaders.
    void settle(int64_t n, float* sums) {
        each_lane(ld_, [&](int64_t lane) FINF_LAMBDA {
            const Vec lead = load(room_.lead + lane);
            if (all_at_most(lead, -1.0f)) return;
            const int64_t i = n * ROWS + lane;
            const Vec d0 = load(room_.d0 + lane), shrink = load(room_.shrink + lane), b = load(room_.b + i);
            const Vec back = at_most(CAPPED_GAIN, load(room_.back + lane)), keep = shrink * exp_of(back);
            const Vec moved = fma(keep, b, shrink * expm1_of(back));  // (e^-c b + expm1(-c)) e^(m before - m)
            const Vec gained = fma(keep, load(room_.d + i), moved * d0) + load(room_.gained + lane);
            const Vec mean = gained * inverse(fma(shrink, d0, load(room_.fresh + lane)));
            const Vec fresh = select_less(lead, Vec(0.0f), b, mean), mix = moved - shrink * fresh;
            store(room_.b + i, fresh);
            store(room_.d1 + i, keep * load(room_.d1 + i));
            store(room_.d + i, fma(keep, load(room_.d + i), mix * d0));
            for (int64_t at = lane; at < op_.Ev * ld_; at += ld_)
                store(sums + at, fma(keep, load(sums + at), mix * load(room_.n0 + at)));
        });
    }
    // p (expm1(g) - b) in w, and the tile's share of D and D1.
    void centre(int64_t n) {
        each_lane(ld_, [&](int64_t lane) FINF_LAMBDA {
            const int64_t i = n * ROWS + lane, end = seen(lane) * ld_ + lane;
            const Vec less = Vec(0.0f) - load(room_.b + i);
            Vec d(0.0f);
            for (int64_t at = lane; at < end; at += ld_) {
                const Vec w = fma(less, load(room_.p + at), load(room_.w + at));
                d = d + w;
                store(room_.w + at, w);
            }
            for (int64_t at = end; at < count_ * ld_; at += ld_) store(room_.w + at, Vec(0.0f));
            store(room_.d + i, load(room_.d + i) + d);
            store(room_.d1 + i, load(room_.d1 + i) + load(room_.fresh1 + lane));
        });
    }

    // Results.
    void finish() {
        each_lane(ld_, [&](int64_t lane) FINF_LAMBDA {
            const Vec by = inverse(load(room_.d0 + lane));
            for (int64_t e = 0; e < op_.Ev; ++e) store(room_.n0 + e * ld_ + lane, load(room_.n0 + e * ld_ + lane) * by);
        });
        write(0, room_.n0);
        for (int64_t n = 0; n < op_.Q; ++n) {
            float* change = room_.n + n * Ev_ * ROWS;
            if (divide(n, change)) walk_after(n, change);
            write(1 + n, change);
        }
    }
    // 0 for the sum of a row that sees nothing; any other has a leader, which brings 1 to it, or is NaN.
    static FINF_MEMBER Vec inverse(Vec sum) { return select_less(sum, Vec(FLT_MIN), Vec(0.0f), Vec(1.0f) / sum); }
    // (N - y D) / D1 in place of N; whether some row needs the second walk, which `large` then says for each.
    bool divide(int64_t n, float* sums) {
        bool any = false;
        each_lane(ld_, [&](int64_t lane) FINF_LAMBDA {
            const int64_t i = n * ROWS + lane;
            const Vec d0 = load(room_.d0 + lane);
            const Vec d = moves_ ? load(room_.d + i) : Vec(0.0f), d1 = moves_ ? load(room_.d1 + i) : d0;
            const Vec by = inverse(d1);
            for (int64_t at = lane; at < op_.Ev * ld_; at += ld_)
                store(sums + at, (load(sums + at) - load(room_.n0 + at) * d) * by);
            if (!moves_) return;
            const Vec large = select_less(d1, Vec(LEAST_LEFT) * d0, Vec(1.0f), load(room_.large + i));
            store(room_.large + i, large);
            any |= !all_at_most(large, 0.0f);
        });
        return any;
    }
    // The softmax after the change less y, for the rows that `large` marks.
    void walk_after(int64_t n, float* change) {
        float *sums = room_.after, *total = room_.d + n * ROWS;
        fill(room_.m, -INF, ROWS);
        fill(total, 0.0f, ROWS);
        fill(sums, 0.0f, Ev_ * ROWS);
        walk([&] { add_tile_after(n, sums, total); });
        each_lane(ld_, [&](int64_t lane) FINF_LAMBDA {
            const Vec by = inverse(load(total + lane)), large = load(room_.large + n * ROWS + lane);
            for (int64_t at = lane; at < op_.Ev * ld_; at += ld_) {
                const Vec far = load(sums + at) * by - load(room_.n0 + at);
                store(change + at, select_less(Vec(0.0f), large, far, load(change + at)));
            }
        });
    }
    void add_tile_after(int64_t n, float* sums, float* total) {
        if (!score()) return;
        score_change(n);
        each_score([&](int64_t i) FINF_LAMBDA { store(room_.s + i, load(room_.s + i) + load(room_.ds + i)); });
        if (find_leaders()) shrink(sums);
        weigh();
        add_fresh(total);
        const Term terms[2] = {{room_.v, room_.p, count_}, {room_.v + (1 + n) * KEYS * Ev_, room_.p, count_}};
        multiply_values(terms, op_.v.moves ? 2 : 1, sums);
    }
    void write(int64_t k, const float* from) {
        T* to = static_cast<T*>(op_.y) + (((k * op_.B + b_) * op_.H + h_) * op_.T + t0_) * op_.Ev;
        for (int64_t lane = 0; lane < rows_; lane += Vec::W)
            for (int64_t e = 0; e < op_.Ev; e += Vec::W) {
                Vec x[Vec::W];
                for (int64_t i = 0; i < Vec::W; ++i) x[i] = load(from + (e + i) * ld_ + lane);
                transpose(x);
                for (int64_t r = 0; r < Vec::W && lane + r < rows_; ++r)
                    store_up_to(to + (lane + r) * op_.Ev + e, x[r], op_.Ev - e);
            }
    }

    const Attention& op_;
    const Room& room_;
    const int64_t b_, h_, t0_, rows_, ld_, Ek_, Ev_;
    const bool moves_;              // whether scores do
    int64_t key0_ = 0, count_ = 0;  // the tile
};

int64_t room(const Attention& op) {
    Pieces all(nullptr);
    furnish(op, all);
    return all.taken();
}

template <class T>
void attend(const Attention& op, int64_t begin, int64_t end, float* first) {
    Pieces all(first);
    const Room room = furnish(op, all);
    const int64_t blocks = finf::attention_blocks(op);
    for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / blocks, block = blocks - 1 - i % blocks;
        Block<T>(op, room, head / op.H, head % op.H, block * ROWS).attend();
    }
}

}  // namespace attention

const finf::AttentionLoops ATTENTION_DELTA[] = {{attention::room, attention::attend<float>},
                                                {attention::room, attention::attend<Bf16>}};
