#include "lower.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "../core/floats.hpp"

namespace fastmaf::record {

namespace {

constexpr int64_t kWidest =
    int64_t(1) << 24;  // rows of a map, and columns: places among the lanes of a tile, 48 for each of them, are ints
constexpr int64_t kUnread = int64_t(1) << 20;  // features that no tensor bears witness to: nothing else bounds what they would cost

// How the maps of a network are wired.
struct Wire {
    bool activated;  // the next map reads activations
    int adds;        // the map whose sums are added to its own, or -1
};

std::vector<Wire> wires_of(const Network& network) {
    std::vector<Wire> wires;
    if (network.initial) wires.push_back({false, -1});
    for (const Block& block : network.blocks) {
        wires.back().activated = !block.linear;
        const int before = int(wires.size()) - 1;
        if (block.residual) wires.push_back({true, -1});
        wires.push_back({false, block.residual ? before : -1});
    }
    if (network.initial) wires.back().activated = network.final_activation;
    wires.push_back({false, -1});
    return wires;
}

std::string missing_in(const Network& network) {
    for (const Dense* map : network.maps())
        if (map->rows() > kWidest) return "a map of " + std::to_string(map->rows()) + " rows";
    if (network.maps()[0]->norm_scale) return "an inner batch norm in front of the first map";
    const Dense& final = network.final;
    if (final.context_bias || (final.context != "none" && final.context != "added"))
        return "a context that enters the final map " + (final.context == "added" ? "with a bias of its own" : final.context);
    return "";
}

Joins joins_of(const std::string& context) {
    return context == "activated" ? Joins::activated : context == "gated" ? Joins::gated : Joins::added;
}

// ((x - a) p - b) q = (x - (a + b / p)) p q, `place` telling which entry of the second belongs to each of the first.
void merge(std::vector<double>& loc, std::vector<double>& scale, const Affine& second, const std::vector<size_t>& place) {
    for (size_t j = 0; j < loc.size(); ++j) {
        loc[j] += second.loc[place[j]] / scale[j];
        scale[j] *= second.scale[place[j]];
        if (!std::isfinite(loc[j]) || !std::isfinite(scale[j]) || scale[j] == 0)
            throw Error("Affine layers that follow each other: column " + std::to_string(j) + " of their product is beyond float64");
    }
}

std::vector<size_t> counted(size_t n) {
    std::vector<size_t> numbers(n);
    std::iota(numbers.begin(), numbers.end(), size_t(0));
    return numbers;
}

// How many layers stand in front of those that become stages.
size_t front_of(const std::vector<Layer>& layers) {
    size_t count = !layers.empty() && std::holds_alternative<Elementwise>(layers[0]);
    while (count < layers.size() && std::holds_alternative<Affine>(layers[count])) ++count;
    return count;
}

Columns columns_of(const std::vector<Layer>& layers, size_t width) {
    constexpr double inf = std::numeric_limits<double>::infinity();
    Columns columns;
    if (!layers.empty() && std::holds_alternative<Elementwise>(layers[0])) {
        const auto& own = std::get<Elementwise>(layers[0]);
        columns.kind = own.kinds;
        columns.lower = own.lower;
        columns.upper = own.upper;
    } else {
        columns.kind.assign(width, Bijection::identity);
        columns.lower.assign(width, -inf);
        columns.upper.assign(width, inf);
    }
    columns.loc.assign(width, 0.0);
    columns.scale.assign(width, 1.0);
    const std::vector<size_t> same = counted(width);
    for (size_t k = 0, end = front_of(layers); k < end; ++k)
        if (const auto* affine = std::get_if<Affine>(&layers[k])) merge(columns.loc, columns.scale, *affine, same);
    return columns;
}

std::vector<double> widened(const Tensor& tensor) {
    std::vector<double> values(size_t(tensor.size));
    for (size_t j = 0; j < values.size(); ++j) {
        if (tensor.numbers == Numbers::f32) {
            float value;
            std::memcpy(&value, tensor.data + j * sizeof value, sizeof value);
            values[j] = value;
        } else {
            std::memcpy(&values[j], tensor.data + j * sizeof(double), sizeof(double));
        }
    }
    return values;
}

Law law_of(const std::string& kind) {
    constexpr const char* kinds[] = {"exp", "exp_soft", "softplus", "sigmoid", "log_precision", "clamp"};
    return Law(std::find(std::begin(kinds), std::end(kinds), kind) - std::begin(kinds));
}

StageSpec network_stage(const Network& network, const std::vector<int64_t>& ranks, const LawOf& law, const Masks* member) {
    StageSpec stage;
    stage.ranks = member ? member->ranks : ranks;
    stage.activation = network.activation;
    stage.law = law_of(law.kind);
    stage.form = law.form;
    for (size_t i = 0; i < law.constants.size(); ++i) stage.constant[i] = law.constants[i].second;
    // The least one is not zero in any dtype, which would say that nothing is clipped.
    if (network.input_clip) stage.input_clip = std::max(*network.input_clip, double(std::numeric_limits<float>::min()));
    stage.skip = network.skip.has_value();
    const std::vector<Wire> wires = wires_of(network);
    size_t unit = 0;
    for (const Dense* dense : network.maps()) {
        MapSpec map;
        map.rows = int(dense->rows());
        map.inputs = int(dense->inputs());
        if (dense->degrees) map.degrees = *dense->degrees;
        if (member && dense != &network.final) {
            map.degrees.assign(member->degrees.begin() + int64_t(unit), member->degrees.begin() + int64_t(unit) + map.rows);
            unit += size_t(map.rows);
        }
        const bool end = stage.maps.empty() || dense == &network.final;
        map.context = end && dense->context == "added" && !dense->context_bias;
        if (!map.context && dense->context != "none") map.joins = joins_of(dense->context);
        map.context_bias = dense->context_bias.has_value();
        if (dense->norm_scale) {  // in front of this map, behind the one before
            stage.maps.back().norm_scale = widened(*dense->norm_scale);
            stage.maps.back().norm_shift = widened(*dense->norm_shift);
        }
        map.activated = wires[stage.maps.size()].activated;
        map.adds = wires[stage.maps.size()].adds;
        stage.maps.push_back(std::move(map));
    }
    return stage;
}

StageSpec stage_of(const Layer& layer, const Masks* member) {
    StageSpec stage;
    if (std::holds_alternative<Linear>(layer)) {
        stage.output = Output::linear;
    } else if (const auto* affine = std::get_if<Affine>(&layer)) {
        stage.output = Output::norm;
        stage.loc = affine->loc;
        stage.scale = affine->scale;
    } else if (const auto* norm = std::get_if<BatchNorm>(&layer)) {
        stage.output = Output::norm;
        stage.trainable = true;
        stage.of_batch = norm->of_batch;
        stage.mean = widened(norm->mean);
        stage.var = widened(norm->var);
        stage.eps = norm->eps;
    } else if (const auto* made = std::get_if<Autoregressive>(&layer)) {
        stage = network_stage(made->network, made->ranks, made->law, member);
        stage.output = Output::transform;
        stage.rows.assign(made->ranks.size(), 2);
        stage.reads_noise = made->reads_noise;
    } else {
        const auto& base = std::get<Terminal>(layer);
        stage = network_stage(base.network, base.ranks, base.law, member);
        stage.output = Output::base;
        stage.values.assign(base.values.begin(), base.values.end());
        for (size_t i = 0; i < base.values.size(); ++i) stage.rows.push_back(int(base.rows(i)));
        const bool mixtures = std::count(base.values.begin(), base.values.end(), 0) > 0;  // of others the number may be anything
        if (mixtures) stage.components = int(base.components);
    }
    return stage;
}

bool reads_context(const Record& record) {
    bool reads = !record.context_layers.empty() || network_of(record.base);
    for (const Layer& layer : record.layers) reads = reads || network_of(layer);
    return reads;
}

}  // namespace

std::string unsupported(const Record& record) {
    if (const auto* base = std::get_if<Terminal>(&record.base)) {
        std::string missing = missing_in(base->network);
        if (!missing.empty()) return missing;
    }
    for (size_t k = front_of(record.layers); k < record.layers.size(); ++k) {
        const Layer& layer = record.layers[k];
        if (std::holds_alternative<Elementwise>(layer)) return "a Elementwise layer behind other layers";
        if (const auto* made = std::get_if<Autoregressive>(&layer)) {
            std::string missing = missing_in(made->network);
            if (!missing.empty()) return missing;
        }
    }
    if (front_of(record.context_layers) != record.context_layers.size()) return "context layers other than an Elementwise and then Affines";
    const bool witnessed = !record.layers.empty() || network_of(record.base);
    if (record.features > (witnessed ? kWidest : kUnread))
        return std::to_string(record.features) + " features" + (witnessed ? "" : " without layers");
    if (record.context_features > (reads_context(record) ? kWidest : kUnread))
        return std::to_string(record.context_features) + " context features" + (reads_context(record) ? "" : " that nothing reads");
    return "";
}

FlowSpec lower(const Record& record, size_t member) {
    const PlainFloats floats;
    if (member >= std::max<size_t>(record.members.size(), 1)) throw Error("there is no member " + std::to_string(member));
    const Masks* masks = record.members.empty() ? nullptr : &record.members[member];
    FlowSpec spec;
    spec.features = int(record.features);
    spec.context = int(record.context_features);
    spec.columns = columns_of(record.layers, size_t(record.features));
    spec.context_columns = columns_of(record.context_layers, size_t(record.context_features));
    std::vector<int> variable(size_t(record.features));
    std::iota(variable.begin(), variable.end(), 0);
    // The coordinate that carries each of these variables.
    auto places = [&](const std::vector<int>& variables) {
        std::vector<size_t> coordinate(variable.size()), result;
        for (size_t i = 0; i < variable.size(); ++i) coordinate[size_t(variable[i])] = i;
        for (int v : variables) result.push_back(coordinate[size_t(v)]);
        return result;
    };
    for (size_t k = front_of(record.layers); k < record.layers.size(); ++k) {
        const Layer& layer = record.layers[k];
        const auto* affine = std::get_if<Affine>(&layer);
        if (const auto* permutation = std::get_if<Permutation>(&layer)) {
            std::vector<int> permuted;
            for (int64_t place : permutation->perm) permuted.push_back(variable[size_t(place)]);
            variable = std::move(permuted);
        } else if (affine && spec.stages.empty()) {  // behind a Permutation at the head: back to the columns of the data
            std::vector<int> columns(variable.size());
            std::iota(columns.begin(), columns.end(), 0);
            merge(spec.columns.loc, spec.columns.scale, *affine, places(columns));
        } else if (affine && spec.stages.back().output == Output::transform && !spec.stages.back().reads_noise) {
            StageSpec& last = spec.stages.back();
            if (last.scale.empty()) {
                last.loc.assign(variable.size(), 0.0);
                last.scale.assign(variable.size(), 1.0);
            }
            merge(last.loc, last.scale, *affine, places(last.variable));
        } else {
            spec.stages.push_back(stage_of(layer, masks));
            spec.stages.back().variable = variable;
        }
    }
    if (network_of(record.base)) {
        spec.stages.push_back(stage_of(record.base, masks));
        spec.stages.back().variable = variable;
    }
    spec.noise_variable = std::move(variable);
    return spec;
}

std::vector<Piece> parameters(const Record& record) {
    std::vector<Piece> result;
    auto add = [&](const Tensor& tensor) { result.push_back({tensor.data, tensor.size}); };
    auto of = [&](const Layer& layer) {
        if (const auto* norm = std::get_if<BatchNorm>(&layer)) {
            add(norm->log_gamma);
            add(norm->beta);
        } else if (const auto* linear = std::get_if<Linear>(&layer)) {
            add(linear->lower);
            add(linear->upper);
            add(linear->bias);
        } else if (const Network* network = network_of(layer)) {
            for (const Dense* map : network->maps()) {
                add(map->weight);
                add(map->bias);
                if (map->context_weight) add(*map->context_weight);
                if (map->context_bias) add(*map->context_bias);
            }
            if (network->skip) add(*network->skip);
        }
    };
    for (const Layer& layer : record.layers) of(layer);
    of(record.base);
    return result;
}

}  // namespace fastmaf::record
