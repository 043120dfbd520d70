// The sampler's tape of halves and what goes with it, from a packed flow; see draw.hpp for the layout. Host code.
#pragma once

#include "draw.hpp"
#include "tensor_image.hpp"

namespace fastmaf {

// A stage cut into pieces.
class Pieces {
public:
    Pieces(const Plan& plan, size_t k)
        : sorted_(plan.sorted()[k]), context_(plan.context()), hidden_(int(sorted_.known.size())), columns_(size_t(hidden_) + 1, 0) {
        for (int m = 0; m < hidden_; ++m) unit_of.emplace_back();
        const int groups = int(sorted_.groups.size()) - 1;
        for (int m = 0; m < hidden_; ++m) add_lone_units(m, 0, units(m, 0), 0);  // those that read the context alone
        for (int g = 0; g < groups;) {
            int end = g;
            while (end < groups && fits(g, end + 1)) ++end;
            if (end > g) {
                add_block(g, end);
                g = end;
                continue;
            }
            for (int s = sorted_.groups[size_t(g)]; s < sorted_.groups[size_t(g + 1)]; s += kDrawVariables) {
                const int count = std::min(kDrawVariables, sorted_.groups[size_t(g + 1)] - s);
                begin(s);
                add_rows(s, count, g);
                add_operation(-1, 0, count, 0, 0);
                end_piece();
            }
            for (int m = 0; m < hidden_; ++m) add_lone_units(m, units(m, g), units(m, g + 1), g + 1);
            ++g;
        }
    }

    std::vector<DrawPiece> all;
    std::vector<DrawOperation> operations;
    std::vector<std::vector<int>> unit_of;  // per hidden map and column, the unit in the order of the degrees, or -1
    std::vector<int> row_of;                // of each final column, the final row, or -1
    std::vector<std::vector<int>> alive;    // per piece and map, the inputs that were alive before
    std::vector<std::vector<int>> counts;   // per piece and map, its units or final rows
    int hidden() const { return hidden_; }
    int columns(int map) const { return columns_[size_t(map)]; }
    // Columns of the inputs of a map.
    int inputs(int map) const { return map == 0 ? context_ + int(sorted_.variables.size()) : columns_[size_t(map - 1)]; }
    // The unit or final row in a column of a map, that with a number in a piece, and the input in a column of a map's inputs. -1: none.
    int unit(int map, int column) const { return (map < hidden_ ? unit_of[size_t(map)] : row_of)[size_t(column)]; }
    int unit(size_t piece, int map, int number) const {
        return number < counts[piece][size_t(map)] ? unit(map, all[piece].column[map] + number) : -1;
    }
    int input(int map, int column) const {
        if (column >= inputs(map)) return -1;
        return map == 0 ? column : unit_of[size_t(map - 1)][size_t(column)];
    }

private:
    // As in write_sampler(): units that are alive once groups below g are known, and the inputs of a map then.
    int units(int m, int g) const { return sorted_.known[size_t(m)][std::min(size_t(g), sorted_.groups.size() - 2)]; }
    int alive_inputs(int m, int g) const { return m == 0 ? context_ + sorted_.groups[size_t(g)] : units(m - 1, g); }

    bool fits(int g, int end) const {
        bool result = sorted_.groups[size_t(end)] - sorted_.groups[size_t(g)] <= kDrawVariables;
        for (int m = 0; m < hidden_; ++m) result = result && units(m, end) - units(m, g) <= kDrawTiles * kTileUnits;
        return result;
    }
    void begin(int variable) {
        DrawPiece piece{};
        piece.variable = variable;
        for (int m = 0; m <= hidden_; ++m) piece.column[m] = columns_[size_t(m)];
        piece.first_operation = int(operations.size());
        all.push_back(piece);
        alive.emplace_back(size_t(hidden_) + 1, 0);
        counts.push_back(alive.back());
    }
    void end_piece() { all.back().end_operation = int(operations.size()); }
    void add_operation(int map, int first, int end, int first_pair, int end_pair) {
        operations.push_back({map, first, end, first_pair, std::max(first_pair, end_pair)});
    }

    // Sums over the inputs [0, inputs) for `count` columns.
    void add(int map, int count, int inputs) {
        DrawPiece& piece = all.back();
        piece.tiles[map] = (count + 2 * kTileUnits - 1) / (2 * kTileUnits) * 2;
        counts.back()[size_t(map)] = count;
        alive.back()[size_t(map)] = inputs;
        int last = inputs;
        if (map > 0) {
            const std::vector<int>& units = unit_of[size_t(map - 1)];
            last = inputs ? int(std::find(units.begin(), units.end(), inputs - 1) - units.begin()) + 1 : 0;
        }
        piece.steps[map] = (last + 15) / 16;
        columns_[size_t(map)] += (count + 1) / 2 * 2;
    }
    void add_units(int map, int first, int last, int inputs) {
        if (first == last) return;
        add(map, last - first, inputs);
        std::vector<int>& units = unit_of[size_t(map)];
        for (int u = first; u < last; ++u) units.push_back(u);
        units.resize(size_t(columns_[size_t(map)]), -1);
    }
    void add_rows(int variable, int count, int g) {
        add(hidden_, 2 * count, alive_inputs(hidden_, g));
        for (int r = 2 * variable; r < 2 * (variable + count); ++r) row_of.push_back(r);
        row_of.resize(size_t(columns_[size_t(hidden_)]), -1);
    }

