#include "program.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <stdexcept>
#include <string>

#include <pthread.h>
#include <unistd.h>

#include "columns.hpp"
#include "floats.hpp"

namespace fastmaf {

namespace {

constexpr double kHalfLog2Pi = 0.91893853320467274178;
constexpr int kPanel = 8;
constexpr int kBlockUnits = 48;   // a sampler block gathers groups until it has this many units ...
constexpr int kBlockGroups = 16;  // ... or this many groups;
constexpr int kLoneUnits = 16;    // a group of this many fills panels by itself and stays alone

// Held while a tape is laid out. There is one for all programs, so that a fork can wait for it: a child of a process that was in the middle
// of this would wait for ever.
std::mutex packing;
[[maybe_unused]] const int fork_waits = pthread_atfork([] { packing.lock(); }, [] { packing.unlock(); }, [] { packing.unlock(); });

const long kCache = [] {
    const long size = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return size > 0 ? size : 1l << 20;
}();

int panel_width(int rows) { return rows > 4 ? 8 : rows > 2 ? 4 : 2; }

constexpr int kLawRows = 192;      // final rows of a base between two law steps, so that they are still in the cache

// Collects the steps of one stage in one direction.
struct Writer {
    std::vector<Step>& steps;
    int64_t& tape;
    std::vector<std::pair<int, int>> wires;  // what each map reads and writes

