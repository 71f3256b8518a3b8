// Functions of one number and their exact changes f(h + d) - f(h), over Vec. Included inside an instruction set's
// namespace; the same mathematics in torch is finf_fast/reference/changes.py.
//
// Each function is a struct: of(h) gives its value and what all changes of h share; reach(h, d) <= REACH says that
// `near`, which does without an exponential or a division, is exact to the last digits; `far` is right for every d.
// Which of the two a number takes depends on nothing but h and d.
#pragma once

#include "exponentials.inl.h"

// What depends on h alone.
struct Prepared {
    Vec h, f;  // the argument, the function's value
    Vec a, b;  // the slope's factors, as the function likes
    Vec s;     // the gate of x gate(x)
};

FINF_INLINE Vec negative(Vec x) { return Vec(0.0f) - x; }
FINF_INLINE Vec with_sign_of(Vec sign, Vec size) { return select_less(sign, Vec(0.0f), negative(size), size); }

// Fitted for the least relative error on the interval named (Lawson's iteration).
// tanh(z) = z P(z^2) for |z| <= 1/8: 6.4e-9
constexpr float SHORT_TANH[] = {0.99999999363f, -0.33332599104f, 0.13207752052f};
// 1 / (1 + x) = P(x) for |x| <= 1/8: 7.7e-9
constexpr float SHORT_INVERSE[] = {1.0f,           -1.0000004289f, 1.0000004288f, -0.9997808485f,
                                   0.99978085325f, -1.0278871367f, 1.0278869338f};
// (x + 3) e^(x^2/2) Phi(-x) = P((x - 3) / (x + 3)) for 0 <= x <= 14.5, past which Phi(-x) is zero: 5.2e-8
constexpr float TAIL[] = {0.7290836684f,   -0.5093323282f,  0.2300193986f,     -0.04725528543f,  -0.01048009395f,
                          0.006920007984f, 0.001074733851f, -0.0008977559842f, -0.0002629911409f};

// The sigmoid of y and of -y, each with all its digits.
struct Sides {
    Vec up, down;
};

FINF_INLINE Sides sides(Vec y) {
    const Vec w = exp_of(negative(abs(y))), more = Vec(1.0f) / (Vec(1.0f) + w), less = w * more;
    return {select_less(y, Vec(0.0f), less, more), select_less(y, Vec(0.0f), more, less)};
}

// tanh(y / 2), which is 2 sigmoid(y) - 1, with the digits that this loses near 0.
FINF_INLINE Vec half_tanh(Vec y) {
    const Vec e = expm1_of(negative(abs(y)));
    return with_sign_of(y, negative(e) / (Vec(2.0f) + e));
}

// sigmoid(y + dy) - sigmoid(y) for |dy| <= 1/4, by tanh's addition theorem: with t = tanh(y/2) and x = tanh(dy/2) it is
// 2 sigmoid(y) sigmoid(-y) x / (1 + t x).
FINF_INLINE Vec near_step(Vec slope, Vec t, Vec dy) {
    const Vec z = Vec(0.5f) * dy, x = z * polynomial(SHORT_TANH, z * z);
    return slope * x * polynomial(SHORT_INVERSE, t * x);
}

// The same for every dy, y1 being y + dy: expm1(dy) sigmoid(y) sigmoid(-y1), mirrored where dy > 0 so that the
// exponential stays below 1.
FINF_INLINE Vec far_step(Sides at, Vec y1, Vec dy) {
    const Sides after = sides(y1);
    const Vec rise = negative(at.down * after.up), fall = at.up * after.down;
    return select_less(Vec(0.0f), dy, rise, fall) * expm1_of(negative(abs(dy)));
}

// x gate(x) after a long way: the plain difference where both values are below d, which the product rule adds and takes
// away; else the product rule.
FINF_INLINE Vec far_product(Vec before, Vec after, Vec d, Vec by_product) {
    return select_less(abs(d), abs(before) + abs(after), by_product, after - before);
}

