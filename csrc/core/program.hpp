// The flow program: a flow packed for evaluation.
//
// Every direction of every MADE is a list of steps over one linear tape of weights. A panel step multiplies a strip of at most eight
// rows of a map with a range of its inputs; a law step turns finished parameters into z (density) or x (sampling). The weights of a
// panel lie on the tape as [input][width], so a step reads memory in one direction. Density runs map by map; the sampler brings
// units to life degree by degree in blocks (left-looking); backward runs the transposed maps from the last to the first.
//
//     master: all staircase weights and biases, the trainable state     tape: a gather of it, padded with zeros to the panel width
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "aligned.hpp"
#include "staircase.hpp"
#include "types.hpp"

namespace fastmaf {

enum class Start : uint8_t { bias, partial };               // what the sum begins with: the bias, or what lies in the output rows
enum class Finish : uint8_t { raw, activation, derivative };  // what is done before storing; derivative: times act'(unit)
enum class Kind : uint8_t { panel, law };

struct Step {
    Kind kind;
    Start start;
    Finish finish;
    uint8_t width;    // rows held by the tape: 8, 4 or 2
    int map;
    int row, rows;    // panel: rows of the output; law: variables [row, row + rows)
    int begin, end;   // inputs
    int64_t tape;     // where the weights of input `begin` lie
};

template <class T>
struct Tape {
    std::vector<std::vector<Step>> steps;  // per MADE
    AlignedVector<T> data;
};

enum class Direction { density, sampler, backward };

// What kernels see of one MADE: pointers into a Program.
template <class T>
struct MadeView {
    int features, context, maps;
    const int* rows;            // [maps] rows of each map, the units that nobody reads left out
    Activation activation;
    Law law;
    Form form;
    T clip;
    const int* next;            // [features] row of the next tile that takes the s-th variable
    const T* loc;               // [features] the Affine that follows, or null
    const T* scale;
    const T* const* bias;       // [maps] padded to a multiple of 8 rows
    const Step* steps;
    int step_count;
    const T* tape;
};

template <class T>
class Program {
public:
    using Value = T;

    explicit Program(FlowSpec spec);  // parameters are zero until set
    Program(const Program&) = delete;
    Program& operator=(const Program&) = delete;

    const FlowSpec& spec() const { return spec_; }
    const std::vector<SortedMade>& sorted() const { return sorted_; }
    int features() const { return spec_.features; }
    int context() const { return spec_.context; }
    size_t mades() const { return sorted_.size(); }
    const std::vector<int>& first() const { return first_; }        // [features] row of the first tile that takes variable v
    const std::vector<int>& widths(size_t made) const { return widths_[made]; }  // rows in use of each map
    double constant() const { return constant_; }  // of log_prob: the normal's, and log|det| of all fixed scales

    // Views of all MADEs for one direction; tapes are packed on first use.
    const std::vector<MadeView<T>>& views(Direction direction) const;
    const Tape<T>& tape(Direction direction) const;

    // The trainable state. Flat parameters are in the user's order; `index` maps a master entry to its place there.
    AlignedVector<T>& master() { return master_; }
    const AlignedVector<T>& master() const { return master_; }
    const std::vector<int64_t>& index() const { return index_; }
    int64_t parameter_count() const { return parameter_count_; }
    int64_t weight_offset(size_t made, size_t map) const { return weight_offset_[made][map]; }
    int64_t bias_offset(size_t made, size_t map) const { return bias_offset_[made][map]; }
    void set_parameters(const T* parameters);
    void get_parameters(T* parameters) const;

    // After `master` changed: rewrite all packed tapes but the sampler's, which is dropped; or only the rows of one panel.
    void repack();
    void repack_rows(size_t made, size_t map, int row, int rows);
    void drop_sampler();

private:
    void lay_out(Direction direction) const;
    void pack_step(const Step& step, size_t made, Direction direction, T* data) const;
    void pack_transposed(const Step& step, const Staircase& stairs, const T* weights, int row, T* panel) const;
    void copy_bias(size_t made, size_t map, int row, int rows) const;

    FlowSpec spec_;
    std::vector<SortedMade> sorted_;
    std::vector<std::vector<int>> widths_;
    std::vector<int> first_;
    std::vector<std::vector<int>> next_;
    std::vector<AlignedVector<T>> post_loc_, post_scale_;
    double constant_ = 0;
    AlignedVector<T> master_;
    std::vector<int64_t> index_;
    int64_t parameter_count_ = 0;
    std::vector<std::vector<int64_t>> weight_offset_, bias_offset_;
    mutable std::vector<std::vector<AlignedVector<T>>> bias_;
    mutable std::vector<std::vector<const T*>> bias_pointers_;
    mutable std::mutex mutex_;
    mutable std::unique_ptr<Tape<T>> tapes_[3];
    mutable std::vector<MadeView<T>> views_[3];
    mutable std::vector<std::vector<int>> density_panel_, backward_panel_;  // [made][map] first step, for repack_rows
};

extern template class Program<float>;
extern template class Program<double>;

}  // namespace fastmaf
