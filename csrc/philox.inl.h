// Random numbers that are a function of where they are wanted: Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel
// random numbers: as easy as 1, 2, 3", SC 2011), and normal numbers out of its words.
//
// Everything up to the last three steps is whole-number arithmetic, and those (a conversion, a square root, products)
// round once each and feed no addition: no compiler can fuse or reorder them, so every processor gives the same bits.
//
// Written once over U, a word of 32 bits or a vector of them, and included inside each namespace that has one: all of
// it wraps around, `>>` brings in zeros, and the two functions below are all else that is asked of U.
#pragma once

#define FINF_SMALL FINF_HOST_DEVICE inline __attribute__((always_inline))

FINF_SMALL uint32_t high_product(uint32_t a, uint32_t b) {
    return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}
FINF_SMALL uint32_t select_zero(uint32_t asked, uint32_t yes, uint32_t no) { return asked == 0 ? yes : no; }

template <class U>
struct PhiloxBlock {
    U word[4];
};

template <class U>
FINF_SMALL PhiloxBlock<U> philox(PhiloxBlock<U> counter, uint32_t key0, uint32_t key1) {
    const U factor0(0xD2511F53u), factor1(0xCD9E8D57u);
    U x0 = counter.word[0], x1 = counter.word[1], x2 = counter.word[2], x3 = counter.word[3];
    for (int round = 0; round < 10; ++round) {
        const U high0 = high_product(x0, factor0), low0 = x0 * factor0;
        const U high1 = high_product(x2, factor1), low1 = x2 * factor1;
        x0 = high1 ^ x1 ^ U(key0);
        x1 = low1;
        x2 = high0 ^ x3 ^ U(key1);
        x3 = low0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return {{x0, x1, x2, x3}};
}

// Four words of the noise of (sample, draw): those at 4 block ... 4 block + 3, block below 2^31. The key is the seed.
template <class U>
FINF_SMALL PhiloxBlock<U> noise_words(uint64_t seed, uint64_t sample, uint32_t draw, U block) {
    const U low(static_cast<uint32_t>(sample)), high(static_cast<uint32_t>(sample >> 32));
    const PhiloxBlock<U> counter = {{block, U(draw), low, high}};
    return philox(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// A whole number below 2^31 and the bits of the float that it is to be multiplied by.
template <class U>
struct Scaled {
    U count, unit;
};

// m without its upper `step` bits where those are zero, and z the number of bits so lost.
template <class U>
FINF_SMALL void shift_out(U& m, U& z, int step) {
    const U upper = m >> (32 - step);
    m = select_zero(upper, m << step, m);
    z = select_zero(upper, z + U(static_cast<uint32_t>(step)), z);
}

// floor(p x / 2^32) for a signed p and a positive x.
template <class U>
FINF_SMALL U high_product_signed(U p, U x) {
    return high_product(p, x) - (x & (U(0u) - (p >> 31)));
}

// -2 ln V for V = (word | 1) / 2^32, whose values are the middles of 2^31 equal parts of (0, 1). With V = 2^-z (1 - s),
// 0 < s <= 1/2, -ln V is z ln 2 + s P(s); P fitted for the least relative error (Lawson's iteration, 3.5e-9), in units
// of 2^-29; of its partial sums only the second and the fourth may be negative. The count is in units of 2^-31 where
// z = 0, else of 2^-26: the largest is 22.2.
template <class U>
FINF_SMALL Scaled<U> minus_two_log(U word) {
    constexpr uint32_t TWO_TO_MINUS_30 = (127u - 30u) << 23, TWO_TO_MINUS_25 = (127u - 25u) << 23;
    U m = word | U(1u), z(0u);
    shift_out(m, z, 16);
    shift_out(m, z, 8);
    shift_out(m, z, 4);
    shift_out(m, z, 2);
    shift_out(m, z, 1);
    const U s = U(0u) - m, x = s - (s >> 31);  // in units of 2^-32; x has room for a sign
    U p(953278044u);
    p = high_product(p, x) - U(1370407488u);
    p = high_product_signed(p, x) + U(1098817938u);
    p = high_product(p, x) - U(340087663u);
    p = high_product_signed(p, x) + U(189704133u);
    p = high_product(p, x) + U(93036198u);
    p = high_product(p, x) + U(135378312u);
    p = high_product(p, x) + U(178909758u);
    p = high_product(p, x) + U(268436195u);
    p = high_product(p, x) + U(536870910u);
    const U fraction = high_product(s, p << 2);
    const U sum = (fraction >> 5) + z * U(46516320u);  // ln 2 in units of 2^-26
    return {select_zero(z, fraction, sum), select_zero(z, U(TWO_TO_MINUS_30), U(TWO_TO_MINUS_25))};
}

// A point of the unit circle in units of 2^-31, signed, all directions alike. The upper two bits of the word choose a
// quarter; the others an angle y pi/4 within it, -1 < y < 1: cos = 1 - t C(t), sin = y S(t), t = y^2, the fits' errors
// 7e-10 and 3e-9, coefficients and t in units of 2^-32.
template <class U>
struct Direction {
    U x, y;
};

template <class U>
FINF_SMALL Direction<U> direction(U word) {
    const U angle = word << 2 | U(2u), sign = U(0u) - (angle >> 31);  // all ones or none: (a ^ sign) - sign is +-a
    const U m = ((angle ^ sign) - sign) << 1, t = high_product(m, m);
    U c = U(1399993u) - high_product(t, U(15212u));
    c = U(68093863u) - high_product(c, t);
    c = U(1324675878u) - high_product(c, t);
    U s = U(10694473u) - high_product(t, U(154406u));
    s = U(346798992u) - high_product(s, t);
    s = U(3373259415u) - high_product(s, t);
    const U cosine = U(0x7fffffffu) - (high_product(c, t) >> 1);
    const U sine = ((high_product(s, m) >> 1) ^ sign) - sign;
    const U even = word & U(1u << 30), half = U(0u) - (word >> 31);  // quarters 0 and 2; 2 and 3
    const U x = select_zero(even, cosine, U(0u) - sine), y = select_zero(even, sine, cosine);
    return {(x ^ half) - half, (y ^ half) - half};
}
