// The kernels of a device, one set per dtype; kernels.cu is compiled once for each. Those of tensor.cu are for float alone.
#pragma once

#include <cuda_runtime_api.h>

#include "draw.hpp"
#include "training.hpp"

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

// Blocks of launch_gradient that one multiprocessor holds at a time.
template <class T>
cudaError_t resident_gradient_blocks(int* blocks);
template <class T>
cudaError_t launch_gradient(const GradientView<T>& view, const GradientJob<T>& job, int blocks, cudaStream_t stream);
// A block for each tile.
template <class T>
cudaError_t launch_stretch(const GradientView<T>& view, const GradientJob<T>& job, const Stretch& stretch, int tiles, cudaStream_t stream);
// From what a launch of `rows` rows has kept, by tile: out [groups of rows][master and one more].
template <class T>
cudaError_t launch_weights(const GradientView<T>& view, const WeightsView<T>& weights, const char* tiles, int64_t rows, int vectors, T* out,
                           cudaStream_t stream);
template <class From>
cudaError_t launch_sum(const Sum<From>& sum, cudaStream_t stream);
// sums [master and one more] to the parameters.
template <class T>
cudaError_t launch_parameters(const WeightsView<T>& weights, const double* sums, T* out, cudaStream_t stream);
template <class T>
cudaError_t launch_narrow(const double* in, T* out, int64_t count, cudaStream_t stream);

// Each number of a job of training.hpp.
template <class Job>
cudaError_t launch_each(const Job& job, cudaStream_t stream);

// Whether the current device runs code that was compiled for tensor cores.
cudaError_t find_tensor_cores(bool* found);  // an error where no kernels were compiled for the device
int tensor_warps();                          // of a block
// Blocks that one multiprocessor holds at a time; limit: the shared memory that a block may have.
cudaError_t resident_tensor_blocks(const TensorView& tensor, int limit, int* blocks);
cudaError_t resident_draw_blocks(const DrawView& draws, int limit, int* blocks);
cudaError_t launch_tensor(const FlowView<float>& flow, const TensorView& tensor, const Job<float>& job, int blocks, cudaStream_t stream);
cudaError_t launch_draws(const FlowView<float>& flow, const DrawView& draws, const Job<float>& job, int blocks, cudaStream_t stream);

}  // namespace cuda
}  // namespace fastmaf
