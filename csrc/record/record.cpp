#include "record.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../core/columns.hpp"
#include "../core/floats.hpp"
#include "json.hpp"

namespace fastmaf::record {

namespace {

constexpr int64_t kFormat = 2;  // the newest that is read
constexpr int kDeepestTraining = 63;
constexpr std::string_view kCheckpoint = "fastmaf_checkpoint", kOfCheckpoint = "checkpoint.";

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
    std::string text;
    auto add = [&](const auto& part) {
        if constexpr (std::is_arithmetic_v<std::decay_t<decltype(part)>>)
            text += std::to_string(part);
        else
            text += part;
    };
    (add(parts), ...);
    throw Error(text);
}

std::string shape_of(const Tensor& tensor) {
    std::string text = "(";
    for (size_t k = 0; k < tensor.shape.size(); ++k) text += (k ? ", " : "") + std::to_string(tensor.shape[k]);
    return text + (tensor.shape.size() == 1 ? ",)" : ")");
}

// Entries of a tensor as T.
template <class T>
std::vector<T> values_of(const Tensor& tensor) {
    std::vector<T> values(size_t(tensor.size));
    if (tensor.size) std::memcpy(values.data(), tensor.data, values.size() * sizeof(T));
    return values;
}

template <class T>
T entry(const Tensor& tensor, int64_t i) {
    T value;
    std::memcpy(&value, tensor.data + i * int64_t(sizeof(T)), sizeof(T));
    return value;
}

double real_entry(const Tensor& tensor, int64_t i) {
    return tensor.numbers == Numbers::f32 ? double(entry<float>(tensor, i)) : entry<double>(tensor, i);
}

// ---- what fits -------------------------------------------------------------------------------------------------------------------

void expect_vector(const std::string& path, const char* name, const Tensor& tensor, int64_t size) {
    if (tensor.shape.size() != 1 || tensor.size != size)
        refuse(path, ": ", name, " has shape ", shape_of(tensor), "; expected (", size, ",)");
}

void expect_matrix(const std::string& path, const char* name, const Tensor& tensor, int64_t rows, int64_t columns) {
    if (tensor.shape.size() != 2 || tensor.shape[0] != rows || tensor.shape[1] != columns)
        refuse(path, ": ", name, " has shape ", shape_of(tensor), "; expected (", rows, ", ", columns, ")");
}

int64_t size_of_vector(const std::string& path, const char* name, const Tensor& tensor) {
    if (tensor.shape.size() != 1) refuse(path, ": ", name, " has shape ", shape_of(tensor), "; it must have 1 dimension");
    return tensor.size;
}

// The first row with a weight that is not zero at an input of a code not below the bound of the row, or -1.
template <class T>
int64_t first_outside(const Tensor& weight, const std::vector<int32_t>& code, const std::vector<int32_t>& bound) {
    const size_t inputs = code.size();
    std::vector<T> row(inputs);
    for (size_t r = 0; r < bound.size() && inputs; ++r) {
        std::memcpy(row.data(), weight.data + r * inputs * sizeof(T), inputs * sizeof(T));
        int outside = 0;
        for (size_t c = 0; c < inputs; ++c) outside |= int(row[c] != T(0)) & int(code[c] >= bound[r]);
        if (outside) return int64_t(r);
    }
    return -1;
}

// Every weight that is not zero lies where an input has a degree of at most the row's.
void check_inside(const std::string& path, const std::string& name, const Tensor& weight, const std::vector<int64_t>& inputs,
                  const std::vector<int64_t>& most) {
    std::vector<int64_t> levels = inputs;
    std::sort(levels.begin(), levels.end());
    levels.erase(std::unique(levels.begin(), levels.end()), levels.end());
    std::vector<int32_t> code, bound;
    for (int64_t degree : inputs) code.push_back(int32_t(std::lower_bound(levels.begin(), levels.end(), degree) - levels.begin()));
    for (int64_t degree : most) bound.push_back(int32_t(std::upper_bound(levels.begin(), levels.end(), degree) - levels.begin()));
    const int64_t row =
        weight.numbers == Numbers::f32 ? first_outside<float>(weight, code, bound) : first_outside<double>(weight, code, bound);
    if (row >= 0) refuse(path, ": ", name, " has a weight in row ", row, " that its degrees forbid");
}

void check_degrees(const std::string& path, const Network& network, const std::vector<const std::vector<int64_t>*>& degrees) {
    size_t map = 0;
    for (size_t b = 0; b < network.blocks.size(); ++b) {
        const std::vector<int64_t>& before = *degrees[map];
        map += network.blocks[b].maps.size();
        const std::vector<int64_t>& after = *degrees[map];
        for (size_t j = 0; network.blocks[b].residual && j < after.size(); ++j)
            if (after[j] < before[j]) refuse(path, ": block ", b, " adds units to others of higher degree");
    }
}

// Degrees of all maps but the final one.
std::vector<const std::vector<int64_t>*> hidden_degrees(const Network& network) {
    std::vector<const std::vector<int64_t>*> degrees;
    for (const Dense* dense : network.maps()) degrees.push_back(&*dense->degrees);
    degrees.pop_back();
    return degrees;
}

void check_ranks(const std::string& path, const std::vector<int64_t>& ranks) {
    if (ranks.empty() || *std::min_element(ranks.begin(), ranks.end()) < 1) refuse(path, ": ranks must be positive, one per variable");
}

// The widths fit, and so do the weights unless `unmasked`. Of the final rows variable i has count(i).
template <class Count>
void check_made(const std::string& path, const std::vector<int64_t>& ranks, const Network& network, Count count, bool unmasked) {
    check_ranks(path, ranks);
    const int64_t features = int64_t(ranks.size());
    const Dense& first = network.initial ? *network.initial : network.final;
    if (first.inputs() != features) refuse(path, ": the first map reads ", first.inputs(), " variables; there are ", features, " ranks");
    const int64_t rows = network.final.rows();
    int64_t left = rows;
    for (int64_t i = 0; i < features && left >= 0; ++i) left = count(i) > left ? -1 : left - count(i);
    if (left) refuse(path, ": the final map has ", rows, " rows, which is not what ", features, " variables need");
    if (network.skip) expect_matrix(path, "skip", *network.skip, rows, features);
    check_degrees(path, network, hidden_degrees(network));
    if (unmasked) return;
    const std::vector<int64_t>* inputs = &ranks;
    int number = 0;
    for (const Dense* dense : network.maps()) {
        if (dense == &network.final) break;
        check_inside(path, "hidden map " + std::to_string(number++), dense->weight, *inputs, *dense->degrees);
        inputs = &*dense->degrees;
    }
    std::vector<int64_t> below;
    for (int64_t i = 0; i < features; ++i) below.insert(below.end(), size_t(count(i)), ranks[size_t(i)] - 1);
    check_inside(path, "the final map", network.final.weight, *inputs, below);
    if (network.skip) check_inside(path, "skip", *network.skip, ranks, below);
}

// ---- from JSON and tensors to structs --------------------------------------------------------------------------------------------

constexpr std::array<std::pair<const char*, std::array<std::pair<const char*, double>, 2>>, 6> kLaws = {{
    {"exp", {}},
    {"exp_soft", {{{"clip", 6.907755278982137}, {nullptr, 0}}}},
    {"softplus", {{{"eps", 1e-3}, {nullptr, 0}}}},
    {"sigmoid", {{{"eps", 1e-3}, {"shift", 2.0}}}},
    {"log_precision", {}},
    {"clamp", {{{"low", -5.0}, {"high", 3.0}}}},
}};

class Reader {
public:
    explicit Reader(Container container) : tensors_(std::move(container.tensors)), metadata_(std::move(container.metadata)) {}

