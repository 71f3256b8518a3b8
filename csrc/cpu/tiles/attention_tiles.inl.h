// The products of attention_delta in bfloat16 by AMX's tiles, in the place of attention_products.inl.h. Included after
// gemm_tiles.inl.h.
//
// Queries, keys and values are the bfloat16 that they are, queries times the power of two that is in the scale: of
// scores every product is exact, and what is left of the scale comes after. Weights are split into two, so that 16 of
// their bits count. Tiles are whole: what is missing of queries, values and weights is zero; of keys it is what was
// there before, and its scores are not read.
#pragma once

#include "attention_room.inl.h"

namespace attention {

class TileProducts : protected Place {
  public:
    typedef Bf16 Number;
    static constexpr int64_t SPLIT = 2 * KEYS * ROWS;
    static void begin() { shape_tiles(2 * TILE, TILE); }
    static void end() { release_tiles(); }

  protected:
    TileProducts(const Attention& op, const Room& room, int64_t b, int64_t h, int64_t t0)
        : Place(op, room, b, h, t0), units_((op.E + 2 * TILE - 1) / (2 * TILE) * TILE) {
        int exponent = 0;
        const float fraction = std::frexp(op.scale, &exponent);
        if (fraction != 0 && std::isfinite(fraction)) {
            power_ = std::ldexp(1.0f, exponent - 1);
            left_ = 2 * fraction;
        } else {
            left_ = op.scale;
        }
    }

    // A weight as the products take it, for the sums that stand beside them.
    static FINF_MEMBER Vec held(Vec weight) {
        const Vec upper = nearest(weight);
        return upper + nearest(weight - upper);
    }

    // Units (E / 2, ROWS) of queries: what is multiplied with unit k of a key lies side by side.
    void take_queries() {
        for (int64_t k = 0; k <= moving(op_.q, op_.Q); ++k) {
            float* to = k == 0 ? room_.q0 : queries(k - 1);
            for (int64_t lane = 0; lane < ld_; lane += TILE)
                for (int64_t unit = 0; unit < units_; unit += TILE) {
                    Vec x[TILE];
                    for (int64_t r = 0; r < TILE; ++r) x[r] = query(k, lane + r, unit);
                    transpose(x);
                    for (int64_t i = 0; i < TILE; ++i) store(to + (unit + i) * ld_ + lane, x[i]);
                }
        }
    }
    // Rows of units (KEYS, E / 2).
    void take_keys() {
        for (int64_t k = 0; k <= moving(op_.k, op_.Q); ++k)
            for (int64_t key = 0; key < count_; ++key) {
                const Bf16* row = rows_of<Bf16>(op_.k, k, b_, key_head(), key0_ + key);
                const int64_t ahead = AHEAD * op_.k.stride_t;
                for (int64_t unit = 0; unit < units_; unit += TILE) {
                    __builtin_prefetch(row + ahead + 2 * unit);
                    store(keys(k) + key * units_ + unit, units_of(row, unit));
                }
            }
    }
    // Rows of units of two keys (Ev, KEYS / 2).
    void take_values() {
        Vec largest(0.0f);
        for (int64_t k = 0; k <= moving(op_.v, op_.Q); ++k)
            for (int64_t key = 0; key < count_; key += 2 * TILE)
                for (int64_t e = 0; e < op_.Ev; e += TILE) {
                    Vec x[TILE];
                    for (int64_t j = 0; j < TILE; ++j) {
                        const Vec first = value(k, key + 2 * j, e), second = value(k, key + 2 * j + 1, e);
                        largest = max(abs(first), max(abs(second), largest));
                        x[j] = pair_of(first, second);
                    }
                    transpose(x);
                    for (int64_t i = 0; i < TILE; ++i) store(values(k) + (e + i) * KEYS / 2 + key / 2, x[i]);
                }
        finite_ = all_at_most(largest, FLT_MAX);
    }

    // Scores into s, and their changes, dq k0 + q0 dk + dq dk, into ds.
    void form_scores() {
        const Factors value = {keys(0), units_, room_.q0, units_};
        multiply<false>(&value, 1, count_, room_.s);
        scale(room_.s);
    }
    void form_changes(int64_t n) {
        Factors terms[3];
        int count = 0;
        if (op_.q.moves) terms[count++] = {keys(0), units_, queries(n), units_};
        if (op_.k.moves) terms[count++] = {keys(1 + n), units_, room_.q0, units_};
        if (op_.q.moves && op_.k.moves) terms[count++] = {keys(1 + n), units_, queries(n), units_};
        multiply<false>(terms, count, count_, room_.ds);
        scale(room_.ds);
    }
    // sums (values' width x ROWS) += the values so weighted.
    void add_values(const Weighted* terms, int count, float* sums) {
        constexpr int64_t HALF = KEYS / 2 * ROWS;
        const int64_t units = (count_ + 2 * TILE - 1) / (2 * TILE) * TILE;
        Factors all[4];
        for (int t = 0; t < count; ++t) {
            float *upper = room_.split + 2 * t * HALF, *lower = upper + HALF;
            split(terms[t].by, units, upper, lower);
            all[t] = {values(terms[t].k), KEYS / 2, upper, units};
            all[count + t] = {values(terms[t].k), KEYS / 2, lower, units};
        }
        // What is left of a weight may be zero or below it, and an infinity times that is no longer one.
        multiply<true>(all, finite_ ? 2 * count : count, op_.Ev, sums);
    }

