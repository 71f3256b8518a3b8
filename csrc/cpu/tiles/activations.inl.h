// Functions of one number and their exact changes f(h + d) - f(h), over Vec. Included inside an instruction set's
// namespace; the same mathematics in torch is finf_fast/reference/changes.py.
//
// Each function is a struct: core(h) gives the two numbers that take an exponential; of(h, core), which all changes of
// h share, its value and its series at h; by_series takes a change d with |d| bend <= REACH, in TERMS steps; by_formula
// is right for every change. Which of the two a number takes depends on nothing but h and d.
#pragma once

#include "exponentials.inl.h"

// What a result keeps: all of float32's digits, or bfloat16's eight bits, for which 2e-5 is a hundredth of the last. Of
// those an argument has no more either, and its square is exact.
enum class Digits { all, half };

// The value, and the change: d (c1 + d (c2 + d (c3 + d c4))) for |d| bend <= REACH.
struct Prepared {
    Vec f, c1, c2, c3, c4, bend;
};

// Of a sigmoid: it at y and at -y, each with all its digits. Of the normal distribution: e^(-x^2/2), and Phi(-|x|).
struct Core {
    Vec up, down;
};

// The fourth term is at most 3e-6 of the first.
constexpr int terms_of(Digits K) { return K == Digits::all ? 4 : 3; }

template <int TERMS>
FINF_INLINE Vec series(const Prepared& p, Vec d) {
    return d * fma(fma(TERMS < 4 ? p.c3 : fma(p.c4, d, p.c3), d, p.c2), d, p.c1);
}

template <class F>
FINF_INLINE Prepared prepared(Vec h) {
    return F::of(h, F::core(h));
}

// Out of the loop, which stays small: most changes are short, and where many are not the call costs little beside them.
template <class F>
__attribute__((noinline)) Vec mended(Vec by_series, Vec reach, Vec h, Vec d) {
    return select_less(Vec(F::REACH), reach, F::by_formula(h, d), by_series);
}

FINF_INLINE Vec negative(Vec x) { return Vec(0.0f) - x; }
FINF_INLINE Vec with_sign_of(Vec sign, Vec size) { return select_less(sign, Vec(0.0f), negative(size), size); }

// Fitted for the least relative error on the interval named (Lawson's iteration).
// tanh(z) = z P(z^2) for |z| <= 1/8: 6.4e-9
constexpr float SHORT_TANH[] = {0.99999999363f, -0.33332599104f, 0.13207752052f};
// 1 / (1 + x) = P(x) for |x| <= 1/8: 7.7e-9
constexpr float SHORT_INVERSE[] = {1.0f,           -1.0000004289f, 1.0000004288f, -0.9997808485f,
                                   0.99978085325f, -1.0278871367f, 1.0278869338f};
// (x + 3) e^(x^2/2) Phi(-x) = P((x - 3) / (x + 3)) for 0 <= x <= 14.5, past which Phi(-x) is zero: 5.2e-8
constexpr float TAIL_OF_ALL[] = {0.7290836684f,   -0.5093323282f,  0.2300193986f,     -0.04725528543f,  -0.01048009395f,
                                 0.006920007984f, 0.001074733851f, -0.0008977559842f, -0.0002629911409f};
// 1.8e-5
constexpr float TAIL_OF_HALF[] = {0.7290903626f,  -0.5094235265f,   0.2298679415f,
                                  -0.0463565194f, -0.009807609422f, 0.004957613478f};

template <Digits K>
FINF_INLINE Vec exp_to(Vec x) {
    if (K == Digits::all) return exp_of(x);
    const Split s = split(x);
    return scale(fma(polynomial(EXP_OF_HALF, s.r), s.r, Vec(1.0f)), s.n);
}

template <Digits K>
FINF_INLINE Core sides(Vec y) {
    const Vec w = exp_to<K>(negative(abs(y))), more = Vec(1.0f) / (Vec(1.0f) + w), less = w * more;
    return {select_less(y, Vec(0.0f), less, more), select_less(y, Vec(0.0f), more, less)};
}

// tanh(y / 2), which is 2 sigmoid(y) - 1, with the digits that this loses near 0: y / 2 - y^3 / 24 has bfloat16's
// there.
template <Digits K>
FINF_INLINE Vec half_tanh(Vec y, Core at) {
    if (K == Digits::half) {
        const Vec near = Vec(0.5f) * y * fma(y * y, Vec(-1.0f / 12), Vec(1.0f));
        return select_less(abs(y), Vec(1.0f / 16), near, at.up - at.down);
    }
    const Vec e = expm1_of(negative(abs(y)));
    return with_sign_of(y, negative(e) / (Vec(2.0f) + e));
}

