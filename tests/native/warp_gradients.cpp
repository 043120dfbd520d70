// The kernels of gradients in the host's runtime.
#include "cuda/kernels.hpp"
#include "runtime.hpp"
#include "team.hpp"

#define FASTMAF_ISA warp_gradients
#define FASTMAF_VEC "../../tests/native/warp_vec.inl.hpp"
#include "cuda/gradient.inl.hpp"

namespace fastmaf {
namespace cuda {

template <class T>
cudaError_t resident_gradient_blocks(int* blocks) {
    *blocks = 1;
    return cudaSuccess;
}

template <class T>
cudaError_t launch_gradient(const GradientView<T>& view, const GradientJob<T>& job, int blocks, cudaStream_t stream) {
    enqueue(stream, [=] {
        const int64_t rows = 32 * job.rows.vectors;
        for (int block = 0; block < blocks; ++block)
            with_team(kWarpsOfTheHost, [&](const Team& team) {
                int64_t place = block;
                for (int64_t begin = block * rows; begin < job.rows.rows; begin += blocks * rows) {
                    warp_gradients::differentiate<T>(view, job, begin, job.rows.scratch + place * view.scratch, team);
                    if (job.keeps) place += blocks;
                }
            });
    });
    return cudaSuccess;
}

template <class T>
cudaError_t launch_stretch(const GradientView<T>& view, const GradientJob<T>& job, const Stretch& stretch, int tiles, cudaStream_t stream) {
    enqueue(stream, [=] {
        for (int64_t tile = 0; tile < tiles; ++tile)
            with_team(kWarpsOfTheHost, [&](const Team& team) {
                warp_gradients::go<T>(view, job, stretch, tile * 32 * job.rows.vectors, job.rows.scratch + tile * view.scratch, team);
            });
    });
    return cudaSuccess;
}

template <class T>
cudaError_t launch_weights(const GradientView<T>& view, const WeightsView<T>& weights, const char* tiles, int64_t rows, int vectors, T* out,
                           cudaStream_t stream) {
    enqueue(stream, [=] {
        with_team(kWarpsOfTheHost, [&](const Team& team) {
            for (int64_t group = 0; group * kGroup < rows; ++group)
                for (int task = 0; task < weights.task_count; ++task)
                    warp_gradients::sum_weights<T>(view, weights, tiles, rows, vectors, task, group, out, team);
        });
    });
    return cudaSuccess;
}

template <class From>
cudaError_t launch_sum(const Sum<From>& sum, cudaStream_t stream) {
    enqueue(stream, [=] {
        const int64_t count = sum.a * ((sum.b + sum.slice - 1) / sum.slice) * sum.c;
        for (int64_t i = 0; i < count; ++i) warp_gradients::sum_slices(sum, i);
    });
    return cudaSuccess;
}

template <class T>
cudaError_t launch_parameters(const WeightsView<T>& weights, const double* sums, T* out, cudaStream_t stream) {
    enqueue(stream, [=] {
        for (int64_t i = 0; i < weights.size; ++i) warp_gradients::write_parameter(weights, sums, i, out);
    });
    return cudaSuccess;
}

template <class T>
cudaError_t launch_narrow(const double* in, T* out, int64_t count, cudaStream_t stream) {
    enqueue(stream, [=] {
        for (int64_t i = 0; i < count; ++i) out[i] = T(in[i]);
    });
    return cudaSuccess;
}

#define FASTMAF_INSTANTIATE(T) \
    template cudaError_t resident_gradient_blocks<T>(int*); \
    template cudaError_t launch_gradient<T>(const GradientView<T>&, const GradientJob<T>&, int, cudaStream_t); \
    template cudaError_t launch_stretch<T>(const GradientView<T>&, const GradientJob<T>&, const Stretch&, int, cudaStream_t); \
    template cudaError_t launch_weights<T>(const GradientView<T>&, const WeightsView<T>&, const char*, int64_t, int, T*, cudaStream_t); \
    template cudaError_t launch_sum<T>(const Sum<T>&, cudaStream_t); \
    template cudaError_t launch_parameters<T>(const WeightsView<T>&, const double*, T*, cudaStream_t); \
    template cudaError_t launch_narrow<T>(const double*, T*, int64_t, cudaStream_t);
FASTMAF_INSTANTIATE(float)
FASTMAF_INSTANTIATE(double)

}  // namespace cuda
}  // namespace fastmaf
