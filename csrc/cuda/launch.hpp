// What a launch takes: a packed flow for one direction, and the rows of a call. Plain structures whose pointers are the device's.
#pragma once

#include "../core/view.hpp"

namespace fastmaf {

// The dtype that samples may have beside that of the flow.
template <class T>
struct OtherOf {
    using Type = float;
};
template <>
struct OtherOf<float> {
    using Type = double;
};
template <class T>
using Other = typename OtherOf<T>::Type;

// A column of data or of the context: a bijection, then (x - loc) * scale.
struct ColumnView {
    Bijection kind;
    int values;                              // of a discrete variable; 0 for any number
    double lower, upper, range, loc, scale;  // range: log(upper - lower) of a logit
};

template <class T>
struct FlowView {
    const StageView<T> *stages;
    int stage_count, transforms, features, context, maps;
    bool has_base, late_context;  // see Plan
    bool normals;                 // noise is drawn: some variables may have any number
    bool bounded;                 // some rows have density zero
    double constant, log_scales;  // see Weights
    const ColumnView *columns, *context_columns;
    const T *low, *high;  // [features] the range of samples
    const Other<T> *other_low, *other_high;
    const int *first, *noise;  // rows of the first and of the last tile; see Plan
    // Scratch of a tile, in bytes.
    int64_t scratch, pointers, log_det, x[2], read, uniform;
    const int64_t *units, *raw;  // [maps]; raw is negative where none is kept
    // Biases of the first maps with a context folded in: where those of each stage begin, and how many they are.
    const int64_t *folded;
    int64_t folded_size;
};

// Row i of a call lies (i / inner) * rows.outer + (i % inner) * rows.inner behind rows.data.
struct Source {
    Rows rows;
    int64_t inner = 1;
};

template <class T>
struct Job {
    int64_t rows = 0;
    int vectors = 1;  // of a tile: 1, 2 or 4
    Source x, context;
    const T *const *folded = nullptr;  // per stage, bias of its first map with the shared context added
    T *log_prob = nullptr, *out = nullptr;
    Other<T> *other = nullptr;  // takes samples in place of `out`
    bool map = false;           // `log_prob` takes log|det| of the map between rows and noise instead of the density
    int width = 0;              // numbers in a row of `out`
    int most = 0;               // `out` takes probabilities of so many values of each variable instead of the noise
    bool fills = false;         // only what is NaN in the outputs is computed
    // Noise from counters instead of x. Row i is number `begin` + i of the call, whose contexts have `inner` rows each.
    bool draws = false;
    uint64_t seed = 0, offset = 0, begin = 0, inner = 1;
    uint32_t context_offset = 0;
    const uint64_t *index = nullptr, *group = nullptr;
    char *scratch = nullptr;
};

}  // namespace fastmaf