    Record record();

private:
    using Node = const Json&;
    using Path = const std::string&;

    static std::string under(Path path, std::string_view name) { return path + "." + std::string(name); }

    static Node object(Path path, Node node) {
        if (!node.object()) refuse(path, " is not a JSON object");
        return node;
    }
    static const Json::List& list(Path path, Node node) {
        if (!node.list()) refuse(path, " must be a list");
        return *node.list();
    }
    static const std::string& text(Path path, Node node) {
        if (!node.text()) refuse(path, " is ", node.shown(), "; it must be a str");
        return *node.text();
    }
    static int64_t integer(Path path, Node node) {
        if (!node.integer()) refuse(path, " is ", node.shown(), "; it must be a int");
        return *node.integer();
    }
    static double real(Path path, Node node) {
        if (const int64_t* integer = node.integer()) return double(*integer);
        const double* value = std::get_if<double>(&node.value);
        if (!value) refuse(path, " is ", node.shown(), "; it must be a finite float");
        return *value;
    }
    static bool flag(Path path, Node node) {
        if (!node.boolean()) refuse(path, " is ", node.shown(), "; it must be a bool");
        return *node.boolean();
    }
    // The place of a word among those allowed.
    static int choice(Path path, Node node, std::initializer_list<const char*> allowed) {
        const std::string& word = text(path, node);
        int place = 0;
        for (const char* each : allowed) {
            if (word == each) return place;
            ++place;
        }
        refuse(path, " is ", in_quotes(word), ", which this version of fastmaf does not know");
    }
    // The fields of an object: these, and no others but `later`, which older files lack.
    static void fields(Path path, Node node, std::initializer_list<const char*> expected, std::string_view later = "") {
        for (const char* name : expected)
            if (!node.find(name)) refuse(path, " lacks ", in_quotes(name));
        for (const auto& [name, value] : *node.object())
            if (std::none_of(expected.begin(), expected.end(), [&n = name](const char* e) { return n == e; }) && name != later)
                refuse(path, " has an unknown field ", in_quotes(name));
    }
    static Node at(Node node, const char* name) { return *node.find(name); }

