// What layer, RMS and group norm share: checks, missing parameters, threads.
#pragma once

#include <cstdint>

#include "../check.h"
#include "isa/kernels.h"

namespace finf {

// Any of the parameters may be null: a weight for 1, a bias for 0, a change for none. `past_cache` is chosen here.
// Throws std::invalid_argument, and then nothing has been written.
void normalize(NormRows rows, DType dtype, int64_t threads);

}  // namespace finf