    // Units all of whose inputs are alive once groups below g are known.
    void add_lone_units(int map, int first, int last, int g) {
        for (int u = first; u < last; u += kDrawTiles * kTileUnits) {
            const int end = std::min(last, u + kDrawTiles * kTileUnits);
            begin(0);
            add_units(map, u, end, alive_inputs(map, g));
            add_operation(map, 0, end - u, 0, 0);
            end_piece();
        }
    }
    void add_block(int first, int end) {
        const int variable = sorted_.groups[size_t(first)], variables = sorted_.groups[size_t(end)] - variable;
        begin(variable);
        for (int m = 0; m < hidden_; ++m) add_units(m, units(m, first), units(m, end), alive_inputs(m, first));
        add_rows(variable, variables, first);
        auto pairs = [&](int m) { return m < hidden_ ? (units(m, end) - units(m, first) + 15) / 16 : (2 * variables + 15) / 16; };
        for (int g = first; g < end; ++g) {
            auto local = [&](int m, int group) { return units(m, group) - units(m, first); };
            const int next = sorted_.groups[size_t(g + 1)] - variable;
            add_operation(-1, sorted_.groups[size_t(g)] - variable, next, local(0, g) / 16, pairs(0));
            for (int m = 0; m < hidden_; ++m)
                if (local(m, g + 1) > local(m, g))
                    add_operation(m, local(m, g), local(m, g + 1), m + 1 < hidden_ ? local(m + 1, g) / 16 : 2 * next / 16, pairs(m + 1));
        }
        end_piece();
    }

    const Sorted& sorted_;
    const int context_, hidden_;
    std::vector<int> columns_;  // of each map so far
};

// The stages for tensor cores: those that have as many hidden maps as the first of them.
struct DrawnStages {
    std::vector<char> fits;
    int hidden = 0;
    std::vector<int> stride;  // of the inputs of each map, in any stage

    explicit DrawnStages(const Weights<float>& weights) : fits(fitting_stages(weights)) {
        const Plan& plan = weights.plan();
        for (size_t k = 0; k < fits.size(); ++k) {
            const int own = fits[k] ? int(plan.widths(k).size()) - 1 : 0;
            fits[k] = own > 0 && own <= kDrawHidden && (hidden == 0 || own == hidden);
            if (!fits[k]) continue;
            hidden = own;
            stride.resize(size_t(own) + 1, 0);
            const Pieces pieces(plan, k);
            for (int m = 0; m <= own; ++m) stride[size_t(m)] = std::max(stride[size_t(m)], stride_of_inputs(pieces, m));
        }
    }
    // Halves from one row to the next. Sums read whole steps of 32 inputs: behind the last one weights are zero, and no other warp writes there.
    static int stride_of_inputs(const Pieces& pieces, int map) { return (pieces.inputs(map) + 31) / 32 * 32 + 8; }

