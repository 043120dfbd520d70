// The kernels of gradients. Compiled once per dtype, FASTMAF_REAL, without contraction.
#include "block.inl.hpp"
#include "kernels.hpp"

#define FASTMAF_ISA cuda
#define FASTMAF_VEC "../cuda/vec.inl.hpp"
#include "gradient.inl.hpp"

namespace fastmaf {
namespace cuda {

namespace {

template <class T>
constexpr int kResident = sizeof(T) == 4 ? 2 : 1;

template <class T>
__global__ void __launch_bounds__(32 * kWarps, kResident<T>)
    gradient_kernel(const __grid_constant__ GradientView<T> view, const __grid_constant__ GradientJob<T> job) {
    const Team team;
    const int64_t rows = 32 * job.rows.vectors;
    int64_t place = blockIdx.x;
    for (int64_t begin = place * rows; begin < job.rows.rows; begin += int64_t(gridDim.x) * rows) {
        differentiate<T>(view, job, begin, job.rows.scratch + place * view.scratch, team);
        if (job.keeps) place += gridDim.x;
    }
}

template <class T>
__global__ void __launch_bounds__(32 * kWarps, kResident<T>)
    weights_kernel(const __grid_constant__ GradientView<T> view, const __grid_constant__ WeightsView<T> weights, const char* tiles,
                   int64_t rows, int vectors, T* out) {
    sum_weights<T>(view, weights, tiles, rows, vectors, int(blockIdx.x), int64_t(blockIdx.y), out, Team());
}

template <class T>
__global__ void __launch_bounds__(32 * kWarps, kResident<T>)
    stretch_kernel(const __grid_constant__ GradientView<T> view, const __grid_constant__ GradientJob<T> job,
                   const __grid_constant__ Stretch stretch) {
    const int64_t begin = int64_t(blockIdx.x) * 32 * job.rows.vectors;
    go<T>(view, job, stretch, begin, job.rows.scratch + int64_t(blockIdx.x) * view.scratch, Team());
}

template <class From>
__global__ void __launch_bounds__(kThreads) sum_kernel(const __grid_constant__ Sum<From> sum, int64_t count) {
    const int64_t i = number_of_thread();
    if (i < count) sum_slices(sum, i);
}

template <class T>
__global__ void __launch_bounds__(kThreads) parameters_kernel(const __grid_constant__ WeightsView<T> weights, const double* sums, T* out) {
    const int64_t i = number_of_thread();
    if (i < weights.size) write_parameter(weights, sums, i, out);
}

template <class T>
__global__ void __launch_bounds__(kThreads) narrow_kernel(const double* in, T* out, int64_t count) {
    const int64_t i = number_of_thread();
    if (i < count) out[i] = T(in[i]);
}

}  // namespace

template <class T>
cudaError_t resident_gradient_blocks(int* blocks) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, gradient_kernel<T>, 32 * kWarps, 0);
}

template <class T>
cudaError_t launch_gradient(const GradientView<T>& view, const GradientJob<T>& job, int blocks, cudaStream_t stream) {
    gradient_kernel<T><<<unsigned(blocks), 32 * kWarps, 0, stream>>>(view, job);
    return cudaGetLastError();
}

template <class T>
cudaError_t launch_stretch(const GradientView<T>& view, const GradientJob<T>& job, const Stretch& stretch, int tiles, cudaStream_t stream) {
    stretch_kernel<T><<<unsigned(tiles), 32 * kWarps, 0, stream>>>(view, job, stretch);
    return cudaGetLastError();
}

template <class T>
cudaError_t launch_weights(const GradientView<T>& view, const WeightsView<T>& weights, const char* tiles, int64_t rows, int vectors, T* out,
                           cudaStream_t stream) {
    const dim3 grid(unsigned(weights.task_count), unsigned((rows + kGroup - 1) / kGroup));
    weights_kernel<T><<<grid, 32 * kWarps, 0, stream>>>(view, weights, tiles, rows, vectors, out);
    return cudaGetLastError();
}

template <class From>
cudaError_t launch_sum(const Sum<From>& sum, cudaStream_t stream) {
    const int64_t count = sum.a * ((sum.b + sum.slice - 1) / sum.slice) * sum.c;
    sum_kernel<From><<<blocks_for(count), kThreads, 0, stream>>>(sum, count);
    return cudaGetLastError();
}

template <class T>
cudaError_t launch_parameters(const WeightsView<T>& weights, const double* sums, T* out, cudaStream_t stream) {
    parameters_kernel<T><<<blocks_for(weights.size), kThreads, 0, stream>>>(weights, sums, out);
    return cudaGetLastError();
}

template <class T>
cudaError_t launch_narrow(const double* in, T* out, int64_t count, cudaStream_t stream) {
    narrow_kernel<T><<<blocks_for(count), kThreads, 0, stream>>>(in, out, count);
    return cudaGetLastError();
}

using Real = FASTMAF_REAL;
template cudaError_t resident_gradient_blocks<Real>(int*);
template cudaError_t launch_gradient<Real>(const GradientView<Real>&, const GradientJob<Real>&, int, cudaStream_t);
template cudaError_t launch_stretch<Real>(const GradientView<Real>&, const GradientJob<Real>&, const Stretch&, int, cudaStream_t);
template cudaError_t launch_weights<Real>(const GradientView<Real>&, const WeightsView<Real>&, const char*, int64_t, int, Real*,
                                          cudaStream_t);
template cudaError_t launch_sum<Real>(const Sum<Real>&, cudaStream_t);
template cudaError_t launch_parameters<Real>(const WeightsView<Real>&, const double*, Real*, cudaStream_t);
template cudaError_t launch_narrow<Real>(const double*, Real*, int64_t, cudaStream_t);

}  // namespace cuda
}  // namespace fastmaf
