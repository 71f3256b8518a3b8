// The loss formulas of the design, written once: from a row's sums to its loss and to the change of its loss.
//
// One row has logits z, changes d and a target t. With m the largest logit, or one at most 20 below it, over v other
// than t,
//     rest = sum e^(z_v - m)        u = sum e^(z_v - m) expm1(d_v - d_t)        s = rest + e^(z_t - m).
// No form here subtracts two nearly equal numbers, so a change of 1e-9 keeps its digits.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define FINF_HOST_DEVICE __host__ __device__
#else
#define FINF_HOST_DEVICE
#endif

namespace finf {

// Largest d_v - d_t for which u is kept as it is. The difference of two losses rounds at 1e-7 of the losses, so a
// column of no weight should not bring it about; but e^(z_v - m) is zero below e^-87, and past 40 such a column could
// count.
constexpr float LARGEST_EXPM1 = 40.0f;

// log(1 + e^g). Past 15 the second form keeps e^g from overflowing; both are exact to the last digits around it.
template <class T>
FINF_HOST_DEVICE inline T softplus(T g) {
    return g > T(15) ? g + log1p(exp(-g)) : log1p(exp(g));
}

// -log softmax(z)_t from the sum of e^(z_v - m) over v other than t. Where the target leads, the loss is small and
// log1p keeps its digits; m is then z_t, or a logit below it.
template <class T>
FINF_HOST_DEVICE inline T loss_of_sums(T rest, T m, T z_t) {
    return z_t >= m ? log1p(rest * exp(m - z_t)) : log(rest + exp(z_t - m)) - (z_t - m);
}

// Whether the change is one that `small_change` holds; a NaN is not, and goes through `large_change` unharmed.
template <class T>
FINF_HOST_DEVICE inline bool is_small_change(T u, T s, float largest_step) {
    return u / s > T(-0.5) && largest_step <= LARGEST_EXPM1;
}

template <class T>
FINF_HOST_DEVICE inline T small_change(T u, T s) {
    return log1p(u / s);
}

// g0, g1: log of the sum over v other than t of e^(z_v - z_t), before and after the change.
template <class T>
FINF_HOST_DEVICE inline T large_change(T g0, T g1) {
    return softplus(g1) - softplus(g0);
}

// Label smoothing adds epsilon (z_t - mean z) to the loss; with d for z, the same to its change.
// A masked column (-inf) makes the mean and so the loss infinite, as in torch, whatever z_t is.
template <class T>
FINF_HOST_DEVICE inline T smoothing_term(T epsilon, T at_target, T mean) {
    return mean == -HUGE_VAL ? T(HUGE_VAL) : epsilon * (at_target - mean);
}

// What a soft cap c lets through of a logit.
template <class T>
FINF_HOST_DEVICE inline T softcap(T c, T z) {
    return c * tanh(z / c);
}

// How much that moves where the logit moves by d: sinh(d) sech(z) sech(z + d) without its overflows.
template <class T>
FINF_HOST_DEVICE inline T softcap_change(T c, T z, T d) {
    const T y = 2 * z / c, y1 = y + 2 * d / c;
    const T up = d > 0 ? y1 : y, low = d > 0 ? y : y1;
    const T size = -expm1(-fabs(2 * d / c)) / ((1 + exp(-up)) * (1 + exp(low)));
    return d > 0 ? 2 * c * size : -2 * c * size;
}

}  // namespace finf
