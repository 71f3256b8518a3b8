#include "rms_norm_delta.h"

namespace finf {

void rms_norm_delta(NormRows rows, DType dtype, int64_t threads) {
    rows.centred = false;
    rows.groups = rows.run = 1;
    normalize(rows, dtype, threads);
}

}  // namespace finf
