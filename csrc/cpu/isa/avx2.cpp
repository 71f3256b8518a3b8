// AVX2 and FMA: eight lanes.
#include "../../numerics.h"
#include "kernels.h"

#if defined(__x86_64__) || defined(__i386__)

#include <immintrin.h>

#include <cfloat>
#include <cmath>
#include <cstdint>

// Headers stay above: an inline function compiled below could be the copy the linker keeps for older processors too.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

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

struct Vec {
    static constexpr int W = 8;
    __m256 v;
    Vec() = default;
    Vec(__m256 lanes) : v(lanes) {}
    Vec(float x) : v(_mm256_set1_ps(x)) {}
};

FINF_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
FINF_INLINE Vec load(const Bf16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
FINF_INLINE Vec load(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
FINF_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }

// To the nearest bfloat16, ties to even; a NaN to a NaN.
FINF_INLINE __m128i narrow(Vec a) {
    const __m256i bits = _mm256_castps_si256(a.v),
                  odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i near = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(1 << 22));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(near, quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
FINF_INLINE void store(Bf16* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a)); }
// Bytes 2i and bytes 2i + 1; and to bfloat16 in that order: finite numbers, to the nearest, a half away from zero.
FINF_INLINE void load_apart(const uint8_t* p, Vec& even, Vec& odd) {
    const __m256i both = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    even = _mm256_cvtepi32_ps(_mm256_and_si256(both, _mm256_set1_epi32(0xff)));
    odd = _mm256_cvtepi32_ps(_mm256_srli_epi32(both, 8));
}
FINF_INLINE void store_together(Bf16* p, Vec even, Vec odd) {
    const __m256i half = _mm256_set1_epi32(0x8000), low = _mm256_add_epi32(_mm256_castps_si256(even.v), half),
                  high = _mm256_add_epi32(_mm256_castps_si256(odd.v), half);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi16(_mm256_srli_epi32(low, 16), high, 0xaa));
}
// Past the cache, to an address that a vector's size divides; `fence` after the last of them.
FINF_INLINE void stream(float* p, Vec a) { _mm256_stream_ps(p, a.v); }
FINF_INLINE void stream(Bf16* p, Vec a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow(a)); }
FINF_INLINE void fence() { _mm_sfence(); }

FINF_INLINE Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
FINF_INLINE Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
FINF_INLINE Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
FINF_INLINE Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
FINF_INLINE Vec sqrt(Vec a) { return _mm256_sqrt_ps(a.v); }
FINF_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
FINF_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a.v, b.v); }
FINF_INLINE Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v); }

// a < b ? yes : no, lane by lane; a NaN is not less.
FINF_INLINE Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
    return _mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ));
}
FINF_INLINE bool all_at_most(Vec a, Vec bound) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a.v, bound.v, _CMP_LE_OQ)) == 0xff;
}
// The size of a with the sign of b.
FINF_INLINE Vec copy_sign(Vec a, Vec b) { return _mm256_or_ps(abs(a).v, _mm256_and_ps(_mm256_set1_ps(-0.0f), b.v)); }

// p 2^n for a whole n < 128; zero where 2^n is below the normal numbers, whatever p is; NaN stays: the comparison is
// "not less than".
FINF_INLINE Vec scale(Vec p, Vec n) {
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
    const __m256 power = _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
    const __m256 kept = _mm256_cmp_ps(n.v, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ);
    return _mm256_and_ps(_mm256_mul_ps(p.v, power), kept);
}

FINF_INLINE float sum(Vec a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
FINF_INLINE float top(Vec a) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
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

// a0 b0 a1 b1 ...: the lower halves of a and b, and the upper halves.
FINF_INLINE Vec zip_low(Vec a, Vec b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v), 0x20);
}
FINF_INLINE Vec zip_high(Vec a, Vec b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v), 0x31);
}

// Eight words of 32 bits.
struct Words {
    __m256i v;
    Words() = default;
    Words(__m256i lanes) : v(lanes) {}
    explicit Words(uint32_t x) : v(_mm256_set1_epi32(static_cast<int>(x))) {}
};

FINF_INLINE Words operator+(Words a, Words b) { return _mm256_add_epi32(a.v, b.v); }
FINF_INLINE Words operator-(Words a, Words b) { return _mm256_sub_epi32(a.v, b.v); }
FINF_INLINE Words operator*(Words a, Words b) { return _mm256_mullo_epi32(a.v, b.v); }
FINF_INLINE Words operator^(Words a, Words b) { return _mm256_xor_si256(a.v, b.v); }
FINF_INLINE Words operator&(Words a, Words b) { return _mm256_and_si256(a.v, b.v); }
FINF_INLINE Words operator|(Words a, Words b) { return _mm256_or_si256(a.v, b.v); }
FINF_INLINE Words operator<<(Words a, int bits) { return _mm256_slli_epi32(a.v, bits); }
FINF_INLINE Words operator>>(Words a, int bits) { return _mm256_srli_epi32(a.v, bits); }
FINF_INLINE Words select_zero(Words asked, Words yes, Words no) {
    return _mm256_blendv_epi8(no.v, yes.v, _mm256_cmpeq_epi32(asked.v, _mm256_setzero_si256()));
}
// The upper halves of products, of the even and of the odd lanes.
FINF_INLINE Words high_product(Words a, Words b) {
    const __m256i even = _mm256_mul_epu32(a.v, b.v);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v, 32), _mm256_srli_epi64(b.v, 32));
    return _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}
FINF_INLINE Words counting_from(uint32_t first) {
    return _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), Words(first).v);
}
// Signed words as numbers, and the floats whose bits they are.
FINF_INLINE Vec to_float(Words a) { return _mm256_cvtepi32_ps(a.v); }
FINF_INLINE Vec as_float(Words a) { return _mm256_castsi256_ps(a.v); }

#include "../tiles/kernels.inl.h"

}  // namespace

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace finf {
const Kernels AVX2 = kernels_of<Bf16>("avx2");
}

#endif
