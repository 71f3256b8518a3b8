// Any processor: four lanes in the compiler's own vector type, which becomes SSE2, NEON or what there is.
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "../../numerics.h"
#include "kernels.h"

namespace {

using finf::ActivationRows;
using finf::Attention;
using finf::AttentionMask;
using finf::Bf16;
using finf::Change;
using finf::ChangeSums;
using finf::HeadRow;
using finf::HeadStack;
using finf::NormRows;
using finf::NormScratch;
using finf::NormValue;
using finf::Row;
using finf::RowSums;
using finf::ScaledSum;

#define FINF_INLINE static inline __attribute__((always_inline))
#define FINF_MEMBER inline __attribute__((always_inline))
#define FINF_LAMBDA __attribute__((always_inline))

typedef float F4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));
typedef uint32_t U4 __attribute__((vector_size(16)));

struct Vec {
    static constexpr int W = 4;
    F4 v;
    Vec() = default;
    Vec(F4 lanes) : v(lanes) {}
    Vec(float x) : v{x, x, x, x} {}
};

FINF_INLINE Vec load(const float* p) {
    F4 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
FINF_INLINE Vec load(const Bf16* p) {
    U4 bits = {p[0].bits, p[1].bits, p[2].bits, p[3].bits};
    return (F4)(bits << 16);
}
FINF_INLINE Vec load(const uint8_t* p) {
    return F4{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])};
}
FINF_INLINE void store(float* p, Vec a) { std::memcpy(p, &a.v, sizeof a.v); }
// To the nearest bfloat16, ties to even; a NaN to a NaN.
FINF_INLINE void store(Bf16* p, Vec a) {
    const U4 bits = (U4)a.v, near = bits + 0x7fff + (bits >> 16 & 1), nan = (U4)(a.v != a.v);
    const U4 high = ((near & ~nan) | ((bits | 1 << 22) & nan)) >> 16;
    for (int lane = 0; lane < Vec::W; ++lane) p[lane].bits = static_cast<uint16_t>(high[lane]);
}
// Bytes 2i and bytes 2i + 1; and to bfloat16 in that order: finite numbers, to the nearest, a half away from zero.
FINF_INLINE void load_apart(const uint8_t* p, Vec& even, Vec& odd) {
    for (int lane = 0; lane < Vec::W; ++lane) {
        even.v[lane] = static_cast<float>(p[2 * lane]);
        odd.v[lane] = static_cast<float>(p[2 * lane + 1]);
    }
}
FINF_INLINE void store_together(Bf16* p, Vec even, Vec odd) {
    const U4 low = ((U4)even.v + 0x8000) >> 16, high = ((U4)odd.v + 0x8000) >> 16;
    for (int lane = 0; lane < Vec::W; ++lane) {
        p[2 * lane].bits = static_cast<uint16_t>(low[lane]);
        p[2 * lane + 1].bits = static_cast<uint16_t>(high[lane]);
    }
}
// There is no portable way past the cache.
template <class T>
FINF_INLINE void stream(T* p, Vec a) {
    store(p, a);
}
FINF_INLINE void fence() {}

FINF_INLINE Vec operator+(Vec a, Vec b) { return a.v + b.v; }
FINF_INLINE Vec operator-(Vec a, Vec b) { return a.v - b.v; }
FINF_INLINE Vec operator*(Vec a, Vec b) { return a.v * b.v; }
FINF_INLINE Vec operator/(Vec a, Vec b) { return a.v / b.v; }
FINF_INLINE Vec sqrt(Vec a) {
    for (int lane = 0; lane < Vec::W; ++lane) a.v[lane] = std::sqrt(a.v[lane]);
    return a;
}
FINF_INLINE Vec fma(Vec a, Vec b, Vec c) { return a.v * b.v + c.v; }
FINF_INLINE Vec max(Vec a, Vec b) { return a.v > b.v ? a.v : b.v; }
FINF_INLINE Vec abs(Vec a) { return (F4)((I4)a.v & 0x7fffffff); }

