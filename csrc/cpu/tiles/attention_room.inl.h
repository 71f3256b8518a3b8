// Where attention_delta's loops keep what they work on: a block of rows of queries of one head, and a tile of keys that
// passes by. Included inside an instruction set's namespace.
#pragma once

#include "elements.inl.h"

namespace attention {

constexpr int64_t ROWS = finf::ATTENTION_ROWS;
// Keys of a tile: 16 KiB of scores, which with as much of queries or values stay in a first-level cache of 48.
constexpr int64_t KEYS = 64;
// Rows of keys or values that are asked for ahead: heads that lie side by side keep a row's next one far away.
constexpr int64_t AHEAD = 8;
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
    float *q0, *dq, *q1;            // E x ROWS
    float *k, *v;                   // stacks of KEYS x keys' and values' width
    float* split;                   // weights as products take them
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

// Numbers of a query, more than it has where a whole tile of the processor's is filled with zeros.
int64_t query_width(const Attention& op) { return op.E < 16 ? 16 : op.E; }

Room furnish(const Attention& op, int64_t split, Pieces& all) {
    const int64_t E = query_width(op), Ek = finf::vectors(op.E), Ev = finf::vectors(op.Ev), tile = KEYS * ROWS;
    const int64_t moves = op.q.moves || op.k.moves ? op.Q : 0;
    Room room;
    room.q0 = all.take(E * ROWS);
    room.dq = all.take(moving(op.q, op.Q) * E * ROWS);
    room.q1 = all.take(op.k.moves ? moving(op.q, op.Q) * E * ROWS : 0);
    room.k = all.take((1 + moving(op.k, op.Q)) * KEYS * Ek);
    room.v = all.take((1 + moving(op.v, op.Q)) * KEYS * Ev);
    room.split = all.take(split);
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

// A block of rows of one head, and the tile.
class Place {
  protected:
    Place(const Attention& op, const Room& room, int64_t b, int64_t h, int64_t t0)
        : op_(op),
          room_(room),
          b_(b),
          h_(h),
          t0_(t0),
          rows_(op.T - t0 < ROWS ? op.T - t0 : ROWS),
          ld_((rows_ + Vec::W - 1) / Vec::W * Vec::W),
          Ek_(finf::vectors(op.E)),
          Ev_(finf::vectors(op.Ev)) {}

    // How many of the tile's keys the lanes [lane, lane + W) see; what lies behind them is neither written nor read.
    int64_t seen(int64_t lane) const {
        const int64_t reach = t0_ + lane + Vec::W - key0_;
        return !op_.causal || reach > count_ ? count_ : reach < 0 ? 0 : reach;
    }
    bool on_diagonal() const { return op_.causal && key0_ + count_ > t0_ + 1; }
    // The head that keys and values of queries of this one are of.
    int64_t key_head() const { return h_ / (op_.H / op_.Hk); }
    float* queries(int64_t n) const { return room_.dq + n * query_width(op_) * ROWS; }

    const Attention& op_;
    const Room& room_;
    const int64_t b_, h_, t0_, rows_, ld_, Ek_, Ev_;
    int64_t key0_ = 0, count_ = 0;
};

// Weights (KEYS x ROWS) of a tile's values, of the stack's row k.
struct Weighted {
    int64_t k;
    const float* by;
};

}  // namespace attention
