// A flow on a GPU as the parts of its host's side share it: backend.cpp keeps the copies, evaluation.cpp and differentiation.cpp launch.
#pragma once

#include <vector>

#include "image.hpp"
#include "kernels.hpp"
#include "streaming.hpp"

namespace fastmaf {
namespace device {

constexpr int kLanes = 128;                     // of the widest tile: four vectors
constexpr int64_t kScratch = int64_t(1) << 30;  // at most, for the blocks of a launch

template <class T>
struct FlowState {
    struct Copy {
        FlowView<T> view;
        TensorView tensor;
        DrawView draws;
        PlacedWeights<T> placed;
    };

    std::shared_ptr<const Weights<T>> weights;
    std::shared_ptr<Station> station;
    Precision precision = Precision::highest;
    std::mutex mutex;
    std::unique_ptr<Copy> copies[2];
    std::unique_ptr<GradientView<T>> gradients;
    PlacedWeights<T> backward;
    std::unique_ptr<WeightsView<T>> tasks;
    std::vector<void*> placed;  // where they lie

    ~FlowState();

    // What fill(image) lays out, where it will lie; it gets there before this returns.
    template <class Fill>
    void put(Fill fill) {
        Image measure;
        fill(measure);
        const int64_t bytes = int64_t(measure.bytes().size());
        void* memory = nullptr;
        const cudaError_t error = cudaMalloc(&memory, size_t(bytes));
        if (error == cudaErrorMemoryAllocation) out_of_memory(bytes, "the weights of a flow");
        check(error, "allocating " + size_of(double(bytes)) + " for the weights of a flow");
        try {
            Image image(static_cast<char*>(memory));
            fill(image);
            const Stream stream;
            const char* const attempt = "copying the weights of a flow";
            check(cudaMemcpyAsync(memory, image.bytes().data(), size_t(bytes), cudaMemcpyHostToDevice, stream), attempt);
            check(cudaStreamSynchronize(stream), attempt);
            placed.push_back(memory);
        } catch (...) {
            cudaFree(memory);
            throw;
        }
    }

    // Made when first asked for.
    const Copy& copy_for(Direction direction);
    const GradientView<T>& gradient_view();
    const WeightsView<T>& weights_view();

    void run(cuda::Operation operation, const Job<T>& job, int64_t outer, int64_t inner, const Place& place, const Poll& poll);
    void launch(cuda::Operation operation, Job<T> job, bool shared, cudaStream_t stream);
    // Of arrays of the host, which `job` holds.
    void stream_job(cuda::Operation operation, const Job<T>& job, bool shared, const Poll& poll);

    void differentiate(const Batch& batch, const Rows& cotangent, const Gradients<T>& out, const Place& place, const Poll& poll);
    // Gradients of arrays of the device. Parts of the rows follow each other where sums need what they leave: those of weights, into `sums`
    // [master and one more], which go on unless they begin here, and those over rows that share a row or a context.
    void launch_gradients(const Batch& batch, const Rows& cotangent, const Gradients<T>& out, double* sums, bool begins,
                          cudaStream_t stream);
    // What rows without any, or sums over them, have: zeros.
    void no_gradients(const Batch& batch, const Gradients<T>& out, const Place& place) const;
};

}  // namespace device
}  // namespace fastmaf
