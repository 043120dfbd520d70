// What the launches of gradients take. Plain structures whose pointers are the device's.
//
// A tile keeps what the stages leave on the way forward in scratch of its own: backward reads it, and what weights need of it.
#pragma once

#include "launch.hpp"

namespace fastmaf {

// Rows of the batch that are summed in the dtype before the sums go on in double: so bits do not depend on how many rows go together.
constexpr int kGroup = 512;

template <class T>
struct GradientView {
    FlowView<T> flow;  // of the density; its own scratch is not used
    const StageView<T>* backward;
    const T* zeros;  // eight of them
    // Scratch of a tile, in bytes.
    int64_t scratch, traces, pointers, log_det, density, again, cotangent, dx[2];
    const int64_t *x, *read, *scaled;  // [stages + 1]; negative where there is none
    const int* first;                  // [stages] which of all maps is its first one
    const int64_t* buffers;            // [5][maps]: units, raw, delta, alone, whole of Trace; negative where there is none
    int maps;                          // of all stages
};

template <class T>
struct GradientJob {
    Job<T> rows;                             // `log_prob` takes the values
    Source cotangent;                        // ones without data
    T *d_x = nullptr, *d_context = nullptr;  // by row, or null
    bool keeps = false;                      // scratch is per tile instead of per block
};

// A part of the way of all tiles of a batch, which has to be looked at in between: some stages forward, from the rows on if they are the
// first and to the densities if they are the last, or backward.
struct Stretch {
    int first, last;
    bool backward;
};

// Eight rows at most of a map: entries [0, limit) of row i go to number offset[i] of a vector laid out like the master.
struct WeightTask {
    int stage, map, row, rows;
    int from, inputs;  // what the map reads, see Step, and how much of it
    const int* limit;  // [rows]
    const int64_t* offset;
    int64_t bias;  // where its biases lie there, or -1
};

template <class T>
struct WeightsView {
    const WeightTask* tasks;  // behind them is one without rows: the sum of the cotangents, behind the master
    int task_count;
    int64_t size;           // of the master
    const uint32_t* index;  // [size] see Plan
    // The weights whose logarithms log|det| has a sum of.
    const int64_t* diagonal;
    const T* diagonal_weights;
    int diagonals;
};

// out[a][slice][c] = or += the sum over the slice's b of in[a][b][c], b upwards.
template <class From>
struct Sum {
    const From* in;
    double* out;
    int64_t a, b, c, slice;  // slice: how many b there are in one, but for the last
    bool add;
};

}  // namespace fastmaf
