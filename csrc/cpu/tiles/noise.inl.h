// The loop of noise, written once over Vec and included inside each instruction set's namespace.
//
// Whole numbers go through plain loops over arrays, which the compiler turns into vectors of the set; only the root is
// asked of Vec. Two words make two normal numbers (Box and Muller): a distance, the root of -2 ln U, and a direction.
#pragma once

#include "elements.inl.h"

// Blocks of four words worked on together: arrays of 1 KiB, some vectors of every set.
constexpr int NOISE_BLOCKS = 64;

struct NoiseRoom {
    alignas(64) uint32_t word[4][NOISE_BLOCKS];
    alignas(64) float distance[NOISE_BLOCKS], x[NOISE_BLOCKS], y[NOISE_BLOCKS];
    alignas(64) float normal[4 * NOISE_BLOCKS];
};

FINF_INLINE void draw_words(uint64_t seed, uint64_t sample, uint32_t draw, uint32_t first, NoiseRoom& room) {
    const uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int i = 0; i < NOISE_BLOCKS; ++i) {
        const finf::PhiloxBlock at = finf::noise_counter(sample, draw, first + static_cast<uint32_t>(i));
        const finf::PhiloxBlock drawn = finf::philox(at, key0, key1);
        for (int k = 0; k < 4; ++k) room.word[k][i] = drawn.word[k];
    }
}

// Numbers 2k and 2k + 1 of every block.
FINF_INLINE void normal_pairs(NoiseRoom& room, int k) {
    constexpr float UNIT = 1.0f / 2147483648.0f;
    for (int i = 0; i < NOISE_BLOCKS; ++i) {
        const finf::Scaled square = finf::minus_log(room.word[2 * k][i]);
        room.distance[i] = static_cast<float>(square.count) * (2 * square.unit);
    }
    for (int i = 0; i < NOISE_BLOCKS; ++i) {
        const finf::Direction to = finf::direction(room.word[2 * k + 1][i]);
        room.x[i] = static_cast<float>(to.x) * UNIT;
        room.y[i] = static_cast<float>(to.y) * UNIT;
    }
    for (int i = 0; i < NOISE_BLOCKS; i += Vec::W) {
        const Vec distance = sqrt(load(room.distance + i));
        store(room.x + i, distance * load(room.x + i));
        store(room.y + i, distance * load(room.y + i));
    }
    for (int i = 0; i < NOISE_BLOCKS; ++i) {
        room.normal[4 * i + 2 * k] = room.x[i];
        room.normal[4 * i + 2 * k + 1] = room.y[i];
    }
}

// `count` normal numbers of a sample and draw, from position 4 `block` on.
void noise_row(uint64_t seed, uint64_t sample, uint32_t draw, int64_t block, int64_t count, float* out) {
    NoiseRoom room;
    for (int64_t v = 0; v < count; v += 4 * NOISE_BLOCKS) {
        draw_words(seed, sample, draw, static_cast<uint32_t>(block + v / 4), room);
        normal_pairs(room, 0);
        normal_pairs(room, 1);
        const int64_t here = count - v < 4 * NOISE_BLOCKS ? count - v : 4 * NOISE_BLOCKS;
        each_vector(here, [&](int64_t i, int64_t lanes)
                              FINF_LAMBDA { store_up_to(out + v + i, load(room.normal + i), lanes); });
    }
}
