// Which instruction set runs: asked of the processor, not of the compiler, so one binary serves every machine.
#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "../../check.h"
#include "kernels.h"

#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace finf {
namespace {

#if defined(__linux__) && defined(__x86_64__)
constexpr int TILE_DATA = 18;  // XFEATURE_XTILEDATA

// Whether processor and system know AMX's products of bfloat16.
bool knows_tiles() {
    constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24;
    constexpr int GET_SUPPORTED = 0x1021;  // arch_prctl's ARCH_GET_XCOMP_SUPP
    unsigned a = 0, b = 0, c = 0, d = 0;
    uint64_t supported = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & BF16) || !(d & TILE)) return false;
    return syscall(SYS_arch_prctl, GET_SUPPORTED, &supported) == 0 && supported >> TILE_DATA & 1;
}

// Asks Linux for room for tiles, for this process's threads and those to come. It refuses where a thread handles
// signals on a stack too small for them, and such stacks are refused from then on: who forces another set never asks.
bool may_use_tiles() {
    constexpr int REQUEST_PERMISSION = 0x1023;  // ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

bool can_use(const Kernels& found) { return &found != &AMX_BF16 || may_use_tiles(); }
#else
bool can_use(const Kernels&) { return true; }
#endif

std::vector<const Kernels*> find_kernels() {
    std::vector<const Kernels*> found;
#if defined(__x86_64__) || defined(__i386__)
    __builtin_cpu_init();
    const bool avx512 =
        __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    const bool pairs = avx512 && __builtin_cpu_supports("avx512bf16");
#if defined(__linux__) && defined(__x86_64__)
    if (pairs && knows_tiles()) found.push_back(&AMX_BF16);
#endif
    // An Intel Xeon multiplies pairs at half the rate of float32 (240 and 481 GFLOP/s on two cores), an AMD at twice.
    const bool slow = __builtin_cpu_is("intel");
    if (pairs && !slow) found.push_back(&AVX512_BF16);
    if (avx512) found.push_back(&AVX512);
    if (pairs && slow) found.push_back(&AVX512_BF16);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&AVX2);
#endif
    found.push_back(&BASELINE);
    return found;
}

const Kernels& choose() {
    const std::vector<const Kernels*>& found = available_kernels();
    const char* forced = std::getenv("FINF_FORCE_ISA");
    if (!forced || !*forced) return **std::find_if(found.begin(), found.end(), [](auto* one) { return can_use(*one); });
    std::string names;
    for (const Kernels* candidate : found) {
        if (std::string(forced) == candidate->name) {
            if (can_use(*candidate)) return *candidate;
            const int why = errno;
            reject("FINF_FORCE_ISA", "a set that the system lets this process use",
                   "'" + std::string(forced) + "': " + std::strerror(why) +
                       " (a thread that handles signals on a small stack of their own?)");
        }
        names += (names.empty() ? "" : ", ") + std::string(candidate->name);
    }
    reject("FINF_FORCE_ISA", "one of " + names + " on this processor", "'" + std::string(forced) + "'");
}

}  // namespace

const std::vector<const Kernels*>& available_kernels() {
    static const std::vector<const Kernels*> found = find_kernels();
    return found;
}

const Kernels& kernels() {
    static const Kernels& chosen = choose();  // a throw leaves it unset, so a wrong name fails at every call
    return chosen;
}

}  // namespace finf
