// The warps of a block, who share its rows.
#pragma once

namespace fastmaf {
namespace cuda {

constexpr int kWarps = 8;

struct Team {
    int rank;
    __device__ Team() : rank(int(threadIdx.x) / 32) {}
    __device__ __forceinline__ bool mine(int i) const { return i % kWarps == rank; }
    __device__ __forceinline__ void sync() const { __syncthreads(); }
    __device__ __forceinline__ int thread() const { return int(threadIdx.x); }
    __device__ __forceinline__ int threads() const { return 32 * kWarps; }
};

}  // namespace cuda
}  // namespace fastmaf
