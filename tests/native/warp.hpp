// What a GPU computes, computed by the host: the blocks of a launch one after the other, their warps as threads.
#pragma once

#include <algorithm>

#include "core/aligned.hpp"
#include "core/calls.hpp"
#include "core/weights.hpp"
#include "cuda/draw_image.hpp"

namespace fastmaf {

struct Warps {
    int count = 1;       // of a block
    int vectors = 4;     // of a tile
    int64_t begin = 0;   // draws: number of the first row; the call has as many more rows
    bool fills = false;  // only NaN in the results is computed
};

// What `fill` puts into an image, at its place: once to measure, once for good.
template <class F>
AlignedVector<char> placed(F fill) {
    AlignedVector<char> memory;
    for (int pass = 0; pass < 2; ++pass) {
        Image image(memory.data());
        fill(image);
        memory.resize(image.bytes().size());
        std::copy(image.bytes().begin(), image.bytes().end(), memory.begin());
    }
    return memory;
}

// The rows of a call, the draws of a request or the noise of a batch where there is none, and what a job says of them.
template <class T>
Batch rows_of_call(const Batch& batch, const Draw* draw, int64_t begin, Job<T>& job) {
    Batch rows = batch;
    if (draw) {
        rows.outer = draw->contexts;
        rows.inner = draw->rows;
        rows.context = draw->context;
        job.draws = true;
        job.seed = draw->seed;
        job.offset = draw->offset;
        job.context_offset = draw->context_offset;
        job.begin = uint64_t(begin);
        job.inner = uint64_t(begin + draw->rows);
        job.index = draw->index;
        job.group = draw->group;
    } else {
        job.x = {batch.x, batch.inner};
    }
    job.rows = rows.rows();
    job.context = {rows.context, rows.inner};
    return rows;
}

template <class T>
void warp_evaluate(const Weights<T>& packed, const Batch& batch, const Warps& warps, T* log_prob, T* noise);
template <class T>
void warp_probabilities(const Weights<T>& packed, const Batch& batch, const Warps& warps, T* out);
// The tensor-core kernel in a given shape, without what fills its gaps.
void warp_halves(const Weights<float>& packed, const Batch& batch, const TensorShape& shape, float* log_prob, float* noise);
// The sampler on tensor cores, without what fills its gaps: with room for `groups` groups of rows, of which so many have a warp.
void warp_draws(const Weights<float>& packed, const Batch& batch, const Draw* draw, int parts, int groups, int active, int warps,
                float* out, float* log_prob);
// Its product of fragments: registers of 32 lanes.
void warp_multiply(const uint32_t (&a)[4][32], const uint32_t (&b)[2][32], float (&c)[4][32]);
// Noise from the batch when `draw` is null. `other` may take the samples in place of `out`.
template <class T>
void warp_generate(const Weights<T>& packed, const Batch& batch, const Draw* draw, const Warps& warps, T* out, T* log_prob,
                   Other<T>* other = nullptr);

}  // namespace fastmaf
