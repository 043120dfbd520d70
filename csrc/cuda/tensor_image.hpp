// The tape of halves and what goes with it, from a packed flow; see tensor.hpp for the layout. Host code.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../core/device.hpp"
#include "fragments.hpp"
#include "image.hpp"
#include "tensor.hpp"

namespace fastmaf {

// Whether a stage is a plain network with a law: each map reads the one before it, all hidden units are activated, all weights finite.
inline bool fits_tensor_cores(const Program<float>& program, size_t k) {
    const StageView<float>& stage = program.views(Direction::density)[k];
    const StageSpec& spec = program.spec().stages[k];
    if (stage.output != Output::transform || spec.direct()) return false;
    for (int m = 0; m + 1 < stage.maps; ++m)
        if (!stage.activated[m] || stage.adds[m] >= 0 || stage.raw[m]) return false;
    for (size_t m = 0; m < spec.maps.size(); ++m) {
        const float* const begin = program.master().data() + program.weight_offset(k, m);
        const float* const end = program.master().data() + program.bias_offset(k, m) + program.bias_count(k, m);
        if (!std::all_of(begin, end, [](float w) { return std::isfinite(w); })) return false;
    }
    return true;
}

inline std::vector<char> fitting_stages(const Program<float>& program) {
    std::vector<char> fits;
    for (size_t k = 0; k < program.stages(); ++k) fits.push_back(fits_tensor_cores(program, k));
    return fits;
}

// A map of such a stage, and its strips dealt out to teams: the largest first, to the team that has least.
class Strips {
public:
    Strips(const Program<float>& program, size_t k, size_t m, int teams) : stairs_(program.sorted()[k].maps[m]) {
        const std::vector<int>& widths = program.widths(k);
        units = widths[m];
        inputs = m == 0 ? program.context() + program.features() : widths[m - 1];
        const int tiles = (units + kTileUnits - 1) / kTileUnits, width = std::clamp((tiles + teams - 1) / teams, 1, kStripTiles);
        std::vector<Strip> all;
        for (int first = 0; first < tiles; first += width) {
            Strip strip{first * kTileUnits, std::min(width, tiles - first), {}};
            for (int t = 0; t < strip.tiles; ++t) strip.end[t] = (limit(strip.row + (t + 1) * kTileUnits - 1) + 15) / 16;
            all.push_back(strip);
        }
        std::stable_sort(all.begin(), all.end(), [](const Strip& a, const Strip& b) { return products(a) > products(b); });
        of.resize(size_t(teams));
        std::vector<int64_t> load(of.size(), 0);
        for (const Strip& strip : all) {
            const auto least = std::min_element(load.begin(), load.end());
            of[size_t(least - load.begin())].push_back(strip);
            *least += products(strip) + 1;
            total += products(strip);
        }
        most = *std::max_element(load.begin(), load.end());
    }

    int units, inputs;
    std::vector<std::vector<Strip>> of;  // the strips of each team
    int64_t total = 0, most = 0;         // products of 8 units and 16 inputs, of all teams and of the busiest one

    // Inputs [0, limit) that a unit reads; units behind the last read nothing.
    int limit(int unit) const { return stairs_.limit[size_t(std::min(unit, units - 1))]; }
    int reads(int unit) const { return unit < units ? limit(unit) : 0; }
    const Staircase& stairs() const { return stairs_; }

private:
    static int products(const Strip& strip) { return strip.end[0] + strip.end[1] + strip.end[2] + strip.end[3]; }
    const Staircase& stairs_;
};

inline int stride_of(int inputs) { return (inputs + 15) / 16 * 16 + 8; }

// Where a view of this shape has what in shared memory; and the parts of the inputs of each map.
inline TensorView room_of(const Program<float>& program, const std::vector<char>& fits, const TensorShape& shape,
                          std::vector<std::vector<int>>& parts) {
    TensorView view;
    view.shape = shape;
    int64_t units[2] = {}, maps = 0;
    parts.assign(program.stages(), {});
    for (size_t k = 0; k < program.stages(); ++k) {
        if (!fits[k]) continue;
        const size_t count = program.widths(k).size();
        maps = std::max(maps, int64_t(count));
        std::vector<int64_t> products;
        for (size_t m = 0; m < count; ++m) products.push_back(Strips(program, k, m, shape.teams).total);
        int64_t all = 0;
        for (int64_t own : products) all += own;
        for (size_t m = 0; m < count; ++m) {
            // Both parts of the variables cost little where the first map is a small part of the work.
            parts[k].push_back(shape.parts == 2 || (m == 0 && 6 * products[0] <= all) ? 2 : 1);
            const int inputs = m == 0 ? program.context() + program.features() : program.widths(k)[m - 1];
            units[m % 2] = std::max(units[m % 2], int64_t(parts[k][m]) * shape.rows * stride_of(inputs) * 2);
        }
    }
    int64_t size = 0;
    auto room = [&](int64_t bytes) {
        const int64_t begin = size;
        size += (bytes + 127) / 128 * 128;
        return begin;
    };
    for (int i : {0, 1}) view.units[i] = room(units[i]);
    view.lost = room(maps * shape.rows * int64_t(sizeof(int)));
    view.sums = room(shape.teams * shape.rows * int64_t(sizeof(double)));
    view.ring = room(int64_t(shape.groups) * shape.teams * slots_of(shape.parts) * shape.parts * kTileBytes);
    view.shared = size;
    return view;
}

// The choice between the kernels, once for a flow: the shape with which blocks of `warps` warps and `shared` bytes of shared memory do most
// rows in a time, as far as that can be told without a GPU; no rows where nothing fits. Larger row tiles read fewer weights, smaller ones
// leave fewer warps without a strip.
inline TensorShape fit_tensor_cores(const Program<float>& program, device::Precision precision, int warps, int64_t shared) {
    TensorShape best;
    if (precision == device::Precision::highest) return best;
    const int parts = precision == device::Precision::high ? 2 : 1;
    const std::vector<char> fits = fitting_stages(program);
    double least = HUGE_VAL;
    for (int rows : {128, 64, 32, 16})
        for (int row_tiles : {4, 2, 1}) {
            const int groups = rows / (16 * row_tiles);
            if (groups < 1 || groups > warps || warps % groups || (parts == 2 && row_tiles == 4)) continue;
            const TensorShape shape{rows, row_tiles, groups, warps / groups, parts};
            std::vector<std::vector<int>> of_maps;
            if (room_of(program, fits, shape, of_maps).shared > shared) continue;
            double time = 0;  // in products of 16 rows: loads of weights and inputs cost some as well, and a meeting of warps
            for (size_t k = 0; k < program.stages(); ++k)
                for (size_t m = 0; m < of_maps[k].size(); ++m) {
                    const int products = parts == 2 ? 3 : of_maps[k][m];
                    time += double(Strips(program, k, m, shape.teams).most) * (row_tiles * products + 2 * parts) + 16;
                }
            if (time > 0 && time / rows < least) {
                least = time / rows;
                best = shape;
            }
        }
    return best;
}

// Halves of the weights of one unit.
struct UnitHalves {
    std::vector<uint16_t> part[2];
    float scale;  // of its sum

