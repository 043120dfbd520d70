#include "program.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace fastmaf {

namespace {

constexpr double kHalfLog2Pi = 0.91893853320467274178;
constexpr int kPanel = 8;
constexpr int kBlockUnits = 48;   // a sampler block gathers groups until it has this many units ...
constexpr int kBlockGroups = 16;  // ... or this many groups;
constexpr int kLoneUnits = 16;    // a group of this many fills panels by itself and stays alone

int panel_width(int rows) { return rows > 4 ? 8 : rows > 2 ? 4 : 2; }

// Collects the steps of one MADE in one direction.
struct Writer {
    std::vector<Step>& steps;
    int64_t& tape;

    void panels(int map, int first, int last, int begin, int end, Start start, Finish finish) {
        for (int row = first; row < last; row += kPanel) panel(map, row, std::min(kPanel, last - row), begin, end, start, finish);
    }
    void panel(int map, int row, int rows, int begin, int end, Start start, Finish finish) {
        const int width = panel_width(rows);
        steps.push_back({Kind::panel, start, finish, uint8_t(width), map, row, rows, begin, end, tape});
        tape += int64_t(width) * std::max(0, end - begin);
    }
    void law(int first, int last) { steps.push_back({Kind::law, Start::bias, Finish::raw, 0, 0, first, last - first, 0, 0, tape}); }
};

void write_density(Writer writer, const SortedMade& made, const std::vector<int>& widths) {
    const int last = int(widths.size()) - 1;
    for (int map = 0; map <= last; ++map)
        for (int row = 0; row < widths[size_t(map)]; row += kPanel) {
            const int rows = std::min(kPanel, widths[size_t(map)] - row);
            writer.panel(map, row, rows, 0, made.maps[size_t(map)].limit[size_t(row + rows - 1)], Start::bias,
                         map < last ? Finish::activation : Finish::raw);
        }
    writer.law(0, int(made.variables.size()));
}

// Blocks of groups [g0, g1). Before a block, all units that group g0 may read are alive. The bulk of the block is the product of its
// rows with what is alive by then; inside it, each group adds what the block itself has brought to life.
void write_sampler(Writer writer, const SortedMade& made, int context) {
    const int final = int(made.maps.size()) - 1;
    const int groups = int(made.groups.size()) - 1;
    // Units of map l alive once groups below g are known; inputs of map l alive then.
    auto units = [&](int l, int g) { return made.known[size_t(l)][size_t(std::min(g, groups - 1))]; };
    auto alive = [&](int l, int g) { return l == 0 ? context + made.groups[size_t(g)] : units(l - 1, g); };
    auto grow = [&](int from, int to, int begin_group, int end_group, Start start, Finish finish) {
        for (int l = 0; l < final; ++l)
            writer.panels(l, units(l, from), units(l, to), begin_group < 0 ? 0 : alive(l, begin_group), alive(l, end_group), start, finish);
    };

    for (int l = 0; l < final; ++l) writer.panels(l, 0, units(l, 0), 0, alive(l, 0), Start::bias, Finish::activation);
    for (int g0 = 0, g1; g0 < groups; g0 = g1) {
        int brought = 0;
        for (g1 = g0; g1 < groups && g1 - g0 < kBlockGroups && brought < kBlockUnits; ++g1) {
            int most = 0;
            for (int l = 0; l < final; ++l) most = std::max(most, units(l, g1 + 1) - units(l, g1));
            if (g1 > g0 && most >= kLoneUnits) break;
            brought += most >= kLoneUnits ? kBlockUnits : std::max(1, most);
        }
        const int first = made.groups[size_t(g0)], last = made.groups[size_t(g1)];
        writer.panels(final, 2 * first, 2 * last, 0, alive(final, g0), Start::bias, Finish::raw);
        if (g1 == g0 + 1) {
            writer.law(first, last);
            grow(g0, g1, -1, g1, Start::bias, Finish::activation);
            continue;
        }
        grow(g0, g1, -1, g0, Start::bias, Finish::raw);
        for (int g = g0; g < g1; ++g) {
            const int low = made.groups[size_t(g)], high = made.groups[size_t(g + 1)];
            if (alive(final, g) > alive(final, g0))
                writer.panels(final, 2 * low, 2 * high, alive(final, g0), alive(final, g), Start::partial, Finish::raw);
            writer.law(low, high);
            grow(g, g + 1, g0, g + 1, Start::partial, Finish::activation);
        }
    }
}

void write_backward(Writer writer, const SortedMade& made, const std::vector<int>& widths, int context) {
    for (int map = int(widths.size()) - 1; map >= 0; --map) {
        const Staircase& stairs = made.maps[size_t(map)];
        auto strip = [&](int first, int last) {
            for (int row = first; row < last; row += kPanel) {
                const int rows = std::min(kPanel, last - row), end = widths[size_t(map)];
                writer.panel(map, row, rows, std::min(stairs.first_reader(row), end), end, Start::partial,
                             map > 0 ? Finish::derivative : Finish::raw);
            }
        };
        if (map > 0) {
            strip(0, widths[size_t(map - 1)]);
        } else {  // apart, so that training can leave out the context
            strip(0, context);
            strip(context, stairs.inputs);
        }
    }
}

}  // namespace