    // Where a view has what in shared memory, for groups of 16 rows.
    DrawView view(int parts, int groups) const {
        DrawView view;
        if (hidden == 0) return view;
        view.hidden = hidden;
        view.parts = parts;
        view.groups = groups;
        view.rows = 16 * groups;
        auto room = [&](int64_t bytes) {
            const int64_t begin = view.shared;
            view.shared += (bytes + 127) / 128 * 128;
            return begin;
        };
        for (int m = 0; m <= hidden; ++m)
            view.inputs[m] = room(int64_t(input_parts(m, parts)) * view.rows * stride[size_t(m)] * int64_t(sizeof(uint16_t)));
        view.lost = room(view.rows * int64_t(sizeof(int)));
        view.ring = room(int64_t(kDrawChunks) * kDrawChunk * kTileBytes);
        return view;
    }
};

// The most rows that fit; none where halves are not wanted or nothing fits. That more rows are better is not measured. Warps without rows have
// no part in the products, and all warps of a block share the weights.
inline Choice<DrawView> fit_draws(const Weights<float>& weights, device::Precision precision, int warps, int64_t shared) {
    if (precision == device::Precision::highest) return {};
    const DrawnStages stages(weights);
    const int parts = precision == device::Precision::high ? 2 : 1;
    for (int groups = warps; groups > 0; --groups) {
        const DrawView view = stages.view(parts, groups);
        if (view.groups == 0) return {};
        if (view.shared > shared) continue;
        const double products = products_of(weights.plan(), stages.fits);
        const double busy = products * (parts == 2 ? 3 : 1) * warps / groups / kHalfProducts;
        return {view, std::max(busy, products * parts * int(sizeof(uint16_t)) / view.rows / kBytesOfL2)};
    }
    return {};
}

// Adds where the tiles of one stage come from, in the order of their use.
class DrawSources {
public:
    DrawSources(const Plan& plan, size_t k, const Pieces& pieces, TileSources& sources)
        : plan_(plan), stage_(k), pieces_(pieces), sources_(sources) {
        for (size_t i = 0; i < pieces.all.size(); ++i) {
            const DrawPiece& piece = pieces.all[i];
            add_sums(i);
            for (int o = piece.first_operation; o < piece.end_operation; ++o) add_operation(i, pieces.operations[size_t(o)]);
        }
    }

private:
    // The weight with which a unit of a map reads an input; -1: there is none.
    uint32_t source(int map, int unit, int input) const {
        const Staircase& stairs = plan_.sorted()[stage_].maps[size_t(map)];
        if (unit < 0 || input < 0 || input >= stairs.limit[size_t(unit)]) return kNoSource;
        return uint32_t(plan_.weight_offset(stage_, size_t(map)) + stairs.offset[size_t(unit)] + input);
    }
    // Over what was alive before a piece: all its units, 32 inputs at a time.
    void add_sums(size_t i) {
        const DrawPiece& piece = pieces_.all[i];
        for (int m = 0; m <= pieces_.hidden(); ++m)
            for (int step = 0; step < piece.steps[m]; step += 2)
                for (int t = 0; t < piece.tiles[m]; ++t)
                    sources_.add_tile([&](int half, int n, int k) {
                        const int input = pieces_.input(m, 16 * (step + half) + k);
                        return source(m, pieces_.unit(i, m, kTileUnits * t + n), input < pieces_.alive[i][size_t(m)] ? input : -1);
                    });
    }
    // Over what an operation brought to life, or over variables: 16 inputs of two tiles of units at a time.
    void add_operation(size_t i, const DrawOperation& operation) {
        const int from = operation.map, to = from + 1, end = from < 0 ? 1 : (operation.end + 15) / 16;
        auto input = [&](int step, int k) {
            if (from >= 0) return pieces_.unit(i, from, 16 * step + k);
            return variable_of(k) < operation.end ? plan_.context() + pieces_.all[i].variable + variable_of(k) : -1;
        };
        for (int step = from < 0 ? 0 : operation.first / 16; step < end; ++step)
            for (int pair = operation.first_pair; pair < operation.end_pair; ++pair)
                sources_.add_tile([&](int half, int n, int k) {
                    return source(to, pieces_.unit(i, to, kTileUnits * (2 * pair + half) + n), input(step, k));
                });
    }

    const Plan& plan_;
    const size_t stage_;
    const Pieces& pieces_;
    TileSources& sources_;
};

inline DrawView lay_out_draws(Image& image, const Weights<float>& weights, int parts, int groups) {
    const Plan& plan = weights.plan();
    const DrawnStages drawn(weights);
    const Halves halves(weights, drawn.fits, parts);
    DrawView view = drawn.view(parts, groups);
    std::vector<DrawStage> stages(plan.stages());
    TileSources sources;
    for (size_t k = stages.size(); k-- > 0;) {  // in the order of their use
        if (!drawn.fits[k]) continue;
        const Pieces pieces(plan, k);
        const int64_t before = sources.tiles();
        DrawSources(plan, k, pieces, sources);
        std::vector<DrawMap> maps;
        for (int m = 0; m <= view.hidden; ++m) {
            const float* const bias = weights.master().data() + plan.bias_offset(k, size_t(m));
            std::vector<float> affine;
            for (int column = 0; column < pieces.columns(m); ++column) {
                const int unit = pieces.unit(m, column);
                affine.push_back(unit < 0 ? 0.0f : halves.scale(k, size_t(m), unit));
                affine.push_back(unit < 0 ? 0.0f : bias[unit]);
            }
            affine.resize(affine.size() + 4 * kTileUnits, 0.0f);  // operations read whole pairs of tiles
            maps.push_back({DrawnStages::stride_of_inputs(pieces, m), image.put(affine)});
        }
        stages[k] = {view.hidden + 1, int(pieces.all.size()), int(sources.tiles() - before),
                     image.put(maps), image.put(pieces.all),  image.put(pieces.operations)};
    }
    std::vector<uint16_t> tape = sources.tape(halves, parts);
    constexpr size_t chunk = kDrawChunk * kTileBytes / sizeof(uint16_t);
    tape.resize(std::max<size_t>(1, (tape.size() + chunk - 1) / chunk) * chunk);
    view.stages = image.put(stages);
    view.tape = reinterpret_cast<const char*>(image.put(tape));
    view.end = view.tape + tape.size() * sizeof(uint16_t);
    return view;
}

}  // namespace fastmaf
