// The products of attention_delta in float32, whatever the stacks' type; attention_tiles.inl.h has the others. Included
// inside an instruction set's namespace.
#pragma once

#include "attention_room.inl.h"
#include "small_product.inl.h"

namespace attention {

template <class T>
class VectorProducts : protected Place {
  public:
    typedef T Number;
    static constexpr int64_t SPLIT = 0;  // numbers of Room::split
    static void begin() {}
    static void end() {}
    // A weight as the products take it, for the sums that stand beside them.
    static FINF_MEMBER Vec held(Vec weight) { return weight; }

  protected:
    using Place::Place;

    // Queries, keys and values; queries times the scale.
    void take_queries() {
        take_transposed(0, room_.q0);
        for (int64_t n = 0; n < moving(op_.q, op_.Q); ++n) {
            float* dq = queries(n);
            take_transposed(1 + n, dq);
            if (op_.k.moves)
                for (int64_t i = 0; i < op_.E * ld_; i += Vec::W)
                    store(room_.q1 + n * query_width(op_) * ROWS + i, load(room_.q0 + i) + load(dq + i));
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
    void take_keys() { take_tile(op_.k, op_.E, Ek_, room_.k); }
    void take_values() { take_tile(op_.v, op_.Ev, Ev_, room_.v); }
    void take_tile(const HeadStack& stack, int64_t width, int64_t ld, float* to) {
        for (int64_t k = 0; k <= moving(stack, op_.Q); ++k)
            for (int64_t key = 0; key < count_; ++key) {
                const T* row = rows_of<T>(stack, k, b_, key_head(), key0_ + key);
                const int64_t ahead = AHEAD * stack.stride_t;
                float* at = to + (k * KEYS + key) * ld;
                each_vector(width, [&](int64_t v, int64_t count) FINF_LAMBDA {
                    __builtin_prefetch(row + ahead + v);
                    store(at + v, load_up_to(row + v, count, T{}));
                });
            }
    }

    // Scores into s, and their changes, dq k0 + q1 dk, into ds.
    void form_scores() {
        const Term value = {room_.k, room_.q0, op_.E};
        multiply_keys(&value, 1, room_.s);
    }
    void form_changes(int64_t n) {
        const int64_t E = op_.E;
        Term terms[2];
        int count = 0;
        if (op_.q.moves) terms[count++] = {room_.k, queries(n), E};
        if (op_.k.moves) {
            const float* q1 = op_.q.moves ? room_.q1 + n * query_width(op_) * ROWS : room_.q0;
            terms[count++] = {room_.k + (1 + n) * KEYS * Ek_, q1, E};
        }
        multiply_keys(terms, count, room_.ds);
    }
    // sums (values' width x ROWS) += the values so weighted.
    void add_values(const Weighted* terms, int count, float* sums) {
        // Behind the diagonal weights are zero; two vectors of lanes at a time save a part of that.
        const int64_t step = (on_diagonal() ? 2 : WIDE) * Vec::W;
        for (int64_t lane = 0; lane < ld_; lane += step) {
            const int64_t end = lane + step < ld_ ? lane + step : ld_, keys = seen(end - Vec::W);
            for (int64_t e = 0; e < op_.Ev; e += TALL) {
                Term at[2];
                for (int t = 0; t < count; ++t) at[t] = {room_.v + terms[t].k * KEYS * Ev_ + e, terms[t].by, keys};
                product_rows<Lies::columns, true>(at, count, Ev_, ld_, lane, end, sums + e * ld_);
            }
        }
    }

  private:
    // The first vector of lanes that sees a key of the tile.
    int64_t first_lane(int64_t key) const {
        const int64_t ahead = key0_ + key - t0_;
        return op_.causal && ahead > 0 ? ahead / Vec::W * Vec::W : 0;
    }

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
};

}  // namespace attention
