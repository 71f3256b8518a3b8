// RMS norm of N rows, and for Q changes of a row and of the weight the exact change of it.
#pragma once

#include "normalize.h"

namespace finf {

void rms_norm_delta(NormRows rows, DType dtype, int64_t threads);

}  // namespace finf