    void panels(int map, int first, int last, int begin, int end, Start start, Finish finish) {
        for (int row = first; row < last; row += kPanel) panel(map, row, std::min(kPanel, last - row), begin, end, start, finish);
    }
    void panel(int map, int row, int rows, int begin, int end, Start start, Finish finish) {
        const int width = panel_width(rows);
        tape = (tape + kPanel - 1) / kPanel * kPanel;  // for loads of several weights at once
        steps.push_back({Kind::panel, start, finish, uint8_t(width), map, row, rows, begin, end, tape, wires[size_t(map)].first,
                         wires[size_t(map)].second});
        tape += int64_t(width) * std::max(0, end - begin);
    }
    // Panels over whole staircases.
    void stairs(int map, const Staircase& stairs, int first, int last, Start start, Finish finish) {
        for (int row = first; row < last; row += kPanel) {
            const int rows = std::min(kPanel, last - row);
            panel(map, row, rows, 0, stairs.limit[size_t(row + rows - 1)], start, finish);
        }
    }
    void law(int first, int last) {
        steps.push_back({Kind::law, Start::bias, Finish::raw, 0, 0, first, last - first, 0, 0, tape, kTile, kTile});
    }
};

// What each map of a stage reads and writes.
std::vector<std::pair<int, int>> wires_of(const StageSpec& stage) {
    std::vector<std::pair<int, int>> wires;
    if (stage.output == Output::linear) return {{kVariables, 0}, {0, 1}};
    wires.reserve(stage.maps.size() + 1);
    for (int m = 0; m < int(stage.maps.size()); ++m) wires.push_back({m ? m - 1 : kTile, m});
    if (stage.direct()) wires.push_back({stage.late_context() ? kTile : kVariables, int(stage.maps.size()) - 1});
    return wires;
}

void write_density(Writer writer, const StageSpec& stage, const Sorted& sorted, const std::vector<int>& widths) {
    const int features = int(sorted.variables.size()), final = int(widths.size()) - 1;
    if (stage.output == Output::norm) return writer.law(0, features);
    if (stage.output == Output::linear) {
        for (int map : {0, 1}) {
            writer.stairs(map, sorted.maps[size_t(map)], 0, features, Start::bias, Finish::raw);
            writer.law(map, map + 1);
        }
        return;
    }
    for (int map = 0; map < final; ++map) writer.stairs(map, sorted.maps[size_t(map)], 0, widths[size_t(map)], Start::bias, Finish::unit);
    const int rows = widths[size_t(final)], chunk = is_base(stage.output) ? kLawRows : rows;
    for (int row = 0, done = 0; row < rows; row += chunk) {
        const int end = std::min(rows, row + chunk);
        writer.stairs(final, sorted.maps[size_t(final)], row, end, Start::bias, Finish::raw);
        if (stage.direct()) writer.stairs(final + 1, sorted.maps[size_t(final + 1)], row, end, Start::partial, Finish::raw);
        int complete = done;
        while (complete < features && sorted.first[size_t(complete + 1)] <= end) ++complete;
        if (complete > done) writer.law(done, complete);
        done = complete;
    }
}

// Blocks of groups [g0, g1). Before a block, all units that group g0 may read are alive. The bulk of the block is the product of its
// rows with what is alive by then; inside it, each group adds what the block itself has brought to life.
void write_sampler(Writer writer, const StageSpec& stage, const Sorted& sorted, int context) {
    const int features = int(sorted.variables.size());
    if (stage.output == Output::norm) return writer.law(0, features);
    if (stage.output == Output::linear) {  // y = L^-1 z, then x = U^-1 y
        writer.wires = {{0, kVariables}, {1, 0}};
        for (int map : {1, 0}) {
            writer.law(1 - map, 2 - map);
            writer.stairs(map, sorted.maps[size_t(map)], 0, features, Start::bias, Finish::raw);
        }
        return;
    }
    const int final = int(stage.maps.size()) - 1;
    const int groups = int(sorted.groups.size()) - 1;
    // Units of map l alive once groups below g are known; inputs of map l alive then.
    auto units = [&](int l, int g) { return sorted.known[size_t(l)][size_t(std::min(g, groups - 1))]; };
    auto alive = [&](int l, int g) { return l == 0 ? context + sorted.groups[size_t(g)] : units(l - 1, g); };
    auto direct = [&](int g) { return (stage.late_context() ? context : 0) + (stage.skip ? sorted.groups[size_t(g)] : 0); };
    auto grow = [&](int from, int to, int begin_group, int end_group, Start start, Finish finish) {
        for (int l = 0; l < final; ++l)
            writer.panels(l, units(l, from), units(l, to), begin_group < 0 ? 0 : alive(l, begin_group), alive(l, end_group), start, finish);
    };
    auto outputs = [&](int first_group, int last_group, int begin_group, int end_group) {
        const int first = sorted.first[size_t(sorted.groups[size_t(first_group)])], last = sorted.first[size_t(sorted.groups[size_t(last_group)])];
        const bool bulk = begin_group < 0;
        const int begin = bulk ? 0 : alive(final, begin_group), end = alive(final, end_group);
        if (bulk || end > begin) writer.panels(final, first, last, begin, end, bulk ? Start::bias : Start::partial, Finish::raw);
        const int from = bulk ? 0 : direct(begin_group), to = direct(end_group);
        if (to > from) writer.panels(final + 1, first, last, from, to, Start::partial, Finish::raw);
    };

    for (int l = 0; l < final; ++l) writer.panels(l, 0, units(l, 0), 0, alive(l, 0), Start::bias, Finish::unit);
    for (int g0 = 0, g1; g0 < groups; g0 = g1) {
        int brought = 0;
        for (g1 = g0; g1 < groups && g1 - g0 < kBlockGroups && brought < kBlockUnits; ++g1) {
            int most = 0;
            for (int l = 0; l < final; ++l) most = std::max(most, units(l, g1 + 1) - units(l, g1));
            if (g1 > g0 && most >= kLoneUnits) break;
            brought += most >= kLoneUnits ? kBlockUnits : std::max(1, most);
        }
        outputs(g0, g1, -1, g0);
        if (g1 == g0 + 1) {
            writer.law(sorted.groups[size_t(g0)], sorted.groups[size_t(g1)]);
            grow(g0, g1, -1, g1, Start::bias, Finish::unit);
            continue;
        }
        grow(g0, g1, -1, g0, Start::bias, Finish::raw);
        for (int g = g0; g < g1; ++g) {
            if (g > g0) outputs(g, g + 1, g0, g);
            writer.law(sorted.groups[size_t(g)], sorted.groups[size_t(g + 1)]);
            grow(g, g + 1, g0, g + 1, Start::partial, Finish::unit);
        }
    }
}

// Steps read what a map writes and write what it reads.
void write_backward(Writer writer, const StageSpec& stage, const Sorted& sorted, const std::vector<int>& widths, int context) {
    if (stage.output == Output::norm) return;
    for (auto& wire : writer.wires) std::swap(wire.first, wire.second);
    for (int map = int(sorted.maps.size()) - 1; map >= 0; --map) {
        const Staircase& stairs = sorted.maps[size_t(map)];
        const int from = writer.wires[size_t(map)].first, to = writer.wires[size_t(map)].second, end = widths[size_t(from)];
        // The variables of a network have a gradient from the law already; so have the units of a Linear, from its diagonal.
        const Start start = (to >= 0) == is_network(stage.output) ? Start::zero : Start::partial;
        auto strip = [&](int first, int last) {
            for (int row = first; row < last; row += kPanel) {
                const int rows = std::min(kPanel, last - row);
                writer.panel(map, row, rows, std::min(stairs.first_reader(row), end), end, start, Finish::raw);
            }
        };
        if (stage.output == Output::linear && map == 0) writer.law(0, 1);
        if (to >= 0) {
            strip(0, widths[size_t(to)]);
        } else {  // apart, so that training can leave out the context
            if (to == kTile) strip(0, context);
            strip(to == kTile ? context : 0, stairs.inputs);
        }
    }
}

}  // namespace

template <class T>
Program<T>::Program(FlowSpec spec) : spec_(std::move(spec)) {
    const PlainFloats floats;
    for (const StageSpec& stage : spec_.stages) {
        sorted_.push_back(sort_stage(stage, spec_.context));
        wires_.push_back(wires_of(stage));
        const Sorted& sorted = sorted_.back();
        std::vector<int> widths, adds;
        std::vector<char> activated;
        for (const auto& known : sorted.known) widths.push_back(known.back());
        if (is_network(stage.output)) widths.push_back(sorted.first.back());
        else
            for (const Staircase& map : sorted.maps) widths.push_back(map.rows());
        for (size_t m = 0; m < widths.size(); ++m) {
            adds.push_back(m < stage.maps.size() ? stage.maps[m].adds : -1);
            activated.push_back(m < stage.maps.size() && stage.maps[m].activated);
        }
        std::vector<char> raw(widths.size(), 0);
        for (int map : adds)
            if (map >= 0 && activated[size_t(map)]) raw[size_t(map)] = 1;
        for (size_t m = 0; m + 1 < widths.size(); ++m) row_path_ = row_path_ && activated[m] && adds[m] < 0;
        row_path_ = row_path_ && stage.output == Output::transform && !stage.direct();
        clips_ = clips_ || stage.input_clip > 0;
        late_context_ = late_context_ || stage.late_context();
        has_base_ = is_base(stage.output);
        unit_rows_.resize(std::max(unit_rows_.size(), widths.size()));
        raw_rows_.resize(unit_rows_.size());
        for (size_t m = 0; m < widths.size(); ++m) {
            const int rows = (widths[m] + 15) / 16 * 16;
            unit_rows_[m] = std::max(unit_rows_[m], rows);
            if (raw[m]) raw_rows_[m] = std::max(raw_rows_[m], rows);
        }
        widths_.push_back(widths);
        adds_.push_back(adds);
        activated_.push_back(activated);
        raw_.push_back(raw);
    }
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
    master_.resize(index_.size());
    bias_.resize(stages());
    bias_pointers_.resize(stages());
    for (size_t k = 0; k < stages(); ++k) {
        for (const Staircase& map : sorted_[k].maps) bias_[k].emplace_back(size_t(padded_rows(map.rows())), T(0));
        for (const auto& bias : bias_[k]) bias_pointers_[k].push_back(bias.data());
    }
    refresh_scales();
}

template <class T>
Program<T>::~Program() {
    for (auto& packed : packed_) delete packed.load();
}

// Which row of its tile each variable has in every stage, and where it goes from there.
template <class T>
void Program<T>::order_rows() {
    const size_t features = size_t(spec_.features);
    for (size_t k = 0; k <= stages(); ++k) {
        std::vector<int> rows(features);
        for (size_t s = 0; s < features; ++s)
            rows[size_t(k < stages() ? spec_.stages[k].variable[size_t(sorted_[k].variables[s])] : spec_.noise_variable[s])] = int(s);
        place_.push_back(rows);
    }
    for (int variable : spec_.noise_variable) noise_.push_back(place_[transforms()][size_t(variable)]);
    for (size_t k = 0; k < stages(); ++k) {
        const StageSpec& stage = spec_.stages[k];
        std::vector<int> next;
        AlignedVector<T> loc, scale;
        for (size_t s = 0; s < features; ++s) {
            const size_t coordinate = stage.output == Output::linear ? s : size_t(sorted_[k].variables[s]);
            next.push_back(place_[k + 1][size_t(stage.variable[coordinate])]);
            if (stage.scale.empty() && stage.output != Output::norm) continue;
            loc.push_back(stage.trainable ? T(0) : T(stage.loc[coordinate]));
            scale.push_back(stage.trainable ? T(1) : T(stage.scale[coordinate]));
        }
        next_.push_back(next);
        loc_.push_back(loc);
        scale_.push_back(scale);
    }
}

// Where each master entry lies among the user's parameters.
template <class T>
void Program<T>::index_parameters() {
    const int context = spec_.context;
    for (size_t k = 0; k < stages(); ++k) {
        const StageSpec& stage = spec_.stages[k];
        const Sorted& sorted = sorted_[k];
        const int features = spec_.features;
        std::vector<int64_t> weight_offset, bias_offset;
        // Entries of a map; `at` gives the place of (row, input), `bias` that of a row.
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
            add(0, [](int, int) { return int64_t(0); }, [&](int j) { return begin + j; });
            parameter_count_ += stage.trainable ? 2 * n : 0;
        } else if (stage.output == Output::linear) {
            add(0, [&](int j, int i) { return begin + n * n + (n - 1 - j) * n + (n - 1 - i); }, none);
            add(1, [&](int j, int i) { return begin + j * n + i; }, [&](int j) { return begin + 2 * n * n + j; });
            parameter_count_ += 2 * n * n + n;
        } else {
            std::vector<int> user_first(1, 0);
            for (int rows : stage.rows) user_first.push_back(user_first.back() + rows);
            std::vector<int64_t> final_rows;
            for (int s = 0; s < features; ++s)
                for (int p = 0; p < stage.rows[size_t(sorted.variables[size_t(s)])]; ++p)
                    final_rows.push_back(user_first[size_t(sorted.variables[size_t(s)])] + p);
            for (size_t m = 0; m < stage.maps.size(); ++m) {
                const MapSpec& map = stage.maps[m];
                const bool final = m + 1 == stage.maps.size();
                const int skip = m == 0 ? context : 0;
                const int64_t weight = parameter_count_, bias = weight + int64_t(map.rows) * map.inputs, of_context = bias + map.rows;
                parameter_count_ = of_context + (map.context ? int64_t(map.rows) * context : 0);
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
        }
        if (parameter_count_ > int64_t(std::numeric_limits<uint32_t>::max()))
            throw std::invalid_argument("the flow has more than 2^32 parameters");
        weight_offset_.push_back(weight_offset);
        bias_offset_.push_back(bias_offset);
    }
}

template <class T>
int Program<T>::bias_count(size_t stage, size_t map) const {
    const StageSpec& spec = spec_.stages[stage];
    const bool without = spec.output == Output::linear ? map == 0 : is_network(spec.output) && map >= spec.maps.size();
    return without ? 0 : sorted_[stage].maps[map].rows();
}

template <class T>
int Program<T>::values(int variable) const {
    if (!discrete()) return 0;
    return spec_.stages.back().output == Output::bernoulli ? 2 : spec_.stages.back().rows[size_t(variable)];
}

template <class T>
int Program<T>::most_values() const {
    const std::vector<int>& rows = spec_.stages.back().rows;
    return *std::max_element(rows.begin(), rows.end());
}

template <class T>
size_t Program<T>::memory() const {
    size_t numbers = master_.size();
    for (const auto& stage : bias_)
        for (const auto& bias : stage) numbers += bias.size();
    for (const auto& packed : packed_)
        if (const Packed<T>* made = packed.load(std::memory_order_acquire)) {
            numbers += made->tape.data.size();
            for (const auto& inverse : made->inverse) numbers += inverse.size();
        }
    return numbers * sizeof(T) + index_.size() * sizeof(uint32_t);
}

template <class T>
void Program<T>::set_parameters(const T* parameters) {
    const PlainFloats floats;
    for (size_t i = 0; i < index_.size(); ++i) master_[i] = parameters[index_[i]];
    repack();
}

template <class T>
void Program<T>::set_parameters(const std::vector<Piece>& parameters) {
    const PlainFloats floats;
    std::vector<int64_t> end;
    end.reserve(parameters.size());
    for (const Piece& piece : parameters) end.push_back((end.empty() ? 0 : end.back()) + piece.count);
    if ((end.empty() ? 0 : end.back()) != parameter_count_)
        throw std::logic_error("the flow has " + std::to_string(parameter_count_) + " parameters; others are given");
    int64_t begin = 0, stop = 0;  // of the piece at hand: neighbours in the master mostly share it
    const char* data = nullptr;
    for (size_t i = 0; i < index_.size(); ++i) {
        const int64_t place = index_[i];
        if (place < begin || place >= stop) {
            const size_t piece = size_t(std::upper_bound(end.begin(), end.end(), place) - end.begin());
            stop = end[piece];
            begin = stop - parameters[piece].count;
            data = parameters[piece].data;
        }
        std::memcpy(&master_[i], data + (place - begin) * int64_t(sizeof(T)), sizeof(T));
    }
    repack();
}

template <class T>
void Program<T>::spread(const T* like_master, T* parameters) const {
    std::fill(parameters, parameters + parameter_count_, T(0));
    for (size_t i = 0; i < index_.size(); ++i) parameters[index_[i]] = like_master[i];
}

template <class T>
void Program<T>::set_statistics(size_t stage, const double* mean, const double* var) {
    const PlainFloats floats;
    StageSpec& spec = spec_.stages[stage];
    spec.mean.assign(mean, mean + spec_.features);
    spec.var.assign(var, var + spec_.features);
    refresh_scales();
}

// Scales that all rows share, and the sum of their logarithms.
template <class T>
void Program<T>::refresh_scales() {
    const size_t features = size_t(spec_.features);
    constant_ = discrete() ? 0 : -double(features) * kHalfLog2Pi;
    for (double scale : spec_.columns.scale) constant_ += std::log(std::fabs(scale));
    for (size_t k = 0; k < stages(); ++k) {
        const StageSpec& stage = spec_.stages[k];
        const T* of_norm = master_.data() + bias_offset_[k][0];
        for (double scale : stage.scale) constant_ += std::log(std::fabs(scale));
        if (stage.trainable)
            for (size_t v = 0; v < features; ++v) {
                const double log_gamma = double(of_norm[v]), variance = stage.var[v] + stage.eps;
                loc_[k][v] = T(stage.mean[v]);
                scale_[k][v] = T(std::exp(log_gamma) / std::sqrt(variance));
                constant_ += log_gamma - 0.5 * std::log(variance);
            }
        if (stage.output == Output::linear)
            for (size_t r = 0; r < features; ++r)
                constant_ += std::log(std::fabs(double(master_[size_t(weight_offset_[k][0] + sorted_[k].maps[0].offset[r + 1] - 1)])));
    }
}

template <class T>
void Program<T>::copy_bias(size_t stage, size_t map, int row, int rows) {
    if (bias_count(stage, map)) std::copy_n(master_.data() + bias_offset_[stage][map] + row, rows, bias_[stage][map].data() + row);
}

// The triangles of a Linear, inverted in double.
template <class T>
void Program<T>::invert(size_t stage, Packed<T>& packed) const {
    const Sorted& sorted = sorted_[stage];
    const size_t n = size_t(spec_.features);
    packed.inverse[stage].assign(size_t(sorted.maps[0].offset.back() + sorted.maps[1].offset.back()), T(0));
    auto& biases = packed.inverse_bias[stage];
    biases.assign(2, AlignedVector<T>(size_t(padded_rows(int(n))), T(0)));
    std::vector<double> inverse(n * n);
    for (size_t m = 0; m < 2; ++m) {
        const Staircase& stairs = sorted.maps[m];
        const T* weights = master_.data() + weight_offset_[stage][m];
        std::fill(inverse.begin(), inverse.end(), 0.0);
        for (size_t i = 0; i < n; ++i) {
            const T* row = weights + stairs.offset[i];
            const double pivot = m == 0 ? double(row[i]) : 1.0;
            for (size_t j = 0; j < i; ++j)
                for (size_t c = 0; c <= j; ++c) inverse[i * n + c] -= double(row[j]) * inverse[j * n + c];
            for (size_t c = 0; c < i; ++c) inverse[i * n + c] /= pivot;
            inverse[i * n + i] = 1 / pivot;
        }
        T* out = packed.inverse[stage].data() + (m ? sorted.maps[0].offset.back() : 0);
        for (size_t i = 0; i < n; ++i)
            for (int c = 0; c < stairs.limit[i]; ++c) out[stairs.offset[i] + c] = T(inverse[i * n + size_t(c)]);
    }
    for (size_t i = 0; i < n; ++i) {
        double sum = 0;
        for (size_t c = 0; c <= i; ++c) sum -= inverse[i * n + c] * double(master_[size_t(bias_offset_[stage][1]) + c]);
        biases[1][i] = T(sum);
    }
    packed.inverse_bias_pointers[stage] = {biases[0].data(), biases[1].data()};
}

template <class T>
void Program<T>::pack_step(const Step& step, size_t stage, Direction direction, Packed<T>& packed) const {
    if (step.kind != Kind::panel) return;
    const Sorted& sorted = sorted_[stage];
    const Staircase& stairs = sorted.maps[size_t(step.map)];
    const bool inverse = direction == Direction::sampler && spec_.stages[stage].output == Output::linear;
    const T* weights = inverse ? packed.inverse[stage].data() + (step.map ? sorted.maps[0].offset.back() : 0)
                               : master_.data() + weight_offset_[stage][size_t(step.map)];
    T* const out = packed.tape.data.data() + step.tape;
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
        std::memcpy(out, in, kPanel * sizeof(T));
        return;
    }
    for (int i = 0; i < step.width; ++i) out[i] = i < count ? in[i] : T(0);
}

