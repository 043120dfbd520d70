// What kernels see of a packed flow: plain structures without containers, for every instruction set and for devices.
#pragma once

#include <cstdint>

namespace fastmaf {

enum class Activation : int { relu, tanh, elu, gelu, silu };
// Whether act' needs the argument of act, so that backward has to keep it; otherwise the value will do.
constexpr bool keeps_argument(Activation a) { return a == Activation::gelu || a == Activation::silu; }

enum class Law : int { exp, exp_soft, softplus, sigmoid, log_precision, clamp };
enum class Form : int { standardize, affine };
// How the units of a context join the sums of a map: added; their activations added; or as factors sigmoid(unit).
enum class Joins : int { none, added, activated, gated };
// What becomes of the outputs of a stage: parameters of a law, or of the conditionals of a base; a linear map; a norm per variable.
enum class Output : int { transform, base, linear, norm };
constexpr bool is_network(Output o) { return o != Output::linear && o != Output::norm; }
enum class Bijection : int { identity, logit, log_above, log_below };
enum class DType : int { f16, f32, f64, i8, i16, i32, i64, u8, u16, u32, u64, boolean };

enum class Start : uint8_t { bias, partial, zero };  // what the sum begins with; partial: what lies in the output rows
enum class Finish : uint8_t { raw, unit };           // whether the rows are complete
enum class Kind : uint8_t { panel, law };

// Biases have room for a panel of eight that begins at any row.
constexpr int padded_rows(int rows) { return (rows + 15) / 8 * 8; }

// What a panel reads and writes: the units of a map if not negative, else the tile of the stage.
constexpr int kTile = -1;       // [context; variables]
constexpr int kVariables = -2;  // the variables alone

// A panel of the density or the sampler sums `rows` rows of a map over its inputs [begin, end); one of backward sums `rows` inputs of
// the map over its rows [begin, end). A law step has no map: it finishes variables, or a part of a Linear.
struct Step {
    Kind kind;
    Start start;
    Finish finish;
    uint8_t width;  // rows held by the tape: 8, 4 or 2
    int map;
    int row, rows;   // rows of what is written; law: variables [row, row + rows), or the part `row` of a Linear
    int begin, end;  // rows of what is read
    int64_t tape;    // where the weights of input `begin` lie
    int in, out;
};

// What kernels see of one stage: pointers into a plan and its weights.
template <class T>
struct StageView {
    Output output;
    int features, context;
    int maps;         // those with units of their own, but for those of contexts, whose units lie behind
    const int* rows;  // [maps + contexts] rows of each, the units that nobody reads left out
    int contexts;
    bool plain;                  // no map has anything beside its sums: no others that are added, no context of its own, no norm
    const char* activated;       // [maps]
    const int* adds;             // [maps] map whose sums are added, or -1
    const int* const* added;     // [maps] the row of these sums that each row adds, or null: its own
    const int* const* adders;    // [maps] the row of the adding map that adds each row of these sums, -1: none; or null: its own
    const char* raw;             // [maps] whether the sums are kept beside the units
    const int* context_units;    // [maps] the units of a context that join the sums, or -1
    const Joins* joins;          // [maps]
    const T* const* norm_scale;  // [maps] units are sum * scale + shift before they are activated; or null
    const T* const* norm_shift;
    Activation activation;
    Law law;
    Form form;
    T constant[2];      // of the law, see ops/laws
    T input_clip;       // where what the maps read of the variables ends, or 0
    bool reads_noise;   // the maps read z, rank by rank in the density and at once in the sampler; else x, the other way round
    bool reads_apart;   // what the maps read is not the tile of x itself
    int components;     // of the mixtures of a base
    bool trainable;     // of a norm: its biases are log_gamma, then beta
    const int* first;   // [features + 1] first final row of the s-th variable
    const int* values;  // [features] of a base: how many values the s-th variable has, 0: any number
    const int* next;    // [features] row of the next tile that takes the s-th variable (of a Linear: the s-th coordinate)
    const T* loc;       // [features] the Affine that follows or the norm, or null
    const T* scale;
    const T* const* bias;  // per map, with padded_rows
    const Step* steps;
    int step_count;
    const T* tape;
    bool far;  // the tape is larger than a core's own cache
};

// A caller's array of rows (c, n, width); a stride of 0 repeats. Strides in bytes.
struct Rows {
    const char* data = nullptr;
    DType dtype = DType::f64;
    int64_t outer = 0, inner = 0, column = 0;
};

}  // namespace fastmaf
