// The loop of attention_delta, written once over Vec and included inside each instruction set's namespace.
//
// A block is ROWS rows of one head; a row is a lane, so nothing is ever summed across a vector. The keys come by in
// tiles, twice: first the products with q alone, for each row's leading key and its score m; then everything. Scores
// are measured against m, changes of scores against the leading key's own: the softmax feels neither shift, the
// exponentials are at most 1, and the leading key adds exactly nothing to the sums of what changes. Per tile
//     p = e^(s - m)   D0 += p   N0 += p v        w = p expm1(ds)   Dd += w   Nd += w v1 + p dv
// and in the end o0 = N0 / D0 and the change (Nd - o0 Dd) / (D0 + Dd). Where a key that counts gains more than FAR on
// the leading one, the row's change is taken again as the difference of two softmaxes.
#include "elements.inl.h"
#include "exponentials.inl.h"

constexpr int64_t ROWS = finf::ATTENTION_ROWS, KEYS = finf::ATTENTION_KEYS;
// A register tile of the products: 24 of AVX-512's 32 registers, 12 of 16 elsewhere.
constexpr int TALL = Vec::W == 16 ? 8 : 4, WIDE = 3;
static_assert(ROWS % (WIDE * Vec::W) == 0 && KEYS % TALL == 0 && finf::ATTENTION_PAD % TALL == 0, "whole tiles");

constexpr float FAR = 20.0f;
// A key whose weight stays under e^-30 of the leading one's counts nowhere in float32.
constexpr float NOTHING = 30.0f;

// c (M, ROWS) = or += a (M, K) b (K, ROWS), a by strides. The K terms are summed before they are added to c, so that no
// sum over all keys is one long chain.
struct Left {
    const float* first;
    int64_t down, along;
};

