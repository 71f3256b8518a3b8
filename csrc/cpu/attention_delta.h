// Softmax attention of stacks of queries, keys and values, and for Q changes of them the exact change of it.
#pragma once

#include <cstdint>

#include "../check.h"
#include "isa/kernels.h"

namespace finf {

// Throws std::invalid_argument, and then nothing has been written. Memory beside the results: a fixed amount a thread,
// whatever T and Tk are.
void attention_delta(const Attention& op, DType dtype, int64_t threads);

}  // namespace finf
