// Errors a user can act on: each names the argument, what was wanted and what was got.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace finf {

enum class DType : int { f32 = 0, bf16 = 1, f64 = 2 };
// The integer types of what is stored, in the order of their codes.
enum class Stored : int { u8 = 0, i8 = 1, u16 = 2, i16 = 3, u32 = 4, i32 = 5, i64 = 6 };

template <class Got>
[[noreturn]] void reject(const char* argument, const std::string& wanted, const Got& got) {
    std::ostringstream text;
    text << argument << ": wanted " << wanted << ", got " << got;
    throw std::invalid_argument(text.str());
}

template <class Got>
void require(bool holds, const char* argument, const char* wanted, const Got& got) {
    if (!holds) reject(argument, wanted, got);
}

inline void require_size(const char* argument, int64_t got, int64_t least = 0) {
    if (got < least) reject(argument, "at least " + std::to_string(least), got);
}

inline void require_memory(const char* argument, const void* got, bool used) {
    require(got != nullptr || !used, argument, "the address of its first element", "0");
}

inline DType require_float_or_bf16(const char* argument, int code) {
    require(code == 0 || code == 1, argument, "0 (float32) or 1 (bfloat16)", code);
    return static_cast<DType>(code);
}

inline DType require_float_or_double(const char* argument, int code) {
    require(code == 0 || code == 2, argument, "0 (float32) or 2 (float64)", code);
    return static_cast<DType>(code);
}

inline Stored require_stored(const char* argument, int code) {
    require(code >= 0 && code <= 6, argument, "a code from 0 to 6", code);
    return static_cast<Stored>(code);
}

}  // namespace finf
