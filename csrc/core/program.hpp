// The flow program: a flow packed for evaluation.
//
// Every direction of every stage is a list of steps over one linear tape of weights. A panel step multiplies a strip of at most eight
// rows of a map with a range of its inputs; a law step turns finished parameters into z (density) or x (sampling). The weights of a
// panel lie on the tape as [input][width], so a step reads memory in one direction. Density runs map by map; the sampler brings
// units to life degree by degree in blocks (left-looking); backward runs the transposed maps from the last to the first.
// A map reads the tile of variables or the units of the map before it, and writes units of its own; direct weights add to the final
// rows. The sampler of a Linear runs over the inverses of its triangles.
//
//     master: all staircase weights and biases, the trainable state     tape: a gather of it, padded with zeros to the panel width
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <tuple>
#include <vector>

#include "aligned.hpp"
#include "staircase.hpp"
#include "types.hpp"

namespace fastmaf {

template <class T>
struct Tape {
    std::vector<std::vector<Step>> steps;  // per stage
    AlignedVector<T> data;
};

// What a direction is packed into.
template <class T>
struct Packed {
    Tape<T> tape;
    std::vector<StageView<T>> views;
    std::vector<std::vector<std::vector<int>>> panels;  // [stage][map] steps, for repack_rows
    // Of the sampler: the triangles of a Linear, inverted; laid out like the master.
    std::vector<AlignedVector<T>> inverse;
    std::vector<std::vector<AlignedVector<T>>> inverse_bias;
    std::vector<std::vector<const T*>> inverse_bias_pointers;
};

// The range of what leaves each column, strictly inside its bounds.
template <class Out>
struct Range {
    std::vector<Out> low, high;
};

enum class Direction { density, sampler, backward };

template <class T>
class Program {
public:
    using Value = T;

    explicit Program(FlowSpec spec);  // parameters are zero until set
    Program(const Program&) = delete;
    Program& operator=(const Program&) = delete;
    ~Program();

    const FlowSpec& spec() const { return spec_; }
    const std::vector<Sorted>& sorted() const { return sorted_; }
    int features() const { return spec_.features; }
    int context() const { return spec_.context; }
    size_t stages() const { return sorted_.size(); }
    bool has_base() const { return has_base_; }
    size_t transforms() const { return stages() - has_base_; }  // stages between data and noise
    const std::vector<int>& first() const { return place_.front(); }  // [features] row of the first tile that takes variable v
    const std::vector<int>& noise() const { return noise_; }          // [features] row of the last tile before the base with noise column i
    const std::vector<int>& widths(size_t stage) const { return widths_[stage]; }  // rows in use of each map with units of its own
    const std::vector<std::pair<int, int>>& wires(size_t stage) const { return wires_[stage]; }  // what each map reads and writes
    // What the buffer of map m must hold in any stage: rows of units, and of the sums beside them. A whole vector may begin at any row.
    const std::vector<int>& unit_rows() const { return unit_rows_; }
    const std::vector<int>& raw_rows() const { return raw_rows_; }
    // The map with units of its own that a map writes: direct weights share the final rows.
    size_t written(size_t stage, size_t map) const { return map < widths_[stage].size() ? map : widths_[stage].size() - 1; }
    bool keeps_raw(size_t stage, size_t map) const { return raw_[stage][map] != 0; }
    bool clips() const { return clips_; }  // whether the maps of a stage read variables clipped
    bool discrete() const { return has_base_ && spec_.stages.back().output != Output::mixture; }
    int values(int variable) const;  // how many values a discrete variable has (no layer stands before such a base); 0 for any number
    template <class Out>
    const Range<Out>& range() const {
        return std::get<Range<Out>>(ranges_);
    }
    bool late_context() const { return late_context_; }  // whether a context is read behind the first map of a stage
    int most_values() const;  // of a discrete variable; 1 for bernoulli variables
    bool row_path() const { return row_path_; }    // whether the path of a single row can run all stages
    double constant() const { return constant_; }  // of log_prob: the normal's, and log|det| of all scales that rows share

    // Views of all stages for one direction; tapes are packed on first use.
    const std::vector<StageView<T>>& views(Direction direction) const { return packed(direction).views; }
    const Tape<T>& tape(Direction direction) const { return packed(direction).tape; }

    // The trainable state. Flat parameters are in the user's order; `index` maps a master entry to its place there.
    AlignedVector<T>& master() { return master_; }
    const AlignedVector<T>& master() const { return master_; }
    const std::vector<uint32_t>& index() const { return index_; }
    int64_t parameter_count() const { return parameter_count_; }
    size_t memory() const;  // bytes of the weights and of what is packed of them so far
    int64_t weight_offset(size_t stage, size_t map) const { return weight_offset_[stage][map]; }
    int64_t bias_offset(size_t stage, size_t map) const { return bias_offset_[stage][map]; }
    int bias_count(size_t stage, size_t map) const;  // 0 for a map without
    void set_parameters(const T* parameters);
    void set_parameters(const std::vector<Piece>& parameters);  // one after the other; throws std::logic_error if they are not as many
    void get_parameters(T* parameters) const { spread(master_.data(), parameters); }
    void spread(const T* like_master, T* parameters) const;  // to the user's order, zeros between

    // Statistics of a trainable norm.
    void set_statistics(size_t stage, const double* mean, const double* var);

    // After `master` changed: rewrite all packed tapes but the sampler's, which is dropped. Or only the rows of one panel; once all are
    // rewritten, `finish_step`.
    void repack();
    void repack_rows(size_t stage, size_t map, int row, int rows);
    void finish_step();

private:
    void order_rows();
    void index_parameters();
    const Packed<T>& packed(Direction direction) const;
    std::unique_ptr<Packed<T>> lay_out(Direction direction) const;
    void invert(size_t stage, Packed<T>& packed) const;
    void refresh_scales();
    void pack_step(const Step& step, size_t stage, Direction direction, Packed<T>& packed) const;
    void pack_transposed(const Step& step, const Staircase& stairs, const T* weights, int row, T* panel) const;
    void copy_bias(size_t stage, size_t map, int row, int rows);

    FlowSpec spec_;
    std::vector<Sorted> sorted_;
    std::vector<std::vector<std::pair<int, int>>> wires_;
    bool has_base_ = false, row_path_ = true, late_context_ = false, clips_ = false;
    std::vector<std::vector<int>> widths_, adds_;
    std::vector<int> unit_rows_, raw_rows_;
    std::vector<std::vector<char>> activated_, raw_;  // booleans, one byte each
    std::vector<std::vector<int>> place_;             // [stage][variable] row, after the context, in the tile of a stage; then of the noise
    std::vector<std::vector<int>> next_;
    std::vector<int> noise_;
    std::vector<AlignedVector<T>> loc_, scale_;
    double constant_ = 0;
    std::tuple<Range<float>, Range<double>> ranges_;  // [features]
    AlignedVector<T> master_;
    std::vector<uint32_t> index_;
    int64_t parameter_count_ = 0;
    std::vector<std::vector<int64_t>> weight_offset_, bias_offset_;
    std::vector<std::vector<AlignedVector<T>>> bias_;
    std::vector<std::vector<const T*>> bias_pointers_;
    mutable std::atomic<Packed<T>*> packed_[3] = {};  // by direction; owned
};

extern template class Program<float>;
extern template class Program<double>;

}  // namespace fastmaf