    Tensor tensor(Path path, Node node, Numbers numbers);
    Tensor weights(Path path, Node node, const char* name) { return tensor(under(path, name), at(node, name), weights_); }
    std::optional<Tensor> optional_weights(Path path, Node node, const char* name) {
        if (at(node, name).is_null()) return std::nullopt;
        return weights(path, node, name);
    }
    std::vector<double> doubles(Path path, Node node, const char* name);
    std::vector<int64_t> integers(Path path, Node node, const char* name);
    Record flow(Path what, Path prefix, Node root);
    std::vector<Masks> members(Node node, const Record& record);

    void part(Path path, Node node, const char* type, std::initializer_list<const char*> expected, std::string_view later = "");
    std::vector<Layer> layers(Path path, Node node);
    Layer layer(Path path, Node node);
    Elementwise elementwise(Path path, Node node);
    Affine affine(Path path, Node node);
    BatchNorm batch_norm(Path path, Node node);
    Permutation permutation(Path path, Node node);
    Linear linear(Path path, Node node);
    Autoregressive autoregressive(Path path, Node node);
    Terminal terminal(Path path, Node node);
    LawOf law_of(Path path, const std::string& kind, Node constants, Path where);
    Dense dense(Path path, Node node);
    Block block(Path path, Node node);
    Network network(Path path, Node node);

