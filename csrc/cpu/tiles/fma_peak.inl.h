// Multiplications and additions as fast as they go: registers only, as many sums side by side as hide their latency.

// Two a cycle with a latency of up to eight want sixteen; of sixteen registers a dozen can be had.
constexpr int CHAINS = Vec::W == 16 ? 24 : 12;

template <bool PAIRS>
FINF_INLINE double run_chains(int64_t rounds) {
    Vec sums[CHAINS];
    Vec x(1.0f), w(0.0f);
    // So that the compiler knows nothing about them.
    __asm__ volatile("" : "+m"(x), "+m"(w));
    for (Vec& s : sums) s = x;
    for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 24
        for (Vec& s : sums) {
#ifdef FINF_PAIRS
            s = PAIRS ? fma_of_pairs(x, w, s) : fma(x, w, s);
#else
            s = fma(x, w, s);
#endif
        }
    for (Vec& s : sums) __asm__ volatile("" : : "m"(s));
    return static_cast<double>(rounds) * CHAINS * Vec::W * (PAIRS ? 4 : 2);
}

double flops_of_fma(bool pairs, int64_t rounds) { return pairs ? run_chains<true>(rounds) : run_chains<false>(rounds); }
