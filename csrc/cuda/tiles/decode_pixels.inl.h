// Sixteen neighbouring bytes, as a lane decodes them: one load, and one to four stores of 16 bytes for each eight or
// four numbers. The table is small and read by all: it stays in the first-level cache.
#pragma once

#include "../decode_pixels.h"
#include "../elements.h"

namespace finf::cuda {

// Bytes of one 16-byte load.
constexpr int PIXELS = 16;

// Word i of `words`, of T.
template <class T>
FINF_ROW void put(Words& words, int i, T x) {
    if (sizeof(T) == 4) {
        words.word[i] = x;
    } else {
        const uint32_t wide = x;
        words.word[i / 2] = i % 2 ? words.word[i / 2] | wide << 16 : wide;
    }
}

// The channel of the number at hand, going on by one number at a time: division is slow.
struct Channel {
    int64_t C, run, at, left;

    FINF_ROW static Channel of(const DecodePixels& op, int64_t i) {
        return {op.C, op.run, i / op.run % op.C, op.run - i % op.run};
    }
    FINF_ROW void next() {
        if (--left > 0) return;
        left = run;
        at = at + 1 == C ? 0 : at + 1;
    }
};

// Numbers PIXELS·chunk and on; T is the bits of one, which are copied as they are.
template <class T>
FINF_ROW void decode_chunk(const DecodePixels& op, int64_t chunk) {
    constexpr int A_STORE = 16 / sizeof(T);
    const int64_t first = PIXELS * chunk, count = op.M - first;
    const T* table = static_cast<const T*>(op.table);
    const uint8_t* raw = op.raw + first;
    T* out = static_cast<T*>(op.out) + first;
    Channel channel = Channel::of(op, first);
    if (count < PIXELS || reinterpret_cast<uintptr_t>(raw) % 16 || reinterpret_cast<uintptr_t>(out) % 16) {
        for (int i = 0; i < PIXELS && i < count; ++i, channel.next()) out[i] = table[channel.at * 256 + raw[i]];
        return;
    }
    const Words bytes = *reinterpret_cast<const Words*>(raw);
    FINF_UNROLL
    for (int store = 0; store < PIXELS / A_STORE; ++store) {
        Words words;
        FINF_UNROLL
        for (int i = 0; i < A_STORE; ++i, channel.next()) {
            const int at = store * A_STORE + i;
            put(words, i, table[channel.at * 256 + (bytes.word[at / 4] >> at % 4 * 8 & 255u)]);
        }
        reinterpret_cast<Words*>(out)[store] = words;
    }
}

}  // namespace finf::cuda
