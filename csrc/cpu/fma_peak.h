// What one thread of this machine multiplies and adds at its best: the ceiling of every product.
#pragma once

#include <string>

namespace finf {

// GFLOP/s, the best of some tries; kind "fp32" or "bf16", which is that of fp32 where bfloat16 has to be widened.
double fma_peak(const std::string& kind);

}  // namespace finf
