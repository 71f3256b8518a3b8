// The loop of noise, written once over Vec and Words and included inside each instruction set's namespace. Two words
// make two normal numbers (Box and Muller): a distance, the root of -2 ln V, and a direction.
#pragma once

#include "../../philox.inl.h"
#include "elements.inl.h"

// Vectors of blocks of four words worked on together: what one waits for, the next can do.
constexpr int NOISE_VECTORS = 4, NOISE_NUMBERS = 4 * NOISE_VECTORS * Vec::W;

// Numbers 2k and 2k + 1 of every block.
FINF_INLINE void normal_pairs(const PhiloxBlock<Words> (&drawn)[NOISE_VECTORS], int k, Vec (&x)[NOISE_VECTORS],
                              Vec (&y)[NOISE_VECTORS]) {
    const Vec unit = 1.0f / 2147483648.0f;
    Vec distance[NOISE_VECTORS];
    for (int i = 0; i < NOISE_VECTORS; ++i) {
        const Scaled<Words> square = minus_two_log(drawn[i].word[2 * k]);
        distance[i] = sqrt(to_float(square.count) * as_float(square.unit));
    }
    for (int i = 0; i < NOISE_VECTORS; ++i) {
        const Direction<Words> to = direction(drawn[i].word[2 * k + 1]);
        x[i] = distance[i] * (to_float(to.x) * unit);
        y[i] = distance[i] * (to_float(to.y) * unit);
    }
}

// NOISE_NUMBERS normal numbers of a sample and draw, from position 4 `block` on.
FINF_INLINE void normal_numbers(uint64_t seed, uint64_t sample, uint32_t draw, uint32_t block, float* out) {
    PhiloxBlock<Words> drawn[NOISE_VECTORS];
    for (uint32_t i = 0; i < NOISE_VECTORS; ++i) {
        drawn[i] = noise_words(seed, sample, draw, counting_from(block + i * Vec::W));
    }
    Vec x[2][NOISE_VECTORS], y[2][NOISE_VECTORS];
    for (int k = 0; k < 2; ++k) normal_pairs(drawn, k, x[k], y[k]);
    for (int i = 0; i < NOISE_VECTORS; ++i, out += 4 * Vec::W) {
        const Vec x_low = zip_low(x[0][i], x[1][i]), x_high = zip_high(x[0][i], x[1][i]);
        const Vec y_low = zip_low(y[0][i], y[1][i]), y_high = zip_high(y[0][i], y[1][i]);
        store(out, zip_low(x_low, y_low));
        store(out + Vec::W, zip_high(x_low, y_low));
        store(out + 2 * Vec::W, zip_low(x_high, y_high));
        store(out + 3 * Vec::W, zip_high(x_high, y_high));
    }
}

// `count` normal numbers of a sample and draw, from position 4 `block` on.
void noise_row(uint64_t seed, uint64_t sample, uint32_t draw, int64_t block, int64_t count, float* out) {
    int64_t v = 0;
    for (; v + NOISE_NUMBERS <= count; v += NOISE_NUMBERS) {
        normal_numbers(seed, sample, draw, static_cast<uint32_t>(block + v / 4), out + v);
    }
    if (v == count) return;
    float last[NOISE_NUMBERS];
    normal_numbers(seed, sample, draw, static_cast<uint32_t>(block + v / 4), last);
    for (int64_t i = v; i < count; ++i) out[i] = last[i - v];
}
