// Evaluation on a GPU: defined by the sources in cuda, or by cuda/none.cpp where CUDA was not built.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "calls.hpp"
#include "weights.hpp"

namespace fastmaf {
namespace device {

// What a GPU could not do, or why there is none.
struct Error : std::runtime_error {
    explicit Error(const std::string& text, bool of_memory = false) : std::runtime_error(text), of_memory(of_memory) {}
    const bool of_memory;
};

struct State {
    bool built = false;
    std::string reason;         // why nothing can run here; empty where something can
    std::string versions;       // of the runtime and the driver
    std::string architectures;  // compiled for
    std::vector<std::string> gpus;
};
State state();
int device_of(uintptr_t address);                // -1 for memory of the host
void synchronize(int device, uintptr_t stream);  // waits for all that was enqueued

// What products of matrices may lose: nothing beyond the dtype; about that (halves in two parts); what halves lose. Flows and devices
// without use for tensor cores have the first, whatever is asked for.
enum class Precision { highest, high, medium };

// Where the arrays of a call lie. On a device the call only enqueues work on the caller's stream.
struct Place {
    bool on_device = false;
    uintptr_t stream = 0;
};

// Where samples go: their dtype is the caller's choice.
struct Samples {
    Samples(float* out) : single(out) {}
    Samples(double* out) : wide(out) {}
    float* single = nullptr;
    double* wide = nullptr;
};

// Over which axes of a batch the gradient in an array is a sum, since rows share what lies there.
struct Summed {
    bool outer = false, inner = false;
};

// Where gradients go; each may be null. Those in rows and contexts are (outer, inner, width), without the axes that are summed over; of
// arrays of the host none is. Sums of the float gradients are made in double, and their order does not depend on the device.
template <class T>
struct Gradients {
    T *value = nullptr, *x = nullptr, *context = nullptr, *parameters = nullptr;
    Summed of_x, of_context;
};

template <class T>
struct FlowState;

// Weights with their copy on one device, made when first needed and freed with it. Results are those of the functions in cpu/backend.hpp.
template <class T>
class Flow {
public:
    using Value = T;

    Flow(std::shared_ptr<const Weights<T>> weights, int device, Precision precision = Precision::highest);
    ~Flow();
    Flow(const Flow&) = delete;
    Flow& operator=(const Flow&) = delete;

    const Weights<T>& weights() const;
    void log_prob(const Batch& batch, T* out, const Place& place, const Poll& poll) const;
    void to_noise(const Batch& batch, T* out, const Place& place, const Poll& poll, T* log_det = nullptr) const;
    void conditional_probs(const Batch& batch, T* out, const Place& place, const Poll& poll) const;
    void from_noise(const Batch& noise, const Samples& out, const Place& place, const Poll& poll, T* log_det = nullptr) const;
    void sample(const Draw& draw, const Samples& out, T* log_prob, const Place& place, const Poll& poll) const;
    // cotangent: (outer, inner) numbers of any dtype; without data they are ones.
    void vjp(const Batch& batch, const Rows& cotangent, const Gradients<T>& out, const Place& place, const Poll& poll) const;

private:
    std::unique_ptr<FlowState<T>> state_;
};

extern template class Flow<float>;
extern template class Flow<double>;

}  // namespace device
}  // namespace fastmaf