// sigmoid(y + dy) - sigmoid(y) for |dy| <= 1/4, by tanh's addition theorem: with t = tanh(y/2) and x = tanh(dy/2) it is
// 2 sigmoid(y) sigmoid(-y) x / (1 + t x).
FINF_INLINE Vec near_step(Core at, Vec dy) {
    const Vec z = Vec(0.5f) * dy, x = z * polynomial(SHORT_TANH, z * z), t = at.up - at.down;
    return Vec(2.0f) * at.up * at.down * x * polynomial(SHORT_INVERSE, t * x);
}

// The same for every dy, y1 being y + dy: expm1(dy) sigmoid(y) sigmoid(-y1), mirrored where dy > 0 so that the
// exponential stays below 1.
template <Digits K>
FINF_INLINE Vec far_step(Core at, Vec y1, Vec dy) {
    const Core after = sides<K>(y1);
    const Vec rise = negative(at.down * after.up), fall = at.up * after.down;
    return select_less(Vec(0.0f), dy, rise, fall) * expm1_of(negative(abs(dy)));
}

// x gate(x) after a long way: the plain difference where it takes nothing back, or less than the product rule does with
// held = d gate(h); else the product rule. In the tails two values near each other differ by much less than the
// rounding of h + d moves either.
FINF_INLINE Vec far_product(Vec before, Vec after, Vec held, Vec by_product) {
    const Vec plain = after - before, kept = max(abs(held), Vec(2.0f) * abs(plain));
    return select_less(kept, abs(before) + abs(after), by_product, plain);
}

// The sigmoid's series: s1 e + s2 e^2 + s3 e^3 + s4 e^4, with p = s (1 - s) its slope and t = 2s - 1. The next term is
// at most e^4 / 120 of the first, 3e-8 for the largest e that is taken this way.
constexpr float LARGEST_SERIES = 1.0f / 24;

struct Series {
    Vec one, two, three, four;
};

FINF_INLINE Series sigmoid_series(Core at) {
    const Vec p = at.up * at.down, t = at.up - at.down, third = p * fma(p, Vec(-1.0f), Vec(1.0f / 6));
    const Vec fourth = p * t * fma(p, Vec(0.5f), Vec(-1.0f / 24));
    return {p, Vec(-0.5f) * p * t, third, fourth};
}

struct Relu {
    static constexpr int TERMS = 2;
    static constexpr bool BENDS = false;
    static constexpr float REACH = FLT_MAX;
    // The corner: c1 is what lies below it, c2 minus what lies above.
    static FINF_MEMBER Core core(Vec h) { return {h, h}; }
    static FINF_MEMBER Prepared of(Vec h, Core) {
        const Vec above = max(Vec(0.0f), h), below = negative(max(Vec(0.0f), negative(h)));
        return {above, below, negative(above), h, h, Vec(1.0f)};
    }
    // d above the corner, what sticks out of it below.
    static FINF_MEMBER Vec by_series(const Prepared& p, Vec d) { return max(p.c2, d + p.c1); }
    static FINF_MEMBER Vec by_formula(Vec h, Vec d) { return by_series(prepared<Relu>(h), d); }
};

// sigmoid(k x) for k = 1, and tanh(x) = 2 sigmoid(2x) - 1 for k = 2: k times the step of sigmoid(k x).
template <int k, Digits K>
struct Sigmoid {
    static constexpr int TERMS = terms_of(K);
    static constexpr bool BENDS = false;
    static constexpr float REACH = LARGEST_SERIES / k;

    static FINF_MEMBER Core core(Vec h) { return sides<K>(Vec(k) * h); }
    static FINF_MEMBER Prepared of(Vec h, Core at) {
        const Series s = sigmoid_series(at);
        const Vec f = k == 1 ? at.up : half_tanh<K>(Vec(k) * h, at), k2(k * k), k3(k * k * k);
        return {f, k2 * s.one, k3 * s.two, k2 * k2 * s.three, k2 * k3 * s.four, Vec(1.0f)};
    }
    static FINF_MEMBER Vec by_series(const Prepared& p, Vec d) { return series<TERMS>(p, d); }
    static FINF_MEMBER Vec by_formula(Vec h, Vec d) {
        const Vec y = Vec(k) * h, dy = Vec(k) * d;
        const Core at = sides<K>(y);
        const Vec near = near_step(at, dy), far = far_step<K>(at, y + dy, dy);
        return Vec(k) * select_less(Vec(SHORT_REACH), abs(dy), far, near);
    }
};

