// Where a kernel runs.
#pragma once

namespace finf::cuda {

struct Place {
    int device;
    void* stream;  // a cudaStream_t
};

}  // namespace finf::cuda
