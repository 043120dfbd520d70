// The kernels of training in the host's runtime.
#include "cuda/kernels.hpp"
#include "runtime.hpp"

#define FASTMAF_ISA warp_training
#define FASTMAF_VEC "../../tests/native/warp_vec.inl.hpp"
#include "cuda/training.inl.hpp"

namespace fastmaf {
namespace cuda {

template <class Job>
cudaError_t launch_each(const Job& job, cudaStream_t stream) {
    enqueue(stream, [=] {
        for (int64_t i = 0; i < job.count; ++i) warp_training::run(job, i);
    });
    return cudaSuccess;
}

#define FASTMAF_INSTANTIATE(T) \
    template cudaError_t launch_each(const TakeJob<T>&, cudaStream_t); \
    template cudaError_t launch_each(const LossJob<T>&, cudaStream_t); \
    template cudaError_t launch_each(const EntryJob<T>&, cudaStream_t); \
    template cudaError_t launch_each(const SquaresJob<T>&, cudaStream_t); \
    template cudaError_t launch_each(const JudgeJob<T>&, cudaStream_t); \
    template cudaError_t launch_each(const AdamJob<T>&, cudaStream_t); \
    template cudaError_t launch_each(const RepackJob<T>&, cudaStream_t); \
    template cudaError_t launch_each(const ScaleJob<T>&, cudaStream_t); \
    template cudaError_t launch_each(const MomentJob<T>&, cudaStream_t); \
    template cudaError_t launch_each(const NormJob<T>&, cudaStream_t); \
    template cudaError_t launch_each(const ThroughJob<T>&, cudaStream_t);
FASTMAF_INSTANTIATE(float)
FASTMAF_INSTANTIATE(double)

}  // namespace cuda
}  // namespace fastmaf