template <class T>
Program<T>::Program(FlowSpec spec) : spec_(std::move(spec)) {
    const size_t features = size_t(spec_.features);
    const int context = spec_.context;
    std::vector<std::vector<int>> place;  // place[k][v]: row (after the context) of variable v in the tile of MADE k
    for (const MadeSpec& made : spec_.mades) {
        sorted_.push_back(sort_made(made, context));
        const SortedMade& sorted = sorted_.back();
        std::vector<int> rows(features);
        for (size_t s = 0; s < features; ++s) rows[size_t(made.variable[size_t(sorted.variables[s])])] = int(s);
        place.push_back(rows);

        std::vector<int> widths;
        for (const auto& known : sorted.known) widths.push_back(known.back());
        widths.push_back(int(2 * features));
        widths_.push_back(widths);
    }
    std::vector<int> noise_row(features);
    for (size_t i = 0; i < features; ++i) noise_row[size_t(spec_.noise_variable[i])] = int(i);
    place.push_back(noise_row);
    first_ = place[0];

    for (size_t k = 0; k < sorted_.size(); ++k) {
        const MadeSpec& made = spec_.mades[k];
        std::vector<int> next;
        AlignedVector<T> loc, scale;
        for (int coordinate : sorted_[k].variables) {
            next.push_back(place[k + 1][size_t(made.variable[size_t(coordinate)])]);
            if (made.scale.empty()) continue;
            loc.push_back(T(made.loc[size_t(coordinate)]));
            scale.push_back(T(made.scale[size_t(coordinate)]));
            constant_ += std::log(std::fabs(made.scale[size_t(coordinate)]));
        }
        next_.push_back(next);
        post_loc_.push_back(loc);
        post_scale_.push_back(scale);
    }
    constant_ -= double(features) * kHalfLog2Pi;
    for (double scale : spec_.columns.scale) constant_ += std::log(std::fabs(scale));

    // Where each master entry lies among the user's parameters.
    for (size_t k = 0; k < sorted_.size(); ++k) {
        const SortedMade& sorted = sorted_[k];
        std::vector<int64_t> weight_offset, bias_offset;
        for (size_t m = 0; m < sorted.maps.size(); ++m) {
            const MapSpec& map = spec_.mades[k].maps[m];
            const bool final = m + 1 == sorted.maps.size();
            const int skip = m == 0 ? context : 0;
            const int64_t weight = parameter_count_, bias = weight + int64_t(map.rows) * map.inputs, of_context = bias + map.rows;
            parameter_count_ = of_context + (map.context ? int64_t(map.rows) * context : 0);
            auto row_of = [&](int j) { return final ? 2 * sorted.variables[size_t(j / 2)] + j % 2 : sorted.units[m][size_t(j)]; };
            weight_offset.push_back(int64_t(index_.size()));
            for (int j = 0; j < sorted.maps[m].rows(); ++j)
                for (int i = 0; i < sorted.maps[m].limit[size_t(j)]; ++i) {
                    if (i < skip) {
                        index_.push_back(of_context + int64_t(row_of(j)) * context + i);
                        continue;
                    }
                    const int column = m == 0 ? sorted.variables[size_t(i - skip)] : sorted.units[m - 1][size_t(i)];
                    index_.push_back(weight + int64_t(row_of(j)) * map.inputs + column);
                }
            bias_offset.push_back(int64_t(index_.size()));
            for (int j = 0; j < map.rows; ++j) index_.push_back(bias + row_of(j));
        }
        weight_offset_.push_back(weight_offset);
        bias_offset_.push_back(bias_offset);
    }
    master_.resize(index_.size());
    bias_.resize(sorted_.size());
    bias_pointers_.resize(sorted_.size());
    for (size_t k = 0; k < sorted_.size(); ++k)
        for (const Staircase& map : sorted_[k].maps) bias_[k].emplace_back(size_t(map.rows() + kPanel) / kPanel * kPanel, T(0));
    for (size_t k = 0; k < sorted_.size(); ++k)
        for (const auto& bias : bias_[k]) bias_pointers_[k].push_back(bias.data());
}

