// The tensor-core kernel, its body run by the host: the layout of fragments, results against float64, rows that halves cannot hold, and that
// neither masked inputs nor the place of a row change a bit.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cpu/backend.hpp"
#include "warp.hpp"

using namespace fastmaf;

namespace {

int passed = 0, failed = 0;
std::string what_runs;
#define CHECK(condition) check(condition, #condition, __LINE__)
void check(bool ok, const char* what, int line) {
    ++(ok ? passed : failed);
    if (!ok && failed <= 40) std::fprintf(stderr, "line %d: %s (%s)\n", line, what, what_runs.c_str());
}

using Random = std::mt19937;
using Floats = std::vector<float>;
using Reals = std::vector<double>;

Reals normals(size_t n, Random& rng, double scale = 1) {
    std::normal_distribution<double> normal(0, scale);
    Reals values(n);
    for (double& v : values) v = normal(rng);
    return values;
}

struct Model {
    int features = 5, context = 0;
    std::vector<int> hidden{20, 20};
    Activation activation = Activation::tanh;
    Law law = Law::exp_soft;
    Form form = Form::affine;
    int stages = 2;
    bool reverses = true;  // every other stage
    int ranks = 0;         // of variables; 0: each has its own
    bool after = false;    // an Affine behind each
    double scale = 1;      // of the weights, whose sums are of order `scale`
};

FlowSpec spec_of(const Model& model, Random& rng) {
    const int features = model.features, ranks = model.ranks ? model.ranks : features;
    FlowSpec spec;
    spec.features = features;
    spec.context = model.context;
    auto columns = [](int n) {
        Columns columns;
        columns.kind.assign(size_t(n), Bijection::identity);
        columns.lower.assign(size_t(n), -INFINITY);
        columns.upper.assign(size_t(n), INFINITY);
        columns.loc.assign(size_t(n), 0.25);
        columns.scale.assign(size_t(n), 0.5);
        return columns;
    };
    spec.columns = columns(features);
    spec.context_columns = columns(model.context);
    for (int k = 0; k < model.stages; ++k) {
        StageSpec stage;
        stage.law = model.law;
        stage.form = model.form;
        stage.constant[0] = 2;
        stage.activation = model.activation;
        int inputs = features;
        for (int i = 0; i < features; ++i) {
            stage.variable.push_back(i);
            stage.ranks.push_back(k % 2 && model.reverses ? ranks - i % ranks : i % ranks + 1);
            stage.rows.push_back(2);
            if (!model.after) continue;
            stage.loc.push_back(0.1 * i);
            stage.scale.push_back(i % 2 ? -1.5 : 0.75);
        }
        for (int width : model.hidden) {
            MapSpec map{width, inputs, {}, stage.maps.empty() && model.context > 0, true, -1};
            for (int u = 0; u < width; ++u) map.degrees.push_back(int64_t(rng() % unsigned(ranks)));
            stage.maps.push_back(map);
            inputs = width;
        }
        stage.maps.push_back({2 * features, inputs, {}, stage.maps.empty() && model.context > 0, false, -1});
        spec.stages.push_back(stage);
    }
    for (int i = 0; i < features; ++i) spec.noise_variable.push_back(i);
    return spec;
}

// Weights with sums of order one, maps by maps; `scale` makes them larger.
Reals parameters_of(const Model& model, const FlowSpec& spec, Random& rng) {
    Reals all;
    for (const StageSpec& stage : spec.stages)
        for (const MapSpec& map : stage.maps) {
            const bool final = map.degrees.empty();
            const double size = model.scale * (final ? 0.4 : 1.2) / std::sqrt(double(map.inputs + (map.context ? model.context : 0)));
            for (double w : normals(size_t(map.rows) * size_t(map.inputs), rng, size)) all.push_back(double(float(w)));
            for (double b : normals(size_t(map.rows), rng, 0.3)) all.push_back(double(float(b)));
            if (map.context)
                for (double w : normals(size_t(map.rows) * size_t(model.context), rng, size)) all.push_back(double(float(w)));
        }
    return all;
}

template <class T>
std::shared_ptr<Weights<T>> weights_of(const FlowSpec& spec, const Reals& parameters) {
    auto packed = std::make_shared<Weights<T>>(spec);
    CHECK(size_t(packed->plan().parameter_count()) == parameters.size());
    packed->set_parameters(std::vector<T>(parameters.begin(), parameters.end()).data());
    return packed;
}

template <class T>
Rows rows_of(const std::vector<T>& values, int width) {
    Rows rows;
    rows.data = reinterpret_cast<const char*>(values.data());
    rows.dtype = sizeof(T) == 4 ? DType::f32 : DType::f64;
    rows.inner = width * int64_t(sizeof(T));
    rows.column = sizeof(T);
    return rows;
}

Batch batch_of(const Model& model, const Floats& x, const Floats& context, size_t n) {
    Batch batch;
    batch.inner = int64_t(n);
    batch.x = rows_of(x, model.features);
    if (model.context) batch.context = rows_of(context, model.context);
    return batch;
}

bool same_bits(float a, float b) { return std::memcmp(&a, &b, sizeof a) == 0; }
bool alike(float a, float b) { return same_bits(a, b) || (std::isnan(a) && std::isnan(b)); }

constexpr int64_t kShared = 227 * 1024;

const char* name_of(const TensorShape& shape) {
    static char text[80];
    std::snprintf(text, sizeof text, "rows %d, row tiles %d, groups %d, teams %d, parts %d", shape.rows, shape.row_tiles, shape.groups,
                  shape.teams, shape.parts);
    return text;
}

std::vector<TensorShape> shapes(int parts) {
    std::vector<TensorShape> all{
        {16, 1, 1, 1, parts}, {16, 1, 1, 3, parts}, {32, 2, 1, 2, parts}, {32, 1, 2, 2, parts}, {128, 2, 4, 1, parts}};
    if (parts == 1) all.push_back({64, 4, 1, 2, parts});
    return all;
}

std::vector<TensorShape> shapes_of_a_gpu(int parts) {
    std::vector<TensorShape> all{{16, 1, 1, 8, parts}, {32, 2, 1, 8, parts}, {64, 1, 4, 2, parts}, {128, 2, 4, 2, parts}};
    if (parts == 1) all.push_back({64, 4, 1, 8, parts});
    return all;
}

// ---- fragments, as the PTX ISA has them for mma.m16n8k16 -----------------------------------------------------------------------------

void fragments_of_the_isa() {
    what_runs = "fragments";
    Random rng(1);
    double a[16][16], b[16][8], c[16][8];
    for (auto& row : a)
        for (double& v : row) v = int(rng() % 17) - 8;
    for (auto& row : b)
        for (double& v : row) v = int(rng() % 17) - 8;
    for (auto& row : c)
        for (double& v : row) v = int(rng() % 99);
    uint32_t of_a[4][32] = {}, of_b[2][32] = {};
    float of_c[4][32];
    for (int laneid = 0; laneid < 32; ++laneid) {
        const int groupID = laneid >> 2, threadID_in_group = laneid % 4;
        for (int i = 0; i < 8; ++i) {
            const int row = (0 <= i && i < 2) || (4 <= i && i < 6) ? groupID : groupID + 8;
            const int column = i < 4 ? threadID_in_group * 2 + (i & 1) : threadID_in_group * 2 + (i & 1) + 8;
            of_a[i / 2][laneid] |= uint32_t(fragments::half_of(a[row][column])) << 16 * (i % 2);
            if (i % 2 == 0) {
                CHECK(fragments::a_row(laneid, unsigned(i / 2)) == row && fragments::a_column(laneid, unsigned(i / 2)) == column);
                // ldmatrix: matrix i / 2 has its row r where lane 8 (i / 2) + r says; lane 4 r + c gets numbers 2 c and 2 c + 1 of it.
                const int names = 8 * (i / 2) + laneid / 4;
                CHECK(int(fragments::matrix_row(names)) == row && int(fragments::matrix_column(names)) + 2 * (laneid % 4) == column);
            }
        }
        for (int i = 0; i < 4; ++i) {
            const int row = i < 2 ? threadID_in_group * 2 + (i & 1) : threadID_in_group * 2 + (i & 1) + 8;
            of_b[i / 2][laneid] |= uint32_t(fragments::half_of(b[row][groupID])) << 16 * (i % 2);
            if (i % 2 == 0) CHECK(int(fragments::b_row(laneid, unsigned(i / 2))) == row && int(fragments::b_column(laneid)) == groupID);
        }
        for (int i = 0; i < 4; ++i) {
            const int row = i < 2 ? groupID : groupID + 8, column = threadID_in_group * 2 + (i & 1);
            of_c[i][laneid] = float(c[row][column]);
            CHECK(int(fragments::c_row(laneid, unsigned(i))) == row && int(fragments::c_column(laneid, unsigned(i))) == column);
        }
    }
    warp_multiply(of_a, of_b, of_c);
    for (int laneid = 0; laneid < 32; ++laneid)
        for (int i = 0; i < 4; ++i) {
            const int row = i < 2 ? laneid / 4 : laneid / 4 + 8, column = laneid % 4 * 2 + (i & 1);
            double sum = c[row][column];
            for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
            CHECK(double(of_c[i][laneid]) == sum);
        }
}

void halves_round_to_nearest() {
    what_runs = "halves";
    using namespace fragments;
    bool exact = true, nearest = true;
    for (int h = 0; h < 0x7C00; ++h) {
        const double own = double(number_of(uint16_t(h))), next = h == 0x7BFF ? 65536 : double(number_of(uint16_t(h + 1))),
                     middle = (own + next) / 2;
        exact = exact && half_of(own) == h && half_of(-own) == (h | 0x8000) && double(number_of(uint16_t(h | 0x8000))) == -own;
        nearest = nearest && half_of(middle) == (h % 2 ? h + 1 : h);
        nearest = nearest && half_of(std::nextafter(middle, 0.0)) == h && half_of(std::nextafter(middle, 1e9)) == h + 1;
    }
    CHECK(exact && nearest);
    CHECK(half_of(INFINITY) == 0x7C00 && half_of(-1e30) == 0xFC00 && std::isnan(number_of(half_of(NAN))) && number_of(0x3C00) == 1);
}

// ---- flows ---------------------------------------------------------------------------------------------------------------------------

struct Errors {
    double log_prob = 0, noise = 0;  // largest, relative to 1 + |truth|
};

// Whether the tape holds the weights: every tile that is not masked, once, at the unit's scale.
void the_tape_holds_the_weights(const Weights<float>& packed, const TensorShape& shape) {
    const Plan& plan = packed.plan();
    TensorView view;
    const AlignedVector<char> memory = placed([&](Image& image) { view = lay_out_tensor(image, packed, shape); });
    bool right = true;
    for (int team = 0; team < shape.teams; ++team) {
        const char* tile = view.tape[team];
        for (size_t k = 0; k < plan.stages(); ++k)
            for (int m = 0; m < view.stages[k].maps; ++m) {
                const TensorMap& map = view.stages[k].map[m];
                const Staircase& stairs = plan.sorted()[k].maps[size_t(m)];
                const float* const weights = packed.master().data() + plan.weight_offset(k, size_t(m));
                for (int i = map.first[team]; i < map.first[team + 1]; ++i) {
                    const Strip& strip = map.strips[i];
                    for (int step = 0; step < 64; step += 2)
                        for (int t = 0; t < strip.tiles; ++t) {
                            if (step >= strip.end[t]) continue;
                            bool any = false;
                            for (int unit = strip.row + 8 * t; unit < strip.row + 8 * t + 8; ++unit)
                                for (int input = 16 * step; input < 16 * step + 32; ++input) {
                                    const bool read = unit < plan.widths(k)[size_t(m)] && input < stairs.limit[size_t(unit)];
                                    any = any || read;
                                    const double w = read ? double(weights[stairs.offset[size_t(unit)] + input]) : 0;
                                    // Independent of fragments.hpp: lane 4 n + k % 8 / 2, register k / 8, half k % 2.
                                    const int k_in = input % 32, lane = unit % 8 * 4 + k_in % 8 / 2,
                                              place = lane * 8 + k_in / 8 * 2 + k_in % 2;
                                    double held = 0;
                                    for (int p = 0; p < shape.parts; ++p) {
                                        uint16_t half = 0;
                                        std::memcpy(&half, tile + 512 * p + 2 * place, 2);
                                        held += double(fragments::number_of(half));
                                    }
                                    held *= double(map.affine[2 * unit]) * 16;
                                    right = right && (read || held == 0);
                                    right = right && std::fabs(held - w) <= std::fabs(w) * (shape.parts == 2 ? 0x1p-21 : 0x1p-11) + 1e-9;
                                }
                            right = right && any;
                            tile += 512 * shape.parts;
                        }
                }
            }
        right = right && tile == view.tape[team + 1];
    }
    CHECK(right);
}

Errors compare(const Model& model, size_t n, int context_kind, const std::vector<TensorShape>& of_shapes) {
    Random rng(7);
    const FlowSpec spec = spec_of(model, rng);
    const Reals parameters = parameters_of(model, spec, rng);
    const auto packed = weights_of<float>(spec, parameters);
    const auto truth = weights_of<double>(spec, parameters);
    const Reals noise = normals(n * size_t(model.features), rng);
    const Reals drawn_context = normals((n + 1) * size_t(std::max(model.context, 1)), rng);
    const Floats context(drawn_context.begin(), drawn_context.end());
    const std::vector<float> of_noise(noise.begin(), noise.end());
    Batch batch = batch_of(model, of_noise, context, n);
    auto shared = [&](Batch given) {
        if (context_kind) given.context.inner = 0;
        if (context_kind == 2) {
            given.outer = 2;
            given.x.outer = 0;
            given.context.outer = model.context * int64_t(sizeof(float));
        }
        return given;
    };
    Floats x(noise.size());
    Batch plain = batch;
    if (context_kind) plain.context.inner = 0;
    from_noise<float>(*packed, plain, x.data(), {});  // points that the model is likely to meet
    batch = shared(batch_of(model, x, context, n));
    const size_t rows = size_t(batch.rows());
    Reals density(rows), z(rows * size_t(model.features));
    log_prob<double>(*truth, batch, density.data(), {});
    to_noise<double>(*truth, batch, z.data(), {});
    Errors worst;
    const std::string name = what_runs;
    for (const TensorShape& shape : of_shapes) {
        what_runs = name + ", " + name_of(shape);
        Floats got(rows, 7), got_z(z.size(), 7);
        warp_halves(*packed, batch, shape, got.data(), nullptr);
        warp_halves(*packed, batch, shape, nullptr, got_z.data());
        for (size_t i = 0; i < rows; ++i) {
            if (!std::isfinite(density[i])) continue;
            const double error = std::fabs(double(got[i]) - density[i]) / (1 + std::fabs(density[i]));
            worst.log_prob = std::isnan(error) ? INFINITY : std::max(worst.log_prob, error);
        }
        for (size_t i = 0; i < z.size(); ++i) {
            const double error = std::fabs(double(got_z[i]) - z[i]) / (1 + std::fabs(z[i]));
            worst.noise = std::isnan(error) ? INFINITY : std::max(worst.noise, error);
        }
        the_tape_holds_the_weights(*packed, shape);
    }
    what_runs = name;
    return worst;
}

struct Named {
    std::string name;
    Model model;
};

std::vector<Named> models() {
    std::vector<Named> all;
    auto add = [&](const char* name, auto change) {
        all.push_back({name, {}});
        change(all.back().model);
    };
    add("plain", [](Model&) {});
    const char* const names[] = {"relu", "tanh", "elu", "gelu", "silu"};
    for (int a = 0; a < 5; ++a) add(names[a], [a](Model& m) { m.activation = Activation(a), m.features = 9, m.hidden = {33}; });
    add("one variable", [](Model& m) { m.features = 1; });
    add("one variable, context", [](Model& m) { m.features = 1, m.context = 3, m.hidden = {7}; });
    add("two variables", [](Model& m) { m.features = 2, m.hidden = {5, 3}; });
    add("few units", [](Model& m) { m.features = 20, m.hidden = {6, 9}; });
    add("no hidden layer", [](Model& m) { m.hidden = {}; });
    add("no hidden layer, context", [](Model& m) { m.hidden = {}, m.context = 2, m.features = 19; });
    add("three hidden layers", [](Model& m) { m.hidden = {40, 17, 50}; });
    add("wide", [](Model& m) { m.features = 43, m.hidden = {131, 97}, m.stages = 3; });
    add("many variables", [](Model& m) { m.features = 150, m.hidden = {160}; });
    add("context", [](Model& m) { m.context = 5, m.hidden = {24, 31}, m.activation = Activation::silu; });
    add("much context", [](Model& m) { m.context = 70, m.hidden = {30}; });
    add("exp, standardize", [](Model& m) { m.law = Law::exp, m.form = Form::standardize; });
    add("exp_soft, standardize, affine behind", [](Model& m) { m.form = Form::standardize, m.after = true; });
    add("softplus", [](Model& m) { m.law = Law::softplus; });
    add("exp, affine behind", [](Model& m) { m.law = Law::exp, m.after = true; });
    return all;
}

void results() {
    for (const Named& one : models())
        for (int parts : {1, 2})
            for (int kind = 0; kind < (one.model.context ? 3 : 1); ++kind)
                for (size_t n : {size_t(1), size_t(37), size_t(131)}) {
                    if (n == 131 && kind) continue;
                    what_runs = one.name + ", " + std::to_string(n) + " rows, context " + std::to_string(kind);
                    // Once with the eight warps that a block has on a GPU.
                    const bool wide = n == 37 && !kind && one.model.features > 40;
                    const Errors errors = compare(one.model, n, kind, wide ? shapes_of_a_gpu(parts) : shapes(parts));
                    const double unit = parts == 1 ? 0x1p-11 : 0x1p-24;
                    if (!(errors.log_prob <= 24 * unit && errors.noise <= 48 * unit))
                        std::fprintf(stderr, "%s: parts %d, %.1f and %.1f\n", what_runs.c_str(), parts, errors.log_prob / unit,
                                     errors.noise / unit);
                    CHECK(errors.log_prob <= 24 * unit);
                    CHECK(errors.noise <= 48 * unit);
                }
}

// ---- samples -------------------------------------------------------------------------------------------------------------------------

struct Blocks {
    int groups, active, warps;  // groups of rows with room, those with a warp, all warps
};

std::string name_of(const Blocks& blocks, int parts) {
    return "room for " + std::to_string(blocks.groups) + " groups, " + std::to_string(blocks.active) + " of " +
           std::to_string(blocks.warps) + " warps have one, parts " + std::to_string(parts);
}

// Every weight of a stage once: in the sums before a piece, or in the operations of its own piece.
void each_weight_is_used_once(const Weights<float>& packed, int parts) {
    const Plan& plan = packed.plan();
    DrawView view;
    const AlignedVector<char> memory = placed([&](Image& image) { view = lay_out_draws(image, packed, parts, 1); });
    bool right = true;
    const char* tile = view.tape;
    for (size_t k = plan.stages(); k-- > 0;) {
        const DrawStage& stage = view.stages[k];
        if (!stage.maps) continue;
        const char* const begin = tile;
        const Pieces pieces(plan, k);
        const int hidden = stage.maps - 1;
        std::vector<std::vector<double>> held(size_t(stage.maps));  // [map][unit][input]
        auto inputs = [&](int m) { return m == 0 ? plan.context() + plan.features() : plan.widths(k)[size_t(m - 1)]; };
        for (int m = 0; m < stage.maps; ++m) held[size_t(m)].assign(size_t(plan.widths(k)[size_t(m)] * inputs(m)), 0);
        auto add = [&](int m, int unit, int input, int place) {
            double w = 0;
            for (int p = 0; p < parts; ++p) {
                uint16_t half = 0;
                std::memcpy(&half, tile + 512 * p + 2 * place, 2);
                w += double(fragments::number_of(half));
            }
            if (unit >= 0 && input >= 0)
                held[size_t(m)][size_t(unit * inputs(m) + input)] += w;
            else
                right = right && w == 0;
        };
        for (int i = 0; i < stage.pieces; ++i) {
            const DrawPiece& piece = stage.piece[i];
            for (int m = 0; m < stage.maps; ++m)
                for (int step = 0; step < piece.steps[m]; step += 2)
                    for (int t = 0; t < piece.tiles[m]; ++t, tile += 512 * parts)
                        for (int n = 0; n < 8; ++n)
                            for (int j = 0; j < 32; ++j)
                                add(m, pieces.unit(size_t(i), m, 8 * t + n), pieces.input(m, 16 * step + j),
                                    (n * 4 + j % 8 / 2) * 8 + j / 8 * 2 + j % 2);
            for (int o = piece.first_operation; o < piece.end_operation; ++o) {
                const DrawOperation& operation = stage.operation[o];
                right = right && operation.first < operation.end && operation.map < hidden;
                const int first = operation.map < 0 ? 0 : operation.first / 16, last = operation.map < 0 ? 1 : (operation.end + 15) / 16;
                for (int step = first; step < last; ++step)
                    for (int pair = operation.first_pair; pair < operation.end_pair; ++pair, tile += 512 * parts)
                        for (int n = 0; n < 16; ++n)
                            for (int j = 0; j < 16; ++j) {
                                const int to = operation.map + 1, unit = pieces.unit(size_t(i), to, 16 * pair + n);
                                // Thread j % 8 / 2 of a quad has variables with that rest modulo 4.
                                const int number = operation.map < 0 ? j % 8 / 2 + 4 * (j % 2 + j / 8 * 2) : 16 * step + j;
                                if (number < operation.first || number >= operation.end) continue;  // the activations are zero
                                const int input = operation.map < 0 ? plan.context() + piece.variable + number
                                                                    : pieces.unit(size_t(i), operation.map, number);
                                add(to, unit, input, (n % 8 * 4 + j % 8 / 2) * 8 + n / 8 * 4 + j / 8 * 2 + j % 2);
                            }
            }
        }
        right = right && tile == begin + stage.tiles * 512 * parts;
        for (int m = 0; m < stage.maps; ++m) {
            const Staircase& stairs = plan.sorted()[k].maps[size_t(m)];
            const float* const weights = packed.master().data() + plan.weight_offset(k, size_t(m));
            for (int unit = 0; unit < plan.widths(k)[size_t(m)]; ++unit) {
                double scale = 0;
                for (int column = 0; column < pieces.columns(m); ++column)
                    if (pieces.unit(m, column) == unit) scale += double(stage.map[m].affine[2 * column]) * 16;
                for (int input = 0; input < inputs(m); ++input) {
                    const double w = input < stairs.limit[size_t(unit)] ? double(weights[stairs.offset[size_t(unit)] + input]) : 0;
                    const double own = held[size_t(m)][size_t(unit * inputs(m) + input)] * scale;
                    right = right && (w != 0 || own == 0) && std::fabs(own - w) <= std::fabs(w) * (parts == 2 ? 0x1p-21 : 0x1p-11) + 1e-9;
                }
            }
        }
    }
    CHECK(right && tile <= view.end && (view.end - view.tape) % (512 * 8) == 0);
}

// Samples from noise, with their density, against float64; the largest errors.
Errors compare_draws(const Model& model, size_t n, int context_kind, int parts, const std::vector<Blocks>& all) {
    Random rng(7);
    const FlowSpec spec = spec_of(model, rng);
    const Reals parameters = parameters_of(model, spec, rng);
    const auto packed = weights_of<float>(spec, parameters);
    const auto truth = weights_of<double>(spec, parameters);
    const Reals drawn = normals(n * size_t(model.features), rng),
                drawn_context = normals((n + 1) * size_t(std::max(model.context, 1)), rng);
    const Floats context(drawn_context.begin(), drawn_context.end()), noise(drawn.begin(), drawn.end());
    Batch batch = batch_of(model, noise, context, n);
    if (context_kind) batch.context.inner = 0;
    if (context_kind == 2) {
        batch.outer = 2;
        batch.x.outer = 0;
        batch.context.outer = model.context * int64_t(sizeof(float));
    }
    const size_t rows = size_t(batch.rows());
    Reals expected(rows * size_t(model.features)), density(rows);
    from_noise<double>(*truth, batch, expected.data(), {});
    Batch back = batch;
    back.x = rows_of(expected, model.features);
    if (context_kind == 2) back.x.outer = int64_t(n) * back.x.inner;
    log_prob<double>(*truth, back, density.data(), {});
    Errors worst;
    const std::string name = what_runs;
    Floats first;
    for (const Blocks& blocks : all) {
        what_runs = name + ", " + name_of(blocks, parts);
        Floats got(expected.size(), 7), got_density(rows, 7);
        warp_draws(*packed, batch, nullptr, parts, blocks.groups, blocks.active, blocks.warps, got.data(), got_density.data());
        for (size_t i = 0; i < got.size(); ++i) {
            const double error = std::fabs(double(got[i]) - expected[i]) / (1 + std::fabs(expected[i]));
            worst.noise = std::isnan(error) ? INFINITY : std::max(worst.noise, error);
        }
        for (size_t i = 0; i < rows; ++i) {
            const double error = std::fabs(double(got_density[i]) - density[i]) / (1 + std::fabs(density[i]));
            worst.log_prob = std::isnan(error) ? INFINITY : std::max(worst.log_prob, error);
        }
        if (first.empty()) first = got;
        bool same = true;
        for (size_t i = 0; i < got.size(); ++i) same = same && same_bits(got[i], first[i]);
        CHECK(same);
    }
    what_runs = name;
    each_weight_is_used_once(*packed, parts);
    return worst;
}

std::vector<Named> drawn_models() {
    std::vector<Named> all;
    for (const Named& one : models())
        if (!one.model.hidden.empty() && one.model.hidden.size() <= size_t(kDrawHidden)) all.push_back(one);
    auto add = [&](const char* name, auto change) {
        Model model;
        change(model);
        all.push_back({name, model});
    };
    add("two variables, large groups", [](Model& m) { m.features = 2, m.hidden = {150, 70}; });
    add("groups of 20", [](Model& m) { m.features = 6, m.hidden = {100, 100}; });
    add("few units for many variables", [](Model& m) { m.features = 70, m.hidden = {9, 11}, m.stages = 3; });
    add("variables of one degree", [](Model& m) { m.features = 60, m.hidden = {50}, m.ranks = 3; });
    add("units that read the context alone", [](Model& m) { m.context = 3, m.hidden = {300, 90}, m.features = 4; });
    return all;
}

void samples() {
    for (const Named& one : drawn_models())
        for (int parts : {1, 2})
            for (int kind = 0; kind < (one.model.context ? 3 : 1); ++kind)
                for (size_t n : {size_t(1), size_t(37), size_t(131)}) {
                    if (n == 131 && kind) continue;
                    what_runs = "samples, " + one.name + ", " + std::to_string(n) + " rows, context " + std::to_string(kind);
                    std::vector<Blocks> all{{1, 1, 1}, {2, 2, 3}, {3, 1, 2}};
                    if (n == 131) all = {{4, 4, 4}, {8, 5, 8}};
                    const Errors errors = compare_draws(one.model, n, kind, parts, all);
                    const double unit = parts == 1 ? 0x1p-11 : 0x1p-24;
                    const double most = one.model.law == Law::softplus ? 8 : 4;  // the logarithm of a rounded scale
                    if (!(errors.log_prob <= most * unit && errors.noise <= 24 * unit))
                        std::fprintf(stderr, "%s: parts %d, %.1f and %.1f\n", what_runs.c_str(), parts, errors.log_prob / unit,
                                     errors.noise / unit);
                    CHECK(errors.log_prob <= most * unit);
                    CHECK(errors.noise <= 24 * unit);
                }
}

// As masked_inputs_change_nothing(), for every number of the noise; and each row alone, in other company and with others' losses beside it.
void masked_noise_changes_nothing() {
    for (const bool grouped : {false, true})
        for (int parts : {1, 2}) {
            Model model;
            model.features = 13;
            model.hidden = {45, 38};
            model.reverses = false;
            model.activation = Activation::relu;
            if (grouped) model.ranks = 5, model.hidden = {400, 90};
            Random rng(3);
            const FlowSpec spec = spec_of(model, rng);
            const auto packed = weights_of<float>(spec, parameters_of(model, spec, rng));
            const size_t n = 13 * 5, d = 13;
            const Reals drawn = normals(d, rng);
            Floats z;
            for (size_t i = 0; i < n; ++i) z.insert(z.end(), drawn.begin(), drawn.end());
            const float values[] = {2.5f, -1e5f, NAN, INFINITY, 3e38f};
            for (size_t j = 0; j < d; ++j)
                for (size_t v = 0; v < 5; ++v) z[(5 * j + v) * d + j] = values[v];
            const Floats base(drawn.begin(), drawn.end());
            const auto rank = [&](size_t i) { return spec.stages[0].ranks[i]; };
            for (const Blocks& blocks : {Blocks{1, 1, 1}, Blocks{2, 2, 2}, Blocks{4, 3, 3}}) {
                what_runs = std::string(grouped ? "masked noise, groups, " : "masked noise, ") + name_of(blocks, parts);
                auto draw = [&](const Floats& noise, size_t rows, Floats& x, Floats& density) {
                    const Batch given = batch_of(model, noise, {}, rows);
                    warp_draws(*packed, given, nullptr, parts, blocks.groups, blocks.active, blocks.warps, x.data(), density.data());
                };
                Floats x(n * d), density(n), of_base(d), density_of_base(1), plain(n * d), plain_density(n);
                draw(z, n, x, density);
                draw(base, 1, of_base, density_of_base);
                const Batch batch = batch_of(model, z, {}, n);
                warp_generate<float>(*packed, batch, nullptr, Warps{}, plain.data(), plain_density.data());
                Floats filled = x, filled_density = density;
                Warps fills;
                fills.fills = true;
                warp_generate<float>(*packed, batch, nullptr, fills, filled.data(), filled_density.data());
                bool unchanged = true, moves = true, gaps = true, kept = true, alone = true;
                for (size_t i = 0; i < n; ++i) {
                    const size_t j = i / 5, v = i % 5;
                    bool last = true;  // nothing comes after
                    for (size_t c = 0; c < d; ++c) {
                        const float own = x[i * d + c], after = filled[i * d + c];
                        last = last && rank(c) <= rank(j);
                        if (c != j && rank(c) <= rank(j)) unchanged = unchanged && same_bits(own, of_base[c]) && same_bits(after, own);
                        if (c == j && v == 0) moves = moves && !same_bits(own, of_base[c]);
                        if (std::isnan(own))
                            gaps = gaps && alike(after, plain[i * d + c]);
                        else
                            kept = kept && same_bits(after, own);
                        if (v > 0 && rank(c) > rank(j) + 1) gaps = gaps && std::isnan(own);
                        if (v == 0) kept = kept && !std::isnan(own);
                    }
                    if (std::isnan(density[i]))
                        gaps = gaps && alike(filled_density[i], plain_density[i]);
                    else
                        kept = kept && same_bits(filled_density[i], density[i]);
                    kept = kept && (v > 0 || !std::isnan(density[i]));
                    kept = kept && (v == 0 || last || rank(j) + 1 >= (grouped ? 5 : 13) || std::isnan(density[i]));
                    if (i % 7) continue;
                    const Floats own(z.begin() + long(i * d), z.begin() + long(i * d + d));
                    Floats again(d), its_density(1);
                    draw(own, 1, again, its_density);
                    for (size_t c = 0; c < d; ++c) alone = alone && alike(again[c], x[i * d + c]);
                    alone = alone && alike(its_density[0], density[i]);
                }
                CHECK(unchanged);
                CHECK(moves);
                CHECK(gaps);
                CHECK(kept);
                CHECK(alone);
            }
        }
}

// Contexts that are NaN or beyond halves, in every third row: all that reads them is NaN, and their neighbours keep their bits.
void lost_contexts() {
    for (int parts : {1, 2})
        for (int features : {1, 6}) {
            what_runs = "lost contexts, parts " + std::to_string(parts);
            Model model;
            model.features = features;
            model.context = 19;
            Random rng(8);
            const FlowSpec spec = spec_of(model, rng);
            const auto packed = weights_of<float>(spec, parameters_of(model, spec, rng));
            const size_t n = 53, d = size_t(features), c = 19;
            const Reals drawn = normals(n * d, rng), drawn_context = normals(n * c, rng);
            const Floats noise(drawn.begin(), drawn.end());
            Floats context(drawn_context.begin(), drawn_context.end()), good(n * d), got(n * d), density(n), lost_density(n), plain(n * d),
                unused(n);
            warp_draws(*packed, batch_of(model, noise, context, n), nullptr, parts, 2, 2, 2, good.data(), density.data());
            for (size_t i = 0; i < n; i += 3) context[i * c + i % c] = i % 2 ? NAN : 1e5f;
            const Batch batch = batch_of(model, noise, context, n);
            warp_draws(*packed, batch, nullptr, parts, 2, 2, 2, got.data(), lost_density.data());
            bool kept = true, lost = true;
            for (size_t i = 0; i < n; ++i) {
                for (size_t v = 0; v < d; ++v) kept = kept && (i % 3 == 0 || same_bits(got[i * d + v], good[i * d + v]));
                kept = kept && (i % 3 == 0 || same_bits(lost_density[i], density[i]));
                lost = lost && (i % 3 || (std::isnan(got[i * d + d - 1]) && std::isnan(lost_density[i])));
            }
            CHECK(kept && lost);
            warp_generate<float>(*packed, batch, nullptr, Warps{}, plain.data(), unused.data());
            Warps fills;
            fills.fills = true;
            warp_generate<float>(*packed, batch, nullptr, fills, got.data(), lost_density.data());
            bool filled = true;
            for (size_t i = 0; i < n; i += 3) filled = filled && alike(got[i * d + d - 1], plain[i * d + d - 1]);
            CHECK(filled);
        }
}

// Units beyond halves, though all variables are small: what reads them is NaN, and nothing else is.
void lost_units() {
    for (int parts : {1, 2})
        for (int layers : {1, 2}) {
            what_runs = "lost units, parts " + std::to_string(parts);
            Model model;
            model.activation = Activation::relu;
            model.hidden.assign(size_t(layers), 30);
            model.stages = 1;
            Random rng(5);
            const FlowSpec spec = spec_of(model, rng);
            Reals parameters = parameters_of(model, spec, rng);
            const size_t width = 30, d = 5;
            // Activations of the last hidden layer 4096 times larger, the weights that read them as much smaller.
            const size_t last = layers == 1 ? 0 : width * d + width, inputs = layers == 1 ? d : width,
                         final = last + width * inputs + width;
            for (size_t i = last; i < final; ++i) parameters[i] *= 4096;
            for (size_t i = final; i < final + 2 * d * width; ++i) parameters[i] /= 4096;
            const auto packed = weights_of<float>(spec, parameters);
            const size_t n = 48;
            const Reals drawn = normals(n * d, rng);
            const Floats noise(drawn.begin(), drawn.end());
            const Batch batch = batch_of(model, noise, {}, n);
            Floats got(n * d), density(n), plain(n * d), unused(n);
            warp_draws(*packed, batch, nullptr, parts, 2, 2, 2, got.data(), density.data());
            warp_generate<float>(*packed, batch, nullptr, Warps{}, plain.data(), unused.data());
            size_t lost = 0;
            bool close = true;
            for (size_t i = 0; i < got.size(); ++i) {
                lost += std::isnan(got[i]);
                const double limit = (parts == 1 ? 0x1p-6 : 0x1p-18) * (1 + std::fabs(double(plain[i])));
                close = close && (std::isnan(got[i]) || std::fabs(double(got[i]) - double(plain[i])) <= limit);
            }
            CHECK(close && lost > 20 && lost < got.size() - 20);
        }
}

// Many variables of one degree: one that is lost leaves the others of its degree as they are, though they do not fit in one piece.
void lost_beside_others() {
    Model model;
    model.features = 80;
    model.ranks = 2;
    model.hidden = {40};
    model.stages = 1;
    Random rng(6);
    const FlowSpec spec = spec_of(model, rng);
    const auto packed = weights_of<float>(spec, parameters_of(model, spec, rng));
    const Reals drawn = normals(80, rng);
    Floats noise(drawn.begin(), drawn.end()), good(80), got(80), density(1);
    what_runs = "lost beside others of its degree";
    warp_draws(*packed, batch_of(model, noise, {}, 1), nullptr, 2, 1, 1, 1, good.data(), density.data());
    noise[0] = 1e5f;
    warp_draws(*packed, batch_of(model, noise, {}, 1), nullptr, 2, 1, 1, 1, got.data(), density.data());
    bool kept = true, lost = true;
    for (size_t v = 1; v < 80; ++v)
        if (v % 2 == 0)
            kept = kept && same_bits(got[v], good[v]);
        else
            lost = lost && std::isnan(got[v]);
    CHECK(kept && lost);
}

// Stages of another depth, which run in float, norms between, ranks with gaps, degrees below and above all ranks.
void mixed_stages() {
    for (unsigned seed = 0; seed < 6; ++seed) {
        Random rng(seed);
        Model model;
        model.features = int(3 + rng() % 20);
        model.hidden = {int(1 + rng() % 100), int(1 + rng() % 100)};
        model.context = seed % 2 ? int(rng() % 20) : 0;
        model.stages = 3;
        FlowSpec spec = spec_of(model, rng);
        for (StageSpec& stage : spec.stages) {
            for (auto& rank : stage.ranks) rank = 3 * rank + 1;
            for (size_t m = 0; m + 1 < stage.maps.size(); ++m)
                for (auto& degree : stage.maps[m].degrees) degree = int64_t(rng() % unsigned(3 * model.features + 6)) - 2;
        }
        StageSpec& shallow = spec.stages[1 + seed % 2];
        shallow.maps.erase(shallow.maps.begin() + 1);
        shallow.maps.back().inputs = shallow.maps.front().rows;
        const Reals parameters = parameters_of(model, spec, rng);
        StageSpec norm;
        norm.output = Output::norm;
        for (int v = 0; v < model.features; ++v) {
            norm.variable.push_back(v);
            norm.loc.push_back(0.1 * v);
            norm.scale.push_back(0.5 + 0.125 * v);
        }
        spec.stages.insert(spec.stages.begin() + long(seed % 4), norm);
        const auto packed = weights_of<float>(spec, parameters);
        const auto truth = weights_of<double>(spec, parameters);
        const size_t n = 53, d = size_t(model.features);
        const Reals drawn = normals(n * d, rng), drawn_context = normals(n * size_t(std::max(model.context, 1)), rng);
        const Floats noise(drawn.begin(), drawn.end()), context(drawn_context.begin(), drawn_context.end());
        const Batch batch = batch_of(model, noise, context, n);
        Reals expected(n * d);
        from_noise<double>(*truth, batch, expected.data(), {});
        what_runs = "mixed stages, seed " + std::to_string(seed);
        const DrawnStages drawn_stages(*packed);
        CHECK(drawn_stages.hidden == 2 && std::count(drawn_stages.fits.begin(), drawn_stages.fits.end(), 1) == 2);
        each_weight_is_used_once(*packed, 2);
        Floats got(n * d, 7), density(n);
        warp_draws(*packed, batch, nullptr, 2, 3, 3, 4, got.data(), density.data());
        double worst = 0;
        for (size_t i = 0; i < got.size(); ++i) {
            const double error = std::fabs(double(got[i]) - expected[i]) / (1 + std::fabs(expected[i]));
            worst = std::isnan(error) ? INFINITY : std::max(worst, error);
        }
        if (!(worst <= 0x1p-17)) std::fprintf(stderr, "%s: %.1f\n", what_runs.c_str(), worst * 0x1p24);
        CHECK(worst <= 0x1p-17);
    }
}

// Draws from counters: those of the CPU, whose noise they share.
void draws_from_counters() {
    Model model;
    model.features = 7;
    model.context = 2;
    Random rng(4);
    const FlowSpec spec = spec_of(model, rng);
    const auto packed = weights_of<float>(spec, parameters_of(model, spec, rng));
    const Reals drawn = normals(6, rng);
    const Floats context(drawn.begin(), drawn.end());
    Draw draw;
    draw.seed = 11;
    draw.contexts = 3;
    draw.rows = 37;
    draw.context = rows_of(context, 2);
    std::swap(draw.context.outer, draw.context.inner);
    Floats expected(3 * 37 * 7), density(3 * 37), got(expected.size()), got_density(density.size());
    sample<float>(*packed, draw, expected.data(), density.data(), {});
    what_runs = "draws from counters";
    warp_draws(*packed, {}, &draw, 2, 2, 2, 2, got.data(), got_density.data());
    bool close = true, same = true;
    for (size_t i = 0; i < got.size(); ++i) {
        close = close && std::fabs(double(got[i]) - double(expected[i])) <= 0x1p-20 * (1 + std::fabs(double(expected[i])));
        same = same && same_bits(got[i], expected[i]);
    }
    for (size_t i = 0; i < density.size(); ++i)
        close = close && std::fabs(double(got_density[i]) - double(density[i])) <= 0x1p-19 * (1 + std::fabs(double(density[i])));
    CHECK(close && !same);
}

// Every variable changed, to an ordinary number, to one beyond halves, to none: what does not depend on it stays as it was to the bit, and
// with the gaps filled all is what it is without tensor cores.
void masked_inputs_change_nothing() {
    for (int activation = 0; activation < 5; ++activation)
        for (int parts : {1, 2}) {
            Model model;
            model.features = 13;
            model.hidden = {45, 38};
            model.reverses = false;
            model.activation = Activation(activation);
            Random rng(3);
            const FlowSpec spec = spec_of(model, rng);
            const auto packed = weights_of<float>(spec, parameters_of(model, spec, rng));
            const size_t n = 13 * 5, d = 13;
            const Reals drawn = normals(d, rng);
            Floats x;
            for (size_t i = 0; i < n; ++i) x.insert(x.end(), drawn.begin(), drawn.end());
            const float values[] = {2.5f, -1e5f, NAN, INFINITY, 3e38f};
            for (size_t j = 0; j < d; ++j)
                for (size_t v = 0; v < 5; ++v) x[(5 * j + v) * d + j] = values[v];
            const Floats base(drawn.begin(), drawn.end());
            for (const TensorShape& shape : shapes(parts)) {
                what_runs = std::string("masked inputs, activation ") + std::to_string(activation) + ", " + name_of(shape);
                const Batch batch = batch_of(model, x, {}, n), one = batch_of(model, base, {}, 1);
                Floats z(n * d), of_base(d), plain(n * d), density(n), plain_density(n);
                warp_halves(*packed, batch, shape, nullptr, z.data());
                warp_halves(*packed, one, shape, nullptr, of_base.data());
                warp_evaluate<float>(*packed, batch, Warps{}, nullptr, plain.data());
                Floats filled = z;
                Warps fills;
                fills.fills = true;
                warp_evaluate<float>(*packed, batch, fills, nullptr, filled.data());
                warp_halves(*packed, batch, shape, density.data(), nullptr);
                warp_evaluate<float>(*packed, batch, Warps{}, plain_density.data(), nullptr);
                Floats filled_density = density;
                warp_evaluate<float>(*packed, batch, fills, filled_density.data(), nullptr);
                bool unchanged = true, moves = true, gaps = true, kept = true;
                for (size_t i = 0; i < n; ++i) {
                    const size_t j = i / 5, v = i % 5;
                    for (size_t c = 0; c < d; ++c) {
                        const float own = z[i * d + c], after = filled[i * d + c];
                        if (c < j) unchanged = unchanged && same_bits(own, of_base[c]) && same_bits(after, own);
                        if (c == j && v == 0) moves = moves && !same_bits(own, of_base[c]);
                        if (c > j + 1 && v > 0 && std::isnan(own)) gaps = gaps && alike(after, plain[i * d + c]);
                        if (!std::isnan(own)) kept = kept && same_bits(after, own);
                        if (v == 2 && c >= j) kept = kept && std::isnan(after) == std::isnan(plain[i * d + c]);
                    }
                    if (v == 0)
                        kept = kept && !std::isnan(density[i]);
                    else if (j + 1 < d)
                        gaps = gaps && std::isnan(density[i]) && alike(filled_density[i], plain_density[i]);
                }
                CHECK(unchanged);
                CHECK(moves);
                CHECK(gaps);
                CHECK(kept);
            }
        }
}

// Activations beyond halves, and weights of any size.
void sizes() {
    for (double scale : {1e-30, 1e-6, 300.0, 1e6}) {
        Model model;
        model.activation = Activation::relu;
        model.hidden = {30, 30};
        model.scale = scale;
        model.stages = 1;
        Random rng(5);
        const FlowSpec spec = spec_of(model, rng);
        const Reals parameters = parameters_of(model, spec, rng);
        const auto packed = weights_of<float>(spec, parameters);
        const auto truth = weights_of<double>(spec, parameters);
        const size_t n = 40;
        const Reals drawn = normals(n * 5, rng);
        const Floats x(drawn.begin(), drawn.end());
        const Batch batch = batch_of(model, x, {}, n);
        Reals expected(n);
        log_prob<double>(*truth, batch, expected.data(), {});
        for (int parts : {1, 2})
            for (const TensorShape& shape : shapes(parts)) {
                what_runs = "weights of size " + std::to_string(scale) + ", " + name_of(shape);
                Floats got(n), plain(n);
                warp_halves(*packed, batch, shape, got.data(), nullptr);
                warp_evaluate<float>(*packed, batch, Warps{}, plain.data(), nullptr);
                Warps fills;
                fills.fills = true;
                size_t lost = 0;
                for (float v : got) lost += std::isnan(v);
                CHECK(scale < 1 ? lost == 0 : lost > 0);
                warp_evaluate<float>(*packed, batch, fills, got.data(), nullptr);
                bool close = true;
                for (size_t i = 0; i < n; ++i) {
                    const double limit = (parts == 1 ? 0x1p-8 : 0x1p-19) * (scale > 1 ? scale : 1) * (1 + std::fabs(expected[i]));
                    if (std::isfinite(plain[i]))
                        close = close && std::fabs(double(got[i]) - expected[i]) <= limit + 4 * std::fabs(double(plain[i]) - expected[i]);
                    else
                        close = close && (got[i] == plain[i] || std::isnan(plain[i]));
                }
                CHECK(close);
            }
    }
}

// Rows in other places, in other company, in a batch of one.
void places() {
    Model model;
    model.features = 11;
    model.hidden = {50, 41};
    model.context = 2;
    Random rng(9);
    const FlowSpec spec = spec_of(model, rng);
    const auto packed = weights_of<float>(spec, parameters_of(model, spec, rng));
    const size_t n = 150, d = 11;
    const Reals drawn = normals(n * d, rng), of_context = normals(n * 2, rng);
    Floats x(drawn.begin(), drawn.end()), context(of_context.begin(), of_context.end());
    for (size_t i = 0; i < n; i += 7) x[i * d + i % d] = NAN;  // neighbours of rows that are lost
    std::vector<size_t> order(n);
    std::iota(order.begin(), order.end(), size_t(0));
    std::shuffle(order.begin(), order.end(), rng);
    Floats moved, moved_context;
    for (size_t i : order) {
        moved.insert(moved.end(), x.begin() + long(i * d), x.begin() + long(i * d + d));
        moved_context.insert(moved_context.end(), context.begin() + long(2 * i), context.begin() + long(2 * i + 2));
    }
    for (int parts : {1, 2}) {
        Floats first;
        for (const TensorShape& shape : shapes(parts)) {
            what_runs = std::string("places, ") + name_of(shape);
            Floats here(n), there(n), alone(1);
            warp_halves(*packed, batch_of(model, x, context, n), shape, here.data(), nullptr);
            warp_halves(*packed, batch_of(model, moved, moved_context, n), shape, there.data(), nullptr);
            bool same = true;
            for (size_t i = 0; i < n; ++i) same = same && same_bits(there[i], here[order[i]]);
            for (size_t i : {size_t(0), size_t(77)}) {
                const Floats own(x.begin() + long(i * d), x.begin() + long(i * d + d));
                const Floats own_context(context.begin() + long(2 * i), context.begin() + long(2 * i + 2));
                warp_halves(*packed, batch_of(model, own, own_context, 1), shape, alone.data(), nullptr);
                same = same && same_bits(alone[0], here[i]);
            }
            CHECK(same);
        }
    }
}

// What is chosen for the flows that the kernel is made for, and for some that it is not for.
void choices() {
    Random rng(2);
    struct {
        const char* name;
        int features, width, layers, stages;
    } const flows[] = {{"S", 6, 100, 2, 5}, {"M", 43, 512, 2, 5}, {"64", 64, 512, 2, 10}, {"X", 784, 1024, 1, 5}};
    for (const auto& one : flows) {
        Model model;
        model.features = one.features;
        model.hidden.assign(size_t(one.layers), one.width);
        model.stages = one.stages;
        const FlowSpec spec = spec_of(model, rng);
        const Weights<float> packed(spec);
        for (auto precision : {device::Precision::medium, device::Precision::high})
            for (int64_t shared : {int64_t(99), int64_t(163), int64_t(227)}) {
                const auto choice = fit_tensor_cores(packed, precision, 8, shared * 1024);
                const TensorShape& shape = choice.shape;
                std::vector<std::vector<int>> parts;
                const int64_t used = shape.rows ? room_of(packed.plan(), fitting_stages(packed), shape, parts).shared : 0;
                std::printf("%s, %s, %d KiB: %s, %.1f KiB used\n", one.name, precision == device::Precision::high ? "high" : "medium",
                            int(shared), shape.rows ? name_of(shape) : "without tensor cores", double(used) / 1024);
                CHECK(used <= shared * 1024 && (shape.rows > 0 || shared < 227));
                CHECK(shape.rows == 0 || (shape.groups * shape.teams == 8 && shape.rows == 16 * shape.row_tiles * shape.groups));
                const auto of_draws = fit_draws(packed, precision, 8, shared * 1024);
                const DrawView& draws = of_draws.shape;
                std::printf("    samples: %d rows, %.1f KiB used\n", draws.rows, double(draws.shared) / 1024);
                const double in_float = cycles_in_float(packed.plan(), fitting_stages(packed));
                std::printf("    cycles for a row: %.0f and %.0f, in float %.0f\n", choice.cycles, of_draws.cycles, in_float);
                if (precision == device::Precision::high && shared == 227) {  // what the memory allows, and the L2
                    const bool is_x = model.features == 784, is_m = model.features == 43;
                    CHECK((choice.cycles < in_float) == !is_x || model.features == 6);
                    CHECK(!(is_x || is_m) || of_draws.cycles > in_float);
                }
                CHECK(draws.groups <= 8 && draws.rows == 16 * draws.groups && draws.shared <= shared * 1024 &&
                      (draws.groups > 0 || shared < 227));
            }
        CHECK(fit_tensor_cores(packed, device::Precision::highest, 8, kShared).shape.rows == 0);
        CHECK(fit_draws(packed, device::Precision::highest, 8, kShared).shape.groups == 0);
    }
    Model model;
    FlowSpec spec = spec_of(model, rng);
    Reals parameters = parameters_of(model, spec, rng);
    CHECK(fit_tensor_cores(*weights_of<float>(spec, parameters), device::Precision::high, 8, kShared).shape.rows > 0);
    parameters.back() = NAN;
    CHECK(fitting_stages(*weights_of<float>(spec, parameters)) == std::vector<char>({1, 0}));
    for (StageSpec& stage : spec.stages) stage.skip = true;
    CHECK(fit_tensor_cores(Weights<float>(spec), device::Precision::high, 8, kShared).shape.rows == 0);
}

}  // namespace

int main() {
    fragments_of_the_isa();
    halves_round_to_nearest();
    choices();
    results();
    masked_inputs_change_nothing();
    sizes();
    places();
    samples();
    masked_noise_changes_nothing();
    lost_contexts();
    lost_units();
    lost_beside_others();
    mixed_stages();
    draws_from_counters();
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed ? 1 : 0;
}
