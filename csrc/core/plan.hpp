// The plan of a flow: everything that is known before its weights are. Units are sorted, rows have their places, and each layout of the
// weights knows where its entries come from. It holds no weights and has no dtype, never changes, and is shared: by copies of a flow, by
// the flows that are trained from one, by the devices that run it.
//
//     user's parameters -- index --> master: all staircase weights and biases of the sorted units, the trainable state
//     master -- layout --> tape: what the steps of one direction read, padded with zeros to the panel width
#pragma once

#include <algorithm>
#include <cstdint>
#include <list>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "layout.hpp"
#include "lazy.hpp"
#include "staircase.hpp"
#include "types.hpp"

namespace fastmaf {

// The range of what leaves each column, strictly inside its bounds.
template <class Out>
struct Range {
    std::vector<Out> low, high;
};

class Plan {
public:
    explicit Plan(FlowSpec spec);
    Plan(const Plan&) = delete;
    Plan& operator=(const Plan&) = delete;

    const FlowSpec& spec() const { return spec_; }
    const std::vector<Sorted>& sorted() const { return sorted_; }
    int features() const { return spec_.features; }
    int context() const { return spec_.context; }
    size_t stages() const { return sorted_.size(); }
    bool has_base() const { return has_base_; }
    size_t transforms() const { return stages() - has_base_; }        // stages between data and noise
    const std::vector<int>& first() const { return place_.front(); }  // [features] row of the first tile that takes variable v
    const std::vector<int>& noise() const { return noise_; }          // [features] row of the last tile before the base with noise column i
    // [features] row of the next tile that takes the s-th variable
    const std::vector<int>& next(size_t stage) const { return next_[stage]; }

    // The maps of a stage that have units of their own; direct weights share the final rows, the maps of contexts come last.
    const std::vector<int>& widths(size_t stage) const { return widths_[stage]; }         // rows of each, those that nobody reads left out
    const std::vector<int>& adds(size_t stage) const { return adds_[stage]; }             // the map whose sums are added, or -1
    const std::vector<char>& activated(size_t stage) const { return activated_[stage]; }  // whether its units are activated
    const std::vector<char>& raw(size_t stage) const { return raw_[stage]; }              // whether its sums are kept beside its units
    size_t written(size_t stage, size_t map) const { return size_t(wires_[stage][map].second); }
    const std::vector<int>& context_units(size_t stage) const { return context_units_[stage]; }  // that join the sums of each map, or -1
    const std::vector<Joins>& joins(size_t stage) const { return joins_[stage]; }
    // Which row each row adds, and is added by, where it is not its own; see StageView.
    const std::vector<const int*>& added(size_t stage) const { return added_[stage]; }
    const std::vector<const int*>& adders(size_t stage) const { return adders_[stage]; }
    // What each map reads and writes.
    const std::vector<std::pair<int, int>>& wires(size_t stage) const { return wires_[stage]; }
    // What the buffer of map m must hold in any stage: rows of units, and of the sums beside them. A whole vector may begin at any row.
    const std::vector<int>& unit_rows() const { return unit_rows_; }
    const std::vector<int>& raw_rows() const { return raw_rows_; }

    bool reads_apart() const { return reads_apart_; }  // whether the maps of a stage read another tile than that of its variables
    // How many variables may have any number, and whether some have only the values 0, 1, ... Those stand in the order of the columns:
    // no layer in front of them changes it.
    int continuous() const { return int(std::count(values_.begin(), values_.end(), 0)) + (has_base_ ? 0 : features()); }
    bool discrete() const { return continuous() < features(); }
    int values(int variable) const { return has_base_ ? values_[size_t(first()[size_t(variable)])] : 0; }  // 0 for any number
    const std::vector<int>& sorted_values() const { return values_; }                                      // [features] of a base
    int most_values() const;  // of a discrete variable; 1 where all have a lone row
    template <class Out>
    const Range<Out>& range() const {
        return std::get<Range<Out>>(ranges_);
    }
    bool late_context() const { return late_context_; }  // whether a context is read elsewhere than by the first map of a stage
    bool row_path() const { return row_path_; }          // whether the path of a single row can run all stages

    // The master is a gather of the user's flat parameters: entry i is number index()[i] of them.
    const std::vector<uint32_t>& index() const { return index_; }
    int64_t parameter_count() const { return parameter_count_; }
    int64_t weight_offset(size_t stage, size_t map) const { return weight_offset_[stage][map]; }
    int64_t bias_offset(size_t stage, size_t map) const { return bias_offset_[stage][map]; }
    int bias_count(size_t stage, size_t map) const;  // 0 for a map without

    // Made when first asked for.
    const Layout& layout(Direction direction) const;
    size_t memory() const;  // bytes of the index and of the layouts made so far

private:
    void shape_stage(const StageSpec& stage);
    void order_rows();
    void index_parameters();

    FlowSpec spec_;
    std::vector<Sorted> sorted_;
    std::vector<std::vector<std::pair<int, int>>> wires_;
    bool has_base_ = false, row_path_ = true, late_context_ = false, reads_apart_ = false;
    std::vector<std::vector<int>> widths_, adds_, context_units_;
    std::vector<std::vector<Joins>> joins_;
    std::vector<std::vector<const int*>> added_, adders_;
    std::list<std::vector<int>> adder_rows_;
    std::vector<std::vector<char>> activated_, raw_;  // booleans, one byte each
    std::vector<int> unit_rows_, raw_rows_;
    std::vector<std::vector<int>> place_;  // [stage][variable] row, after the context, in the tile of a stage; then of the noise
    std::vector<std::vector<int>> next_;
    std::vector<int> noise_;
    std::vector<int> values_;
    std::tuple<Range<float>, Range<double>> ranges_;  // [features]
    std::vector<uint32_t> index_;
    int64_t parameter_count_ = 0;
    std::vector<std::vector<int64_t>> weight_offset_, bias_offset_;
    Lazy<Layout> layouts_[kDirections];  // by direction
};

}  // namespace fastmaf
