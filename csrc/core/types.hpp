// Plain types shared by every part of the core: what a flow is before it is packed, and how callers' arrays are described.
#pragma once

#include <cstdint>
#include <vector>

namespace fastmaf {

enum class Activation : int { relu, tanh, elu, gelu, silu };
// Whether act' needs the argument of act, so that backward has to keep it; otherwise the value will do.
constexpr bool keeps_argument(Activation a) { return a == Activation::gelu || a == Activation::silu; }

enum class Law : int { exp, exp_soft };
enum class Form : int { standardize, affine };
enum class Bijection : int { identity, logit, log_above, log_below };
enum class DType : int { f16, f32, f64, i8, i16, i32, i64, u8, u16, u32, u64, boolean };

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
    bool context = false;  // reads the context too; its weights (rows, C) follow the bias in the flat parameters
};

struct MadeSpec {
    std::vector<int64_t> ranks;    // [features] of each coordinate
    std::vector<MapSpec> maps;     // hidden maps, then the final one with rows 2 i (shift) and 2 i + 1 (raw log-scale)
    std::vector<int> variable;     // [features] which variable of the data each coordinate carries
    std::vector<double> loc, scale;  // an Affine after this layer, by coordinate; empty if there is none
    Activation activation = Activation::relu;
    Law law = Law::exp_soft;
    Form form = Form::affine;
    double clip = 0;
};

struct FlowSpec {
    int features = 0;
    int context = 0;
    Columns columns, context_columns;
    std::vector<MadeSpec> mades;      // from data to noise
    std::vector<int> noise_variable;  // [features] variable carried by each column of the noise
};

// A caller's array of rows (c, n, width); a stride of 0 repeats. Strides in bytes.
struct Rows {
    const char* data = nullptr;
    DType dtype = DType::f64;
    int64_t outer = 0, inner = 0, column = 0;
};

}  // namespace fastmaf
