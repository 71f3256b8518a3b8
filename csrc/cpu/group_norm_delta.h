// Group norm of N groups of numbers, and for Q changes of them and of the parameters the exact change of it.
#pragma once

#include "normalize.h"

namespace finf {

void group_norm_delta(NormRows rows, DType dtype, int64_t threads);

}  // namespace finf