    std::map<std::string, Tensor> tensors_;
    std::map<std::string, std::string> metadata_;
    Numbers weights_ = Numbers::f32;
    bool ensemble_ = false;
};

Tensor Reader::tensor(Path path, Node node, Numbers numbers) {
    const auto found = tensors_.find(path);
    if (!node.text() || *node.text() != path || found == tensors_.end()) refuse("the tensor ", in_quotes(path), " is missing");
    Tensor result = std::move(found->second);
    tensors_.erase(found);
    if (result.numbers != numbers)
        refuse("tensor ", in_quotes(path), " has dtype ", name_of(result.numbers), "; it must have ", name_of(numbers));
    return result;
}

std::vector<double> Reader::doubles(Path path, Node node, const char* name) {
    const Tensor found = tensor(under(path, name), at(node, name), Numbers::f64);
    size_of_vector(path, name, found);
    return values_of<double>(found);
}

std::vector<int64_t> Reader::integers(Path path, Node node, const char* name) {
    const Tensor found = tensor(under(path, name), at(node, name), Numbers::i64);
    size_of_vector(path, name, found);
    return values_of<int64_t>(found);
}

void Reader::part(Path path, Node node, const char* type, std::initializer_list<const char*> expected, std::string_view later) {
    const Json* own = object(path, node).find("type");
    if (!own || !own->text() || *own->text() != type)
        refuse(path, " has type ", own ? own->shown() : "null", "; this version of fastmaf knows ", type);
    fields(path, node, expected, later);
}

Elementwise Reader::elementwise(Path path, Node node) {
    fields(path, node, {"type", "kinds", "lower", "upper"});
    Elementwise own;
    const std::string kinds = under(path, "kinds");
    for (const Json& kind : list(kinds, at(node, "kinds")))
        own.kinds.push_back(
            Bijection(choice(under(kinds, std::to_string(own.kinds.size())), kind, {"identity", "logit", "log_above", "log_below"})));
    own.lower = doubles(path, node, "lower");
    own.upper = doubles(path, node, "upper");
    if (own.lower.size() != own.kinds.size() || own.upper.size() != own.kinds.size())
        refuse(path, ": kinds has ", own.kinds.size(), " entries, lower ", own.lower.size(), " and upper ", own.upper.size());
    for (size_t j = 0; j < own.kinds.size(); ++j) {
        const double low = own.lower[j], high = own.upper[j];
        const Bijection kind = own.kinds[j];
        const bool below = kind == Bijection::logit || kind == Bijection::log_above,
                   above = kind == Bijection::logit || kind == Bijection::log_below;
        if (std::isnan(low) || std::isnan(high) || (below && !std::isfinite(low)) || (above && !std::isfinite(high)) ||
            (kind == Bijection::logit && !(low < high && std::isfinite(high - low))))
            refuse(path, ": column ", j, " has bounds that do not fit its kind");
    }
    return own;
}

Affine Reader::affine(Path path, Node node) {
    fields(path, node, {"type", "loc", "scale"});
    Affine own;
    own.loc = doubles(path, node, "loc");
    own.scale = doubles(path, node, "scale");
    if (own.loc.size() != own.scale.size()) refuse(path, ": scale has shape (", own.scale.size(), ",); expected (", own.loc.size(), ",)");
    for (size_t j = 0; j < own.loc.size(); ++j) {
        if (!std::isfinite(own.loc[j])) refuse(path, ": loc[", j, "] must be finite");
        if (!std::isfinite(own.scale[j]) || own.scale[j] == 0) refuse(path, ": scale[", j, "] must be finite and not zero");
    }
    return own;
}

BatchNorm Reader::batch_norm(Path path, Node node) {
    fields(path, node, {"type", "log_gamma", "beta", "mean", "var", "eps"}, "statistics");
    BatchNorm own;
    own.log_gamma = weights(path, node, "log_gamma");
    own.beta = weights(path, node, "beta");
    own.mean = weights(path, node, "mean");
    own.var = weights(path, node, "var");
    own.eps = real(under(path, "eps"), at(node, "eps"));
    if (const Json* statistics = node.find("statistics"))
        own.of_batch = choice(under(path, "statistics"), *statistics, {"batch", "data"}) == 0;
    const int64_t size = size_of_vector(path, "log_gamma", own.log_gamma);
    expect_vector(path, "beta", own.beta, size);
    expect_vector(path, "mean", own.mean, size);
    expect_vector(path, "var", own.var, size);
    for (int64_t j = 0; j < size; ++j)
        if (!(real_entry(own.var, j) + own.eps > 0)) refuse(path, ": var[", j, "] and eps: their sum must be positive");
    return own;
}

Permutation Reader::permutation(Path path, Node node) {
    fields(path, node, {"type", "perm"});
    Permutation own{integers(path, node, "perm")};
    std::vector<char> seen(own.perm.size());
    for (int64_t place : own.perm) {
        if (place < 0 || place >= int64_t(seen.size()) || seen[size_t(place)])
            refuse(path, ": perm is not a permutation of 0..", int64_t(seen.size()) - 1);
        seen[size_t(place)] = 1;
    }
    return own;
}

Linear Reader::linear(Path path, Node node) {
    fields(path, node, {"type", "lower", "upper", "bias"});
    Linear own{weights(path, node, "lower"), weights(path, node, "upper"), weights(path, node, "bias")};
    const int64_t n = size_of_vector(path, "bias", own.bias);
    expect_matrix(path, "lower", own.lower, n, n);
    expect_matrix(path, "upper", own.upper, n, n);
    for (int64_t j = 0; j < n; ++j)
        if (real_entry(own.upper, j * n + j) == 0) refuse(path, ": upper has a zero in row ", j, " of its diagonal");
    return own;
}

// `path` is that of the constants, `where` that of the layer or law they belong to.
LawOf Reader::law_of(Path path, const std::string& kind, Node constants, Path where) {
    LawOf law;
    law.kind = kind;
    const auto* found = std::find_if(kLaws.begin(), kLaws.end(), [&](const auto& each) { return kind == each.first; });
    if (found == kLaws.end()) refuse(where, ": law is ", in_quotes(kind), ", which this version of fastmaf does not know");
    for (const auto& [name, value] : found->second)
        if (name) law.constants.emplace_back(name, value);
    for (const auto& [name, node] : *object(path, constants).object()) {
        const auto own =
            std::find_if(law.constants.begin(), law.constants.end(), [&n = name](const auto& each) { return each.first == n; });
        if (own == law.constants.end()) refuse(where, ": law ", in_quotes(kind), " has no constant ", in_quotes(name));
        own->second = real(under(path, name), node);
    }
    for (const auto& [name, value] : law.constants)
        if ((name == "clip" || name == "eps") && !(value > 0))
            refuse(where, ": constant ", in_quotes(name), " of law ", in_quotes(kind), " must be positive");
    if (kind == "clamp" && !(law.constants[0].second < law.constants[1].second)) refuse(where, ": law 'clamp' must have low below high");
    return law;
}

Dense Reader::dense(Path path, Node node) {
    part(path, node, "Dense",
         {"type", "weight", "bias", "degrees", "context", "context_weight", "context_bias", "norm_scale", "norm_shift"});
    Dense own;
    own.weight = weights(path, node, "weight");
    own.bias = weights(path, node, "bias");
    if (!at(node, "degrees").is_null()) own.degrees = integers(path, node, "degrees");
    choice(under(path, "context"), at(node, "context"), {"none", "added", "activated", "gated"});
    own.context = *at(node, "context").text();
    own.context_weight = optional_weights(path, node, "context_weight");
    own.context_bias = optional_weights(path, node, "context_bias");
    own.norm_scale = optional_weights(path, node, "norm_scale");
    own.norm_shift = optional_weights(path, node, "norm_shift");
    if (own.weight.shape.size() != 2) refuse(path, ": weight has shape ", shape_of(own.weight), "; it must have 2 dimensions");
    expect_vector(path, "bias", own.bias, own.rows());
    if (own.degrees && int64_t(own.degrees->size()) != own.rows())
        refuse(path, ": degrees has shape (", own.degrees->size(), ",); expected (", own.rows(), ",)");
    if ((own.context == "none") == own.context_weight.has_value())
        refuse(path, ": context is ", in_quotes(own.context), ", but context_weight is ", own.context_weight ? "given" : "absent");
    if (own.context == "none" && own.context_bias) refuse(path, ": context is 'none', but context_bias is given");
    if (own.norm_scale.has_value() != own.norm_shift.has_value())
        refuse(path, ": norm_", own.norm_shift ? "scale" : "shift", " is missing");
    if (own.context_weight) {
        if (own.context_weight->shape.size() != 2)
            refuse(path, ": context_weight has shape ", shape_of(*own.context_weight), "; it must have 2 dimensions");
        expect_matrix(path, "context_weight", *own.context_weight, own.rows(), own.context_weight->shape[1]);
    }
    if (own.context_bias) expect_vector(path, "context_bias", *own.context_bias, own.rows());
    if (own.norm_scale) {
        expect_vector(path, "norm_scale", *own.norm_scale, own.inputs());
        expect_vector(path, "norm_shift", *own.norm_shift, own.inputs());
    }
    return own;
}

Block Reader::block(Path path, Node node) {
    part(path, node, "Block", {"type", "kind", "maps"});
    Block own;
    const int kind = choice(under(path, "kind"), at(node, "kind"), {"plain", "linear", "residual", "linear_residual"});
    own.linear = kind % 2 == 1;
    own.residual = kind >= 2;
    const std::string maps = under(path, "maps");
    for (const Json& map : list(maps, at(node, "maps"))) own.maps.push_back(dense(under(maps, std::to_string(own.maps.size())), map));
    if (own.maps.size() != 1u + own.residual) refuse(path, ": a ", *at(node, "kind").text(), " block has ", own.maps.size(), " maps");
    if (own.residual && own.maps[1].rows() != own.maps[0].inputs())
        refuse(path, ": a residual block maps ", own.maps[0].inputs(), " units to ", own.maps[1].rows());
    return own;
}

Network Reader::network(Path path, Node node) {
    part(path, node, "Conditioner", {"type", "initial", "blocks", "final", "activation", "final_activation", "skip"}, "input_clip");
    Network own;
    if (!at(node, "initial").is_null()) own.initial = dense(under(path, "initial"), at(node, "initial"));
    const std::string blocks = under(path, "blocks");
    for (const Json& each : list(blocks, at(node, "blocks")))
        own.blocks.push_back(block(under(blocks, std::to_string(own.blocks.size())), each));
    own.final = dense(under(path, "final"), at(node, "final"));
    own.activation = Activation(choice(under(path, "activation"), at(node, "activation"), {"relu", "tanh", "elu", "gelu", "silu"}));
    own.final_activation = flag(under(path, "final_activation"), at(node, "final_activation"));
    own.skip = optional_weights(path, node, "skip");
    if (const Json* clip = node.find("input_clip"); clip && !clip->is_null()) {
        own.input_clip = real(under(path, "input_clip"), *clip);
        if (!(*own.input_clip > 0)) refuse(path, ": input_clip must be a positive number or null");
    }
    if (!own.initial && !own.blocks.empty()) refuse(path, ": a conditioner with blocks needs an initial map");
    const Dense* before = nullptr;
    int number = 0;
    for (const Dense* map : own.maps()) {
        const bool final = map == &own.final;
        const std::string name = final ? "the final map" : "hidden map " + std::to_string(number++);
        if (!final && !map->degrees) refuse(path, ": ", name, " has no degrees");
        if (before && map->inputs() != before->rows()) refuse(path, ": ", name, " reads ", map->inputs(), " units of ", before->rows());
        before = map;
    }
    if (own.skip && own.skip->shape.size() != 2) refuse(path, ": skip has shape ", shape_of(*own.skip), "; it must have 2 dimensions");
    return own;
}

Autoregressive Reader::autoregressive(Path path, Node node) {
    fields(path, node, {"type", "ranks", "conditioner", "law", "direction"});
    Autoregressive own;
    own.ranks = integers(path, node, "ranks");
    own.network = network(under(path, "conditioner"), at(node, "conditioner"));
    const std::string law = under(path, "law");
    part(law, at(node, "law"), "Law", {"type", "kind", "form", "constants"});
    const std::string& kind = text(under(law, "kind"), at(at(node, "law"), "kind"));
    own.law = law_of(under(law, "constants"), kind, at(at(node, "law"), "constants"), law);
    own.law.form = Form(choice(under(law, "form"), at(at(node, "law"), "form"), {"standardize", "affine"}));
    own.reads_noise = choice(under(path, "direction"), at(node, "direction"), {"data", "noise"}) == 1;
    check_made(
        path, own.ranks, own.network, [](int64_t) { return int64_t(2); }, ensemble_);
    return own;
}

Terminal Reader::terminal(Path path, Node node) {
    fields(path, node, {"type", "ranks", "conditioner", "conditional", "components", "categories", "constants", "law"});
    Terminal own;
    own.ranks = integers(path, node, "ranks");
    own.network = network(under(path, "conditioner"), at(node, "conditioner"));
    enum { mixture, bernoulli, categorical, mixed };
    const int conditional = choice(under(path, "conditional"), at(node, "conditional"), {"mixture", "bernoulli", "categorical", "mixed"});
    own.components = integer(under(path, "components"), at(node, "components"));
    const std::string categories = under(path, "categories");
    for (const Json& count : list(categories, at(node, "categories")))
        own.values.push_back(integer(under(categories, std::to_string(own.values.size())), count));
    own.law = law_of(under(path, "constants"), text(under(path, "law"), at(node, "law")), at(node, "constants"), path);
    if (own.components < 1) refuse(path, ": components is ", own.components);
    own.lone = conditional == bernoulli;
    if (conditional == mixture || conditional == bernoulli) {
        own.values.assign(own.ranks.size(), own.lone ? 2 : 0);
    } else {
        const auto wrong = [&](int64_t count) { return count < 2 && !(conditional == mixed && count == 0); };
        if (own.values.size() != own.ranks.size() || std::any_of(own.values.begin(), own.values.end(), wrong))
            refuse(path, ": categories must give at least 2 values", conditional == mixed ? ", or 0 for any number," : "", " for each of ",
                   own.ranks.size(), " variables");
    }
    check_made(
        path, own.ranks, own.network, [&](int64_t i) { return own.rows(size_t(i)); }, ensemble_);
    return own;
}

Layer Reader::layer(Path path, Node node) {
    const Json* type = object(path, node).find("type");
    const std::string name = type && type->text() ? *type->text() : "";
    if (name == "Elementwise") return elementwise(path, node);
    if (name == "Affine") return affine(path, node);
    if (name == "BatchNorm") return batch_norm(path, node);
    if (name == "Permutation") return permutation(path, node);
    if (name == "Linear") return linear(path, node);
    if (name == "Autoregressive") return autoregressive(path, node);
    if (name == "Terminal") return terminal(path, node);
    if (name == "Normal") {
        fields(path, node, {"type", "features"});
        return Normal{integer(under(path, "features"), at(node, "features"))};
    }
    refuse(path, " has type ", type ? type->shown() : "null", ", which this version of fastmaf does not know");
}

std::vector<Layer> Reader::layers(Path path, Node node) {
    std::vector<Layer> result;
    for (const Json& each : list(path, node)) result.push_back(layer(under(path, std::to_string(result.size())), each));
    return result;
}

// A number of this dtype lies strictly between the bounds of every column.
template <class T>
void check_range(const std::string& path, const Elementwise& layer) {
    constexpr T inf = std::numeric_limits<T>::infinity();
    for (size_t j = 0; j < layer.kinds.size(); ++j) {
        T low, high;
        inner_range(layer.kinds[j], layer.lower[j], layer.upper[j], low, high);
        if (!(low <= high) || low == inf || high == -inf)
            refuse(path, ": column ", j, " has bounds between which ", sizeof(T) == 4 ? "float32" : "float64", " has no number");
    }
}

void check_width(const std::string& name, int64_t width, int64_t expected, const char* what) {
    if (width != expected) refuse(name, " has width ", width, "; the flow has ", expected, " ", what);
}

// Whether the values of column j go through a layer as they are, and no other column depends on them.
bool leaves(const Layer& layer, size_t j) {
    if (const auto* own = std::get_if<Elementwise>(&layer)) return j < own->kinds.size() && own->kinds[j] == Bijection::identity;
    const auto* affine = std::get_if<Affine>(&layer);
    return affine && j < affine->loc.size() && affine->loc[j] == 0 && affine->scale[j] == 1;
}

void check_flow(const Record& record) {
    auto check_network = [&](const std::string& name, const Network& network) {
        for (const Dense* map : network.maps()) {
            if (map->rows() == 0) refuse(name, " has a hidden layer without units");
            if (map->context_weight)
                check_width("the context of " + name, map->context_weight->shape[1], record.context_features, "context features");
        }
    };
    if (record.features < 1) refuse("features is ", record.features, "; it must be at least 1");
    if (record.context_features < 0) refuse("context_features is ", record.context_features, "; it must be at least 0");
    if (!std::holds_alternative<Normal>(record.base) && !std::holds_alternative<Terminal>(record.base))
        refuse("base is of type ", name_of(record.base), "; it must be Normal or Terminal");
    check_width("base", width_of(record.base), record.features, "features");
    if (const auto* base = std::get_if<Terminal>(&record.base)) {
        check_network("base", base->network);
        for (const Layer& layer : record.layers)
            for (size_t j = 0; j < base->values.size(); ++j)
                if (base->values[j] && !leaves(layer, j))
                    refuse("column ", j,
                           " has the values of a discrete variable, which the layers in front of the base must leave as they are");
    }
    for (size_t k = 0; k < record.layers.size(); ++k) {
        const std::string name = "layers[" + std::to_string(k) + "]";
        const Layer& layer = record.layers[k];
        if (std::holds_alternative<Normal>(layer) || std::holds_alternative<Terminal>(layer))
            refuse(name, " is of type ", name_of(layer), ", which is no layer");
        check_width(name, width_of(layer), record.features, "features");
        if (const auto* made = std::get_if<Autoregressive>(&layer)) check_network(name, made->network);
        if (const auto* own = std::get_if<Elementwise>(&layer)) {
            if (record.is_double)
                check_range<double>(name, *own);
            else
                check_range<float>(name, *own);
        }
    }
    for (size_t k = 0; k < record.context_layers.size(); ++k) {
        const std::string name = "context_layers[" + std::to_string(k) + "]";
        const Layer& layer = record.context_layers[k];
        if (!std::holds_alternative<Elementwise>(layer) && !std::holds_alternative<Affine>(layer))
            refuse(name, " is of type ", name_of(layer), "; it must be Elementwise or Affine");
        check_width(name, width_of(layer), record.context_features, "context features");
    }
}

// The density of an ensemble is the mean of densities of the same rows.
void check_beside(const std::string& path, const Record& own, const Record& first) {
    const auto discrete = [](const Record& record) {
        const auto* base = std::get_if<Terminal>(&record.base);
        return base && base->discrete() ? std::pair(base->lone, base->values) : std::pair(false, std::vector<int64_t>());
    };
    const char* const other = own.features != first.features                   ? "features"
                              : own.context_features != first.context_features ? "context_features"
                              : own.is_double != first.is_double               ? "dtype"
                              : discrete(own) != discrete(first)               ? "discrete variables"
                              : own.names != first.names                       ? "names"
                                                                               : nullptr;
    if (other) refuse(path, " has other ", other, " than flows.0");
}

std::vector<Masks> Reader::members(Node node, const Record& record) {
    fields("ensemble", object("ensemble", node), {"ranks", "degrees"});
    const Network* network = network_of(record.base);
    int networks = network != nullptr;
    for (const Layer& layer : record.layers)
        if (const Network* own = network_of(layer)) network = own, ++networks;
    if (networks != 1) refuse("the flow has ", networks, " networks; an ensemble needs exactly one");
    int64_t units = 0;
    for (const auto* degrees : hidden_degrees(*network)) units += int64_t(degrees->size());
    const Tensor ranks = tensor("ensemble.ranks", at(node, "ranks"), Numbers::i64);
    const Tensor degrees = tensor("ensemble.degrees", at(node, "degrees"), Numbers::i64);
    const int64_t count = ranks.shape.empty() ? 0 : ranks.shape[0];
    expect_matrix("ensemble", "ranks", ranks, count, record.features);
    expect_matrix("ensemble", "degrees", degrees, count, units);
    if (!count) refuse("ensemble: there must be at least one member");
    std::vector<Masks> result;
    const std::vector<int64_t> all_ranks = values_of<int64_t>(ranks), all_degrees = values_of<int64_t>(degrees);
    for (int64_t k = 0; k < count; ++k) {
        Masks member;
        member.ranks.assign(all_ranks.begin() + k * record.features, all_ranks.begin() + (k + 1) * record.features);
        member.degrees.assign(all_degrees.begin() + k * units, all_degrees.begin() + (k + 1) * units);
        const std::string path = "ensemble: member " + std::to_string(k);
        check_ranks(path, member.ranks);
        std::vector<std::vector<int64_t>> pieces;
        auto first = member.degrees.begin();
        for (const auto* own : hidden_degrees(*network)) {
            pieces.emplace_back(first, first + int64_t(own->size()));
            first += int64_t(own->size());
        }
        std::vector<const std::vector<int64_t>*> views;
        views.reserve(pieces.size());
        for (const auto& piece : pieces) views.push_back(&piece);
        check_degrees(path, *network, views);
        result.push_back(std::move(member));
    }
    return result;
}

Record Reader::record() {
    if (metadata_.count(std::string(kCheckpoint)))
        for (auto each = tensors_.lower_bound(std::string(kOfCheckpoint));
             each != tensors_.end() && each->first.compare(0, kOfCheckpoint.size(), kOfCheckpoint) == 0;)
            each = tensors_.erase(each);
    const auto found = metadata_.find("fastmaf");
    if (found == metadata_.end()) refuse("it is a safetensors file without the metadata of fastmaf");
    const Json root = parse_json(found->second, "its metadata");
    const std::string what = "the metadata";
    const Json* format = object(what, root).find("format");
    if (!format || !format->integer() || *format->integer() < 1) refuse("its format is ", format ? format->shown() : "null");
    if (*format->integer() > kFormat)
        refuse("it has format ", *format->integer(), "; this version of fastmaf reads formats up to ", kFormat, ": update fastmaf");
    Record result;
    if (const Json* flows = root.find("flows")) {
        fields(what, root, {"format", "flows"});
        const std::vector<Json>& all = list("flows", *flows);
        if (all.empty()) refuse("flows must be a list of at least one flow");
        for (size_t k = 0; k < all.size(); ++k) {
            const std::string path = "flows." + std::to_string(k);
            Record own = flow(path, path + ".", object(path, all[k]));
            if (k)
                check_beside(path, own, result), result.others.push_back(std::move(own));
            else
                result = std::move(own);
        }
    } else {
        result = flow(what, "", root);
    }
    if (!tensors_.empty()) refuse("no layer has the tensor ", in_quotes(tensors_.begin()->first));
    return result;
}

Record Reader::flow(Path what, Path prefix, Node root) {
    const bool nested = !prefix.empty();
    if (nested)
        fields(what, root, {"dtype", "features", "context_features", "names", "context_layers", "layers", "base", "training"});
    else
        fields(what, root, {"format", "dtype", "features", "context_features", "names", "context_layers", "layers", "base", "training"},
               "ensemble");
    const Json* ensemble = nested ? nullptr : root.find("ensemble");
    ensemble_ = ensemble && !ensemble->is_null();
    const Json& dtype = at(root, "dtype");
    if (!dtype.text() || (*dtype.text() != "float32" && *dtype.text() != "float64")) refuse("its dtype is ", dtype.shown());
    Record result;
    result.is_double = *dtype.text() == "float64";
    weights_ = result.is_double ? Numbers::f64 : Numbers::f32;
    result.layers = layers(prefix + "layers", at(root, "layers"));
    result.base = layer(prefix + "base", at(root, "base"));
    result.features = integer("features", at(root, "features"));
    result.context_features = integer("context_features", at(root, "context_features"));
    result.context_layers = layers(prefix + "context_layers", at(root, "context_layers"));
    if (object("training", at(root, "training")).depth() > kDeepestTraining) refuse("training holds lists or mappings too deep");
    check_flow(result);
    if (!at(root, "names").is_null()) {
        for (const Json& name : list("names", at(root, "names")))
            result.names.push_back(text("names." + std::to_string(result.names.size()), name));
        std::vector<std::string> sorted = result.names;
        std::sort(sorted.begin(), sorted.end());
        if (int64_t(sorted.size()) != result.features || std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end())
            refuse("names must list ", result.features, " different names");
    }
    if (ensemble_) result.members = members(*ensemble, result);
    return result;
}

}  // namespace