// a < b ? yes : no, lane by lane; a NaN is not less.
FINF_INLINE Vec select_less(Vec a, Vec b, Vec yes, Vec no) { return a.v < b.v ? yes.v : no.v; }
FINF_INLINE bool all_at_most(Vec a, Vec bound) {
    const I4 in = a.v <= bound.v;
    return (in[0] & in[1] & in[2] & in[3]) != 0;
}
// The size of a with the sign of b.
FINF_INLINE Vec copy_sign(Vec a, Vec b) { return (F4)(((I4)a.v & 0x7fffffff) | ((I4)b.v & ~0x7fffffff)); }

// p 2^n for a whole n < 128; zero where 2^n is below the normal numbers, whatever p is; NaN stays, since a comparison
// with it is false.
FINF_INLINE Vec scale(Vec p, Vec n) {
    const I4 whole = __builtin_convertvector(max(Vec(-127.0f), n).v, I4);
    const U4 exponent = (U4)(whole + 127) << 23;
    return (F4)((I4)(p.v * (F4)exponent) & ~(n.v < -126.0f));
}

FINF_INLINE float sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
FINF_INLINE float top(Vec a) {
    float best = a.v[0];
    for (int lane = 1; lane < Vec::W; ++lane) best = a.v[lane] > best ? a.v[lane] : best;
    return best;
}

template <class T>
FINF_INLINE Vec load_first(const T* p, int64_t count, T fill) {
    T lanes[Vec::W];
    for (int lane = 0; lane < Vec::W; ++lane) lanes[lane] = lane < count ? p[lane] : fill;
    return load(lanes);
}

template <class T>
FINF_INLINE void store_first(T* p, Vec a, int64_t count) {
    T lanes[Vec::W];
    store(lanes, a);
    for (int lane = 0; lane < count; ++lane) p[lane] = lanes[lane];
}

// a0 b0 a1 b1: the lower halves of a and b, and the upper halves.
FINF_INLINE Vec zip_low(Vec a, Vec b) { return F4{a.v[0], b.v[0], a.v[1], b.v[1]}; }
FINF_INLINE Vec zip_high(Vec a, Vec b) { return F4{a.v[2], b.v[2], a.v[3], b.v[3]}; }

// Four words of 32 bits.
struct Words {
    U4 v;
    Words() = default;
    Words(U4 lanes) : v(lanes) {}
    explicit Words(uint32_t x) : v{x, x, x, x} {}
};

FINF_INLINE Words operator+(Words a, Words b) { return a.v + b.v; }
FINF_INLINE Words operator-(Words a, Words b) { return a.v - b.v; }
FINF_INLINE Words operator*(Words a, Words b) { return a.v * b.v; }
FINF_INLINE Words operator^(Words a, Words b) { return a.v ^ b.v; }
FINF_INLINE Words operator&(Words a, Words b) { return a.v & b.v; }
FINF_INLINE Words operator|(Words a, Words b) { return a.v | b.v; }
FINF_INLINE Words operator<<(Words a, int bits) { return a.v << bits; }
FINF_INLINE Words operator>>(Words a, int bits) { return a.v >> bits; }
FINF_INLINE Words select_zero(Words asked, Words yes, Words no) { return asked.v == 0 ? yes.v : no.v; }
FINF_INLINE Words high_product(Words a, Words b) {
#if defined(__SSE2__)
    // Of the even and of the odd lanes: noise takes a third of the time that it takes with a loop over lanes.
    const __m128i x = (__m128i)a.v, y = (__m128i)b.v, even = _mm_mul_epu32(x, y);
    const __m128i odd = _mm_mul_epu32(_mm_srli_epi64(x, 32), _mm_srli_epi64(y, 32));
    return (U4)_mm_srli_epi64(even, 32) | ((U4)odd & U4{0, ~0u, 0, ~0u});
#else
    for (int lane = 0; lane < Vec::W; ++lane) {
        a.v[lane] = static_cast<uint32_t>(static_cast<uint64_t>(a.v[lane]) * b.v[lane] >> 32);
    }
    return a;
#endif
}
FINF_INLINE Words counting_from(uint32_t first) { return U4{0, 1, 2, 3} + first; }
// Signed words as numbers, and the floats whose bits they are.
FINF_INLINE Vec to_float(Words a) { return __builtin_convertvector((I4)a.v, F4); }
FINF_INLINE Vec as_float(Words a) { return (F4)a.v; }

#include "../tiles/kernels.inl.h"

}  // namespace

namespace finf {
const Kernels BASELINE = kernels_of<Bf16>("baseline");
}
