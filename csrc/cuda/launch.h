// How every kernel here is started: on the device and stream of its tensors, without waiting, and with a word if the
// start failed.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "place.h"

namespace finf::cuda {

inline void check_cuda(cudaError_t error, const char* doing) {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string(doing) + ": CUDA error " + cudaGetErrorName(error) + ", " +
                             cudaGetErrorString(error));
}

// The calling thread's device is another one for as long as this lives.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
        check_cuda(cudaSetDevice(device), "cudaSetDevice");
    }
    ~DeviceGuard() { cudaSetDevice(before_); }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int before_ = 0;
};

// Blocks for so many pieces of work. Kernels go on by the grid's size, so the largest grid holds any number of them.
inline unsigned blocks_for(int64_t work, int64_t of_block) {
    const int64_t blocks = (work + of_block - 1) / of_block;
    return static_cast<unsigned>(std::min<int64_t>(blocks, std::numeric_limits<int32_t>::max()));
}

template <class Kernel, class... Args>
void launch(const char* name, const Place& place, Kernel kernel, unsigned blocks, int threads, const Args&... args) {
    if (blocks == 0) return;
    const DeviceGuard guard(place.device);
    kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(place.stream)>>>(args...);
    check_cuda(cudaGetLastError(), name);
}

}  // namespace finf::cuda
