// Targets are checked before anything is written.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>

namespace finf {

inline void check_targets(const int64_t* target, int64_t N, int64_t V, int64_t ignore_index) {
    for (int64_t n = 0; n < N; ++n) {
        const int64_t t = target[n];
        if (t == ignore_index || (t >= 0 && t < V)) continue;
        std::ostringstream text;
        text << "target: wanted 0 to " << V - 1 << " or ignore_index " << ignore_index << ", got " << t << " in row "
             << n;
        throw std::out_of_range(text.str());
    }
}

}  // namespace finf
