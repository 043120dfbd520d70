// A flow as a file holds it: plain structs, checked as the classes of fastmaf/layers.py and record.py check. Arrays stay where they are in
// the bytes of the file, which must outlive the record.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "../core/view.hpp"
#include "container.hpp"

namespace fastmaf::record {

struct Elementwise {
    std::vector<Bijection> kinds;
    std::vector<double> lower, upper;
};

struct Affine {
    std::vector<double> loc, scale;
};

struct BatchNorm {
    Tensor log_gamma, beta, mean, var;
    double eps = 0;
    bool of_batch = true;
};

struct Permutation {
    std::vector<int64_t> perm;
};

struct Linear {
    Tensor lower, upper, bias;
};

struct LawOf {
    std::string kind;
    Form form = Form::standardize;
    std::vector<std::pair<std::string, double>> constants;  // all that the law has
};

struct Dense {
    Tensor weight, bias;
    std::optional<std::vector<int64_t>> degrees;
    std::string context;
    std::optional<Tensor> context_weight, context_bias, norm_scale, norm_shift;

    int64_t rows() const { return weight.shape[0]; }
    int64_t inputs() const { return weight.shape[1]; }
};

struct Block {
    bool linear = false, residual = false;
    std::vector<Dense> maps;
};

struct Network {
    std::optional<Dense> initial;
    std::vector<Block> blocks;
    Dense final;
    Activation activation = Activation::relu;
    bool final_activation = true;
    std::optional<Tensor> skip;
    std::optional<double> input_clip;

    std::vector<const Dense*> maps() const;  // in order, the final one last
};

struct Autoregressive {
    std::vector<int64_t> ranks;
    Network network;
    LawOf law;
    bool reads_noise = false;
};

struct Normal {
    int64_t features = 0;
};

struct Terminal {
    std::vector<int64_t> ranks;
    Network network;
    int64_t components = 1;
    std::vector<int64_t> values;  // how many values each variable has; 0: any number
    bool lone = false;            // a variable has one row, the logit of 1
    LawOf law;

    int64_t rows(size_t variable) const;  // of the final map
    bool discrete() const;                // some variable is
};

using Layer = std::variant<Elementwise, Affine, BatchNorm, Permutation, Linear, Autoregressive, Normal, Terminal>;

const char* name_of(const Layer& layer);
int64_t width_of(const Layer& layer);
const Network* network_of(const Layer& layer);  // null without

// Ranks of the variables, and degrees of all hidden units, one after the other.
struct Masks {
    std::vector<int64_t> ranks, degrees;
};

struct Record {
    bool is_double = false;
    int64_t features = 0, context_features = 0;
    std::vector<std::string> names;  // none, or one for each feature
    std::vector<Layer> context_layers, layers;
    Layer base = Normal{};
    std::vector<Masks> members;  // of an ensemble of masks: they take the place of those of its one network, whose weights are all there
    std::vector<Record> others;  // of an ensemble of flows: those behind the first
};

// Throws Error.
Record read(std::string_view data);

}  // namespace fastmaf::record
