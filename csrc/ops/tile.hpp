// A tile of rows with its scratch, as kernels see it. Plain pointers, no code.
//
// Rows lie in SIMD lanes: every matrix of a sub-tile is [unit][lanes] with lanes = kVectors vectors, so a row never meets its neighbours.
// The tile of variables of stage k is [context; variables in its order]; two of them alternate. Maps that read their
// variables clipped read a third one, in which they lie so. Sub-tiles share a pass over the
// weights, which pays when the tape is larger than the cache.
#pragma once

#include "../core/view.hpp"

namespace fastmaf {

template <class T>
struct Tile {
    int rows;  // valid rows; lanes beyond them hold finite copies or garbage and are never read back
    int subtiles;
    int64_t stride;          // elements from one sub-tile's scratch to the next
    T* x[2];                 // [context + features][lanes] each
    T* read;                 // the same for maps that read variables clipped
    T** units;               // [maps]: units[m] is the output of map m, [rows[m]][lanes]
    T** raw;                 // [maps]: its sums, where they are kept beside the activations
    T* uniform;              // [features][lanes] for the draws of a base
    bool density;            // whether these draws add their log-density to log_det
    double* log_det;         // [lanes] of sub-tile 0; sub-tile s at log_det + s * lanes
    const T* const* folded;  // per stage, bias of map 0 with the shared context added; null when rows have their own context
};

}  // namespace fastmaf
