#include "pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace finf {

void expect_writing(void* first, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t PAGE = uintptr_t{1} << 21;  // of x86-64 and of most others with pages of 4 KiB
    const uintptr_t start = reinterpret_cast<uintptr_t>(first), end = start + static_cast<uintptr_t>(bytes);
    const uintptr_t from = (start + PAGE - 1) / PAGE * PAGE, to = end / PAGE * PAGE;
    if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);  // refused, it changes nothing
#else
    static_cast<void>(first), static_cast<void>(bytes);
#endif
}

}  // namespace finf