  private:
    // Rows of units, so many numbers apart, and units of lanes (units, ld).
    struct Factors {
        const float* rows;
        int64_t stride;
        const float* lanes;
        int64_t units;
    };

    float* keys(int64_t k) const { return room_.k + k * KEYS * Ek_; }
    float* values(int64_t k) const { return room_.v + k * KEYS * Ev_; }

    Vec units_of(const Bf16* row, int64_t unit) const {
        return 2 * unit < op_.E ? Pairs::units(row, unit, op_.E) : Vec(0.0f);
    }
    Vec query(int64_t k, int64_t r, int64_t unit) const {
        if (r >= rows_) return Vec(0.0f);
        const Bf16* row = rows_of<Bf16>(op_.q, k, b_, h_, t0_ + r);
        __builtin_prefetch(row + 2 * unit + TILE * op_.q.stride_t);
        return times(Vec(power_), units_of(row, unit));
    }
    // Both numbers of every unit times a power of two.
    static FINF_MEMBER Vec times(Vec power, Vec units) {
        const Words bits(_mm512_castps_si512(units.v));
        return pair_of(nearest(as_float(bits << 16) * power), nearest(as_float(bits & Words(0xffff0000u)) * power));
    }
    Vec value(int64_t k, int64_t key, int64_t e) const {
        if (key >= count_) return Vec(0.0f);
        const Bf16* row = rows_of<Bf16>(op_.v, k, b_, key_head(), key0_ + key) + e;
        __builtin_prefetch(row + AHEAD * op_.v.stride_t);
        return load_up_to(row, op_.Ev - e, Bf16{});
    }

    void scale(float* scores) const {
        if (left_ == 1.0f) return;
        const Vec by(left_);
        for (int64_t i = 0; i < count_ * ld_; i += Vec::W) store(scores + i, load(scores + i) * by);
    }

    // Weights of two keys a unit, as the bfloat16 nearest to them, and to what that leaves.
    void split(const float* by, int64_t units, float* upper, float* lower) const {
        for (int64_t unit = 0; unit < units; ++unit)
            for (int64_t lane = 0; lane < ld_; lane += Vec::W) {
                const Vec first = weight(by, 2 * unit, lane), second = weight(by, 2 * unit + 1, lane);
                const Vec first_upper = nearest(first), second_upper = nearest(second);
                store(upper + unit * ld_ + lane, pair_of(first_upper, second_upper));
                store(lower + unit * ld_ + lane, pair_of(nearest(first - first_upper), nearest(second - second_upper)));
            }
    }
    FINF_MEMBER Vec weight(const float* by, int64_t key, int64_t lane) const {
        return key < count_ ? load(by + key * ld_ + lane) : Vec(0.0f);
    }

    // out (rows, ld), filled up to whole tiles of rows, = the sum of the products, or that added to it.
    template <bool ADD>
    void multiply(const Factors* terms, int count, int64_t rows, float* out) const {
        for (int64_t row = 0; row < rows; row += 2 * TILE)
            for (int64_t lane = 0; lane < ld_; lane += 2 * TILE) {
                const bool lower = row + TILE < rows, second = lane + TILE < ld_;
                if (lower && second) form<ADD, true, true>(terms, count, row, lane, out);
                if (lower && !second) form<ADD, true, false>(terms, count, row, lane, out);
                if (!lower && second) form<ADD, false, true>(terms, count, row, lane, out);
                if (!lower && !second) form<ADD, false, false>(terms, count, row, lane, out);
            }
    }
    template <bool ADD, bool LOWER, bool SECOND>
    FINF_MEMBER void form(const Factors* terms, int count, int64_t row, int64_t lane, float* out) const {
        constexpr int64_t NUMBER = sizeof(float);
        const TileSquare<LOWER, SECOND> square = {out + row * ld_ + lane, ld_ * NUMBER};
        if (ADD) {
            square.load();
        } else {
            square.zero();
        }
        for (int t = 0; t < count; ++t) {
            const float *rows = terms[t].rows + row * terms[t].stride, *lanes = terms[t].lanes + lane;
            square.add(reinterpret_cast<const char*>(rows), terms[t].stride * NUMBER, lanes, lanes + TILE, ld_,
                       terms[t].units);
        }
        square.store();
    }

    const int64_t units_;         // of a query or key, whole tiles
    float power_ = 1, left_ = 1;  // the scale, as their product
    bool finite_ = true;          // the tile's values
};

}  // namespace attention

const finf::AttentionLoops ATTENTION_BY_TILES[] = {attention::loops_of<attention::VectorProducts<float>>(),
                                                   attention::loops_of<attention::TileProducts>()};
