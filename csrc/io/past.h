// Writing what is converted: straight away, or past the cache by way of a buffer that stays in the first-level one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace finf {

// Bytes from `from` to `to`, which go past the cache where the processor can.
inline void copy_past(uint8_t* to, const uint8_t* from, int64_t bytes) {
#if defined(__SSE2__)
    const int64_t head = std::min<int64_t>(bytes, (16 - reinterpret_cast<uintptr_t>(to) % 16) % 16);
    std::memcpy(to, from, static_cast<size_t>(head));
    int64_t i = head;
    for (; i + 16 <= bytes; i += 16) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    }
    std::memcpy(to + i, from + i, static_cast<size_t>(bytes - i));
    _mm_sfence();  // whoever is woken next must see them
#else
    std::memcpy(to, from, static_cast<size_t>(bytes));
#endif
}

inline void copy(uint8_t* to, const uint8_t* from, int64_t bytes, bool past) {
    if (past) return copy_past(to, from, bytes);
    std::memcpy(to, from, static_cast<size_t>(bytes));
}

// Calls body(first, n, to) so that `count` words are written to `out`.
template <class Word, class Body>
void convert(Word* out, int64_t count, bool past, const Body& body) {
    if (!past) return body(0, count, out);
    constexpr int64_t STEP = 8192 / sizeof(Word);  // 8 KiB: a quarter of a first-level cache
    alignas(64) Word buffer[STEP];
    for (int64_t first = 0; first < count; first += STEP) {
        const int64_t n = std::min(STEP, count - first);
        body(first, n, buffer);
        copy_past(reinterpret_cast<uint8_t*>(out + first), reinterpret_cast<const uint8_t*>(buffer),
                  n * static_cast<int64_t>(sizeof(Word)));
    }
}

}  // namespace finf
