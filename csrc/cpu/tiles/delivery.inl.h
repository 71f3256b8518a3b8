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

// The numbers of a rule for the channels of one vector.
struct Shade {
    Vec gain, offset;
    FINF_MEMBER Shade(const finf::PixelRule& rule, int64_t at)
        : gain(load(rule.gain + at)), offset(load(rule.offset + at)) {}
    FINF_MEMBER Vec of(Vec x) const { return fma(x, gain, offset); }
};

// A quotient x / y is x times the nearest float of 1 / y, plus x times what that leaves: two roundings, the second of
// them of the whole. That is the nearest float almost always; io/deliver.cpp asks whether it is for all of 256 pixels.
struct ExactShade {
    Vec scale, scale_rest, mean, spread, spread_rest;
    FINF_MEMBER ExactShade(const finf::PixelRule& rule, int64_t at)
        : scale(load(rule.scale + at)),
          scale_rest(load(rule.scale_rest + at)),
          mean(load(rule.mean + at)),
          spread(load(rule.spread + at)),
          spread_rest(load(rule.spread_rest + at)) {}
    FINF_MEMBER Vec of(Vec x) const {
        const Vec centred = fma(x, scale, x * scale_rest) - mean;
        return fma(centred, spread, centred * spread_rest);
    }
};

FINF_INLINE Vec pixels_up_to(const uint8_t* from, int64_t count) {
    if (count >= Vec::W) return load(from);
    uint8_t lanes[Vec::W] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
    return load(lanes);
}

// C vectors hold each of C channels equally often, so that their numbers stay in registers.
template <class By, int C, class T>
void shade_channels(const uint8_t* from, int64_t count, const finf::PixelRule& rule, int64_t phase, T* to) {
    const auto by = [&](int k) FINF_LAMBDA { return By(rule, phase + k * Vec::W % rule.period); };
    const By first = by(0), second = by(C > 1 ? 1 : 0), third = by(C > 2 ? 2 : 0), fourth = by(C > 3 ? 3 : 0);
    const auto shade = [&](const By& one, int64_t v) FINF_LAMBDA { store(to + v, one.of(load(from + v))); };
    int64_t v = 0;
    for (; v + C * Vec::W <= count; v += C * Vec::W) {
        shade(first, v);
        if (C > 1) shade(second, v + Vec::W);
        if (C > 2) shade(third, v + 2 * Vec::W);
        if (C > 3) shade(fourth, v + 3 * Vec::W);
    }
    for (int k = 0; v < count; ++k, v += Vec::W)
        store_up_to(to + v, by(k).of(pixels_up_to(from + v, count - v)), count - v);
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
    if (rule.one_step) return shade_by<Shade>(from, count, rule, phase, to);
    shade_by<ExactShade>(from, count, rule, phase, to);
}

const finf::DeliveryLoops DELIVERY = {
    {widen_items<uint8_t>, widen_items<int8_t>, widen_items<uint16_t>, widen_items<int16_t>, widen_items<uint32_t>,
     widen_items<int32_t>, widen_items<int64_t>},
    shade_pixels<float>,
    shade_pixels<Bf16>};
