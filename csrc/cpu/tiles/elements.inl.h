// Numbers in and out of a vector, tails included. Included inside an instruction set's namespace.
#pragma once

// The tail of a block, or a whole vector: `fill` stands for what is past the end.
template <class T>
FINF_INLINE Vec load_up_to(const T* p, int64_t count, T fill) {
    return count >= Vec::W ? load(p) : load_first(p, count, fill);
}

template <class T>
FINF_INLINE void store_up_to(T* p, Vec x, int64_t count) {
    if (count >= Vec::W) {
        store(p, x);
    } else {
        store_first(p, x, count);
    }
}

// The first `count` numbers of x, and zeros.
FINF_INLINE Vec first_of(Vec x, int64_t count) {
    if (count >= Vec::W) return x;
    float lanes[Vec::W];
    store(lanes, x);
    return load_first(lanes, count, 0.0f);
}

// What a loop writes once and does not read again. `past_cache`: where it is too large to be found in a cache later,
// whole vectors go straight to memory, which saves reading what they overwrite; they have to be aligned then.
template <class T>
struct Result {
    T* p;
    bool past_cache;
};

template <class T>
FINF_INLINE void put(Result<T> to, int64_t v, Vec x, int64_t count) {
    if (to.past_cache && count >= Vec::W) {
        stream(to.p + v, x);
    } else {
        store_up_to(to.p + v, x, count);
    }
}

// body(v, count) for every vector of [0, D), the last one holding `count` numbers. In the others `count` is a constant,
// and what the body asks about it is answered by the compiler.
template <class Body>
FINF_INLINE void each_vector(int64_t D, Body body) {
    int64_t v = 0;
    for (; v + 4 * Vec::W <= D; v += 4 * Vec::W)
        for (int k = 0; k < 4; ++k) body(v + k * Vec::W, int64_t{Vec::W});
    for (; v + Vec::W <= D; v += Vec::W) body(v, int64_t{Vec::W});
    if (v < D) body(v, D - v);
}

// What will be read soon, `ahead` numbers further on, is asked for from memory while this is worked on: the processor
// asks by itself for what follows in a row, and too late for whoever computes meanwhile.
template <class T>
FINF_INLINE void fetch(const T* p, int64_t ahead) {
    __builtin_prefetch(p + ahead);
}

FINF_INLINE float to_float(float x) { return x; }
FINF_INLINE float to_float(Bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

// Rows become columns: zipping rows i and i + W/2 moves every number's lowest row bit to its lowest column bit.
FINF_INLINE void transpose(Vec (&rows)[Vec::W]) {
#pragma GCC unroll 4
    for (int round = 1; round < Vec::W; round *= 2) {
        Vec zipped[Vec::W];
#pragma GCC unroll 8
        for (int i = 0; i < Vec::W / 2; ++i) {
            zipped[2 * i] = zip_low(rows[i], rows[i + Vec::W / 2]);
            zipped[2 * i + 1] = zip_high(rows[i], rows[i + Vec::W / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < Vec::W; ++i) rows[i] = zipped[i];
    }
}
