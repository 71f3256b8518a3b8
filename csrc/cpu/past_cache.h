// When a result is written past the cache.
#pragma once

#include <cstdint>

namespace finf {

// A result of this size would push itself out of a last-level cache of the usual 32 MiB before it is read again.
// Measured (Zen 5, one core, 36 GB/s of reading): copying 64 MiB takes 0.65 of the time that way, copying 8 MiB the
// same, but who reads those next then finds them in memory only.
constexpr int64_t PAST_CACHE_BYTES = int64_t{1} << 24;

// `row_bytes`: what lies between the starts of the runs that a loop writes from; a vector holds up to 64 bytes.
inline bool goes_past_cache(const void* first, int64_t row_bytes, int64_t bytes) {
    return bytes >= PAST_CACHE_BYTES && row_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(first) % 64 == 0;
}

}  // namespace finf