using Tanh = Sigmoid<2, Digits::all>;

// Series of x g(x) from that of g: its own terms, moved on by one, and x times them.
FINF_INLINE Prepared product_series(Vec h, Vec g, Series s, Vec bend) {
    return {h * g, fma(h, s.one, g), fma(h, s.two, s.one), fma(h, s.three, s.two), fma(h, s.four, s.three), bend};
}

// x sigmoid(y) with y = Gate::of(x).
template <class Gate, Digits K>
struct Gated {
    static constexpr int TERMS = terms_of(K);
    static constexpr bool BENDS = Gate::BENDS;
    static constexpr float REACH = LARGEST_SERIES / Gate::SPEED;

    static FINF_MEMBER Core core(Vec h) { return sides<K>(Gate::of(h)); }
    static FINF_MEMBER Prepared of(Vec h, Core at) {
        return product_series(h, at.up, Gate::series(h, sigmoid_series(at)), Gate::bend(h));
    }
    static FINF_MEMBER Vec by_series(const Prepared& p, Vec d) { return series<TERMS>(p, d); }
    static FINF_MEMBER Vec by_formula(Vec h, Vec d) {
        const Vec h1 = h + d, y = Gate::of(h), y1 = Gate::of(h1), dy = Gate::change(h, d);
        const Core at = sides<K>(y);
        const Vec near = near_step(at, dy);
        const Vec far = far_step<K>(at, y1, dy), held = d * at.up;
        const Vec jump = far_product(h * at.up, h1 * sides<K>(y1).up, held, fma(far, h1, held));
        return select_less(Vec(SHORT_REACH), abs(dy), jump, fma(near, h1, held));
    }
};

// y = k x.
template <int THOUSANDTHS>
struct LinearGate {
    static constexpr float k = THOUSANDTHS / 1000.0f, SPEED = k;
    static constexpr bool BENDS = false;
    static FINF_MEMBER Vec of(Vec x) { return Vec(k) * x; }
    static FINF_MEMBER Vec bend(Vec) { return Vec(1.0f); }
    static FINF_MEMBER Series series(Vec, Series s) {
        return {Vec(k) * s.one, Vec(k * k) * s.two, Vec(k * k * k) * s.three, Vec(k * k * k * k) * s.four};
    }
    static FINF_MEMBER Vec change(Vec, Vec d) { return Vec(k) * d; }
};
using SiluGate = LinearGate<1000>;
using QuickGeluGate = LinearGate<1702>;  // the gelu of CLIP

// gelu_tanh(x) = x sigmoid(x (a + b x^2)), a = 2 sqrt(2/pi), b = 0.044715 a (Hendrycks and Gimpel, arXiv 1606.08415).
struct GeluTanhGate {
    static constexpr float SLOPE = 1.5957691216f, CUBIC = 0.0713548162726f;
    // |dy| is |d| times y's slope, and what y's own bend adds: less than 1 part in 20.
    static constexpr float SPEED = 1.05f;
    static constexpr bool BENDS = true;
    static FINF_MEMBER Vec of(Vec x) { return x * fma(x * x, Vec(CUBIC), Vec(SLOPE)); }
    static FINF_MEMBER Vec bend(Vec h) { return fma(Vec(3 * CUBIC) * h, h, Vec(SLOPE)); }
    // y's is y1 d + y2 d^2 + y3 d^3, exactly.
    static FINF_MEMBER Series series(Vec h, Series s) {
        const Vec y1 = bend(h), y2 = Vec(3 * CUBIC) * h, y3(CUBIC), square = y1 * y1;
        return {s.one * y1, fma(s.one, y2, s.two * square),
                fma(s.one, y3, fma(Vec(2.0f) * s.two * y1, y2, s.three * square * y1)),
                fma(s.two, fma(Vec(2.0f) * y1, y3, y2 * y2),
                    fma(Vec(3.0f) * s.three * square, y2, s.four * square * square))};
    }
    static FINF_MEMBER Vec change(Vec h, Vec d) {
        const Vec h1 = h + d, square = fma(h + h1, h1, h * h);
        return d * fma(square, Vec(CUBIC), Vec(SLOPE));
    }
};