template <class T>
void Program<T>::set_parameters(const T* parameters) {
    for (size_t i = 0; i < index_.size(); ++i) master_[i] = parameters[index_[i]];
    repack();
}

template <class T>
void Program<T>::get_parameters(T* parameters) const {
    std::fill(parameters, parameters + parameter_count_, T(0));
    for (size_t i = 0; i < index_.size(); ++i) parameters[index_[i]] = master_[i];
}

template <class T>
void Program<T>::copy_bias(size_t made, size_t map, int row, int rows) const {
    std::copy_n(master_.data() + bias_offset_[made][map] + row, rows, bias_[made][map].data() + row);
}

template <class T>
void Program<T>::pack_step(const Step& step, size_t made, Direction direction, T* data) const {
    if (step.kind != Kind::panel) return;
    const Staircase& stairs = sorted_[made].maps[size_t(step.map)];
    const T* weights = master_.data() + weight_offset_[made][size_t(step.map)];
    T* const out = data + step.tape;
    if (direction == Direction::backward) {
        for (int row = step.begin; row < step.end; ++row) pack_transposed(step, stairs, weights, row, out);
        return;
    }
    for (int i = 0; i < step.width; ++i) {
        const int row = step.row + i;
        const int inside = i < step.rows ? std::clamp(stairs.limit[size_t(row)], step.begin, step.end) : step.begin;
        const T* in = i < step.rows ? weights + stairs.offset[size_t(row)] : weights;
        T* column = out + i;
        for (int k = step.begin; k < inside; ++k, column += step.width) *column = in[k];
        for (int k = inside; k < step.end; ++k, column += step.width) *column = T(0);
    }
}

// One row of a transposed panel: the weights with which `row` reads the panel's inputs, one vector.
template <class T>
void Program<T>::pack_transposed(const Step& step, const Staircase& stairs, const T* weights, int row, T* panel) const {
    T* out = panel + int64_t(row - step.begin) * step.width;
    const T* in = weights + stairs.offset[size_t(row)] + step.row;
    const int count = std::clamp(stairs.limit[size_t(row)] - step.row, 0, step.rows);
    if (count == kPanel) {
        std::copy_n(in, kPanel, out);
        return;
    }
    for (int i = 0; i < step.width; ++i) out[i] = i < count ? in[i] : T(0);
}