template <class T>
std::unique_ptr<Packed<T>> Program<T>::lay_out(Direction direction) const {
    const PlainFloats floats;
    auto packed = std::make_unique<Packed<T>>();
    Tape<T>& tape = packed->tape;
    auto& panels = packed->panels;
    packed->inverse.resize(stages());
    packed->inverse_bias.resize(stages());
    packed->inverse_bias_pointers.resize(stages());
    int64_t size = 0;
    for (size_t k = 0; k < stages(); ++k) {
        const StageSpec& stage = spec_.stages[k];
        std::vector<Step> steps;
        Writer writer{steps, size, wires_[k]};
        if (direction == Direction::density) write_density(writer, stage, sorted_[k], widths_[k]);
        if (direction == Direction::sampler) write_sampler(writer, stage, sorted_[k], spec_.context);
        if (direction == Direction::backward) write_backward(writer, stage, sorted_[k], widths_[k], spec_.context);
        if (direction == Direction::sampler && stage.output == Output::linear) invert(k, *packed);
        panels.emplace_back(sorted_[k].maps.size());
        for (size_t s = 0; s < steps.size(); ++s)
            if (steps[s].kind == Kind::panel) panels.back()[size_t(steps[s].map)].push_back(int(s));
        tape.steps.push_back(std::move(steps));
    }
    tape.data.resize(size_t(size) + kPanel);  // the path of a single row reads all panels as if they had eight rows
    for (size_t k = 0; k < stages(); ++k)
        for (const Step& step : tape.steps[k]) pack_step(step, k, direction, *packed);

    for (size_t k = 0; k < stages(); ++k) {
        const StageSpec& stage = spec_.stages[k];
        const bool inverse = direction == Direction::sampler && stage.output == Output::linear;
        StageView<T> view{};
        view.output = stage.output;
        view.features = spec_.features;
        view.context = spec_.context;
        view.maps = int(widths_[k].size());
        view.rows = widths_[k].data();
        view.activated = activated_[k].data();
        view.adds = adds_[k].data();
        view.raw = raw_[k].data();
        view.activation = stage.activation;
        view.law = stage.law;
        view.form = stage.form;
        view.clip = T(stage.clip);
        view.input_clip = T(stage.input_clip);
        view.components = stage.components;
        view.first = sorted_[k].first.data();
        view.trainable = stage.trainable;
        view.next = next_[k].data();
        view.loc = scale_[k].empty() ? nullptr : loc_[k].data();
        view.scale = scale_[k].empty() ? nullptr : scale_[k].data();
        view.bias = inverse ? packed->inverse_bias_pointers[k].data() : bias_pointers_[k].data();
        view.steps = tape.steps[k].data();
        view.step_count = int(tape.steps[k].size());
        view.tape = tape.data.data();
        view.far = tape.data.size() * sizeof(T) > size_t(kCache);
        packed->views.push_back(view);
    }
    return packed;
}

