// The tensor-core kernels of the sampler, by hidden maps and parts of the weights. They need sm_80, as those of tensor.cu.
#include "block.inl.hpp"
#include "kernels.hpp"

#define FASTMAF_GLOBAL(pointer)  // here it costs registers that spill
#define FASTMAF_ISA tensor
#define FASTMAF_VEC "../cuda/vec.inl.hpp"
#define FASTMAF_MMA "../cuda/mma.inl.hpp"
#include "draw.inl.hpp"

namespace fastmaf {
namespace cuda {

namespace {

template <int HIDDEN, int PARTS>
__global__ void __launch_bounds__(32 * kWarps, 1)
    draw_kernel(const __grid_constant__ FlowView<float> flow, const __grid_constant__ DrawView view,
                const __grid_constant__ Job<float> job) {
#if __CUDA_ARCH__ >= 800
    extern __shared__ __align__(128) char shared[];
    const Team team;
    char* const scratch = job.scratch + int64_t(blockIdx.x) * flow.scratch;
    tensor::clear_halves(shared, view.ring, team);
    tensor::Supply<PARTS> supply(view, shared, team);
    const int64_t rows = 16 * view.groups;
    for (int64_t begin = int64_t(blockIdx.x) * rows; begin < job.rows; begin += int64_t(gridDim.x) * rows)
        tensor::generate_halves<HIDDEN, PARTS>(flow, view, job, begin, scratch, shared, supply, team);
    tensor::wait_copies<0>();
#endif
}

using Kernel = void (*)(FlowView<float>, DrawView, Job<float>);

Kernel kernel_of(const DrawView& view) {
    static const Kernel all[kDrawHidden][2] = {
        {draw_kernel<1, 1>, draw_kernel<1, 2>}, {draw_kernel<2, 1>, draw_kernel<2, 2>}, {draw_kernel<3, 1>, draw_kernel<3, 2>}};
    return all[view.hidden - 1][view.parts - 1];
}

}  // namespace

cudaError_t resident_draw_blocks(const DrawView& view, int limit, int* blocks) {
    return resident_blocks(kernel_of(view), view.shared, limit, blocks);
}

cudaError_t launch_draws(const FlowView<float>& flow, const DrawView& view, const Job<float>& job, int blocks, cudaStream_t stream) {
    kernel_of(view)<<<unsigned(blocks), 32 * kWarps, size_t(view.shared), stream>>>(flow, view, job);
    return cudaGetLastError();
}

}  // namespace cuda
}  // namespace fastmaf
