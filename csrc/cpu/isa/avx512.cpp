// AVX-512 (F, BW, VL): sixteen lanes, masked loads, and an instruction for p 2^n. Where there are more extensions,
// products of bfloat16 pairs, or tiles of them.
#include "../../numerics.h"
#include "kernels.h"

#if defined(__x86_64__) || defined(__i386__)

#include <immintrin.h>

#include <cfloat>
#include <cmath>
#include <cstdint>

// Headers stay above: an inline function compiled below could be the copy the linker keeps for older processors too.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl"))), apply_to = function)
#else
// GCC 12 warns of its own header (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl")
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
    static constexpr int W = 16;
    __m512 v;
    Vec() = default;
    Vec(__m512 lanes) : v(lanes) {}
    Vec(float x) : v(_mm512_set1_ps(x)) {}
};

FINF_INLINE Vec widen(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }
FINF_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
FINF_INLINE Vec load(const Bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
FINF_INLINE Vec load(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
FINF_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }

// To the nearest bfloat16, ties to even; a NaN to a NaN.
FINF_INLINE __m256i narrow(Vec a) {
    const __m512i bits = _mm512_castps_si512(a.v),
                  odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i near = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(
        _mm512_srli_epi32(_mm512_mask_or_epi32(near, nan, bits, _mm512_set1_epi32(1 << 22)), 16));
}
FINF_INLINE void store(Bf16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a)); }
// Bytes 2i and bytes 2i + 1; and to bfloat16 in that order: finite numbers, to the nearest, a half away from zero.
FINF_INLINE void load_apart(const uint8_t* p, Vec& even, Vec& odd) {
    const __m512i both = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    even = _mm512_cvtepi32_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xff)));
    odd = _mm512_cvtepi32_ps(_mm512_srli_epi32(both, 8));
}
FINF_INLINE void store_together(Bf16* p, Vec even, Vec odd) {
    const __m512i half = _mm512_set1_epi32(0x8000), low = _mm512_add_epi32(_mm512_castps_si512(even.v), half),
                  high = _mm512_add_epi32(_mm512_castps_si512(odd.v), half);
    _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(low, 16), high));
}
// Past the cache, to an address that a vector's size divides; `fence` after the last of them.
FINF_INLINE void stream(float* p, Vec a) { _mm512_stream_ps(p, a.v); }
FINF_INLINE void stream(Bf16* p, Vec a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(a)); }
FINF_INLINE void fence() { _mm_sfence(); }

FINF_INLINE __mmask16 first(int64_t count) { return static_cast<__mmask16>((1u << count) - 1u); }
FINF_INLINE Vec load_first(const float* p, int64_t count, float fill) {
    return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), first(count), p);
}
FINF_INLINE Vec load_first(const Bf16* p, int64_t count, Bf16 fill) {
    return widen(_mm256_mask_loadu_epi16(_mm256_set1_epi16(static_cast<short>(fill.bits)), first(count), p));
}
FINF_INLINE void store_first(float* p, Vec a, int64_t count) { _mm512_mask_storeu_ps(p, first(count), a.v); }
FINF_INLINE void store_first(Bf16* p, Vec a, int64_t count) { _mm256_mask_storeu_epi16(p, first(count), narrow(a)); }

FINF_INLINE Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
FINF_INLINE Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
FINF_INLINE Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
FINF_INLINE Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
FINF_INLINE Vec sqrt(Vec a) { return _mm512_sqrt_ps(a.v); }
FINF_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
FINF_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }
FINF_INLINE Vec abs(Vec a) { return _mm512_abs_ps(a.v); }
// The size of a with the sign of b.
FINF_INLINE Vec copy_sign(Vec a, Vec b) {
    const __m512i sign = _mm512_set1_epi32(INT32_MIN), a_bits = _mm512_castps_si512(a.v);
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(sign, _mm512_castps_si512(b.v), a_bits, 0xca));
}
// p 2^n; zero where 2^n is below the normal numbers, whatever p is: results there, all but those next to the normal
// ones, would take an Intel processor fifty times as long as any other.
FINF_INLINE Vec scale(Vec p, Vec n) {
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(n.v, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ), p.v, n.v);
}
FINF_INLINE float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
FINF_INLINE float top(Vec a) { return _mm512_reduce_max_ps(a.v); }

// a < b ? yes : no, lane by lane; a NaN is not less.
FINF_INLINE Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v);
}
FINF_INLINE bool all_at_most(Vec a, Vec bound) { return _mm512_cmp_ps_mask(a.v, bound.v, _CMP_LE_OQ) == 0xffff; }

// a0 b0 a1 b1 ...: the lower halves of a and b, and the upper halves.
FINF_INLINE Vec zip_low(Vec a, Vec b) {
    const __m512i from = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    return _mm512_permutex2var_ps(a.v, from, b.v);
}
FINF_INLINE Vec zip_high(Vec a, Vec b) {
    const __m512i from = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    return _mm512_permutex2var_ps(a.v, from, b.v);
}