    UnitHalves(const float* weights, int count, int parts) {
        float largest = 0;
        for (int i = 0; i < count; ++i) largest = std::max(largest, std::fabs(weights[i]));
        int exponent = 0;
        std::frexp(largest, &exponent);
        // The scale must be a normal float; weights that are as small as that are far from mattering.
        const int up = largest > 0 ? std::min(15 - exponent, 120) : 0;
        scale = std::ldexp(1 / kHalfScale, -up);
        for (int i = 0; i < count; ++i) {
            const double w = std::ldexp(double(weights[i]), up);
            part[0].push_back(fragments::half_of(w));
            if (parts == 2) part[1].push_back(fragments::half_of(w - double(fragments::number_of(part[0].back()))));
        }
    }
    uint16_t at(int p, int input) const { return size_t(input) < part[p].size() ? part[p][size_t(input)] : uint16_t(0); }
};

inline TensorView lay_out_tensor(Image& image, const Program<float>& program, const TensorShape& shape) {
    std::vector<std::vector<int>> parts;
    TensorView view = room_of(program, fitting_stages(program), shape, parts);
    std::vector<std::vector<uint16_t>> tape(size_t(shape.teams));
    std::vector<TensorStage> stages;
    for (size_t k = 0; k < program.stages(); ++k) {
        std::vector<TensorMap> maps;
        for (size_t m = 0; m < parts[k].size(); ++m) {
            const Strips strips(program, k, m, shape.teams);
            const float* const weights = program.master().data() + program.weight_offset(k, m);
            const float* const bias = program.master().data() + program.bias_offset(k, m);
            std::vector<UnitHalves> halves;
            std::vector<float> affine;
            for (int u = 0; u < (strips.units + kTileUnits - 1) / kTileUnits * kTileUnits; ++u) {
                halves.emplace_back(u < strips.units ? weights + strips.stairs().offset[size_t(u)] : weights, strips.reads(u), shape.parts);
                affine.push_back(halves.back().scale);
                affine.push_back(u < strips.units ? bias[u] : 0.0f);
            }
            std::vector<int> reader, first(1, 0);
            for (int i = 0, u = 0; i <= strips.inputs; ++i) {
                while (u < strips.units && strips.limit(u) <= i) ++u;
                reader.push_back(u);
            }
            std::vector<Strip> all;
            for (size_t team = 0; team < strips.of.size(); ++team) {
                for (const Strip& strip : strips.of[team]) {
                    all.push_back(strip);
                    for (int step = 0; step < *std::max_element(strip.end, strip.end + kStripTiles); step += kTileInputs / 16)
                        for (int t = 0; t < strip.tiles; ++t)
                            for (int p = 0; p < shape.parts && step < strip.end[t]; ++p)
                                for (unsigned lane = 0; lane < 32; ++lane)
                                    for (unsigned r = 0; r < 4; ++r)
                                        for (unsigned i = 0; i < 2; ++i) {
                                            const int unit = strip.row + t * kTileUnits + int(fragments::b_column(lane));
                                            const int input = 16 * (step + int(r / 2)) + int(fragments::b_row(lane, r % 2) + i);
                                            tape[team].push_back(halves[size_t(unit)].at(p, input));
                                        }
                }
                first.push_back(int(all.size()));
            }
            maps.push_back({strips.inputs, stride_of(strips.inputs), parts[k][m], image.put(all), image.put(first), image.put(affine),
                            image.put(reader)});
        }
        stages.push_back({int(maps.size()), image.put(maps)});
    }
    view.stages = image.put(stages);
    std::vector<uint16_t> all;
    for (const auto& own : tape) all.insert(all.end(), own.begin(), own.end());
    const char* begin = reinterpret_cast<const char*>(image.put(all));
    std::vector<const char*> begins(1, begin);
    for (const auto& own : tape) begins.push_back(begin += own.size() * sizeof(uint16_t));
    view.tape = image.put(begins);
    return view;
}

}  // namespace fastmaf
