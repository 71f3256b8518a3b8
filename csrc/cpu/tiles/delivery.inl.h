// Items of a file to numbers of a batch, written once over Vec and included inside each instruction set's namespace.
// Whole numbers go through plain loops, which the compiler turns into vectors of the set.
#pragma once

#include "elements.inl.h"

template <class T>
void widen_items(const uint8_t* from, int64_t count, int64_t* to) {
    for (int64_t i = 0; i < count; ++i) {
        T one;  // a row may begin at an odd byte
        __builtin_memcpy(&one, from + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
        to[i] = static_cast<int64_t>(one);
    }
}

// The numbers of a rule for the channels of STEP neighbouring pixels.
struct Shade {
    static constexpr int64_t STEP = Vec::W;
    Vec gain, offset;
    FINF_MEMBER Shade(const finf::PixelRule& rule, int64_t at)
        : gain(load(rule.gain + at)), offset(load(rule.offset + at)) {}
    template <class T>
    FINF_MEMBER void apply(const uint8_t* from, T* to) const {
        store(to, fma(load(from), gain, offset));
    }
};

// A bfloat16 is a float's upper half: of two neighbours one is shifted, and the other laid over what that leaves free.
struct PairShade {
    static constexpr int64_t STEP = 2 * Vec::W;
    Vec gain[2], offset[2];
    FINF_MEMBER PairShade(const finf::PixelRule& rule, int64_t at) {
        float gains[2][Vec::W], offsets[2][Vec::W];
        for (int i = 0; i < 2 * Vec::W; ++i) {
            gains[i % 2][i / 2] = rule.gain[at + i];
            offsets[i % 2][i / 2] = rule.offset[at + i];
        }
        for (int odd = 0; odd < 2; ++odd) gain[odd] = load(gains[odd]), offset[odd] = load(offsets[odd]);
    }
    FINF_MEMBER void apply(const uint8_t* from, Bf16* to) const {
        Vec even, odd;
        load_apart(from, even, odd);
        store_together(to, fma(even, gain[0], offset[0]), fma(odd, gain[1], offset[1]));
    }
};

// A quotient x / y is x times the nearest float of 1 / y, plus x times what that leaves: two roundings, the second of
// them of the whole. That is the nearest float almost always; io/shades.cpp asks whether it is for all of 256 pixels.
struct ExactShade {
    static constexpr int64_t STEP = Vec::W;
    Vec scale, scale_rest, mean, spread, spread_rest;
    FINF_MEMBER ExactShade(const finf::PixelRule& rule, int64_t at)
        : scale(load(rule.scale + at)),
          scale_rest(load(rule.scale_rest + at)),
          mean(load(rule.mean + at)),
          spread(load(rule.spread + at)),
          spread_rest(load(rule.spread_rest + at)) {}
    template <class T>
    FINF_MEMBER void apply(const uint8_t* from, T* to) const {
        const Vec x = load(from), centred = fma(x, scale, x * scale_rest) - mean;
        store(to, fma(centred, spread, centred * spread_rest));
    }
};

// C steps hold each of C channels equally often, so that their numbers stay in registers.
template <class By, int C, class T>
void shade_channels(const uint8_t* from, int64_t count, const finf::PixelRule& rule, int64_t phase, T* to) {
    constexpr int64_t STEP = By::STEP, ROUND = C * STEP;
    const auto by = [&](int k) FINF_LAMBDA { return By(rule, phase + k * STEP % rule.period); };
    const By first = by(0), second = by(C > 1 ? 1 : 0), third = by(C > 2 ? 2 : 0), fourth = by(C > 3 ? 3 : 0);
    const auto shade = [&](const uint8_t* x, T* y) FINF_LAMBDA {
        first.apply(x, y);
        if (C > 1) second.apply(x + STEP, y + STEP);
        if (C > 2) third.apply(x + 2 * STEP, y + 2 * STEP);
        if (C > 3) fourth.apply(x + 3 * STEP, y + 3 * STEP);
    };
    int64_t v = 0;
    for (; v + ROUND <= count; v += ROUND) shade(from + v, to + v);
    if (v == count) return;
    uint8_t x[ROUND] = {};
    T y[ROUND];
    for (int64_t i = v; i < count; ++i) x[i - v] = from[i];
    shade(x, y);
    for (int64_t i = v; i < count; ++i) to[i] = y[i - v];
}

template <class By, class T>
void shade_by(const uint8_t* from, int64_t count, const finf::PixelRule& rule, int64_t phase, T* to) {
    if (rule.period == 16) return shade_channels<By, 1>(from, count, rule, phase, to);
    if (rule.period == 32) return shade_channels<By, 2>(from, count, rule, phase, to);
    if (rule.period == 48) return shade_channels<By, 3>(from, count, rule, phase, to);
    return shade_channels<By, 4>(from, count, rule, phase, to);
}

template <class T>
void shade_pixels(const uint8_t* from, int64_t count, const finf::PixelRule& rule, int64_t phase, T* to) {
    if constexpr (sizeof(T) == sizeof(Bf16)) {
        if (rule.way == finf::PixelRule::PAIRS) return shade_by<PairShade>(from, count, rule, phase, to);
    }
    if (rule.way == finf::PixelRule::ONE_STEP) return shade_by<Shade>(from, count, rule, phase, to);
    shade_by<ExactShade>(from, count, rule, phase, to);
}

const finf::DeliveryLoops DELIVERY = {
    {widen_items<uint8_t>, widen_items<int8_t>, widen_items<uint16_t>, widen_items<int16_t>, widen_items<uint32_t>,
     widen_items<int32_t>, widen_items<int64_t>},
    shade_pixels<float>,
    shade_pixels<Bf16>};
