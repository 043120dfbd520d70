// The kernels of a device, one set per dtype; kernels.cu is compiled once for each.
#pragma once

#include <cuda_runtime_api.h>

#include "launch.hpp"

namespace fastmaf {
namespace cuda {

enum class Operation { evaluate, generate };

// Blocks that one multiprocessor holds at a time.
template <class T>
cudaError_t resident_blocks(Operation operation, int* blocks);
template <class T>
cudaError_t launch(Operation operation, const FlowView<T>& flow, const Job<T>& job, int blocks, cudaStream_t stream);
// room: [stages][context][32]; table: [stages] pointers into `folded`.
template <class T>
cudaError_t launch_fold(const FlowView<T>& flow, const Job<T>& job, T* room, T* folded, const T** table, cudaStream_t stream);

}  // namespace cuda
}  // namespace fastmaf
