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
inline bool fits_tensor_cores(const Weights<float>& weights, size_t k) {
    const Plan& plan = weights.plan();
    const StageSpec& spec = plan.spec().stages[k];
    if (spec.output != Output::transform || spec.reads_noise || spec.direct() || !spec.joined().empty() || plan.wires(k)[0].first != kTile)
        return false;
    for (const MapSpec& map : spec.maps)
        if (!map.norm_scale.empty()) return false;
    for (size_t m = 0; m + 1 < plan.widths(k).size(); ++m)
        if (!plan.activated(k)[m] || plan.adds(k)[m] >= 0 || plan.raw(k)[m]) return false;
    for (size_t m = 0; m < spec.maps.size(); ++m) {
        const float* const begin = weights.master().data() + plan.weight_offset(k, m);
        const float* const end = weights.master().data() + plan.bias_offset(k, m) + plan.bias_count(k, m);
        if (!std::all_of(begin, end, [](float w) { return std::isfinite(w); })) return false;
    }
    return true;
}

inline std::vector<char> fitting_stages(const Weights<float>& weights) {
    std::vector<char> fits;
    for (size_t k = 0; k < weights.plan().stages(); ++k) fits.push_back(fits_tensor_cores(weights, k));
    return fits;
}

// A map of such a stage, and its strips dealt out to teams: the largest first, to the team that has least.
class Strips {
public:
    Strips(const Plan& plan, size_t k, size_t m, int teams) : stairs_(plan.sorted()[k].maps[m]) {
        const std::vector<int>& widths = plan.widths(k);
        units = widths[m];
        inputs = m == 0 ? plan.context() + plan.features() : widths[m - 1];
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
inline TensorView room_of(const Plan& plan, const std::vector<char>& fits, const TensorShape& shape, std::vector<std::vector<int>>& parts) {
    TensorView view;
    view.shape = shape;
    int64_t units[2] = {}, maps = 0;
    parts.assign(plan.stages(), {});
    for (size_t k = 0; k < plan.stages(); ++k) {
        if (!fits[k]) continue;
        const size_t count = plan.widths(k).size();
        maps = std::max(maps, int64_t(count));
        std::vector<int64_t> products;
        for (size_t m = 0; m < count; ++m) products.push_back(Strips(plan, k, m, shape.teams).total);
        int64_t all = 0;
        for (int64_t own : products) all += own;
        for (size_t m = 0; m < count; ++m) {
            // Both parts of the variables cost little where the first map is a small part of the work.
            parts[k].push_back(shape.parts == 2 || (m == 0 && 6 * products[0] <= all) ? 2 : 1);
            const int inputs = m == 0 ? plan.context() + plan.features() : plan.widths(k)[m - 1];
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

// What a multiprocessor does in a cycle, by the data sheet of an H100 and 5.5 TB/s of its L2: no GPU was at hand.
constexpr double kFloatProducts = 128, kHalfProducts = 1024, kBytesOfL2 = 24;

// Of a row, in the stages that tensor cores can take.
inline double products_of(const Plan& plan, const std::vector<char>& fits) {
    double products = 0;
    for (size_t k = 0; k < plan.stages(); ++k)
        for (size_t m = 0; fits[k] && m < plan.widths(k).size(); ++m) products += double(plan.bias_offset(k, m) - plan.weight_offset(k, m));
    return products;
}

// Cycles that these take without tensor cores. The 128 rows of a tile share the weights, so that bringing them takes a sixth of that.
inline double cycles_in_float(const Plan& plan, const std::vector<char>& fits) { return products_of(plan, fits) / kFloatProducts; }

// A choice of what runs on tensor cores, and the cycles that it takes for a row, as far as that can be told without a GPU.
template <class Shape>
struct Choice {
    Shape shape{};
    double cycles = HUGE_VAL;
};

// The shape with which blocks of `warps` warps and `shared` bytes of shared memory do most rows in a time; no rows where nothing fits. Larger
// row tiles read fewer weights, smaller ones leave fewer warps without a strip.
inline Choice<TensorShape> fit_tensor_cores(const Weights<float>& weights, device::Precision precision, int warps, int64_t shared) {
    const Plan& plan = weights.plan();
    Choice<TensorShape> best;
    if (precision == device::Precision::highest) return best;
    const int parts = precision == device::Precision::high ? 2 : 1;
    const std::vector<char> fits = fitting_stages(weights);
    for (int rows : {128, 64, 32, 16})
        for (int row_tiles : {4, 2, 1}) {
            const int groups = rows / (16 * row_tiles);
            if (groups < 1 || groups > warps || warps % groups || (parts == 2 && row_tiles == 4)) continue;
            const TensorShape shape{rows, row_tiles, groups, warps / groups, parts};
            std::vector<std::vector<int>> of_maps;
            if (room_of(plan, fits, shape, of_maps).shared > shared) continue;
            // Of a warp, in products of 8 units, 16 inputs and 16 rows: loads of weights and inputs cost some as well, and a meeting of
            // warps. All groups of a block read all weights.
            double time = 0, bytes = 0;
            for (size_t k = 0; k < plan.stages(); ++k)
                for (size_t m = 0; m < of_maps[k].size(); ++m) {
                    const int products = parts == 2 ? 3 : of_maps[k][m];
                    const Strips strips(plan, k, m, shape.teams);
                    time += double(strips.most) * (row_tiles * products + 2 * parts) + 16;
                    bytes += double(strips.total) * kTileBytes / 2 * parts * groups;
                }
            const double cycles = std::max(time * warps * 8 * 16 * 16 / kHalfProducts, bytes / kBytesOfL2) / rows;
            if (time > 0 && cycles < best.cycles) best = {shape, cycles};
        }
    return best;
}

// The weights of some stages in halves, laid out like the master. Those of each unit are scaled by a power of two, which its sum is divided
// by.
class Halves {
public:
    Halves(const Weights<float>& weights, const std::vector<char>& stages, int parts) : plan_(weights.plan()) {
        for (int p = 0; p < parts; ++p) part[p].resize(weights.master().size());
        for (size_t k = 0; k < stages.size(); ++k) {
            scale_.emplace_back(stages[k] ? plan_.sorted()[k].maps.size() : 0);
            for (size_t m = 0; m < scale_[k].size(); ++m) {
                const Staircase& stairs = plan_.sorted()[k].maps[m];
                for (int u = 0; u < stairs.rows(); ++u) {
                    const int64_t begin = plan_.weight_offset(k, m) + stairs.offset[size_t(u)];
                    scale_[k][m].push_back(convert(weights.master().data(), begin, stairs.limit[size_t(u)], parts));
                }
            }
        }
    }
    std::vector<uint16_t> part[2];
    float scale(size_t stage, size_t map, int unit) const { return scale_[stage][map][size_t(unit)]; }  // of the sum of a unit

private:
    float convert(const float* master, int64_t begin, int count, int parts) {
        float largest = 0;
        for (int i = 0; i < count; ++i) largest = std::max(largest, std::fabs(master[begin + i]));
        int exponent = 0;
        std::frexp(largest, &exponent);
        // The scale must be a normal float; weights that are as small as that are far from mattering.
        const int up = largest > 0 ? std::min(15 - exponent, 120) : 0;
        for (int i = 0; i < count; ++i) {
            const size_t at = size_t(begin + i);
            const double w = std::ldexp(double(master[at]), up);
            part[0][at] = fragments::half_of(w);
            if (parts == 2) part[1][at] = fragments::half_of(w - double(fragments::number_of(part[0][at])));
        }
        return std::ldexp(1 / kHalfScale, -up);
    }

    const Plan& plan_;
    std::vector<std::vector<std::vector<float>>> scale_;  // [stage][map][unit]
};

// Where the halves of a tape come from: for each entry of each tile of 8 units and 32 inputs, in the order in which fragments are loaded, a
// master entry or kNoSource. On the tape the parts of a tile lie one behind the other.
class TileSources {
public:
    // Registers 2 h and 2 h + 1 of B hold unit n and input k where source(h, n, k) says.
    template <class F>
    void add_tile(F source) {
        for (unsigned lane = 0; lane < 32; ++lane)
            for (unsigned r = 0; r < 4; ++r)
                for (unsigned i = 0; i < 2; ++i)
                    sources_.push_back(source(int(r / 2), int(fragments::b_column(lane)), int(fragments::b_row(lane, r % 2) + i)));
    }
    int64_t tiles() const { return int64_t(sources_.size()) / kTile; }

    std::vector<uint16_t> tape(const Halves& halves, int parts) const {
        std::vector<uint16_t> result(sources_.size() * size_t(parts));
        uint16_t* out = result.data();
        for (int64_t t = 0; t < tiles(); ++t)
            for (int p = 0; p < parts; ++p, out += kTile)
                for (int64_t i = 0; i < kTile; ++i) {
                    const uint32_t source = sources_[size_t(t * kTile + i)];
                    out[i] = source == kNoSource ? uint16_t(0) : halves.part[p][source];
                }
        return result;
    }

private:
    static constexpr int64_t kTile = kTileBytes / int64_t(sizeof(uint16_t));
    std::vector<uint32_t> sources_;
};

inline TensorView lay_out_tensor(Image& image, const Weights<float>& weights, const TensorShape& shape) {
    const Plan& plan = weights.plan();
    const std::vector<char> fits = fitting_stages(weights);
    const Halves halves(weights, fits, shape.parts);
    std::vector<std::vector<int>> parts;
    TensorView view = room_of(plan, fits, shape, parts);
    std::vector<TileSources> sources(size_t(shape.teams));
    std::vector<TensorStage> stages;
    for (size_t k = 0; k < plan.stages(); ++k) {
        std::vector<TensorMap> maps;
        for (size_t m = 0; m < parts[k].size(); ++m) {
            const Strips strips(plan, k, m, shape.teams);
            const Staircase& stairs = strips.stairs();
            const float* const bias = weights.master().data() + plan.bias_offset(k, m);
            std::vector<float> affine;
            for (int u = 0; u < (strips.units + kTileUnits - 1) / kTileUnits * kTileUnits; ++u) {
                affine.push_back(u < strips.units ? halves.scale(k, m, u) : 1 / kHalfScale);
                affine.push_back(u < strips.units ? bias[u] : 0.0f);
            }
            // Of each input, the first unit that reads it.
            std::vector<int> reader, first(1, 0);
            for (int i = 0, u = 0; i <= strips.inputs; ++i) {
                while (u < strips.units && strips.limit(u) <= i) ++u;
                reader.push_back(u);
            }
            std::vector<Strip> all;
            for (size_t team = 0; team < strips.of.size(); ++team) {
                // Each team walks its strips, 32 inputs at a time, and in them the tiles that read these.
                for (const Strip& strip : strips.of[team]) {
                    all.push_back(strip);
                    for (int step = 0; step < *std::max_element(strip.end, strip.end + kStripTiles); step += kTileInputs / 16)
                        for (int t = 0; t < strip.tiles; ++t)
                            if (step < strip.end[t])
                                sources[team].add_tile([&](int half, int n, int row) {
                                    const int unit = strip.row + t * kTileUnits + n, input = 16 * (step + half) + row;
                                    if (input >= strips.reads(unit)) return kNoSource;
                                    return uint32_t(plan.weight_offset(k, m) + stairs.offset[size_t(unit)] + input);
                                });
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
    std::vector<size_t> begins;
    for (const TileSources& own : sources) {
        begins.push_back(all.size());
        const std::vector<uint16_t> tape = own.tape(halves, shape.parts);
        all.insert(all.end(), tape.begin(), tape.end());
    }
    begins.push_back(all.size());
    const uint16_t* const begin = image.put(all);
    std::vector<const char*> pointers;
    for (size_t own : begins) pointers.push_back(reinterpret_cast<const char*>(begin + own));
    view.tape = image.put(pointers);
    return view;
}

}  // namespace fastmaf
