// A packed flow as one block of memory with the pointers of the place where it will lie: what a device gets in one copy.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../core/weights.hpp"
#include "launch.hpp"

namespace fastmaf {

// Arrays one behind the other, as they will lie at `base`. With a null base it only measures.
class Image {
public:
    explicit Image(char* base = nullptr) : base_(base) {}
    template <class U>
    const U* put(const U* values, size_t count) {
        const size_t begin = bytes_.size();
        bytes_.resize(begin + (count * sizeof(U) + 255) / 256 * 256);
        if (count) std::memcpy(bytes_.data() + begin, values, count * sizeof(U));
        return reinterpret_cast<const U*>(base_ + begin);
    }
    template <class V>
    auto put(const V& values) {
        return put(values.data(), values.size());
    }
    const std::vector<char>& bytes() const { return bytes_; }

private:
    char* base_;
    std::vector<char> bytes_;
};

inline std::vector<ColumnView> views_of(const Columns& columns) {
    std::vector<ColumnView> views;
    for (size_t c = 0; c < columns.kind.size(); ++c) {
        const double range = columns.kind[c] == Bijection::logit ? std::log(columns.upper[c] - columns.lower[c]) : 0;
        views.push_back({columns.kind[c], 0, columns.lower[c], columns.upper[c], range, columns.loc[c], columns.scale[c]});
    }
    return views;
}

// Where the weights of a direction lie, see sources_of, and its stages as they lie there.
template <class T>
struct PlacedWeights {
    const T* at = nullptr;
    std::vector<StageView<T>> stages;
    std::vector<int64_t> x;  // of gradients: where the tile of each stage lies in the scratch
};

constexpr size_t padded_entries(size_t count) { return (count + kPanel - 1) / kPanel * kPanel; }

// Which entry of the master each weight of a direction is, or kNoSource: those of the tape, then the biases of all maps. Not of samplers,
// where a Linear has others.
inline std::vector<uint32_t> sources_of(const Plan& plan, Direction direction) {
    std::vector<uint32_t> sources = plan.layout(direction).sources();
    sources.resize(padded_entries(sources.size()), kNoSource);
    for (size_t k = 0; k < plan.stages(); ++k)
        for (size_t m = 0; m < plan.sorted()[k].maps.size(); ++m) {
            const int rows = plan.sorted()[k].maps[m].rows();
            for (int row = 0; row < padded_rows(rows); ++row)
                sources.push_back(row < plan.bias_count(k, m) ? uint32_t(plan.bias_offset(k, m) + row) : kNoSource);
        }
    return sources;
}

// The stages of a direction with everything that they point to.
template <class T>
const StageView<T>* put_stages(Image& image, const Weights<T>& weights, Direction direction, PlacedWeights<T>& placed) {
    const Plan& plan = weights.plan();
    const size_t features = size_t(plan.features());
    std::vector<StageView<T>> stages = weights.views(direction);
    std::vector<T> all(weights.tape(direction).begin(), weights.tape(direction).end());
    all.resize(padded_entries(all.size()), T(0));
    std::vector<size_t> biases;
    for (size_t k = 0; k < stages.size(); ++k)
        for (size_t m = 0; m < plan.sorted()[k].maps.size(); ++m) {
            const T* const own = stages[k].bias[m];
            biases.push_back(all.size());
            all.insert(all.end(), own, own + padded_rows(plan.sorted()[k].maps[m].rows()));
        }
    placed.at = image.put(all);
    auto bias_of_next = biases.begin();
    for (size_t k = 0; k < stages.size(); ++k) {
        StageView<T>& stage = stages[k];
        const size_t maps = size_t(stage.maps), all = maps + size_t(stage.contexts);
        std::vector<const T*> bias;
        for (size_t m = 0; m < plan.sorted()[k].maps.size(); ++m) bias.push_back(placed.at + *bias_of_next++);
        stage.bias = image.put(bias);
        if (is_network(stage.output)) {
            std::vector<const int*> added, adders;
            std::vector<const T*> norm_scale, norm_shift;
            for (size_t m = 0; m < maps; ++m) {
                const size_t rows = size_t(stage.rows[m]);
                added.push_back(stage.added[m] ? image.put(stage.added[m], rows) : nullptr);
                adders.push_back(stage.adders[m] ? image.put(stage.adders[m], size_t(stage.rows[stage.adds[m]])) : nullptr);
                norm_scale.push_back(stage.norm_scale[m] ? image.put(stage.norm_scale[m], rows) : nullptr);
                norm_shift.push_back(stage.norm_shift[m] ? image.put(stage.norm_shift[m], rows) : nullptr);
            }
            stage.added = image.put(added);
            stage.adders = image.put(adders);
            stage.norm_scale = image.put(norm_scale);
            stage.norm_shift = image.put(norm_shift);
            stage.context_units = image.put(stage.context_units, maps);
            stage.joins = image.put(stage.joins, maps);
        } else {
            stage.adders = nullptr;
        }
        stage.rows = image.put(stage.rows, all);
        stage.activated = image.put(stage.activated, maps);
        stage.adds = image.put(stage.adds, maps);
        stage.raw = image.put(stage.raw, maps);
        if (is_network(stage.output)) stage.first = image.put(stage.first, features + 1);
        if (stage.output == Output::base) stage.values = image.put(stage.values, features);
        stage.next = image.put(stage.next, features);
        if (stage.scale) {
            stage.loc = image.put(stage.loc, features);
            stage.scale = image.put(stage.scale, features);
        }
        stage.steps = image.put(stage.steps, size_t(stage.step_count));
        stage.tape = placed.at;
    }
    const StageView<T>* const there = image.put(stages);
    placed.stages = std::move(stages);
    return there;
}

// Bytes of a tile's scratch, handed out from the front.
class Room {
public:
    int64_t take(int64_t bytes) {
        const int64_t begin = size_;
        size_ += (bytes + 127) / 128 * 128;
        return begin;
    }
    int64_t size() const { return size_; }

private:
    int64_t size_ = 0;
};

// `lanes`: rows of the widest tile.
template <class T>
FlowView<T> lay_out(Image& image, const Weights<T>& weights, Direction direction, int lanes, PlacedWeights<T>& placed) {
    const Plan& plan = weights.plan();
    FlowView<T> flow{};
    flow.stage_count = int(plan.stages());
    flow.transforms = int(plan.transforms());
    flow.features = plan.features();
    flow.context = plan.context();
    flow.has_base = plan.has_base();
    flow.normals = plan.continuous() > 0;
    flow.late_context = plan.late_context();
    flow.constant = weights.constant();
    flow.log_scales = weights.log_scales();

    std::vector<ColumnView> columns = views_of(plan.spec().columns);
    for (size_t v = 0; v < columns.size(); ++v) {
        columns[v].values = plan.values(int(v));
        flow.bounded = flow.bounded || columns[v].values || columns[v].kind != Bijection::identity;
    }
    flow.columns = image.put(columns);
    flow.context_columns = image.put(views_of(plan.spec().context_columns));
    const Range<T>& own = plan.range<T>();
    const Range<Other<T>>& other = plan.range<Other<T>>();
    flow.low = image.put(own.low);
    flow.high = image.put(own.high);
    flow.other_low = image.put(other.low);
    flow.other_high = image.put(other.high);
    flow.first = image.put(plan.first());
    flow.noise = image.put(plan.noise());

    flow.stages = put_stages(image, weights, direction, placed);
    std::vector<int64_t> units, raw;  // rows that map m needs in any stage
    for (size_t k = 0; k < plan.stages(); ++k) {
        const std::vector<int>& widths = plan.widths(k);
        units.resize(std::max(units.size(), widths.size()), 0);
        raw.resize(units.size(), 0);
        for (size_t m = 0; m < widths.size(); ++m) {
            units[m] = std::max<int64_t>(units[m], widths[m]);
            if (m < plan.raw(k).size() && plan.raw(k)[m]) raw[m] = std::max<int64_t>(raw[m], widths[m]);
        }
    }
    flow.maps = int(units.size());

    Room room;
    const int64_t row = lanes * int64_t(sizeof(T));
    flow.pointers = room.take(2 * flow.maps * int64_t(sizeof(T*)));
    flow.log_det = room.take(lanes * int64_t(sizeof(double)));
    for (int64_t& x : flow.x) x = room.take((flow.features + flow.context) * row);
    flow.read = plan.reads_apart() ? room.take((flow.features + flow.context) * row) : 0;
    flow.uniform = flow.has_base ? room.take(flow.features * row) : 0;
    for (int64_t& rows : units) rows = room.take(rows * row);
    for (int64_t& rows : raw) rows = rows ? room.take(rows * row) : -1;
    flow.scratch = room.size();
    std::vector<int64_t> folded;
    for (size_t k = 0; k < plan.stages(); ++k) {
        folded.push_back(flow.folded_size);
        flow.folded_size += padded_rows(plan.widths(k)[0]);
    }
    flow.folded = image.put(folded);
    flow.units = image.put(units);
    flow.raw = image.put(raw);
    return flow;
}

// Rows for which one context is shared by all.
inline bool shares_context(const Rows& context, int64_t outer, int64_t inner) {
    return (outer == 1 || context.outer == 0) && (inner == 1 || context.inner == 0);
}

}  // namespace fastmaf
