// An activation function on N numbers, and for Q changes of them the exact change of it, with or without a gate.
#pragma once

#include <cstdint>
#include <string>

#include "../check.h"
#include "isa/kernels.h"

namespace finf {

// `past_cache` is chosen here. Throws std::invalid_argument, and then nothing has been written.
void activation_delta(const std::string& kind, ActivationRows rows, DType dtype, int64_t threads);

}  // namespace finf