struct Relu {
    static constexpr float REACH = FLT_MAX;
    static FINF_MEMBER Prepared of(Vec h) { return {h, max(Vec(0.0f), h), h, h, h}; }
    static FINF_MEMBER Vec reach(const Prepared&, Vec) { return Vec(0.0f); }
    // d above the corner, what sticks out of it below.
    static FINF_MEMBER Vec near(const Prepared& p, Vec d) {
        return max(negative(p.f), d - max(Vec(0.0f), negative(p.h)));
    }
    static FINF_MEMBER Vec far(Vec, Vec d) { return d; }
};

struct Sigmoid {
    static constexpr float REACH = SHORT_REACH;
    static FINF_MEMBER Prepared of(Vec h) {
        const Sides at = sides(h);
        return {h, at.up, Vec(2.0f) * at.up * at.down, half_tanh(h), h};
    }
    static FINF_MEMBER Vec reach(const Prepared&, Vec d) { return abs(d); }
    static FINF_MEMBER Vec near(const Prepared& p, Vec d) { return near_step(p.a, p.b, d); }
    static FINF_MEMBER Vec far(Vec h, Vec d) { return far_step(sides(h), h + d, d); }
};

// 2 sigmoid(2x) - 1
struct Tanh {
    static constexpr float REACH = SHORT_REACH;
    static FINF_MEMBER Prepared of(Vec h) {
        const Vec y = h + h, t = half_tanh(y);
        const Sides at = sides(y);
        return {h, t, Vec(4.0f) * at.up * at.down, t, h};
    }
    static FINF_MEMBER Vec reach(const Prepared&, Vec d) { return abs(d + d); }
    static FINF_MEMBER Vec near(const Prepared& p, Vec d) { return near_step(p.a, p.b, d + d); }
    static FINF_MEMBER Vec far(Vec h, Vec d) {
        const Vec y = h + h, dy = d + d, step = far_step(sides(y), y + dy, dy);
        return step + step;
    }
};

// x sigmoid(y) with y = Gate::of(x).
template <class Gate>
struct Gated {
    static constexpr float REACH = SHORT_REACH;
    static FINF_MEMBER Prepared of(Vec h) {
        const Vec y = Gate::of(h);
        const Sides at = sides(y);
        return {h, h * at.up, Vec(2.0f) * at.up * at.down, half_tanh(y), at.up};
    }
    static FINF_MEMBER Vec reach(const Prepared& p, Vec d) { return abs(Gate::change(p.h, d)); }
    static FINF_MEMBER Vec near(const Prepared& p, Vec d) {
        return fma(near_step(p.a, p.b, Gate::change(p.h, d)), p.h + d, d * p.s);
    }
    static FINF_MEMBER Vec far(Vec h, Vec d) {
        const Vec h1 = h + d, y1 = Gate::of(h1);
        const Sides at = sides(Gate::of(h));
        const Vec by_product = fma(far_step(at, y1, Gate::change(h, d)), h1, d * at.up);
        return far_product(h * at.up, h1 * sides(y1).up, d, by_product);
    }
};

struct SiluGate {
    static FINF_MEMBER Vec of(Vec x) { return x; }
    static FINF_MEMBER Vec change(Vec, Vec d) { return d; }
};

// The gelu of CLIP.
struct QuickGeluGate {
    static FINF_MEMBER Vec of(Vec x) { return Vec(1.702f) * x; }
    static FINF_MEMBER Vec change(Vec, Vec d) { return Vec(1.702f) * d; }
};

// gelu_tanh(x) = x sigmoid(x (a + b x^2)), a = 2 sqrt(2/pi), b = 0.044715 a (Hendrycks and Gimpel, arXiv 1606.08415).
struct GeluTanhGate {
    static constexpr float SLOPE = 1.5957691216f, CUBIC = 0.0713548162726f;
    static FINF_MEMBER Vec of(Vec x) { return x * fma(x * x, Vec(CUBIC), Vec(SLOPE)); }
    static FINF_MEMBER Vec change(Vec h, Vec d) {
        const Vec h1 = h + d, square = fma(h + h1, h1, h * h);
        return d * fma(square, Vec(CUBIC), Vec(SLOPE));
    }
};

