// Which instruction set runs: asked of the processor, not of the compiler, so one binary serves every machine.
#include <cstdlib>

#include "../../check.h"
#include "kernels.h"

#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace finf {
namespace {

// Whether AMX can multiply bfloat16 here: the processor, and Linux, which makes room for tiles where it is asked, once
// a process, for all threads there are and will be.
bool has_tiles() {
#if defined(__linux__) && defined(__x86_64__)
    constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24;
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // arch_prctl's ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & BF16) || !(d & TILE)) return false;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}

}  // namespace

std::vector<const Kernels*> available_kernels() {
    std::vector<const Kernels*> found;
#if defined(__x86_64__) || defined(__i386__)
    __builtin_cpu_init();
    const bool avx512 =
        __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    const bool pairs = avx512 && __builtin_cpu_supports("avx512bf16");
    if (pairs && has_tiles()) found.push_back(&AMX_BF16);
    // Intel's processors multiply pairs at half the rate of an AMD's, half that of float32: 240 and 481 GFLOP/s of two
    // cores of a Xeon of 2024. Beside that, float32 needs no rounding of a changed row.
    const bool slow = __builtin_cpu_is("intel");
    if (pairs && !slow) found.push_back(&AVX512_BF16);
    if (avx512) found.push_back(&AVX512);
    if (pairs && slow) found.push_back(&AVX512_BF16);
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
