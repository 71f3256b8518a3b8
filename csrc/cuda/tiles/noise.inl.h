// Four numbers of noise, as a lane draws them. Two words make two normal numbers (Box and Muller): a distance, the root
// of -2 ln U, and a direction.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../../numerics.h"
#include "../noise.h"

namespace finf::cuda {

#include "../../philox.inl.h"

// The root and the products round once each, as IEEE has it, and feed no addition: the bits are the CPU's.
FINF_SMALL void normal_pair(uint32_t distance, uint32_t angle, float* normal) {
    constexpr float UNIT = 1.0f / 2147483648.0f;
    const Scaled<uint32_t> square = minus_two_log(distance);
    float unit;
    memcpy(&unit, &square.unit, sizeof unit);
    const float size = sqrtf(static_cast<float>(square.count) * unit);
    const Direction<uint32_t> to = direction(angle);
    normal[0] = size * (static_cast<float>(static_cast<int32_t>(to.x)) * UNIT);
    normal[1] = size * (static_cast<float>(static_cast<int32_t>(to.y)) * UNIT);
}

FINF_SMALL void normal_block(const Noise& op, uint64_t sample, int64_t block, float (&normal)[4]) {
    const PhiloxBlock<uint32_t> drawn = noise_words(op.seed, sample, op.draw, static_cast<uint32_t>(block));
    normal_pair(drawn.word[0], drawn.word[1], normal);
    normal_pair(drawn.word[2], drawn.word[3], normal + 2);
}

// Block i of all samples' blocks, `blocks` to a sample; the last of a sample may have less than four numbers.
FINF_SMALL void write_block(const Noise& op, int64_t i, int64_t blocks) {
    const int64_t s = i / blocks, block = i % blocks, count = op.M - 4 * block;
    float normal[4], *out = op.out + s * op.M + 4 * block;
    normal_block(op, static_cast<uint64_t>(op.samples[s]), block, normal);
    if (count >= 4 && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
        struct alignas(16) Four {
            float x[4];
        };
        *reinterpret_cast<Four*>(out) = Four{{normal[0], normal[1], normal[2], normal[3]}};
    } else {
        for (int k = 0; k < 4; ++k)
            if (k < count) out[k] = normal[k];
    }
}

}  // namespace finf::cuda
