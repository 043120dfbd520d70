// What a GPU computes, computed by the host: the blocks of a launch one after the other, their warps as threads.
#pragma once

#include "core/calls.hpp"
#include "core/program.hpp"
#include "cuda/draw_image.hpp"

namespace fastmaf {

struct Warps {
    int count = 1;      // of a block
    int vectors = 4;    // of a tile
    int64_t begin = 0;  // draws: number of the first row; the call has as many more rows
    bool fills = false;  // only NaN in the results is computed
};

template <class T>
void warp_evaluate(const Program<T>& program, const Batch& batch, const Warps& warps, T* log_prob, T* noise);
template <class T>
void warp_probabilities(const Program<T>& program, const Batch& batch, const Warps& warps, T* out);
// The tensor-core kernel in a given shape, without what fills its gaps.
void warp_halves(const Program<float>& program, const Batch& batch, const TensorShape& shape, float* log_prob, float* noise);
// The sampler on tensor cores, without what fills its gaps: with room for `groups` groups of rows, of which so many have a warp.
void warp_draws(const Program<float>& program, const Batch& batch, const Draw* draw, int parts, int groups, int active, int warps, float* out,
                float* log_prob);
// Its product of fragments: registers of 32 lanes.
void warp_multiply(const uint32_t (&a)[4][32], const uint32_t (&b)[2][32], float (&c)[4][32]);
// Noise from the batch when `draw` is null.
template <class T>
void warp_generate(const Program<T>& program, const Batch& batch, const Draw* draw, const Warps& warps, T* out, T* log_prob);

}  // namespace fastmaf
