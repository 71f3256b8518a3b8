// The loops of squared_error_delta, written once over Vec and included inside each instruction set's namespace.
//
// A row is taken in blocks that stay in the first-level cache: p - y into a buffer with the sum of its squares, then
// for every query the sum of d (2 (p - y) + d). Sums are float32 inside a block and double from block to block.
#pragma once

#include "elements.inl.h"
#include "sums.inl.h"

template <class P, class Y>
double gap_block(const void* p, const void* y, int64_t n, float* gap) {
    const P* from = static_cast<const P*>(p);
    const Y* to = static_cast<const Y*>(y);
    return sums(n,
                [&](int64_t v, int64_t count, Vec& squares, Vec&, Vec&) FINF_LAMBDA {
                    fetch(from + v, finf::ERROR_BLOCK);
                    fetch(to + v, finf::ERROR_BLOCK);
                    const Vec x = load_up_to(from + v, count, P{}) - load_up_to(to + v, count, Y{});
                    store(gap + v, x);
                    squares = fma(x, x, squares);
                })
        .a;
}

template <class D>
double change_block(const void* d, int64_t n, const float* gap) {
    const D* by = static_cast<const D*>(d);
    return sums(n,
                [&](int64_t v, int64_t count, Vec& change, Vec&, Vec&) FINF_LAMBDA {
                    fetch(by + v, finf::ERROR_BLOCK);
                    const Vec x = load_up_to(by + v, count, D{});
                    change = fma(x, fma(Vec(2.0f), load(gap + v), x), change);
                })
        .a;
}

const finf::SquaredErrorLoops SQUARED_ERROR_DELTA = {
    {{gap_block<float, float>, gap_block<float, Bf16>}, {gap_block<Bf16, float>, gap_block<Bf16, Bf16>}},
    {change_block<float>, change_block<Bf16>},
};
