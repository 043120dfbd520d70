#include "layout.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "plan.hpp"

namespace fastmaf {

namespace {

constexpr int kBlockUnits = 48;   // a sampler block gathers groups until it has this many units ...
constexpr int kBlockGroups = 16;  // ... or this many groups;
constexpr int kLoneUnits = 16;    // a group of this many fills panels by itself and stays alone
constexpr int kLawRows = 192;     // final rows of a base between two law steps, so that they are still in the cache

int panel_width(int rows) { return rows > 4 ? 8 : rows > 2 ? 4 : 2; }

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
    // The units of contexts, which come before all that they join.
    void contexts(const StageSpec& stage, const Sorted& sorted, const std::vector<int>& widths) {
        for (size_t map = stage.maps.size() + stage.direct(); map < sorted.maps.size(); ++map)
            stairs(int(map), sorted.maps[map], 0, widths[size_t(wires[map].second)], Start::bias, Finish::raw);
    }
    void law(int first, int last) {
        steps.push_back({Kind::law, Start::bias, Finish::raw, 0, 0, first, last - first, 0, 0, tape, kTile, kTile});
    }
};

void write_density(Writer writer, const StageSpec& stage, const Sorted& sorted, const std::vector<int>& widths) {
    const int features = int(sorted.variables.size()), final = int(stage.maps.size()) - 1;
    if (stage.output == Output::norm) return writer.law(0, features);
    if (stage.output == Output::linear) {
        for (int map : {0, 1}) {
            writer.stairs(map, sorted.maps[size_t(map)], 0, features, Start::bias, Finish::raw);
            writer.law(map, map + 1);
        }
        return;
    }
    writer.contexts(stage, sorted, widths);
    for (int map = 0; map < final; ++map) writer.stairs(map, sorted.maps[size_t(map)], 0, widths[size_t(map)], Start::bias, Finish::unit);
    const int rows = widths[size_t(final)], chunk = stage.output == Output::base ? kLawRows : rows;
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

// The sampler of a network. Blocks of groups [g0, g1): before a block, all units that group g0 may read are alive. The bulk of the block is
// the product of its rows with what is alive by then; inside it, each group adds what the block itself has brought to life.
class NetworkSampler {
public:
    NetworkSampler(Writer& writer, const StageSpec& stage, const Sorted& sorted, int context)
        : writer_(writer),
          stage_(stage),
          sorted_(sorted),
          context_(context),
          final_(int(stage.maps.size()) - 1),
          groups_(int(sorted.groups.size()) - 1) {}

    void write() {
        const Alive nothing(size_t(final_) + 2, 0), context = alive(0);
        for (int map = 0; map < final_; ++map)
            writer_.panels(map, 0, units(map, 0), 0, context[size_t(map)], Start::bias, Finish::unit);  // those that read the context alone
        for (int g0 = 0, g1; g0 < groups_; g0 = g1) {
            g1 = end_of_block(g0);
            const Alive before = alive(g0);
            outputs(g0, g1, nothing, before, Start::bias);
            if (g1 == g0 + 1) {
                law(g0);
                grow(g0, g1, nothing, alive(g1), Start::bias, Finish::unit);
                continue;
            }
            grow(g0, g1, nothing, before, Start::bias, Finish::raw);
            for (int g = g0; g < g1; ++g) {
                if (g > g0) outputs(g, g + 1, before, alive(g), Start::partial);
                law(g);
                grow(g, g + 1, before, alive(g + 1), Start::partial, Finish::unit);
            }
        }
    }

private:
    // How many inputs of each map are alive: of the hidden maps, the final one, and the direct weights behind it.
    using Alive = std::vector<int>;

    // Units of a hidden map, and inputs of all maps, that are alive once the groups below g are known.
    int units(int map, int g) const { return sorted_.known[size_t(map)][size_t(std::min(g, groups_ - 1))]; }
    Alive alive(int g) const {
        const int variables = sorted_.groups[size_t(g)];
        Alive inputs(1, (stage_.maps[0].context ? context_ : 0) + variables);
        for (int map = 0; map < final_; ++map) inputs.push_back(units(map, g));
        inputs.push_back((stage_.late_context() ? context_ : 0) + (stage_.skip ? variables : 0));
        return inputs;
    }

    int end_of_block(int g0) const {
        int g1 = g0;
        for (int brought = 0; g1 < groups_ && g1 - g0 < kBlockGroups && brought < kBlockUnits; ++g1) {
            int most = 0;
            for (int map = 0; map < final_; ++map) most = std::max(most, units(map, g1 + 1) - units(map, g1));
            if (g1 > g0 && most >= kLoneUnits) break;
            brought += most >= kLoneUnits ? kBlockUnits : std::max(1, most);
        }
        return g1;
    }

    // Hidden units that groups [first, last) bring to life, over the inputs that came from `from` to `to`.
    void grow(int first, int last, const Alive& from, const Alive& to, Start start, Finish finish) {
        for (int map = 0; map < final_; ++map)
            writer_.panels(map, units(map, first), units(map, last), from[size_t(map)], to[size_t(map)], start, finish);
    }
    // Final rows of groups [first, last), likewise. No panel that would add nothing.
    void outputs(int first, int last, const Alive& from, const Alive& to, Start start) {
        const int begin = sorted_.first[size_t(sorted_.groups[size_t(first)])], end = sorted_.first[size_t(sorted_.groups[size_t(last)])];
        const size_t map = size_t(final_), direct = map + 1;
        if (start == Start::bias || to[map] > from[map]) writer_.panels(final_, begin, end, from[map], to[map], start, Finish::raw);
        if (to[direct] > from[direct]) writer_.panels(final_ + 1, begin, end, from[direct], to[direct], Start::partial, Finish::raw);
    }
    void law(int g) { writer_.law(sorted_.groups[size_t(g)], sorted_.groups[size_t(g + 1)]); }

    Writer& writer_;
    const StageSpec& stage_;
    const Sorted& sorted_;
    const int context_, final_, groups_;
};

void write_sampler(Writer writer, const StageSpec& stage, const Sorted& sorted, const std::vector<int>& widths, int context) {
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
    writer.contexts(stage, sorted, widths);
    NetworkSampler(writer, stage, sorted, context).write();
}

// Steps read what a map writes and write what it reads.
class Backward {
public:
    Backward(Writer writer, const StageSpec& stage, const Sorted& sorted, const std::vector<int>& widths, int context)
        : writer_(std::move(writer)), stage_(stage), sorted_(sorted), widths_(widths), context_(context) {
        for (auto& wire : writer_.wires) std::swap(wire.first, wire.second);
    }

    void write() {
        if (stage_.output == Output::norm) return;
        for (int map = own_maps(); map-- > 0;) {
            if (stage_.output == Output::linear && map == 0) writer_.law(0, 1);
            if (reads(map) >= 0) {
                strip(map, 0, widths_[size_t(reads(map))]);
            } else {
                strip_context(map);
                strip_variables(map, 0, int(sorted_.variables.size()));
            }
        }
        contexts();
    }

    // Of the sampler of a Linear, which z leaves: the inverse of U, then that of L, which adds to what there is of its diagonal.
    void write_inverse() {
        const int features = int(sorted_.variables.size());
        writer_.wires = {{kVariables, 0}, {1, kVariables}};
        for (int map : {0, 1}) {
            strips(map, 0, features, features, map == 0 ? Start::zero : Start::partial);
            writer_.law(map, map + 1);
        }
    }

    // Of a network, rank by rank from the last: the units of a rank are complete once all that is read of higher ranks is, then what they
    // give its variables is, on which the law waits.
    void write_by_rank() {
        for (int g = int(sorted_.groups.size()) - 1; g-- > 0;) {
            const int first = sorted_.groups[size_t(g)], last = sorted_.groups[size_t(g + 1)];
            for (int map = own_maps(); map-- > 0;)
                if (const int to = reads(map); to >= 0)
                    strip(map, known(to, g), known(to, g + 1));
                else
                    strip_variables(map, first, last);
            writer_.law(first, last);
        }
        for (int map = own_maps(); map-- > 0;)  // what depends on the context alone
            if (const int to = reads(map); to >= 0)
                strip(map, 0, known(to, 0));
            else
                strip_context(map);
        contexts();
    }

private:
    int reads(int map) const { return writer_.wires[size_t(map)].second; }
    // Units of contexts come behind all others: what they join has passed its gradient on to them by then.
    int own_maps() const { return is_network(stage_.output) ? int(stage_.maps.size()) + stage_.direct() : int(sorted_.maps.size()); }
    void contexts() {
        for (int map = int(sorted_.maps.size()); map-- > own_maps();) strip_context(map);
    }
    // Units of a hidden map below group g.
    int known(int map, int g) const {
        const std::vector<int>& units = sorted_.known[size_t(map)];
        return g < int(units.size()) ? units[size_t(g)] : widths_[size_t(map)];
    }

    // Apart from the variables, so that training can leave it out.
    void strip_context(int map) {
        if (reads(map) == kTile) strip(map, 0, context_);
    }
    void strip_variables(int map, int first, int last) {
        const int shift = reads(map) == kTile ? context_ : 0;
        strip(map, shift + first, std::min(shift + last, sorted_.maps[size_t(map)].inputs));
    }
    void strip(int map, int first, int last) {
        // The variables of a network have a gradient from the law already; so have the units of a Linear, from its diagonal.
        const Start start = (reads(map) >= 0) == is_network(stage_.output) ? Start::zero : Start::partial;
        strips(map, first, last, widths_[size_t(writer_.wires[size_t(map)].first)], start);
    }
    void strips(int map, int first, int last, int end, Start start) {
        const Staircase& stairs = sorted_.maps[size_t(map)];
        for (int row = first; row < last; row += kPanel)
            writer_.panel(map, row, std::min(kPanel, last - row), std::min(stairs.first_reader(row), end), end, start, Finish::raw);
    }

    Writer writer_;
    const StageSpec& stage_;
    const Sorted& sorted_;
    const std::vector<int>& widths_;
    const int context_;
};

}  // namespace

Layout::Layout(const Plan& plan, Direction direction)
    : transposed_(direction == Direction::backward || direction == Direction::sampler_backward), master_size_(plan.index().size()) {
    for (size_t k = 0; k < plan.stages(); ++k) {
        const StageSpec& stage = plan.spec().stages[k];
        const Sorted& sorted = plan.sorted()[k];
        std::vector<Step> steps;
        const Writer writer{steps, size_, plan.wires(k)};
        if (transposed_) {
            const bool of_sampler = direction == Direction::sampler_backward;
            Backward backward(writer, stage, sorted, plan.widths(k), plan.context());
            if (of_sampler && stage.output == Output::linear)
                backward.write_inverse();
            else if (stage.output == Output::transform && of_sampler != stage.reads_noise)
                backward.write_by_rank();
            else
                backward.write();
        } else if ((direction == Direction::density) != stage.reads_noise) {
            write_density(writer, stage, sorted, plan.widths(k));
        } else {
            write_sampler(writer, stage, sorted, plan.widths(k), plan.context());
        }
        std::vector<Block> blocks;
        for (size_t m = 0; m < sorted.maps.size(); ++m) blocks.push_back({&sorted.maps[m], plan.weight_offset(k, m), {}});
        for (size_t s = 0; s < steps.size(); ++s)
            if (steps[s].kind == Kind::panel) blocks[size_t(steps[s].map)].panels.push_back(int(s));
        steps_.push_back(std::move(steps));
        blocks_.push_back(std::move(blocks));
    }
    size_ += kPanel;  // the path of a single row reads all panels as if they had eight rows
}

namespace {

// Some rows of a map into the vectors of a transposed panel: each row is the vector of the weights with which it reads the panel's inputs.
template <class V>
void gather_vectors(const Step& step, const Staircase& stairs, int first, int last, const V* weights, V* panel) {
    V* out = panel + int64_t(first - step.begin) * step.width;
    for (int j = first; j < last; ++j, out += step.width) {
        const V* const in = weights + stairs.offset[size_t(j)] + step.row;
        const int count = std::min(stairs.limit[size_t(j)] - step.row, step.rows);
        if (count == kPanel)
            std::memcpy(out, in, kPanel * sizeof(V));
        else
            for (int i = 0; i < count; ++i) out[i] = in[i];
    }
}

// Some rows of a map into the columns of a panel, one behind the other: inputs [begin, end) of a row lie `width` entries apart.
template <class V>
void gather_columns(const Step& step, const Staircase& stairs, int first, int last, int begin, const V* weights, V* panel) {
    for (int j = first; j < last; ++j) {
        const V* const in = weights + stairs.offset[size_t(j)];
        const int end = std::min(stairs.limit[size_t(j)], step.end);
        V* out = panel + int64_t(begin - step.begin) * step.width + (j - step.row);
        for (int i = begin; i < end; ++i, out += step.width) *out = in[i];
    }
}

// All rows of the widest panel side by side, as far as the first and shortest of them goes; returns the input where it ends.
template <class V>
int gather_panel(const Step& step, const Staircase& stairs, const V* weights, V* panel) {
    const V* in[kPanel];
    for (int i = 0; i < kPanel; ++i) in[i] = weights + stairs.offset[size_t(step.row + i)];
    const int end = std::min(stairs.limit[size_t(step.row)], step.end);
    for (int k = step.begin; k < end; ++k, panel += kPanel)
        for (int i = 0; i < kPanel; ++i) panel[i] = in[i][k];
    return std::max(step.begin, end);
}

}  // namespace

template <class V>
void Layout::gather(size_t stage, size_t map, int row, int rows, const V* master, V* tape) const {
    const Block& block = blocks_[stage][map];
    const Staircase& stairs = *block.stairs;
    const V* const weights = master + block.weights;
    for (int s : block.panels) {
        const Step& step = steps_[stage][size_t(s)];
        V* const panel = tape + step.tape;
        const int first = std::max(row, transposed_ ? step.begin : step.row);
        const int last = std::min(row + rows, transposed_ ? step.end : step.row + step.rows);
        if (transposed_) {
            gather_vectors(step, stairs, first, last, weights, panel);
        } else {
            const int done = last - first == kPanel ? gather_panel(step, stairs, weights, panel) : step.begin;
            gather_columns(step, stairs, first, last, done, weights, panel);
        }
    }
}

// The places of the master, gathered like its weights.
std::vector<uint32_t> Layout::sources() const {
    std::vector<uint32_t> result(size_t(size_), kNoSource), places(master_size_);
    std::iota(places.begin(), places.end(), 0u);
    gather(places.data(), result.data());
    return result;
}

template void Layout::gather(size_t, size_t, int, int, const float*, float*) const;
template void Layout::gather(size_t, size_t, int, int, const double*, double*) const;

}  // namespace fastmaf
