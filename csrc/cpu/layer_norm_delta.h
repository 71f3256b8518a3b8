// Layer norm of N rows, and for Q changes of a row and of the parameters the exact change of it.
#pragma once

#include "normalize.h"

namespace finf {

void layer_norm_delta(NormRows rows, DType dtype, int64_t threads);

}  // namespace finf
