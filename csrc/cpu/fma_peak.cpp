#include "fma_peak.h"

#include <chrono>

#include "../check.h"
#include "isa/kernels.h"

namespace finf {

double fma_peak(const std::string& kind) {
    if (kind != "fp32" && kind != "bf16") reject("kind", "fp32 or bf16", kind);
    const bool pairs = kind == "bf16" && kernels().pairs;
    // About 10 ms a try: the clock has risen by the second.
    constexpr int TRIES = 8;
    constexpr int64_t ROUNDS = 4000000;
    double best = 0;
    for (int i = 0; i < TRIES; ++i) {
        const auto since = std::chrono::steady_clock::now();
        const double flops = kernels().flops_of_fma(pairs, ROUNDS);
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - since;
        if (flops / seconds.count() > best) best = flops / seconds.count();
    }
    return best / 1e9;
}

}  // namespace finf
