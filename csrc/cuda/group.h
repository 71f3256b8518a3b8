// Lanes that work on one row together. A loop is written once over a Group, which has
//     rank(), size()          this lane, and how many there are
//     sum(x), max(x)          over all lanes, in one fixed order; every lane gets the same bits
//     any(x)                  whether x holds for a lane
//     before(x, total)        sum over the lanes of lower rank, and over all
//     sync()                  what lanes wrote so far is seen by all of them
// A group is some lanes of a warp or a whole block; the tests have one of ordinary threads.
#pragma once

#include <cstdint>

#include "../numerics.h"

#define FINF_ROW FINF_HOST_DEVICE inline

// An array indexed by a loop stays in registers only if the loop is written out.
#if defined(__CUDACC__)
#define FINF_UNROLL _Pragma("unroll")
#else
#define FINF_UNROLL
#endif

namespace finf::cuda {

// Part `rank` of the `size` that a row is in. Their groups take turns at it.
struct Part {
    int rank, size;

    FINF_ROW static Part of(int64_t i, int64_t size) { return {static_cast<int>(i % size), static_cast<int>(size)}; }
};

}  // namespace finf::cuda

#if defined(__CUDACC__)
namespace finf::cuda {

// WIDTH neighbours of a warp. Other lanes of the warp may be elsewhere meanwhile: only the group's own are waited for.
template <int WIDTH>
struct Lanes {
    __device__ static unsigned mask() {
        return WIDTH == 32 ? ~0u : ((1u << WIDTH % 32) - 1) << (threadIdx.x % 32 / WIDTH * WIDTH);
    }
    __device__ int rank() const { return threadIdx.x % WIDTH; }
    __device__ static constexpr int size() { return WIDTH; }
    __device__ void sync() const { __syncwarp(mask()); }

    template <class T>
    __device__ T sum(T x) const {
        for (int step = WIDTH / 2; step > 0; step /= 2) x += __shfl_xor_sync(mask(), x, step, WIDTH);
        return x;
    }
    __device__ float max(float x) const {
        for (int step = WIDTH / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(mask(), x, step, WIDTH));
        return x;
    }
};

// All of a block's THREADS. `room` is a warp's word each, shared; it may be used again once a call has returned.
template <int THREADS>
struct Block {
    static constexpr int WARPS = THREADS / 32;
    double* room;

    __device__ int rank() const { return threadIdx.x; }
    __device__ static constexpr int size() { return THREADS; }
    __device__ void sync() const { __syncthreads(); }

    template <class T>
    __device__ void share(T of_warp) const {
        if (threadIdx.x % 32 == 0) reinterpret_cast<T*>(room)[threadIdx.x / 32] = of_warp;
        __syncthreads();
    }
    template <class T>
    __device__ T sum(T x) const {
        share(Lanes<32>().sum(x));
        T total = reinterpret_cast<T*>(room)[0];
        for (int warp = 1; warp < WARPS; ++warp) total += reinterpret_cast<T*>(room)[warp];
        __syncthreads();
        return total;
    }
    __device__ float max(float x) const {
        share(Lanes<32>().max(x));
        float top = reinterpret_cast<float*>(room)[0];
        for (int warp = 1; warp < WARPS; ++warp) top = fmaxf(top, reinterpret_cast<float*>(room)[warp]);
        __syncthreads();
        return top;
    }
    __device__ bool any(bool x) const { return __syncthreads_or(x); }
    __device__ int before(int x, int& total) const {
        int up_to = x;
        for (int step = 1; step < 32; step *= 2) {
            const int lower = __shfl_up_sync(~0u, up_to, step);
            up_to += threadIdx.x % 32 >= step ? lower : 0;
        }
        if (threadIdx.x % 32 == 31) reinterpret_cast<int*>(room)[threadIdx.x / 32] = up_to;
        __syncthreads();
        int below = 0;
        total = 0;
        for (int warp = 0; warp < WARPS; ++warp) {
            const int of_warp = reinterpret_cast<int*>(room)[warp];
            below += warp < static_cast<int>(threadIdx.x / 32) ? of_warp : 0;
            total += of_warp;
        }
        __syncthreads();
        return below + up_to - x;
    }
};

}  // namespace finf::cuda
#endif
