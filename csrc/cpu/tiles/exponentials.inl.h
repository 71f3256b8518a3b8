// e^x and e^x - 1 over Vec. Included inside an instruction set's namespace.
//
// Contract of Vec's max(a, b): the second argument where either is NaN, so max(bound, x) lets a NaN through.
#pragma once

// Adding and taking away 1.5 * 2^23 leaves no bits after the point: round to the nearest whole number.
constexpr float ROUNDER = 12582912.0f;
constexpr float LOG2_E = 1.44269504088896341f;
// ln 2 in two parts; the first has 15 bits, so that its product with a whole number up to 2^9 is exact.
constexpr float LN2_HIGH = 0.693145751953125f, LN2_LOW = 1.42860682030941723e-6f;
// e^-140 is zero in float32: from there on e^x - 1 is -1, and what is split below stays a number.
constexpr float LOWEST_EXP = -140.0f;

// Polynomials P fitted for the least relative error on the interval named (Lawson's iteration).
// e^r = 1 + r P(r) on [-ln 2 / 2, ln 2 / 2]: 9.2e-8
constexpr float EXP[] = {0.99999970198f, 0.49999150634f, 0.16667637229f, 0.041897974908f, 0.0082903057337f};
// The same to bfloat16's digits: 2.9e-6
constexpr float EXP_OF_HALF[] = {0.99996670791f, 0.50003025912f, 0.16787711764f, 0.041513527876f};
// e^r - 1 = r P(r) on the same: 1.1e-8
constexpr float EXPM1[] = {1.0f, 0.4999999702f, 0.16666506231f, 0.041667137295f, 0.0083690760657f, 0.0013888872927f};
// e^x - 1 = x P(x) on [-SHORT_REACH, SHORT_REACH]: 8.5e-8
constexpr float SHORT_REACH = 0.25f;
constexpr float SHORT_EXPM1[] = {1.0f, 0.49999826127f, 0.16666738689f, 0.04177515209f, 0.00833333004f};

template <int TERMS>
FINF_INLINE Vec polynomial(const float (&c)[TERMS], Vec x) {
    Vec p(c[TERMS - 1]);
    for (int i = TERMS - 2; i >= 0; --i) p = fma(p, x, Vec(c[i]));
    return p;
}

// x = n ln 2 + r with n whole and |r| <= ln 2 / 2.
struct Split {
    Vec n, r;
};

FINF_INLINE Split split(Vec x) {
    const Vec n = fma(x, Vec(LOG2_E), Vec(ROUNDER)) - Vec(ROUNDER);
    return {n, fma(n, Vec(-LN2_LOW), fma(n, Vec(-LN2_HIGH), x))};
}

// e^x for x < 88; zero at -inf.
FINF_INLINE Vec exp_of(Vec x) {
    const Split s = split(x);
    return scale(fma(polynomial(EXP, s.r), s.r, Vec(1.0f)), s.n);
}

// e^x - 1 for x < 88, without cancellation; past that the caller drops what it gets.
FINF_INLINE Vec expm1_of(Vec x) {
    const Split s = split(max(Vec(LOWEST_EXP), x));
    const Vec power = scale(Vec(1.0f), s.n);
    return fma(power * s.r, polynomial(EXPM1, s.r), power - Vec(1.0f));
}

// e^x - 1 for |x| <= SHORT_REACH.
FINF_INLINE Vec short_expm1_of(Vec x) { return x * polynomial(SHORT_EXPM1, x); }
