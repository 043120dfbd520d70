// The kernels: a block of warps takes tile after tile. Compiled once per dtype, FASTMAF_REAL, without contraction.
#include "block.inl.hpp"
#include "kernels.hpp"

#define FASTMAF_ISA cuda
#define FASTMAF_VEC "../cuda/vec.inl.hpp"
#include "evaluate.inl.hpp"

namespace fastmaf {
namespace cuda {

namespace {

template <class T>
constexpr int kResident = sizeof(T) == 4 ? 2 : 1;  // blocks that the registers are shared out to; more spills

template <class T>
__global__ void __launch_bounds__(32 * kWarps, kResident<T>)
    evaluate_kernel(const __grid_constant__ FlowView<T> flow, const __grid_constant__ Job<T> job) {
    const Team team;
    char* const scratch = job.scratch + int64_t(blockIdx.x) * flow.scratch;
    const int64_t rows = 32 * job.vectors;
    for (int64_t begin = int64_t(blockIdx.x) * rows; begin < job.rows; begin += int64_t(gridDim.x) * rows)
        evaluate<T>(flow, job, begin, scratch, team);
}

template <class T>
__global__ void __launch_bounds__(32 * kWarps, kResident<T>)
    generate_kernel(const __grid_constant__ FlowView<T> flow, const __grid_constant__ Job<T> job) {
    const Team team;
    char* const scratch = job.scratch + int64_t(blockIdx.x) * flow.scratch;
    const int64_t rows = 32 * job.vectors;
    for (int64_t begin = int64_t(blockIdx.x) * rows; begin < job.rows; begin += int64_t(gridDim.x) * rows)
        generate<T>(flow, job, begin, scratch, team);
}

template <class T>
__global__ void fold_kernel(const __grid_constant__ FlowView<T> flow, const __grid_constant__ Job<T> job, T* room, T* folded,
                            const T** table) {
    const Team team;
    const int k = int(blockIdx.x);
    T* const own = folded + flow.folded[k];
    if (team.thread() == 0) table[k] = own;
    fold<T>(flow, job, k, room + int64_t(k) * flow.context * 32, own, team);
}

}  // namespace

template <class T>
cudaError_t resident_blocks(Operation operation, int* blocks) {
    return operation == Operation::evaluate ? cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, evaluate_kernel<T>, 32 * kWarps, 0)
                                            : cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, generate_kernel<T>, 32 * kWarps, 0);
}

template <class T>
cudaError_t launch(Operation operation, const FlowView<T>& flow, const Job<T>& job, int blocks, cudaStream_t stream) {
    if (operation == Operation::evaluate)
        evaluate_kernel<T><<<unsigned(blocks), 32 * kWarps, 0, stream>>>(flow, job);
    else
        generate_kernel<T><<<unsigned(blocks), 32 * kWarps, 0, stream>>>(flow, job);
    return cudaGetLastError();
}

template <class T>
cudaError_t launch_fold(const FlowView<T>& flow, const Job<T>& job, T* room, T* folded, const T** table, cudaStream_t stream) {
    fold_kernel<T><<<unsigned(flow.stage_count), 32 * kWarps, 0, stream>>>(flow, job, room, folded, table);
    return cudaGetLastError();
}

using Real = FASTMAF_REAL;
template cudaError_t resident_blocks<Real>(Operation, int*);
template cudaError_t launch<Real>(Operation, const FlowView<Real>&, const Job<Real>&, int, cudaStream_t);
template cudaError_t launch_fold<Real>(const FlowView<Real>&, const Job<Real>&, Real*, Real*, const Real**, cudaStream_t);

}  // namespace cuda
}  // namespace fastmaf