template <class T>
const Packed<T>& Program<T>::packed(Direction direction) const {
    std::atomic<Packed<T>*>& packed = packed_[int(direction)];
    if (const Packed<T>* made = packed.load(std::memory_order_acquire)) return *made;
    std::lock_guard<std::mutex> lock(packing);
    if (!packed.load(std::memory_order_relaxed)) packed.store(lay_out(direction).release(), std::memory_order_release);
    return *packed.load(std::memory_order_relaxed);
}

template <class T>
void Program<T>::repack() {
    for (Direction direction : {Direction::density, Direction::backward})
        if (Packed<T>* const packed = packed_[int(direction)])
            for (size_t k = 0; k < stages(); ++k)
                for (const Step& step : packed->tape.steps[k]) pack_step(step, k, direction, *packed);
    for (size_t k = 0; k < stages(); ++k)
        for (size_t m = 0; m < sorted_[k].maps.size(); ++m) copy_bias(k, m, 0, sorted_[k].maps[m].rows());
    finish_step();
}

template <class T>
void Program<T>::repack_rows(size_t stage, size_t map, int row, int rows) {
    copy_bias(stage, map, row, rows);
    if (spec_.stages[stage].output == Output::norm) return;
    Packed<T>& density = *packed_[int(Direction::density)];
    const int panel = density.panels[stage][map][size_t(row / kPanel)];
    pack_step(density.tape.steps[stage][size_t(panel)], stage, Direction::density, density);

    Packed<T>& backward = *packed_[int(Direction::backward)];
    const Staircase& stairs = sorted_[stage].maps[map];
    const T* weights = master_.data() + weight_offset_[stage][map];
    for (int s : backward.panels[stage][map]) {
        const Step& step = backward.tape.steps[stage][size_t(s)];
        for (int j = std::max(row, step.begin); j < std::min(row + rows, step.end); ++j)
            pack_transposed(step, stairs, weights, j, backward.tape.data.data() + step.tape);
    }
}

template <class T>
void Program<T>::finish_step() {
    refresh_scales();
    delete packed_[int(Direction::sampler)].exchange(nullptr);
}

template class Program<float>;
template class Program<double>;

}  // namespace fastmaf
