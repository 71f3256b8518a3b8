// Sixteen bytes of a row as stored, as a lane widens them: one load where they lie on a 16-byte border, and a store of
// 16 bytes for every two numbers wherever they lie.
#pragma once

#include "../decode_tokens.h"
#include "../elements.h"

namespace finf::cuda {

// Numbers of one 16-byte load, and of a word of it.
template <class T>
constexpr int TOKENS = 16 / sizeof(T);
template <class T>
constexpr int IN_WORD = 4 / sizeof(T);

// Number i of `words`.
template <class T>
FINF_ROW T token_of(const Words& words, int i) {
    return static_cast<T>(words.word[i / IN_WORD<T>] >> i % IN_WORD<T> * (32 / IN_WORD<T>));
}

// The words from any number on.
template <class T>
FINF_ROW Words gathered(const T* from) {
    constexpr int BITS = 32 / IN_WORD<T>;
    Words words = {};
    FINF_UNROLL
    for (int i = 0; i < TOKENS<T>; ++i)
        words.word[i / IN_WORD<T>] |= (from[i] & ~0u >> (32 - BITS)) << i % IN_WORD<T> * BITS;
    return words;
}

// Two numbers side by side, from a 16-byte border on. Left to itself the compiler makes several stores of them.
FINF_ROW void store_two(int64_t* to, int64_t a, int64_t b) {
#if defined(__CUDA_ARCH__)
    __stwb(reinterpret_cast<longlong2*>(to), make_longlong2(a, b));
#else
    struct alignas(16) Two {
        int64_t a, b;
    };
    *reinterpret_cast<Two*>(to) = {a, b};
#endif
}

// Chunks that hold a row wherever it begins.
template <class T>
FINF_ROW int64_t chunks_of(int64_t L) {
    return (L + 2 * (TOKENS<T> - 1)) / TOKENS<T>;
}

// Chunk i of all rows' chunks, `chunks_of` to a row. The first begins at the 16-byte border at or before the row, or
// one number from it where only so what is written begins on one: there are up to eight times as many bytes to write.
template <class T>
FINF_ROW void decode_chunk(const DecodeTokens& op, int64_t i) {
    const int64_t b = i / chunks_of<T>(op.L);
    const T* row = static_cast<const T*>(op.raw) + b * op.raw_stride;
    int64_t* out = op.out + b * op.L;
    const bool shifted = (phase(row) + phase(out)) % 2 != 0;
    const int64_t first = TOKENS<T> * (i - b * chunks_of<T>(op.L)) - (phase(row) + shifted) % TOKENS<T>;
    if (first < 0 || first + TOKENS<T> > op.L) {
        for (int64_t k = first; k < first + TOKENS<T>; ++k)
            if (k >= 0 && k < op.L) out[k] = row[k];
        return;
    }
    const Words words = shifted ? gathered(row + first) : *reinterpret_cast<const Words*>(row + first);
    FINF_UNROLL
    for (int k = 0; k < TOKENS<T>; k += 2) store_two(out + first + k, token_of<T>(words, k), token_of<T>(words, k + 1));
}

// `work` with a number of the type that is stored.
template <class Work>
void with_stored(Stored stored, const Work& work) {
    switch (stored) {
        case Stored::u8:
            return work(uint8_t{});
        case Stored::i8:
            return work(int8_t{});
        case Stored::u16:
            return work(uint16_t{});
        case Stored::i16:
            return work(int16_t{});
        case Stored::u32:
            return work(uint32_t{});
        case Stored::i32:
            return work(int32_t{});
        default:
            reject("stored", "a code from 0 to 5", static_cast<int>(stored));
    }
}

}  // namespace finf::cuda
