#include "plan.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "columns.hpp"
#include "floats.hpp"

namespace fastmaf {

namespace {

// What each map of a stage reads and writes.
std::vector<std::pair<int, int>> wires_of(const StageSpec& stage, int context) {
    std::vector<std::pair<int, int>> wires;
    if (stage.output == Output::linear) return {{kVariables, 0}, {0, 1}};
    if (stage.output == Output::norm) return {{kVariables, 0}};
    const int maps = int(stage.maps.size()), contexts = int(stage.joined().size());
    wires.reserve(stage.maps.size() + 1);
    wires.push_back({stage.maps[0].context || context == 0 ? kTile : kVariables, 0});
    for (int m = 1; m < maps; ++m) wires.push_back({m - 1, m});
    if (stage.direct()) wires.push_back({stage.late_context() ? kTile : kVariables, maps - 1});
    for (int c = 0; c < contexts; ++c) wires.push_back({kTile, maps + c});
    return wires;
}

}  // namespace

Plan::Plan(FlowSpec spec) : spec_(std::move(spec)) {
    const PlainFloats floats;
    for (const StageSpec& stage : spec_.stages) shape_stage(stage);
    order_rows();
    index_parameters();
    std::apply(
        [&](auto&... range) {
            const size_t features = size_t(spec_.features);
            (range.low.resize(features), ...);
            (range.high.resize(features), ...);
            const Columns& columns = spec_.columns;
            for (size_t v = 0; v < features; ++v)
                (inner_range(columns.kind[v], columns.lower[v], columns.upper[v], range.low[v], range.high[v]), ...);
        },
        ranges_);
}

// Sorts the units of a stage, and sizes the buffers that its maps share with those of other stages.
void Plan::shape_stage(const StageSpec& stage) {
    sorted_.push_back(sort_stage(stage, spec_.context));
    wires_.push_back(wires_of(stage, spec_.context));
    const Sorted& sorted = sorted_.back();
    std::vector<int> widths, adds;
    std::vector<char> activated;
    for (const auto& known : sorted.known) widths.push_back(known.back());
    if (is_network(stage.output))
        widths.push_back(sorted.first.back());
    else
        for (const Staircase& map : sorted.maps) widths.push_back(map.rows());
    for (size_t m = 0; m < widths.size(); ++m) {
        adds.push_back(m < stage.maps.size() ? stage.maps[m].adds : -1);
        activated.push_back(m < stage.maps.size() && stage.maps[m].activated);
    }
    std::vector<char> raw(widths.size(), 0);
    for (int map : adds)
        if (map >= 0 && (activated[size_t(map)] || !stage.maps[size_t(map)].norm_scale.empty())) raw[size_t(map)] = 1;

    std::vector<int> context_units(stage.maps.size(), -1);
    std::vector<Joins> joins;
    for (const MapSpec& map : stage.maps) joins.push_back(map.joins);
    for (int m : stage.joined()) {
        context_units[size_t(m)] = int(widths.size());
        widths.push_back(widths[size_t(m)]);
    }
    std::vector<const int*> added(stage.maps.size(), nullptr), adders(added);
    for (size_t m = 0; m < sorted.added.size(); ++m) {
        if (sorted.added[m].empty()) continue;
        const size_t from = size_t(adds[m]);
        adder_rows_.emplace_back(size_t(widths[from]), -1);
        for (int j = 0; j < widths[m]; ++j) adder_rows_.back()[size_t(sorted.added[m][size_t(j)])] = j;
        added[m] = sorted.added[m].data();
        adders[m] = adder_rows_.back().data();
    }

    const bool joined = widths.size() > stage.maps.size() && is_network(stage.output);
    bool one_by_one =
        stage.output == Output::linear || (stage.output == Output::transform && !stage.direct() && !joined && !stage.reads_noise);
    for (size_t m = 0; m + 1 < stage.maps.size(); ++m)
        one_by_one = one_by_one && activated[m] && adds[m] < 0 && stage.maps[m].norm_scale.empty();
    row_path_ = row_path_ && one_by_one;
    reads_apart_ = reads_apart_ || stage.reads_apart();
    late_context_ = late_context_ || stage.late_context() || joined;
    has_base_ = stage.output == Output::base;
    if (has_base_)
        for (int coordinate : sorted.variables) values_.push_back(stage.values[size_t(coordinate)]);
    unit_rows_.resize(std::max(unit_rows_.size(), widths.size()));
    raw_rows_.resize(unit_rows_.size());
    for (size_t m = 0; m < widths.size(); ++m) {
        const int rows = (widths[m] + 15) / 16 * 16;
        unit_rows_[m] = std::max(unit_rows_[m], rows);
        if (m < raw.size() && raw[m]) raw_rows_[m] = std::max(raw_rows_[m], rows);
    }
    widths_.push_back(widths);
    adds_.push_back(adds);
    activated_.push_back(activated);
    raw_.push_back(raw);
    context_units_.push_back(std::move(context_units));
    joins_.push_back(std::move(joins));
    added_.push_back(std::move(added));
    adders_.push_back(std::move(adders));
}

// Which row of its tile each variable has in every stage, and where it goes from there.
void Plan::order_rows() {
    const size_t features = size_t(spec_.features);
    for (size_t k = 0; k <= stages(); ++k) {
        std::vector<int> rows(features);
        for (size_t s = 0; s < features; ++s)
            rows[size_t(k < stages() ? spec_.stages[k].variable[size_t(sorted_[k].variables[s])] : spec_.noise_variable[s])] = int(s);
        place_.push_back(rows);
    }
    for (int variable : spec_.noise_variable) noise_.push_back(place_[transforms()][size_t(variable)]);
    for (size_t k = 0; k < stages(); ++k) {
        std::vector<int> next;
        for (size_t s = 0; s < features; ++s) {
            const size_t coordinate = spec_.stages[k].output == Output::linear ? s : size_t(sorted_[k].variables[s]);
            next.push_back(place_[k + 1][size_t(spec_.stages[k].variable[coordinate])]);
        }
        next_.push_back(next);
    }
}

// Where each master entry lies among the user's parameters.
void Plan::index_parameters() {
    const int context = spec_.context;
    int64_t size = 0;
    for (const Sorted& sorted : sorted_)
        for (const Staircase& map : sorted.maps) size += map.offset.back() + map.rows();
    index_.reserve(size_t(size));
    for (size_t k = 0; k < stages(); ++k) {
        const StageSpec& stage = spec_.stages[k];
        const Sorted& sorted = sorted_[k];
        const int features = spec_.features;
        std::vector<int64_t> weight_offset, bias_offset;
        // The master holds a map row by row, of each row the inputs inside its stair; then one bias for each row. `at` gives the user's
        // place of (row, input), `bias` that of a row.
        auto add = [&](size_t m, auto at, auto bias) {
            weight_offset.push_back(int64_t(index_.size()));
            for (int j = 0; j < sorted.maps[m].rows(); ++j)
                for (int i = 0; i < sorted.maps[m].limit[size_t(j)]; ++i) index_.push_back(uint32_t(at(j, i)));
            bias_offset.push_back(int64_t(index_.size()));
            for (int j = 0; j < bias_count(k, m); ++j) index_.push_back(uint32_t(bias(j)));
        };
        const int64_t begin = parameter_count_, n = features;
        auto none = [](int) { return int64_t(0); };
        if (stage.output == Output::norm) {
            add(
                0, [](int, int) { return int64_t(0); }, [&](int j) { return begin + j; });
            parameter_count_ += stage.trainable ? 2 * n : 0;
        } else if (stage.output == Output::linear) {  // the user has L, U and the bias; U is sorted from its last row and column
            add(
                0, [&](int j, int i) { return begin + n * n + (n - 1 - j) * n + (n - 1 - i); }, none);
            add(
                1, [&](int j, int i) { return begin + j * n + i; }, [&](int j) { return begin + 2 * n * n + j; });
            parameter_count_ += 2 * n * n + n;
        } else {
            // The user's final rows in the order of the sorted variables, those of one variable together.
            std::vector<int> user_first(1, 0);
            for (int rows : stage.rows) user_first.push_back(user_first.back() + rows);
            std::vector<int64_t> final_rows, of_contexts;
            for (int s = 0; s < features; ++s)
                for (int p = 0; p < stage.rows[size_t(sorted.variables[size_t(s)])]; ++p)
                    final_rows.push_back(user_first[size_t(sorted.variables[size_t(s)])] + p);
            for (size_t m = 0; m < stage.maps.size(); ++m) {
                const MapSpec& map = stage.maps[m];
                const bool final = m + 1 == stage.maps.size();
                const bool joins = map.joins != Joins::none;
                const int skip = m == 0 && map.context ? context : 0;
                const int64_t weight = parameter_count_, bias = weight + int64_t(map.rows) * map.inputs, of_context = bias + map.rows;
                of_contexts.push_back(of_context);
                parameter_count_ =
                    of_context + (map.context || joins ? int64_t(map.rows) * context : 0) + (map.context_bias ? map.rows : 0);
                auto row_of = [&](int j) { return final ? final_rows[size_t(j)] : int64_t(sorted.units[m][size_t(j)]); };
                auto at = [&](int j, int i) {
                    if (i < skip) return of_context + row_of(j) * context + i;
                    return weight + row_of(j) * map.inputs + (m == 0 ? sorted.variables[size_t(i - skip)] : sorted.units[m - 1][size_t(i)]);
                };
                add(m, at, [&](int j) { return bias + row_of(j); });
            }
            if (stage.direct()) {
                const int shift = stage.late_context() ? context : 0;
                const int64_t weight = parameter_count_, of_context = weight - int64_t(final_rows.size()) * shift;
                parameter_count_ += stage.skip ? int64_t(final_rows.size()) * n : 0;
                auto at = [&](int j, int i) {
                    if (i < shift) return of_context + final_rows[size_t(j)] * shift + i;
                    return weight + final_rows[size_t(j)] * n + sorted.variables[size_t(i - shift)];
                };
                add(stage.maps.size(), at, none);
            }
            for (int m : stage.joined()) {
                const int64_t weight = of_contexts[size_t(m)], bias = weight + int64_t(stage.maps[size_t(m)].rows) * context;
                const std::vector<int>& units = sorted.units[size_t(m)];
                add(
                    weight_offset.size(), [&](int j, int i) { return weight + int64_t(units[size_t(j)]) * context + i; },
                    [&](int j) { return bias + units[size_t(j)]; });
            }
        }
        if (parameter_count_ > int64_t(std::numeric_limits<uint32_t>::max()))
            throw std::invalid_argument("the flow has more than 2^32 parameters");
        weight_offset_.push_back(weight_offset);
        bias_offset_.push_back(bias_offset);
    }
}

int Plan::bias_count(size_t stage, size_t map) const {
    const StageSpec& spec = spec_.stages[stage];
    bool without = spec.output == Output::linear && map == 0;
    if (is_network(spec.output) && map >= spec.maps.size()) {
        const size_t behind = map - spec.maps.size();
        without = spec.direct() && behind == 0;
        if (!without) without = !spec.maps[size_t(spec.joined()[behind - spec.direct()])].context_bias;
    }
    return without ? 0 : sorted_[stage].maps[map].rows();
}

int Plan::most_values() const {
    const std::vector<int>& rows = spec_.stages.back().rows;
    const bool lone = *std::max_element(rows.begin(), rows.end()) == 1;
    return lone ? 1 : *std::max_element(values_.begin(), values_.end());
}

const Layout& Plan::layout(Direction direction) const {
    return layouts_[int(direction)].get([&] { return std::make_unique<Layout>(*this, direction); });
}

size_t Plan::memory() const {
    size_t bytes = index_.size() * sizeof(uint32_t);
    for (const auto& layout : layouts_)
        if (const Layout* const made = layout.get())
            for (size_t k = 0; k < stages(); ++k) bytes += made->steps(k).size() * (sizeof(Step) + sizeof(int));
    return bytes;
}

}  // namespace fastmaf
