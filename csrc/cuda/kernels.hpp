// The kernels of a device, one set per dtype; kernels.cu is compiled once for each. Those of tensor.cu are for float alone.
#pragma once

#include <cuda_runtime_api.h>

#include "draw.hpp"

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

// Whether the current device runs code that was compiled for tensor cores.
bool has_tensor_cores();
int tensor_warps();  // of a block
// Blocks that one multiprocessor holds at a time; limit: the shared memory that a block may have.
cudaError_t resident_tensor_blocks(const TensorView& tensor, int limit, int* blocks);
cudaError_t resident_draw_blocks(const DrawView& draws, int limit, int* blocks);
cudaError_t launch_tensor(const FlowView<float>& flow, const TensorView& tensor, const Job<float>& job, int blocks, cudaStream_t stream);
cudaError_t launch_draws(const FlowView<float>& flow, const DrawView& draws, const Job<float>& job, int blocks, cudaStream_t stream);

}  // namespace cuda
}  // namespace fastmaf