template <class T>
void Program<T>::lay_out(Direction direction) const {
    auto tape = std::make_unique<Tape<T>>();
    std::vector<std::vector<int>> panel;
    int64_t size = 0;
    for (size_t k = 0; k < sorted_.size(); ++k) {
        std::vector<Step> steps;
        Writer writer{steps, size};
        if (direction == Direction::density) write_density(writer, sorted_[k], widths_[k]);
        if (direction == Direction::sampler) write_sampler(writer, sorted_[k], spec_.context);
        if (direction == Direction::backward) write_backward(writer, sorted_[k], widths_[k], spec_.context);
        std::vector<int> first(sorted_[k].maps.size(), 0);
        for (size_t s = steps.size(); s-- > 0;)
            if (steps[s].kind == Kind::panel) first[size_t(steps[s].map)] = int(s);
        panel.push_back(first);
        tape->steps.push_back(std::move(steps));
    }
    tape->data.resize(size_t(size));
    for (size_t k = 0; k < sorted_.size(); ++k)
        for (const Step& step : tape->steps[k]) pack_step(step, k, direction, tape->data.data());

    std::vector<MadeView<T>> views;
    for (size_t k = 0; k < sorted_.size(); ++k) {
        const MadeSpec& made = spec_.mades[k];
        const bool affine = !post_scale_[k].empty();
        views.push_back({spec_.features, spec_.context, int(sorted_[k].maps.size()), widths_[k].data(), made.activation, made.law,
                         made.form, T(made.clip), next_[k].data(), affine ? post_loc_[k].data() : nullptr,
                         affine ? post_scale_[k].data() : nullptr, bias_pointers_[k].data(), tape->steps[k].data(),
                         int(tape->steps[k].size()), tape->data.data()});
    }
    if (direction == Direction::density) density_panel_ = panel;
    if (direction == Direction::backward) backward_panel_ = panel;
    views_[int(direction)] = std::move(views);
    tapes_[int(direction)] = std::move(tape);
}

template <class T>
const Tape<T>& Program<T>::tape(Direction direction) const {
    views(direction);
    return *tapes_[int(direction)];
}

template <class T>
const std::vector<MadeView<T>>& Program<T>::views(Direction direction) const {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!tapes_[int(direction)]) lay_out(direction);
    return views_[int(direction)];
}

template <class T>
void Program<T>::repack() {
    drop_sampler();
    for (Direction direction : {Direction::density, Direction::backward})
        if (const auto& tape = tapes_[int(direction)])
            for (size_t k = 0; k < sorted_.size(); ++k)
                for (const Step& step : tape->steps[k]) pack_step(step, k, direction, tape->data.data());
    for (size_t k = 0; k < sorted_.size(); ++k)
        for (size_t m = 0; m < sorted_[k].maps.size(); ++m) copy_bias(k, m, 0, sorted_[k].maps[m].rows());
}

template <class T>
void Program<T>::drop_sampler() {
    std::lock_guard<std::mutex> lock(mutex_);
    tapes_[int(Direction::sampler)].reset();
}

template <class T>
void Program<T>::repack_rows(size_t made, size_t map, int row, int rows) {
    copy_bias(made, map, row, rows);
    Tape<T>& density = *tapes_[int(Direction::density)];
    pack_step(density.steps[made][size_t(density_panel_[made][map] + row / kPanel)], made, Direction::density, density.data.data());

    Tape<T>& backward = *tapes_[int(Direction::backward)];
    const Staircase& stairs = sorted_[made].maps[map];
    const T* weights = master_.data() + weight_offset_[made][map];
    const auto& steps = backward.steps[made];
    for (size_t s = size_t(backward_panel_[made][map]); s < steps.size() && steps[s].map == int(map); ++s) {
        const Step& step = steps[s];
        for (int j = std::max(row, step.begin); j < row + rows; ++j) pack_transposed(step, stairs, weights, j, backward.data.data() + step.tape);
    }
}

template class Program<float>;
template class Program<double>;

}  // namespace fastmaf
