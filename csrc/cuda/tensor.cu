// The tensor-core kernels of the density, by row tiles of a warp and parts of the weights. They need sm_80; compiled for less they are empty
// and not used.
#include "block.inl.hpp"
#include "kernels.hpp"

#define FASTMAF_ISA tensor
#define FASTMAF_VEC "../cuda/vec.inl.hpp"
#define FASTMAF_MMA "../cuda/mma.inl.hpp"
#include "tensor.inl.hpp"

namespace fastmaf {
namespace cuda {

namespace {

template <int MT, int PARTS>
__global__ void __launch_bounds__(32 * kWarps, 1)
    tensor_kernel(const __grid_constant__ FlowView<float> flow, const __grid_constant__ TensorView view,
                  const __grid_constant__ Job<float> job) {
#if __CUDA_ARCH__ >= 800
    extern __shared__ __align__(128) char shared[];
    const Team team;
    char* const scratch = job.scratch + int64_t(blockIdx.x) * flow.scratch;
    tensor::clear_halves(shared, view.ring, team);
    tensor::Feed<PARTS> feed(view, shared, team.rank);
    const int64_t rows = view.shape.rows;
    for (int64_t begin = int64_t(blockIdx.x) * rows; begin < job.rows; begin += int64_t(gridDim.x) * rows)
        tensor::evaluate_halves<MT, PARTS>(flow, view, job, begin, scratch, shared, feed, team);
    tensor::wait_copies<0>();
#endif
}

using Kernel = void (*)(FlowView<float>, TensorView, Job<float>);

Kernel kernel_of(const TensorShape& shape) {
    if (shape.parts == 2) return shape.row_tiles == 2 ? tensor_kernel<2, 2> : tensor_kernel<1, 2>;
    return shape.row_tiles == 4 ? tensor_kernel<4, 1> : shape.row_tiles == 2 ? tensor_kernel<2, 1> : tensor_kernel<1, 1>;
}

}  // namespace

cudaError_t find_tensor_cores(bool* found) {
    cudaFuncAttributes attributes{};
    const cudaError_t error = cudaFuncGetAttributes(&attributes, tensor_kernel<1, 1>);
    *found = error == cudaSuccess && attributes.ptxVersion >= 80;
    return error;
}

int tensor_warps() { return kWarps; }

cudaError_t resident_tensor_blocks(const TensorView& view, int limit, int* blocks) {
    return resident_blocks(kernel_of(view.shape), view.shared, limit, blocks);
}

cudaError_t launch_tensor(const FlowView<float>& flow, const TensorView& view, const Job<float>& job, int blocks, cudaStream_t stream) {
    kernel_of(view.shape)<<<unsigned(blocks), 32 * kWarps, size_t(view.shared), stream>>>(flow, view, job);
    return cudaGetLastError();
}

}  // namespace cuda
}  // namespace fastmaf
