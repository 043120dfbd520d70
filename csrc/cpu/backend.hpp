// Whole operations on the CPU: rows are cut into tiles, tiles go to threads, kernels do the arithmetic.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "../core/calls.hpp"
#include "../core/training.hpp"
#include "../core/weights.hpp"

namespace fastmaf {

template <class T>
struct Kernels;

// Biases of the first maps with a context that all rows share folded in.
template <class T>
struct Folded {
    AlignedVector<T> row, biases;
    std::vector<const T*> pointers;  // per stage
};

// What the calls of one caller keep for the next ones, so that these allocate nothing and ask nothing of the process. It belongs to one
// flow.
template <class T>
struct Workspace {
    const Kernels<T>* kernels;
    int threads;
    Folded<T> folded;
    std::shared_ptr<void> gradients;  // layouts and buffers of vjp
};

// Without a workspace a call takes the instruction set and the threads of the process.

template <class T>
void log_prob(const Weights<T>& weights, const Batch& batch, T* out, const Poll& poll,
              Workspace<T>* workspace = nullptr);  // out [rows]; NaN for rows with a NaN alone
// Of discrete variables: p(x_i = 1 | x_<i) as (n, D), or p(x_i = c | x_<i) as (n, D, most values), zero where there is no c, NaN where x_i
// is continuous. Whatever x holds goes into the network, as NaN where it lies at or outside a bound.
template <class T>
void conditional_probs(const Weights<T>& weights, const Batch& batch, T* out, const Poll& poll, Workspace<T>* workspace = nullptr);
template <class T>
void to_noise(const Weights<T>& weights, const Batch& batch, T* out, const Poll& poll, Workspace<T>* workspace = nullptr,
              T* log_det = nullptr);  // out [rows][features]
// Columns leave the network in double: the dtype of `out` is the caller's choice.
template <class T, class Out>
void from_noise(const Weights<T>& weights, const Batch& noise, Out* out, const Poll& poll, Workspace<T>* workspace = nullptr,
                T* log_det = nullptr);  // out [rows][features]
// log_det [rows] of either: log|det| of the map in its own direction. Of to_noise: where a number of the noise is not finite, NaN for rows
// with a NaN and -inf for others. Of from_noise: whatever the sums say.
template <class T, class Out>
void sample(const Weights<T>& weights, const Draw& draw, Out* out, T* log_prob, const Poll& poll,
            Workspace<T>* workspace = nullptr);  // log_prob may be null

// value [rows]; d_x [rows][features], d_context [rows][context], d_parameters [parameters]: each may be null.
template <class T>
void vjp(const Weights<T>& weights, const Batch& batch, const T* cotangent, T* value, T* d_x, T* d_context, T* d_parameters,
         const Poll& poll, Workspace<T>* workspace = nullptr);

// Gradients of sum(cotangent . z) + sum(of_log_det log|det|), both of to_noise, or of sum(cotangent . x) of from_noise at the rows x that it
// made; cotangent, d_rows [rows][features]: d_rows is in x of the first and in the noise of the second. of_log_det [rows], d_rows, d_context
// and d_parameters may be null. Zero for rows without noise, and for those far out whose gradient is no number in T.
template <class T>
void to_noise_vjp(const Weights<T>& weights, const Batch& batch, const T* cotangent, const T* of_log_det, T* d_rows, T* d_context,
                  T* d_parameters, const Poll& poll);
template <class T>
void from_noise_vjp(const Weights<T>& weights, const Batch& batch, const T* cotangent, T* d_rows, T* d_context, T* d_parameters,
                    const Poll& poll);

template <class T>
struct TrainerState;

// Owns weights and the optimizer's moments. If shared, the members are networks with different masks over the same parameters, and step t
// trains number t mod their count; set_parameters says where all of them begin.
template <class T>
class Trainer {
public:
    using Value = T;

    Trainer(std::vector<std::shared_ptr<Weights<T>>> members, bool shared, AdamSettings settings);  // one, unless shared
    ~Trainer();
    void set_members(std::vector<std::shared_ptr<Weights<T>>> members);  // of a shared trainer

    // Sums gradient [size] and loss over all processes that train together, in place.
    using Total = std::function<void(T* gradient, int64_t size, double* loss)>;

    // Steps over batch.index; weights [all rows] may be null. Returns the sum of w_i nll_i; `done` counts the steps done, fewer than
    // planned when the loss of the next one is not finite. With `total` each step is that of all processes, and may have no rows here;
    // but for norms of the batch, of which each process would have its own.
    double epoch(const Batch& batch, const double* weights, const Steps& steps, int64_t& done, const Poll& poll, const Total& total = {});

    int64_t parameter_count() const;
    void get_parameters(T* parameters) const;
    void set_parameters(const T* parameters);
    void get_moments(T* first, T* second) const;  // in the order of the flat parameters
    void set_moments(const T* first, const T* second);
    int64_t steps() const;
    void set_steps(int64_t steps);

private:
    std::unique_ptr<TrainerState<T>> state_;
};

// GFLOP/s of the micro-kernel on a block in L1 and of fused multiply-adds in registers, on so many threads, for about `seconds` each.
struct Peak {
    double kernel, registers;
};
template <class T>
Peak peak(double seconds, int threads);

// Row order of an epoch: argsort of 64-bit Philox words of (row, epoch, stream).
void shuffle(uint64_t seed, uint32_t stream, uint32_t epoch, int64_t rows, int64_t* order);

}  // namespace fastmaf
