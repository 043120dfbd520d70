// The warps of a block, who share its rows.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fastmaf {
namespace cuda {

constexpr int kWarps = 8;

struct Team {
    int rank;
    __device__ Team() : rank(int(threadIdx.x) / 32) {}
    __device__ __forceinline__ bool mine(int i) const { return i % kWarps == rank; }
    __device__ __forceinline__ void sync() const { __syncthreads(); }
    __device__ __forceinline__ int warps() const { return kWarps; }
    __device__ __forceinline__ int thread() const { return int(threadIdx.x); }
    __device__ __forceinline__ int threads() const { return 32 * kWarps; }
};

constexpr int kThreads = 256;  // of a block whose threads work alone

static __device__ __forceinline__ int64_t number_of_thread() { return int64_t(blockIdx.x) * kThreads + threadIdx.x; }
inline unsigned blocks_for(int64_t numbers) { return unsigned((numbers + kThreads - 1) / kThreads); }

// Blocks of a kernel that one multiprocessor holds at a time, each with so much shared memory. `limit`: what any block may have; the kernel
// gets it for good, so that calls from several threads do not take it from each other.
template <class Kernel>
cudaError_t resident_blocks(Kernel kernel, int64_t shared, int limit, int* blocks) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
    if (error != cudaSuccess) return error;
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, 32 * kWarps, size_t(shared));
}

}  // namespace cuda
}  // namespace fastmaf
