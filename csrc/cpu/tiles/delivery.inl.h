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

// The five numbers of a rule for the channels of one vector.
struct Shade {
    Vec scale, scale_rest, mean, spread, spread_rest;
};

FINF_INLINE Shade shade_at(const finf::PixelRule& rule, int64_t at) {
    return {load(rule.scale + at), load(rule.scale_rest + at), load(rule.mean + at), load(rule.spread + at),
            load(rule.spread_rest + at)};
}

// A quotient x / y is x times the nearest float of 1 / y, plus x times what that leaves: two roundings, the second of
// them of the whole. That is the nearest float almost always; io/deliver.cpp asks whether it is for all of 256 pixels.
FINF_INLINE Vec shaded(Vec x, const Shade& by) {
    const Vec centred = fma(x, by.scale, x * by.scale_rest) - by.mean;
    return fma(centred, by.spread, centred * by.spread_rest);
}

FINF_INLINE Vec pixels_up_to(const uint8_t* from, int64_t count) {
    if (count >= Vec::W) return load(from);
    uint8_t lanes[Vec::W] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
    return load(lanes);
}

template <class T>
void shade_pixels(const uint8_t* from, int64_t count, const finf::PixelRule& rule, int64_t phase, T* to) {
    if (rule.period == 16) {  // one channel: the same numbers for every vector
        const Shade by = shade_at(rule, 0);
        return each_vector(count, [&](int64_t v, int64_t lanes) FINF_LAMBDA {
            store_up_to(to + v, shaded(pixels_up_to(from + v, lanes), by), lanes);
        });
    }
    int64_t at = 0;
    each_vector(count, [&](int64_t v, int64_t lanes) FINF_LAMBDA {
        store_up_to(to + v, shaded(pixels_up_to(from + v, lanes), shade_at(rule, phase + at)), lanes);
        at = at + Vec::W < rule.period ? at + Vec::W : 0;
    });
}

const finf::DeliveryLoops DELIVERY = {
    {widen_items<uint8_t>, widen_items<int8_t>, widen_items<uint16_t>, widen_items<int16_t>, widen_items<uint32_t>,
     widen_items<int32_t>, widen_items<int64_t>},
    shade_pixels<float>,
    shade_pixels<Bf16>};
