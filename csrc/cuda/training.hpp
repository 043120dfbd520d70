// What the launches of a step of training take, beside those of gradients. Plain structures whose pointers are the device's; each is done
// number by number, `count` of them, and no two write the same place.
#pragma once

#include "../core/optimizer.hpp"
#include "gradient.hpp"

namespace fastmaf {

// Rows of the data, whatever their dtype, into a batch; and the weight and the cotangent of each.
template <class T>
struct TakeJob {
    struct Part {
        const char* from;
        char* to;
        int64_t width, size;  // numbers in a row, bytes of each
    } x, context;
    const int64_t* rows;    // [batch] which rows, or null: the first ones
    const double* weights;  // of all rows, or null: ones
    double mass;            // cotangents are -weight / mass
    double* weight;         // [batch]
    T* cotangent;           // [batch]
    int64_t count;          // batch times the numbers of x, of the context, and one
};

// The loss, -weight * (value + *shared), of each slice of rows.
template <class T>
struct LossJob {
    const T* value;
    const double *weight, *shared;
    double* out;  // [slices]
    int64_t rows, slice, count;
};

// The gradient in each weight of a network from its sum and that of the cotangents. Here and below, weights lie in the order of the flat
// parameters.
template <class T>
struct EntryJob {
    WeightsView<T> view;
    const double* sums;
    const T* weights;
    T* out;
    int64_t count;  // of the network's own
};

// Sums of (g + l2 w)^2 over every count-th weight.
template <class T>
struct SquaresJob {
    const T *gradient, *weights;
    T l2;
    int64_t size;
    double* out;
    int64_t count;
};

// What a step must know before it may begin: whether the loss is a number, and the factor on the gradient. Once it was none, no step is
// made until `halted` is set back: so the host need not look at each loss.
template <class T>
struct JudgeJob {
    const double *loss, *squares;  // null: no norm to clip at
    double clip_norm;
    T* scale;
    int* halted;
    int64_t count;
};

template <class T>
struct AdamJob {
    AdamStep<T> step;  // but for the scale
    const T *scale, *gradient;
    const int* halted;
    T *weights, *first, *second;
    int64_t count;
};

// The weights where stages read them: of two directions, see sources_of.
template <class T>
struct RepackJob {
    const T* weights;
    T* to[2];
    const uint32_t* sources[2];
    uint32_t nothing;     // the source of an entry that stays as it is
    int64_t size, count;  // of the first; of both
};

// A weight that all rows share a scale by: on the diagonal of a Linear, |w|; of a norm, e^w / root, which stages read at `scale`, and its
// mean at `loc`.
template <class T>
struct SharedScale {
    int64_t place;
    double root, mean;
    T *scale[2], *loc[2];  // of two directions; null for a Linear
};
template <class T>
struct ScaleJob {
    const SharedScale<T>* scales;
    const T* weights;
    double* out;  // [count] logarithms, but for those of the roots
    int64_t count;
};

// Norms with the statistics of the batch. The rows of a batch as its tiles keep them in front of the norm; all weights are shares, the
// cotangents by their sum.
template <class T>
struct NormRows {
    const char* tiles;
    int64_t scratch, x, d;  // bytes of a tile; where the variables lie in it, and the gradient in them
    int64_t rows;
    int lanes, width, features;  // of a tile: its lanes, how many of them are rows
    const T* cotangent;
    const double* total;
};

// Sums over slices of rows, [features][slices]: of x; of (x - mean)^2, the mean being given; or, both shares left out, of -d and of
// d (x - mean), behind each other.
enum class Moment { mean, variance, gradients };
template <class T>
struct MomentJob {
    NormRows<T> rows;
    Moment moment;
    const double* mean;
    double* out;
    int64_t slice, slices, count;
};

// The scale of a norm from its statistics.
template <class T>
struct NormJob {
    const SharedScale<T>* scales;  // [features]
    const T* weights;
    const double *mean, *variance;
    double eps;
    double* out;  // [features] the logarithms of the scales
    int64_t count;
};

// What the statistics add to the gradient in each number.
template <class T>
struct ThroughJob {
    NormRows<T> rows;
    const double *mean, *variance, *sums;  // sums: [2][features], see Moment::gradients
    double eps;
    int64_t count;
};

}  // namespace fastmaf
