// Evaluation on a GPU: defined by the sources in cuda, or by cuda/none.cpp where CUDA was not built.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "calls.hpp"
#include "training.hpp"
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
void copy_to_host(int device, uintptr_t from, void* to, int64_t bytes, uintptr_t stream);
void copy_from_host(int device, const void* from, uintptr_t to, int64_t bytes, uintptr_t stream);

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

// Where what a step needs of several trainers is summed up between its halves: the gradient, in the order of the flat parameters, and the
// loss. What is enqueued on the stream is in time.
template <class T>
struct StepArrays {
    T* gradient;
    int64_t size;
    double* loss;
    uintptr_t stream;
};

template <class T>
struct TrainerState;

// The trainer of cpu/backend.hpp on a device; results are those of the CPU to rounding, and the same bits from run to run. The rows lie
// there too.
template <class T>
class Trainer {
public:
    using Value = T;

    Trainer(const std::vector<std::shared_ptr<Weights<T>>>& members, bool shared, int device, const AdamSettings& settings);
    ~Trainer();
    Trainer(const Trainer&) = delete;
    Trainer& operator=(const Trainer&) = delete;
    void set_members(const std::vector<std::shared_ptr<Weights<T>>>& members);  // of a shared trainer

    // Rows of the host, to which later calls refer by number; weights [rows] may be null. They are copied to the device if they take at most
    // `most` bytes, or, if that is negative, half of what is free there. If not they stay where they are, and must stay as they are, and each
    // epoch brings them in pieces.
    void set_rows(const Batch& rows, const double* weights, const Poll& poll, int64_t most = -1);
    // As on the CPU: steps over the rows order[0 .. rows). `total` gets gradients and losses on the host.
    using Total = std::function<void(T* gradient, int64_t size, double* loss)>;
    double epoch(const int64_t* order, int64_t rows, const Steps& steps, int64_t& done, const Poll& poll, const Total& total = {});

    // An epoch in its parts. Gradient and loss of rows [begin, begin + rows) of the order, if there are any, the gradient divided by `mass`;
    // then the step. Both only enqueue; `look` waits for up to kMostSteps of them, adds up their losses and says how many were made: none
    // from the first one on whose loss is no number.
    static constexpr int64_t kMostSteps = 256;
    void set_order(const int64_t* order, int64_t rows);
    void grad(int64_t begin, int64_t rows, double mass);
    StepArrays<T> arrays() const;
    void apply(double rate);
    int64_t look(double& sum);

    void log_prob(size_t member, const Batch& batch, T* out, const Poll& poll);  // under the weights as they are, of arrays of the host
    int features() const;
    int64_t parameter_count() const;
    void get_parameters(T* parameters) const;
    void set_parameters(const T* parameters);
    void set_statistics(size_t stage, const double* mean, const double* var);  // of a norm
    void get_moments(T* first, T* second) const;                               // in the order of the flat parameters
    void set_moments(const T* first, const T* second);
    int64_t steps() const;
    void set_steps(int64_t steps);

private:
    std::unique_ptr<TrainerState<T>> state_;
};

extern template class Flow<float>;
extern template class Flow<double>;
extern template class Trainer<float>;
extern template class Trainer<double>;

}  // namespace device
}  // namespace fastmaf