std::vector<const Dense*> Network::maps() const {
    std::vector<const Dense*> result;
    if (initial) result.push_back(&*initial);
    for (const Block& block : blocks)
        for (const Dense& map : block.maps) result.push_back(&map);
    result.push_back(&final);
    return result;
}

const char* name_of(const Layer& layer) {
    constexpr const char* names[] = {"Elementwise", "Affine", "BatchNorm", "Permutation", "Linear", "Autoregressive", "Normal", "Terminal"};
    return names[layer.index()];
}

int64_t width_of(const Layer& layer) {
    struct Width {
        int64_t operator()(const Elementwise& own) const { return int64_t(own.kinds.size()); }
        int64_t operator()(const Affine& own) const { return int64_t(own.loc.size()); }
        int64_t operator()(const BatchNorm& own) const { return own.beta.size; }
        int64_t operator()(const Permutation& own) const { return int64_t(own.perm.size()); }
        int64_t operator()(const Linear& own) const { return own.bias.size; }
        int64_t operator()(const Autoregressive& own) const { return int64_t(own.ranks.size()); }
        int64_t operator()(const Normal& own) const { return own.features; }
        int64_t operator()(const Terminal& own) const { return int64_t(own.ranks.size()); }
    };
    return std::visit(Width{}, layer);
}

int64_t Terminal::rows(size_t variable) const {
    constexpr int64_t most = std::numeric_limits<int64_t>::max();
    if (values[variable]) return lone ? 1 : values[variable];
    return components > most / 3 ? most : 3 * components;
}

bool Terminal::discrete() const {
    return std::any_of(values.begin(), values.end(), [](int64_t count) { return count > 0; });
}

const Network* network_of(const Layer& layer) {
    if (const auto* made = std::get_if<Autoregressive>(&layer)) return &made->network;
    if (const auto* made = std::get_if<Terminal>(&layer)) return &made->network;
    return nullptr;
}

Record read(std::string_view data) {
    const PlainFloats floats;  // next to a bound at 0 are denormals
    return Reader(read_container(data)).record();
}

}  // namespace fastmaf::record
