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
// Weights are summed as they are multiplied: where products round them, sums do.
//
// After a large change, one softmax less the other loses nothing, and a second walk takes it.
#pragma once

#include "attention_products.inl.h"
#include "attention_scores.inl.h"

namespace attention {

// Past this gain the second walk is taken. A key whose p is zero in float32, below e^-87, counts for less than e^-27
// after it, and e^64 p stays far inside the range.
constexpr float LARGEST_GAIN = 60.0f, CAPPED_GAIN = 64.0f;
// So is it past this D1, e^60: what a key has gained on one leader, and that one on the next, are factors of it.
constexpr float LARGEST_SUM = 1e26f;
// A key this far behind the leading one after the change counts for nothing, however much it has gained.
constexpr float OUT_OF_SIGHT = -40.0f;
// Where so little of D0 is left, N - y D is a small difference of large sums.
constexpr float LEAST_LEFT = 1.0f / 16;

// A block of rows of one head, from its queries to its results.
template <class Products>
class Block : Scores<Products> {
  public:
    Block(const Attention& op, const Room& room, int64_t b, int64_t h, int64_t t0) : Base(op, room, b, h, t0) {}

    void attend() {
        take_queries();
        start();
        walk([&] { add_tile(); });
        finish();
    }

  private:
    using Base = Scores<Products>;
    using T = typename Products::Number;
    using Base::add_values;
    using Base::b_;
    using Base::count_;
    using Base::each_score;
    using Base::Ev_;
    using Base::finite;
    using Base::h_;
    using Base::key0_;
    using Base::ld_;
    using Base::moves_;
    using Base::op_;
    using Base::room_;
    using Base::rows_;
    using Base::score;
    using Base::score_change;
    using Base::seen;
    using Base::t0_;
    using Base::take_queries;
    using Base::walk;

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
        const Weighted value = {0, room_.p};
        add_values(&value, 1, room_.n0);
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

    // p and its sum over the tile.
    void weigh() {
        each_lane(ld_, [&](int64_t lane) FINF_LAMBDA {
            const Vec m = finite(load(room_.m + lane));
            const int64_t end = seen(lane);
            Vec total(0.0f);
            for (int64_t key = 0; key < end; ++key) {
                const Vec p = Base::held(exp_of(load(room_.s + key * ld_ + lane) - m));
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
    // Changes.
    void add_change(int64_t n, bool turned) {
        float* sums = room_.n + n * Ev_ * ROWS;
        Weighted terms[2];
        int count = 0;
        if (moves_) {
            score_change(n);
            if (turned) follow(n);
            gain(n);
            if (turned) settle(n, sums);
            centre(n);
            terms[count++] = {0, room_.w};
        } else if (turned) {
            shrink(sums);
        }
        if (op_.v.moves) terms[count++] = {1 + n, moves_ ? room_.ds : room_.p};
        add_values(terms, count, sums);
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
                const Vec after = Base::held(p + w);
                gained = gained + w;
                d1 = d1 + after;
                store(room_.w + at, w);
                store(room_.ds + at, after);
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
                const Vec w = Base::held(fma(less, load(room_.p + at), load(room_.w + at)));
                d = d + w;
                store(room_.w + at, w);
            }
            for (int64_t at = end; at < count_ * ld_; at += ld_) store(room_.w + at, Vec(0.0f));
            store(room_.d + i, load(room_.d + i) + d);
            const Vec d1 = load(room_.d1 + i) + load(room_.fresh1 + lane);
            store(room_.d1 + i, d1);
            store(room_.large + i, select_less(Vec(LARGEST_SUM), d1, Vec(1.0f), load(room_.large + i)));
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
        const Weighted terms[2] = {{0, room_.p}, {1 + n, room_.p}};
        add_values(terms, op_.v.moves ? 2 : 1, sums);
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
};

template <class Products>
int64_t room(const Attention& op) {
    Pieces all(nullptr);
    furnish(op, Products::SPLIT, all);
    return all.taken();
}

template <class Products>
void attend(const Attention& op, int64_t begin, int64_t end, float* first) {
    Pieces all(first);
    const Room room = furnish(op, Products::SPLIT, all);
    const int64_t blocks = finf::attention_blocks(op);
    Products::begin();
    for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / blocks, block = blocks - 1 - i % blocks;
        Block<Products>(op, room, head / op.H, head % op.H, block * ROWS).attend();
    }
    Products::end();
}

template <class Products>
constexpr finf::AttentionLoops loops_of() {
    return {room<Products>, attend<Products>};
}

}  // namespace attention

const finf::AttentionLoops ATTENTION_DELTA[] = {attention::loops_of<attention::VectorProducts<float>>(),
                                                attention::loops_of<attention::VectorProducts<Bf16>>()};
