// The kernels of training beside those of gradients. Compiled once per dtype, FASTMAF_REAL, without contraction.
#include "block.inl.hpp"
#include "kernels.hpp"

#define FASTMAF_ISA cuda
#define FASTMAF_VEC "../cuda/vec.inl.hpp"
#include "training.inl.hpp"

namespace fastmaf {
namespace cuda {

namespace {

template <class Job>
__global__ void __launch_bounds__(kThreads) each_kernel(const __grid_constant__ Job job) {
    const int64_t i = number_of_thread();
    if (i < job.count) run(job, i);
}

}  // namespace

template <class Job>
cudaError_t launch_each(const Job& job, cudaStream_t stream) {
    if (job.count == 0) return cudaSuccess;
    each_kernel<Job><<<blocks_for(job.count), kThreads, 0, stream>>>(job);
    return cudaGetLastError();
}

using Real = FASTMAF_REAL;
template cudaError_t launch_each(const TakeJob<Real>&, cudaStream_t);
template cudaError_t launch_each(const LossJob<Real>&, cudaStream_t);
template cudaError_t launch_each(const EntryJob<Real>&, cudaStream_t);
template cudaError_t launch_each(const SquaresJob<Real>&, cudaStream_t);
template cudaError_t launch_each(const JudgeJob<Real>&, cudaStream_t);
template cudaError_t launch_each(const AdamJob<Real>&, cudaStream_t);
template cudaError_t launch_each(const RepackJob<Real>&, cudaStream_t);
template cudaError_t launch_each(const ScaleJob<Real>&, cudaStream_t);
template cudaError_t launch_each(const MomentJob<Real>&, cudaStream_t);
template cudaError_t launch_each(const NormJob<Real>&, cudaStream_t);
template cudaError_t launch_each(const ThroughJob<Real>&, cudaStream_t);

}  // namespace cuda
}  // namespace fastmaf
