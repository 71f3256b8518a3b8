// Which instruction set runs: asked of the processor, not of the compiler, so one binary serves every machine.
#include <cstdlib>

#include "../../check.h"
#include "kernels.h"

namespace finf {

std::vector<const Kernels*> available_kernels() {
    std::vector<const Kernels*> found;
#if defined(__x86_64__) || defined(__i386__)
    __builtin_cpu_init();
    const bool avx512 =
        __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&AVX512_BF16);
    if (avx512) found.push_back(&AVX512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&AVX2);
#endif
    found.push_back(&BASELINE);
    return found;
}

namespace {

const Kernels& choose() {
    const std::vector<const Kernels*> found = available_kernels();
    const char* forced = std::getenv("FINF_FORCE_ISA");
    if (!forced || !*forced) return *found.front();
    std::string names;
    for (const Kernels* candidate : found) {
        if (std::string(forced) == candidate->name) return *candidate;
        names += (names.empty() ? "" : ", ") + std::string(candidate->name);
    }
    reject("FINF_FORCE_ISA", "one of " + names + " on this processor", "'" + std::string(forced) + "'");
}

}  // namespace

const Kernels& kernels() {
    static const Kernels& chosen = choose();  // a throw leaves it unset, so a wrong name fails at every call
    return chosen;
}

}  // namespace finf