template <bool ADD>
FINF_INLINE void product_tile(const Left& a, const float* b, float* c, int64_t K) {
    Vec sum[TALL][WIDE];
#pragma GCC unroll 8
    for (int i = 0; i < TALL; ++i)
#pragma GCC unroll 3
        for (int j = 0; j < WIDE; ++j) sum[i][j] = Vec(0.0f);
    for (int64_t k = 0; k < K; ++k) {
        Vec y[WIDE];
#pragma GCC unroll 3
        for (int j = 0; j < WIDE; ++j) y[j] = load(b + k * ROWS + j * Vec::W);
#pragma GCC unroll 8
        for (int i = 0; i < TALL; ++i) {
            const Vec x(a.first[i * a.down + k * a.along]);
#pragma GCC unroll 3
            for (int j = 0; j < WIDE; ++j) sum[i][j] = fma(x, y[j], sum[i][j]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < TALL; ++i)
#pragma GCC unroll 3
        for (int j = 0; j < WIDE; ++j) {
            float* to = c + i * ROWS + j * Vec::W;
            store(to, ADD ? load(to) + sum[i][j] : sum[i][j]);
        }
}

template <bool ADD>
static void product(const Left& a, const float* b, float* c, int64_t M, int64_t K) {
    for (int64_t r = 0; r < ROWS; r += WIDE * Vec::W)
        for (int64_t i = 0; i < M; i += TALL)
            product_tile<ADD>({a.first + i * a.down, a.down, a.along}, b + r, c + i * ROWS + r, K);
}

FINF_INLINE Vec least(Vec a, Vec b) { return select_less(b, a, b, a); }  // lets a NaN in a through

// tanh of x, by e^(-2|x|), which neither overflows nor cancels but near 0, where expm1 stands for the difference.
FINF_INLINE Vec tanh_of(Vec x) {
    const Vec e = expm1_of(Vec(-2.0f) * abs(x));
    const Vec size = (Vec(0.0f) - e) / (e + Vec(2.0f));
    return select_less(x, Vec(0.0f), Vec(0.0f) - size, size);
}

// tanh(x + d) - tanh(x) = 2 e^(-2x) (-expm1(-2d)) / ((1 + e^(-2x)) (1 + e^(-2(x+d)))), taken on the side where x >= 0.
// Past d = -40 both ends lie on the far plateau.
FINF_INLINE Vec tanh_change_of(Vec x, Vec d) {
    d = max(Vec(-40.0f), select_less(x, Vec(0.0f), Vec(0.0f) - d, d));
    const Vec e = exp_of(Vec(-2.0f) * abs(x)), moved = expm1_of(Vec(-2.0f) * d);
    const Vec change = (Vec(-2.0f) * e * moved) / ((e + Vec(1.0f)) * (fma(e, moved, e) + Vec(1.0f)));
    return select_less(x, Vec(0.0f), Vec(0.0f) - change, change);
}

template <class T>
class Attention {
  public:
    Attention(const finf::AttentionBlock& block, float* room)
        : b_(block),
          rows_(block.T - block.begin < ROWS ? block.T - block.begin : ROWS),
          keys_(block.causal && block.begin + rows_ < block.S ? block.begin + rows_ : block.S),
          moves_(block.q.moves || block.k.moves),
          F_(finf::attention_width(block.F)) {
        const auto take = [&room](int64_t numbers) {
            float* taken = room;
            room += numbers;
            return taken;
        };
        const int64_t tile = KEYS * ROWS, Q = block.Q;
        q_ = take(block.E * ROWS);
        dq_ = take(Q * block.E * ROWS);
        q1_ = take(Q * block.E * ROWS);
        key_ = take(KEYS * block.E);
        changed_key_ = take(KEYS * block.E);
        value_ = take(KEYS * F_);
        changed_value_ = take(KEYS * F_);
        moved_value_ = take(KEYS * F_);
        raw_ = take(tile);
        scores_ = take(finf::attention_scores(block.S, block.softcap > 0) * ROWS);
        weight_ = take(tile);
        step_ = take(tile);
        bias_ = take(tile);
        out_ = take(F_ * ROWS);
        top_ = take(ROWS);
        lead_ = take(ROWS);
        total_ = take(ROWS);
        shift_ = take(Q * ROWS);
        moved_ = take(Q * ROWS);
        far_ = take(Q * ROWS);
        after_top_ = take(ROWS);
        line_ = take(F_);
        lead_key_ = take(block.E * ROWS);
        changed_lead_key_ = take(block.E * ROWS);
        sums_ = take((1 + Q) * F_ * ROWS);
    }

    void run() {
        load_rows();
        find_leads();
        if (moves_) find_shifts();
        clear(total_, ROWS);
        clear(moved_, b_.Q * ROWS);
        clear(sums_, (1 + b_.Q) * F_ * ROWS);
        fill(far_, b_.Q * ROWS, -1.0f);
        for (int64_t j = 0; j < keys_; j += KEYS) take_tile(j, count(j));
        finish_value();
        for (int64_t n = 0; n < b_.Q; ++n) finish_change(n);
    }

  private:
    int64_t count(int64_t j) const { return keys_ - j < KEYS ? keys_ - j : KEYS; }
    static void clear(float* p, int64_t numbers) { fill(p, numbers, 0.0f); }
    static void fill(float* p, int64_t numbers, float value) {
        for (int64_t i = 0; i < numbers; ++i) p[i] = value;
    }
    static const T* row(const finf::AttentionInput& x, int64_t q, int64_t t) {
        return static_cast<const T*>(x.first) + q * x.stride_q + t * x.stride_t;
    }

    // q, its changes, and q after them: (E, ROWS) each, times the scale; zeros in rows that are not there.
    void load_rows() {
        turn(0, q_);
        for (int64_t n = 0; b_.q.moves && n < b_.Q; ++n) turn(1 + n, dq_ + n * b_.E * ROWS);
        for (int64_t n = 0; b_.k.moves && n < b_.Q; ++n)
            for (int64_t at = 0; at < b_.E * ROWS; at += Vec::W) {
                const Vec d = b_.q.moves ? load(dq_ + n * b_.E * ROWS + at) : Vec(0.0f);
                store(q1_ + n * b_.E * ROWS + at, load(q_ + at) + d);
            }
    }

    void turn(int64_t n, float* to) {
        if (rows_ < ROWS) clear(to, b_.E * ROWS);
        for (int64_t r = 0; r < rows_; ++r) {
            const T* from = row(b_.q, n, b_.begin + r);
            for (int64_t e = 0; e < b_.E; ++e) to[e * ROWS + r] = b_.scale * to_float(from[e]);
        }
    }

    // Rows j to j + n of a tile as (KEYS, width) float32, zeros past the D numbers and past the rows that are there.
    void load_tile(const finf::AttentionInput& x, int64_t n, int64_t j, int64_t D, int64_t width, float* to) {
        for (int64_t key = 0; key < KEYS; ++key, to += width) {
            if (key >= count(j)) {
                clear(to, width);
                continue;
            }
            const T* from = row(x, n, j + key);
            each_vector(D, [&](int64_t d, int64_t here)
                               FINF_LAMBDA { store_up_to(to + d, load_up_to(from + d, here, T{}), here); });
            clear(to + D, width - D);
        }
    }

    // What is added to the scores of a tile, -inf where a row may not look; whether there is anything.
    bool find_bias(int64_t j, int64_t here) {
        if (!b_.seen && !b_.added && (!b_.causal || j + here - 1 <= b_.begin)) return false;
        for (int64_t key = 0; key < here; ++key)
            for (int64_t r = 0; r < ROWS; ++r) bias_[key * ROWS + r] = r < rows_ ? bias(b_.begin + r, j + key) : 0.0f;
        return true;
    }

    float bias(int64_t t, int64_t s) const {
        const int64_t at = t * b_.mask_stride_t + s * b_.mask_stride_s;
        if ((b_.causal && s > t) || (b_.seen && !b_.seen[at])) return -INFINITY;
        return b_.added ? b_.added[at] : 0.0f;
    }

    // Where the scores of tile j lie: all of the block's where they are kept, else the one tile's that is at work.
    float* scores(int64_t j) { return kept() ? scores_ + j * ROWS : scores_; }
    bool kept() const { return finf::attention_keeps(b_.S, b_.softcap > 0); }

    // Scores of a tile, and before the cap into raw_.
    void find_scores(int64_t j, int64_t here) {
        float* s = scores(j);
        load_tile(b_.k, 0, j, b_.E, b_.E, key_);
        product<false>({key_, b_.E, 1}, q_, b_.softcap > 0 ? raw_ : s, up(here), b_.E);
        if (b_.softcap > 0)
            each(here, [&](int64_t at, int64_t) FINF_LAMBDA {
                store(s + at, Vec(b_.softcap) * tanh_of(load(raw_ + at) * Vec(1 / b_.softcap)));
            });
        if (find_bias(j, here))
            each(here, [&](int64_t at, int64_t) FINF_LAMBDA { store(s + at, load(s + at) + load(bias_ + at)); });
    }

    // The same for the second time.
    void find_scores_again(int64_t j, int64_t here) {
        if (!kept()) {
            find_scores(j, here);
        } else if (b_.q.moves) {
            load_tile(b_.k, 0, j, b_.E, b_.E, key_);
        }
    }

    static int64_t up(int64_t here) { return (here + TALL - 1) / TALL * TALL; }

    // body(at, r) for every vector of the first `here` keys of a tile: where it lies in it, and its first row.
    template <class Body>
    FINF_MEMBER static void each(int64_t here, Body body) {
        for (int64_t key = 0; key < here; ++key)
            for (int64_t r = 0; r < ROWS; r += Vec::W) body(key * ROWS + r, r);
    }

    // p = e^(s - top) of a tile into weight_, and its sum over the keys onto `total`.
    void find_weights(const float* s, int64_t here, const float* top, float* total) {
        for (int64_t r = 0; r < ROWS; r += Vec::W) {
            const Vec m = load(top + r);
            Vec part(0.0f);
            for (int64_t at = r; at < here * ROWS; at += ROWS) {
                const Vec p = exp_of(load(s + at) - m);
                store(weight_ + at, p);
                part = part + p;
            }
            store(total + r, load(total + r) + part);
        }
    }

    // Each row's largest score, 0 where it sees nothing, and the key that has it.
    void find_leads() {
        fill(top_, ROWS, -INFINITY);
        clear(lead_, ROWS);
        for (int64_t j = 0; j < keys_; j += KEYS) {
            find_scores(j, count(j));
            for (int64_t r = 0; r < ROWS; r += Vec::W) {
                Vec top = load(top_ + r), lead = load(lead_ + r);
                for (int64_t key = 0; key < count(j); ++key) {
                    const Vec s = load(scores(j) + key * ROWS + r);
                    lead = select_less(top, s, Vec(static_cast<float>(j + key)), lead);
                    top = select_less(top, s, s, top);
                }
                store(top_ + r, top);
                store(lead_ + r, lead);
            }
        }
        for (int64_t r = 0; r < ROWS; ++r) top_[r] = top_[r] == -INFINITY ? 0.0f : top_[r];
    }

    // The change of each row's leading score, by the same operations in the same order as the tiles': the leading
    // key's own change is then exactly 0.
    void find_shifts() {
        float *key = lead_key_, *changed = changed_lead_key_;
        gather(0, key);
        for (int64_t n = 0; n < b_.Q; ++n) {
            if (b_.k.moves) gather(1 + n, changed);
            for (int64_t r = 0; r < ROWS; r += Vec::W) {
                Vec s(0.0f), x(0.0f), y(0.0f);
                for (int64_t e = 0; e < b_.E; ++e) s = fma(load(key + e * ROWS + r), load(q_ + e * ROWS + r), s);
                for (int64_t e = 0; b_.q.moves && e < b_.E; ++e)
                    x = fma(load(key + e * ROWS + r), load(dq_ + (n * b_.E + e) * ROWS + r), x);
                for (int64_t e = 0; b_.k.moves && e < b_.E; ++e)
                    y = fma(load(changed + e * ROWS + r), load(q1_ + (n * b_.E + e) * ROWS + r), y);
                store(shift_ + n * ROWS + r, capped(s, x + y));
            }
        }
    }

    void gather(int64_t n, float* to) {
        for (int64_t r = 0; r < ROWS; ++r) {
            const T* from = row(b_.k, n, static_cast<int64_t>(lead_[r]));
            for (int64_t e = 0; e < b_.E; ++e) to[e * ROWS + r] = to_float(from[e]);
        }
    }

    FINF_MEMBER Vec capped(Vec s, Vec x) const {
        if (!(b_.softcap > 0)) return x;
        const Vec per(1 / b_.softcap);
        return Vec(b_.softcap) * tanh_change_of(s * per, x * per);
    }

    // Changes of the scores of a tile by query n, before the cap, into step_.
    void find_steps(int64_t n, int64_t j, int64_t here) {
        if (b_.q.moves) product<false>({key_, b_.E, 1}, dq_ + n * b_.E * ROWS, step_, up(here), b_.E);
        if (b_.k.moves) {
            load_tile(b_.k, 1 + n, j, b_.E, b_.E, changed_key_);
            const Left keys = {changed_key_, b_.E, 1};
            const float* rows = q1_ + n * b_.E * ROWS;
            b_.q.moves ? product<true>(keys, rows, step_, up(here), b_.E)
                       : product<false>(keys, rows, step_, up(here), b_.E);
        }
    }

    // One vector of them, less the leading key's.
    FINF_MEMBER Vec step(int64_t at, Vec shift) const {
        const Vec x = load(step_ + at);
        return (b_.softcap > 0 ? capped(load(raw_ + at), x) : x) - shift;
    }

    void take_tile(int64_t j, int64_t here) {
        find_scores_again(j, here);
        find_weights(scores(j), here, top_, total_);
        load_tile(b_.v, 0, j, b_.F, F_, value_);
        product<true>({value_, 1, F_}, weight_, sums_, F_, here);
        for (int64_t n = 0; n < b_.Q; ++n) take_changes(n, j, here);
    }

    void take_changes(int64_t n, int64_t j, int64_t here) {
        float* sums = sums_ + (1 + n) * F_ * ROWS;
        if (b_.v.moves) {
            load_tile(b_.v, 1 + n, j, b_.F, F_, changed_value_);
            product<true>({changed_value_, 1, F_}, weight_, sums, F_, here);
        }
        if (!moves_) return;
        find_steps(n, j, here);
        weigh(n, scores(j), here);
        product<true>({values_after(), 1, F_}, step_, sums, F_, here);
    }

    // The tile's values after the change that changed_value_ holds.
    const float* values_after() {
        if (!b_.v.moves) return value_;
        for (int64_t at = 0; at < KEYS * F_; ++at) moved_value_[at] = value_[at] + changed_value_[at];
        return moved_value_;
    }

    // Steps become what they add to the weights.
    void weigh(int64_t n, const float* s, int64_t here) {
        float *moved = moved_ + n * ROWS, *far = far_ + n * ROWS;
        for (int64_t r = 0; r < ROWS; r += Vec::W) {
            const Vec shift = load(shift_ + n * ROWS + r), least_counting = load(top_ + r) - Vec(NOTHING);
            Vec part(0.0f), beyond = load(far + r);
            for (int64_t at = r; at < here * ROWS; at += ROWS) {
                const Vec x = step(at, shift), w = load(weight_ + at) * expm1_of(least(x, Vec(FAR)));
                beyond = max(beyond, least(x - Vec(FAR), load(s + at) - least_counting + x));
                part = part + w;
                store(step_ + at, w);
            }
            store(far + r, beyond);
            store(moved + r, load(moved + r) + part);
        }
    }

    // sums_[0] becomes the output; 0 for a row that sees nothing, whose total is 0 where any other's is 1 at least.
    void finish_value() {
        for (int64_t f = 0; f < F_; ++f)
            for (int64_t r = 0; r < ROWS; r += Vec::W) {
                const Vec D0 = load(total_ + r), o = load(sums_ + f * ROWS + r) / D0;
                store(sums_ + f * ROWS + r, select_less(D0, Vec(0.5f), Vec(0.0f), o));
            }
        put(0, sums_);
    }

    void finish_change(int64_t n) {
        const float* sums = sums_ + (1 + n) * F_ * ROWS;
        for (int64_t f = 0; f < F_; ++f)
            for (int64_t r = 0; r < ROWS; r += Vec::W) {
                const Vec D0 = load(total_ + r), Dd = load(moved_ + n * ROWS + r);
                const Vec change = (load(sums + f * ROWS + r) - load(sums_ + f * ROWS + r) * Dd) / (D0 + Dd);
                store(out_ + f * ROWS + r, select_less(D0, Vec(0.5f), Vec(0.0f), change));
            }
        bool far = false;
        for (int64_t r = 0; r < rows_; ++r) far = far || far_[n * ROWS + r] > 0;
        if (far) retake(n);
        put(1 + n, out_);
    }

    // The change of rows with a far step: the output of the softmax after it, less the one before.
    void retake(int64_t n) {
        float *sums = sums_ + (1 + n) * F_ * ROWS, *top = after_top_, *total = moved_ + n * ROWS;
        fill(top, ROWS, -INFINITY);
        for (int64_t j = 0; j < keys_; j += KEYS) {
            find_after(n, j);
            each(count(j), [&](int64_t at, int64_t r) FINF_LAMBDA {
                const Vec s = load(step_ + at);
                store(top + r, select_less(load(top + r), s, s, load(top + r)));
            });
        }
        clear(total, ROWS);
        clear(sums, F_ * ROWS);
        for (int64_t j = 0; j < keys_; j += KEYS) {
            find_after(n, j);
            find_weights(step_, count(j), top, total);
            load_tile(b_.v, 0, j, b_.F, F_, value_);
            if (b_.v.moves) load_tile(b_.v, 1 + n, j, b_.F, F_, changed_value_);
            product<true>({values_after(), 1, F_}, weight_, sums, F_, count(j));
        }
        const float* far = far_ + n * ROWS;
        for (int64_t f = 0; f < F_; ++f)
            for (int64_t r = 0; r < ROWS; r += Vec::W) {
                const int64_t at = f * ROWS + r;
                const Vec change = load(sums + at) / load(total + r) - load(sums_ + at);
                store(out_ + at, select_less(Vec(0.0f), load(far + r), change, load(out_ + at)));
            }
    }

    // Scores after the change of query n, less the leading key's before and after it, into step_.
    void find_after(int64_t n, int64_t j) {
        find_scores_again(j, count(j));
        find_steps(n, j, count(j));
        each(count(j), [&](int64_t at, int64_t r) FINF_LAMBDA {
            store(step_ + at, load(scores(j) + at) - load(top_ + r) + step(at, load(shift_ + n * ROWS + r)));
        });
    }

    // A result (F, ROWS) into the rows of the output.
    void put(int64_t n, const float* from) {
        for (int64_t r = 0; r < rows_; ++r) {
            for (int64_t f = 0; f < b_.F; ++f) line_[f] = from[f * ROWS + r];
            T* to = static_cast<T*>(b_.out) + n * b_.out_stride_q + (b_.begin + r) * b_.F;
            each_vector(b_.F, [&](int64_t f, int64_t here)
                                  FINF_LAMBDA { store_up_to(to + f, load_up_to(line_ + f, here, 0.0f), here); });
        }
    }

    const finf::AttentionBlock& b_;
    const int64_t rows_, keys_;
    const bool moves_;
    const int64_t F_;
    float *q_, *dq_, *q1_, *key_, *changed_key_, *value_, *changed_value_, *moved_value_;
    float *raw_, *scores_, *weight_, *step_, *bias_, *out_;  // of a tile (KEYS, ROWS); out_ (F, ROWS)
    float *top_, *lead_, *total_, *shift_, *moved_, *far_, *after_top_;
    float *line_, *lead_key_, *changed_lead_key_, *sums_;
};

template <class T>
void attention_block(const finf::AttentionBlock& block, float* room) {
    Attention<T>(block, room).run();
}

void (*const ATTENTION_DELTA[2])(const finf::AttentionBlock&, float*) = {attention_block<float>, attention_block<Bf16>};