// Sixteen words of 32 bits.
struct Words {
    __m512i v;
    Words() = default;
    Words(__m512i lanes) : v(lanes) {}
    explicit Words(uint32_t x) : v(_mm512_set1_epi32(static_cast<int>(x))) {}
};

FINF_INLINE Words operator+(Words a, Words b) { return _mm512_add_epi32(a.v, b.v); }
FINF_INLINE Words operator-(Words a, Words b) { return _mm512_sub_epi32(a.v, b.v); }
FINF_INLINE Words operator*(Words a, Words b) { return _mm512_mullo_epi32(a.v, b.v); }
FINF_INLINE Words operator^(Words a, Words b) { return _mm512_xor_si512(a.v, b.v); }
FINF_INLINE Words operator&(Words a, Words b) { return _mm512_and_si512(a.v, b.v); }
FINF_INLINE Words operator|(Words a, Words b) { return _mm512_or_si512(a.v, b.v); }
FINF_INLINE Words operator<<(Words a, int bits) { return _mm512_slli_epi32(a.v, static_cast<unsigned>(bits)); }
FINF_INLINE Words operator>>(Words a, int bits) { return _mm512_srli_epi32(a.v, static_cast<unsigned>(bits)); }
FINF_INLINE Words select_zero(Words asked, Words yes, Words no) {
    return _mm512_mask_blend_epi32(_mm512_testn_epi32_mask(asked.v, asked.v), no.v, yes.v);
}
// The upper halves of products, of the even and of the odd lanes.
FINF_INLINE Words high_product(Words a, Words b) {
    const __m512i even = _mm512_mul_epu32(a.v, b.v);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), _mm512_srli_epi64(b.v, 32));
    return _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
}
FINF_INLINE Words counting_from(uint32_t first) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_add_epi32(lanes, Words(first).v);
}
// Signed words as numbers, and the floats whose bits they are.
FINF_INLINE Vec to_float(Words a) { return _mm512_cvtepi32_ps(a.v); }
FINF_INLINE Vec as_float(Words a) { return _mm512_castsi512_ps(a.v); }

// c + x0 w0 + x1 w1, where x and w hold two bfloat16 a lane. Written as the instruction itself, which processors with
// AVX512-BF16 have: what else is in this file must run without. choose.cpp asks.
FINF_INLINE Vec fma_of_pairs(Vec x, Vec w, Vec c) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(c.v) : "v"(w.v), "v"(x.v));
    return c;
}
// Two bfloat16 a lane, of two vectors that each came of one.
FINF_INLINE Vec pair_of(Vec first, Vec second) {
    return _mm512_castsi512_ps(
        _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(first.v), 16), _mm512_castps_si512(second.v)));
}
// The nearest bfloat16 by an instruction of the same extension, where `narrow` takes eight: zero for what is below the
// normal numbers.
FINF_INLINE __m256i narrow_at_once(Vec a) {
    __m256i bits;
    __asm__("vcvtneps2bf16 %1, %0" : "=v"(bits) : "v"(a.v));
    return bits;
}
FINF_INLINE void store_nearest(Bf16* p, Vec a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_at_once(a));
}
// The same as a number.
FINF_INLINE Vec nearest(Vec a) { return widen(narrow_at_once(a)); }

// Read as any other, and written that way.
struct NearestBf16 : Bf16 {};
FINF_INLINE void store(NearestBf16* p, Vec a) { store_nearest(p, a); }
FINF_INLINE void store_first(NearestBf16* p, Vec a, int64_t count) {
    _mm256_mask_storeu_epi16(p, first(count), narrow_at_once(a));
}
FINF_INLINE void stream(NearestBf16* p, Vec a) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_at_once(a));
}
#define FINF_PAIRS

#include "../tiles/kernels.inl.h"
#if defined(__x86_64__)
#include "../tiles/gemm_tiles.inl.h"
// after it
#include "../tiles/attention_tiles.inl.h"
#endif

constexpr finf::Kernels kernels_of_pairs() {
    finf::Kernels kernels = kernels_of<NearestBf16>("avx512_bf16");
    kernels.pairs = &PAIR_PANELS;
    return kernels;
}

#if defined(__x86_64__)
constexpr finf::Kernels kernels_of_tiles() {
    finf::Kernels kernels = kernels_of<NearestBf16>("amx_bf16");
    kernels.attention_delta = ATTENTION_BY_TILES;
    kernels.pairs = &TILE_PANELS;
    kernels.flops_of_fma = flops_of_tiles;
    return kernels;
}
#endif

}  // namespace

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace finf {
const Kernels AVX512 = kernels_of<Bf16>("avx512");
const Kernels AVX512_BF16 = kernels_of_pairs();
#if defined(__x86_64__)
const Kernels AMX_BF16 = kernels_of_tiles();
#endif
}  // namespace finf

#endif