struct Normal {
    Vec density, tail;  // e^(-x^2/2), and Phi(-|x|)
};

// x is split at 2^-8, so that the square of its first part is exact: a rounded x^2 would cost the tail its digits.
FINF_INLINE Normal normal(Vec h) {
    constexpr float SPLITTER = 49152.0f;  // 1.5 * 2^15, whose last digit is 2^-8
    const Vec x = select_less(Vec(16.0f), abs(h), Vec(16.0f), abs(h));
    const Vec high = (x + Vec(SPLITTER)) - Vec(SPLITTER), q = Vec(0.5f) * ((x - high) * (x + high));
    const Vec small = fma(q, fma(q, Vec(0.5f), Vec(-1.0f)), Vec(1.0f));  // e^-q, |q| < 2^-4
    const Vec density = exp_of(Vec(-0.5f) * (high * high)) * small;
    const Vec r = Vec(1.0f) / (x + Vec(3.0f));
    return {density, density * polynomial(TAIL, (x - Vec(3.0f)) * r) * r};
}

FINF_INLINE Vec distribution(Vec h, Vec tail) { return select_less(h, Vec(0.0f), tail, Vec(1.0f) - tail); }

// x Phi(x)
struct Gelu {
    static constexpr float ROOT = 0.398942280401f;  // 1 / sqrt(2 pi)
    // The exponent below stays within SHORT_REACH, and the terms left out below 5e-8.
    static constexpr float REACH = 0.4f;

    static FINF_MEMBER Prepared of(Vec h) {
        const Normal at = normal(h);
        const Vec below = distribution(h, at.tail);
        return {h, h * below, Vec(ROOT) * at.density, h, below};
    }
    static FINF_MEMBER Vec reach(const Prepared& p, Vec d) { return abs(d) * fma(abs(d), Vec(4.0f), abs(p.h)); }
    // The density's integral over [h, h + d] around its middle m: with u = d^2 and k = m d it is
    //     d density(m) (1 + (k^2 - u) / 24 + (k^4 - 6 k^2 u + 3 u^2) / 1920 + ...),
    // and density(m) = density(h) e^(-d (h + d/4) / 2).
    static FINF_MEMBER Vec near(const Prepared& p, Vec d) {
        const Vec half = Vec(0.5f) * d, u = d * d, k = (p.h + half) * d, k2 = k * k;
        const Vec by = short_expm1_of(negative(half * fma(d, Vec(0.25f), p.h)));
        const Vec fourth = fma(k2, k2 - Vec(6.0f) * u, Vec(3.0f) * (u * u));
        const Vec bend = fma(fourth, Vec(1.0f / 1920), (k2 - u) * Vec(1.0f / 24));
        const Vec mean = fma(by, bend, by + bend);  // (1 + by) (1 + bend) - 1
        const Vec step = p.a * fma(d, mean, d);
        return fma(step, p.h + d, d * p.s);
    }
    // By the tails of the side that both ends lie on, or across 0 by both.
    static FINF_MEMBER Vec far(Vec h, Vec d) {
        const Vec h1 = h + d, t0 = normal(h).tail, t1 = normal(h1).tail;
        const Vec below = distribution(h, t0), after = distribution(h1, t1);
        const Vec same = select_less(h, Vec(0.0f), t1 - t0, t0 - t1);
        const Vec across = with_sign_of(d, (Vec(1.0f) - t0) - t1);
        const Vec step = select_less(h * h1, Vec(0.0f), across, same);
        return far_product(h * below, h1 * after, d, fma(step, h1, d * below));
    }
};
