// Plain types shared by every part of the core: what a flow is before it is packed, and how callers' arrays are described.
#pragma once

#include <cstdint>
#include <vector>

#include "view.hpp"

namespace fastmaf {

// Per column: a fixed bijection to the real line, then z = (x - loc) * scale. All in double.
struct Columns {
    std::vector<Bijection> kind;
    std::vector<double> lower, upper, loc, scale;
};

// One masked linear map; its units may come in any order. `degrees` is empty for the final map.
struct MapSpec {
    int rows = 0;
    int inputs = 0;
    std::vector<int64_t> degrees;
    // Of the first and the final map: reads the context too; its weights (rows, C) follow the bias in the flat parameters.
    bool context = false;
    bool activated = false;  // the next map reads activations
    int adds = -1;           // the hidden map whose sums are added to those of this one, unit by unit; its units have no higher degrees
    // Of a hidden map: units of their own take what the context gives, which then joins the sums; (rows, C) weights and, if there are any,
    // biases follow the bias of the map.
    Joins joins = Joins::none;
    bool context_bias = false;
    // Of a hidden map, or none: its units are sum * scale + shift, or the activation of that.
    std::vector<double> norm_scale{}, norm_shift{};
};

// One step of the flow: a masked network with what its outputs feed, a Linear, or a norm.
struct StageSpec {
    Output output = Output::transform;
    std::vector<int> variable;   // [features] which variable of the data each coordinate carries
    std::vector<int64_t> ranks;  // [features] of each coordinate
    std::vector<MapSpec> maps;   // hidden maps, then the final one with rows[i] rows for coordinate i
    std::vector<int> rows;
    // Of a base: how many values each coordinate has, where a lone row is the logit of 1; 0 for any number, whose rows are a mixture.
    std::vector<int> values;
    bool skip = false;  // direct weights from variables to final rows, behind all maps in the flat parameters
    Activation activation = Activation::relu;
    Law law = Law::exp_soft;
    Form form = Form::affine;
    double constant[2] = {1, 0};     // of the law, see ops/laws
    double input_clip = 0;           // variables beyond +-input_clip are read as it by the maps; 0: all as they are
    bool reads_noise = false;        // of a transform: the maps read what its law makes of the variables, not the variables themselves
    int components = 1;              // of mixtures: rows are logits, means, raw log-scales
    std::vector<double> loc, scale;  // transform of x: an Affine after it, by coordinate, or none. norm: (x - loc) scale if not trainable
    bool trainable = false;          // norm: (x - mean) e^log_gamma / sqrt(var + eps) + beta
    bool of_batch = false;           // in training the statistics are those of the batch
    std::vector<double> mean, var;
    double eps = 0;

    // What the maps read is not the tile of variables itself.
    bool reads_apart() const { return input_clip > 0 || reads_noise; }
    // The context enters a second time, at the final map.
    bool late_context() const { return maps.size() > 1 && maps.back().context; }
    // There are weights from the tile of variables to the final rows.
    bool direct() const { return skip || late_context(); }
    // The maps whose context has units of its own, in order: the maps of these units are the last ones, behind the direct weights.
    std::vector<int> joined() const {
        std::vector<int> result;
        for (const MapSpec& map : maps)
            if (map.joins != Joins::none) result.push_back(int(&map - maps.data()));
        return result;
    }
};

// Numbers somewhere in memory, at any alignment.
struct Piece {
    const char* data;
    int64_t count;
};

struct FlowSpec {
    int features = 0;
    int context = 0;
    Columns columns, context_columns;
    std::vector<StageSpec> stages;    // from data to noise; the last one may be a base
    std::vector<int> noise_variable;  // [features] variable carried by each column of the noise
};

}  // namespace fastmaf
