// The weights of a flow over its plan: the master, the statistics of its norms, and tapes gathered from the master when first needed.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <vector>

#include "aligned.hpp"
#include "lazy.hpp"
#include "plan.hpp"

namespace fastmaf {

template <class T>
class Weights {
public:
    using Value = T;

    explicit Weights(std::shared_ptr<const Plan> plan);  // zeros until parameters are set; norms have the statistics of the plan's spec
    explicit Weights(FlowSpec spec) : Weights(std::make_shared<const Plan>(std::move(spec))) {}
    Weights(const Weights& other);  // the same weights over the same plan; tapes are gathered anew
    Weights& operator=(const Weights&) = delete;

    const Plan& plan() const { return *plan_; }
    double constant() const { return constant_; }      // of log_prob: the normal's, and log|det| of all scales that rows share
    double fixed_constant() const { return fixed_; }   // the part of constant() without trainable weights and the statistics of batches
    double log_scales() const { return log_scales_; }  // the latter alone: the constant of log|det| of the map to the noise

    // Views of all stages for one direction; tapes are packed on first use.
    const std::vector<StageView<T>>& views(Direction direction) const { return packed(direction).views; }
    const AlignedVector<T>& tape(Direction direction) const { return packed(direction).tape; }
    size_t memory() const;  // bytes of the weights and of what is packed of them so far; the plan has its own

    // The trainable state; see Plan::index.
    AlignedVector<T>& master() { return master_; }
    const AlignedVector<T>& master() const { return master_; }
    void set_parameters(const T* parameters);
    void set_parameters(const std::vector<Piece>& parameters);  // one after the other; throws std::logic_error if they are not as many
    void get_parameters(T* parameters) const { spread(master_.data(), parameters); }
    void spread(const T* like_master, T* parameters) const;  // to the user's order, zeros between

    // Statistics of a trainable norm.
    struct Statistics {
        std::vector<double> mean, var;
    };
    const Statistics& statistics(size_t stage) const { return statistics_[stage]; }
    void set_statistics(size_t stage, const double* mean, const double* var);

    // After `master` changed: gathers all tapes again but the sampler's, which is dropped. Or only what comes from some rows of a map, once
    // those of density and backward are packed; when all rows have been, `finish_step`.
    void repack();
    void repack_rows(size_t stage, size_t map, int row, int rows);
    void finish_step();

private:
    // What a direction is packed into.
    struct Packed {
        AlignedVector<T> tape;
        std::vector<StageView<T>> views;
        std::vector<AlignedVector<T>> inverse_bias;  // of the sampler: those of the inverted triangles of Linears, two for each
        std::vector<const T*> inverse_bias_pointers;
    };

    const Packed& packed(Direction direction) const;
    std::unique_ptr<Packed> pack(const Layout& layout, Direction direction) const;
    StageView<T> view(size_t stage) const;
    void invert(size_t stage, T* like_master, Packed& packed) const;
    void refresh_scales();
    void copy_bias(size_t stage, size_t map, int row, int rows);

    std::shared_ptr<const Plan> plan_;
    AlignedVector<T> master_;
    std::vector<Statistics> statistics_;         // [stage]; empty but for trainable norms
    std::vector<AlignedVector<T>> loc_, scale_;  // [stage][features]: the Affine behind a stage, or that of a norm
    double constant_ = 0, fixed_ = 0, log_scales_ = 0;
    std::vector<std::vector<AlignedVector<T>>> bias_;  // [stage][map], with padded_rows
    std::vector<std::vector<const T*>> bias_pointers_;
    std::list<std::vector<T>> norms_;                             // of hidden maps, in the order of their units
    std::vector<std::vector<const T*>> norm_scale_, norm_shift_;  // [stage][map], or null
    Lazy<Packed> packed_[kDirections];                            // by direction
};

extern template class Weights<float>;
extern template class Weights<double>;

}  // namespace fastmaf
