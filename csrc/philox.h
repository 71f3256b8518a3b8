// Random numbers that are a function of where they are wanted: Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel
// random numbers: as easy as 1, 2, 3", SC 2011), and normal numbers out of its words.
//
// Everything up to the last three steps is whole-number arithmetic, and those (a conversion, a square root, products)
// round once each and feed no addition: no compiler can fuse or reorder them, so every processor gives the same bits.
#pragma once

#include <cmath>
#include <cstdint>

#include "numerics.h"

namespace finf {

#define FINF_SMALL FINF_HOST_DEVICE inline __attribute__((always_inline))

struct PhiloxBlock {
    uint32_t word[4];
};

FINF_SMALL uint32_t high_product(uint32_t a, uint32_t b) {
    return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}
FINF_SMALL int32_t high_product(int32_t a, int32_t b) {
    return static_cast<int32_t>(static_cast<int64_t>(a) * b >> 32);
}

FINF_SMALL PhiloxBlock philox(PhiloxBlock counter, uint32_t key0, uint32_t key1) {
    uint32_t x0 = counter.word[0], x1 = counter.word[1], x2 = counter.word[2], x3 = counter.word[3];
    for (int round = 0; round < 10; ++round) {
        const uint32_t high0 = high_product(0xD2511F53u, x0), low0 = 0xD2511F53u * x0;
        const uint32_t high1 = high_product(0xCD9E8D57u, x2), low1 = 0xCD9E8D57u * x2;
        x0 = high1 ^ x1 ^ key0;
        x1 = low1;
        x2 = high0 ^ x3 ^ key1;
        x3 = low0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return {{x0, x1, x2, x3}};
}

// Four words of the noise of (sample, draw): those at 4 block ... 4 block + 3, block below 2^31. The key is the seed.
FINF_SMALL PhiloxBlock noise_counter(uint64_t sample, uint32_t draw, uint32_t block) {
    return {{block, draw, static_cast<uint32_t>(sample), static_cast<uint32_t>(sample >> 32)}};
}

// A whole number and the power of two that it is to be multiplied by.
struct Scaled {
    int32_t count;
    float unit;
};

// m without its upper `step` bits where those are zero, and z the number of bits so lost; no loop around it, which
// would keep a loop around all this from becoming vectors.
FINF_SMALL void shift_out(uint32_t& m, uint32_t& z, uint32_t step) {
    const bool zeros = m >> (32 - step) == 0;
    m = zeros ? m << step : m;
    z += zeros ? step : 0;
}

// -ln U for U = (word | 1) / 2^32, whose values are the middles of 2^31 equal parts of (0, 1). With U = 2^-z (1 - s),
// 0 < s <= 1/2, it is z ln 2 + s P(s); P fitted for the least relative error (Lawson's iteration, 3.5e-9), in units of
// 2^-29. In units of 2^-31 where z = 0, else of 2^-26: the largest is 22.2.
FINF_SMALL Scaled minus_log(uint32_t word) {
    uint32_t m = word | 1u, z = 0;
    shift_out(m, z, 16);
    shift_out(m, z, 8);
    shift_out(m, z, 4);
    shift_out(m, z, 2);
    shift_out(m, z, 1);
    const uint32_t s = 0u - m;  // in units of 2^-32
    const int32_t x = static_cast<int32_t>(s > 0x7fffffffu ? 0x7fffffffu : s);
    int32_t p = 953278044;
    p = -1370407488 + high_product(p, x);
    p = 1098817938 + high_product(p, x);
    p = -340087663 + high_product(p, x);
    p = 189704133 + high_product(p, x);
    p = 93036198 + high_product(p, x);
    p = 135378312 + high_product(p, x);
    p = 178909758 + high_product(p, x);
    p = 268436195 + high_product(p, x);
    p = 536870910 + high_product(p, x);
    const int32_t fraction = static_cast<int32_t>(high_product(s, static_cast<uint32_t>(p) << 2));
    const int32_t sum = (fraction >> 5) + static_cast<int32_t>(z) * 46516320;  // ln 2 in units of 2^-26
    return z == 0 ? Scaled{fraction, 1.0f / 2147483648.0f} : Scaled{sum, 1.0f / 67108864.0f};
}

// A point of the unit circle in units of 2^-31, all directions alike. The upper two bits of the word choose a quarter;
// the others an angle y pi/4 within it, -1 < y < 1: cos = 1 - t C(t), sin = y S(t), t = y^2, the fits' errors 7e-10 and
// 3e-9, coefficients and t in units of 2^-32.
struct Direction {
    int32_t x, y;
};

FINF_SMALL Direction direction(uint32_t word) {
    const uint32_t angle = word << 2 | 2u, negative = angle >> 31;
    const uint32_t m = (negative ? 0u - angle : angle) << 1, t = high_product(m, m);
    uint32_t c = 1399993u - high_product(15212u, t);
    c = 68093863u - high_product(c, t);
    c = 1324675878u - high_product(c, t);
    uint32_t s = 10694473u - high_product(154406u, t);
    s = 346798992u - high_product(s, t);
    s = 3373259415u - high_product(s, t);
    const int32_t cosine = static_cast<int32_t>(0x7fffffffu - (high_product(c, t) >> 1));
    const int32_t size = static_cast<int32_t>(high_product(s, m) >> 1), sine = negative ? -size : size;
    const bool odd = word >> 30 & 1u, half = word >> 31;  // quarters 1 and 3; 2 and 3
    const int32_t x = odd ? -sine : cosine, y = odd ? cosine : sine;
    return {half ? -x : x, half ? -y : y};
}

}  // namespace finf