// All digits: x is split at 2^-8, so that the square of its first part is exact; a rounded x^2 would cost the tail its
// digits.
template <Digits K>
FINF_INLINE Vec density_of(Vec x) {
    if (K == Digits::half) return exp_to<K>(Vec(-0.5f) * (x * x));
    constexpr float SPLITTER = 49152.0f;  // 1.5 * 2^15, whose last digit is 2^-8
    const Vec high = (x + Vec(SPLITTER)) - Vec(SPLITTER), q = Vec(0.5f) * ((x - high) * (x + high));
    const Vec small = fma(q, fma(q, Vec(0.5f), Vec(-1.0f)), Vec(1.0f));  // e^-q, |q| < 2^-4
    return exp_of(Vec(-0.5f) * (high * high)) * small;
}

template <Digits K>
FINF_INLINE Core normal(Vec h) {
    const Vec x = select_less(Vec(16.0f), abs(h), Vec(16.0f), abs(h)), density = density_of<K>(x);
    const Vec r = Vec(1.0f) / (x + Vec(3.0f)), z = (x - Vec(3.0f)) * r;
    const Vec tail = K == Digits::all ? polynomial(TAIL_OF_ALL, z) : polynomial(TAIL_OF_HALF, z);
    return {density, density * tail * r};
}

FINF_INLINE Vec distribution(Vec h, Vec tail) { return select_less(h, Vec(0.0f), tail, Vec(1.0f) - tail); }

// x Phi(x)
template <Digits K>
struct Gelu {
    static constexpr int TERMS = terms_of(K);
    static constexpr bool BENDS = true;
    static constexpr float REACH = LARGEST_SERIES;
    static constexpr float ROOT = 0.398942280401f;  // 1 / sqrt(2 pi)
    // Up to here the exponent below stays within SHORT_REACH, and the terms left out below 5e-8.
    static constexpr float NEAR = 0.4f;

    // Phi's terms are Hermite's polynomials times the density; the first left out is within 3e-8 of the first.
    static FINF_MEMBER Core core(Vec h) { return normal<K>(h); }
    static FINF_MEMBER Prepared of(Vec h, Core at) {
        const Vec p = Vec(ROOT) * at.up, h2 = h * h;
        const Series s = {p, Vec(-0.5f) * p * h, p * fma(h2, Vec(1.0f / 6), Vec(-1.0f / 6)),
                          p * h * fma(h2, Vec(-1.0f / 24), Vec(0.125f))};
        return product_series(h, distribution(h, at.down), s, abs(h) + Vec(1.3f));
    }
    static FINF_MEMBER Vec by_series(const Prepared& p, Vec d) { return series<TERMS>(p, d); }
    static FINF_MEMBER Vec by_formula(Vec h, Vec d) {
        const Core at = normal<Digits::all>(h);
        const Vec h1 = h + d, below = distribution(h, at.down), held = d * below;
        const Vec near = fma(near_step(Vec(ROOT) * at.up, h, d), h1, held);
        const Vec t1 = normal<Digits::all>(h1).down, far = fma(far_step(h, at.down, h1, t1), h1, held);
        const Vec jump = far_product(h * below, h1 * distribution(h1, t1), held, far);
        return select_less(Vec(NEAR), abs(d) * fma(abs(d), Vec(4.0f), abs(h)), jump, near);
    }

    // Phi(h + d) - Phi(h), the density's integral, around its middle m: with u = d^2 and k = m d it is
    //     d density(m) (1 + (k^2 - u) / 24 + (k^4 - 6 k^2 u + 3 u^2) / 1920 + ...),
    // and density(m) = density(h) e^(-d (h + d/4) / 2).
    static FINF_MEMBER Vec near_step(Vec density, Vec h, Vec d) {
        const Vec half = Vec(0.5f) * d, u = d * d, k = (h + half) * d, k2 = k * k;
        const Vec by = short_expm1_of(negative(half * fma(d, Vec(0.25f), h)));
        const Vec fourth = fma(k2, k2 - Vec(6.0f) * u, Vec(3.0f) * (u * u));
        const Vec bend = fma(fourth, Vec(1.0f / 1920), (k2 - u) * Vec(1.0f / 24));
        return density * fma(d, fma(by, bend, by + bend), d);  // (1 + by) (1 + bend) - 1
    }
    // By the tails of the side that both ends lie on, or across 0 by both.
    static FINF_MEMBER Vec far_step(Vec h, Vec t0, Vec h1, Vec t1) {
        const Vec same = select_less(h, Vec(0.0f), t1 - t0, t0 - t1);
        const Vec across = with_sign_of(h1, (Vec(1.0f) - t0) - t1);
        return select_less(h * h1, Vec(0.0f), across, same);
    }
};
