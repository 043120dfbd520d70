// Sampling: the MADEs from the last to the first, each by the steps of its sampler tape. A law step finishes the variables of one rank,
// x from z by the law, and the panels after it bring the units of that degree to life. Every weight is used once.
// A unit's sum begins in the output rows themselves: what a block could already add waits there until its degree is reached.
#pragma once

#include "../ops/rng.inl.hpp"
#include "log_prob.inl.hpp"

namespace fastmaf {
namespace FASTMAF_ISA {

// Variables [first, first + count): z from the rows of the tile behind, x to the rows of this one.
template <class T>
static void sample_law(const MadeView<T>& made, int first, int count, const T* parameters, const T* z, T* x, int vectors, double* log_det) {
    constexpr int W = Lanes<T>::W, lanes = lanes_of<T>();
    for (int j = 0; j < vectors; ++j) {
        typename Lanes<T>::Wide sum{};
        for (int s = first; s < first + count; ++s) {
            const T* row = parameters + 2 * s * lanes + j * W;
            const Vec<T> scale = log_scale<T>(made, at(row + lanes));
            Vec<T> noise = at(z + made.next[s] * lanes + j * W);
            if (made.scale) noise = noise / made.scale[s] + made.loc[s];
            at(x + s * lanes + j * W) = to_x<T>(made, noise, at(row), scale);
            sum -= widen(scale);
        }
        add_to<T>(log_det + j * W, sum);
    }
}

template <class T>
static int from_noise(const MadeView<T>* mades, int count, const Tile<T>& tile) {
    constexpr int lanes = lanes_of<T>();
    for (int k = count; k-- > 0;) {
        const MadeView<T>& made = mades[k];
        T* const x = tile.x[k % 2];
        const T* const z = tile.x[(k + 1) % 2];
        for (int i = 0; i < made.step_count; ++i) {
            const Step& step = made.steps[i];
            for (int s = 0; s < tile.subtiles; ++s) {
                const int vectors = vectors_of(tile.rows, s, Lanes<T>::W);
                const int64_t at_tile = s * tile.stride;
                if (step.kind == Kind::panel)
                    run_panel<T>(made, step, (step.map ? tile.units[step.map - 1] : x) + at_tile, tile.units[step.map] + at_tile, vectors,
                                 tile.folded ? tile.folded[k] : nullptr);
                else
                    sample_law<T>(made, step.row, step.rows, tile.units[made.maps - 1] + at_tile, z + at_tile + made.context * lanes,
                                  x + at_tile + made.context * lanes, vectors, tile.log_det + s * lanes);
            }
        }
    }
    return 0;
}

static void words(uint64_t seed, uint64_t index, int count, uint32_t third, uint32_t fourth, uint32_t out[4][64]) {
    constexpr int W = FASTMAF_VECTOR_BYTES / 4;
    for (int r = 0; r < count; r += W) {
        Words word[4] = {{}, {}, Words{} + third, Words{} + fourth};
        for (int i = 0; i < W; ++i) {
            word[0][i] = uint32_t(index + uint64_t(r + i));
            word[1][i] = uint32_t((index + uint64_t(r + i)) >> 32);
        }
        philox(word, uint32_t(seed), uint32_t(seed >> 32));
        for (int w = 0; w < 4; ++w)
            for (int i = 0; i < W; ++i) out[w][r + i] = word[w][i];
    }
}

template <class T>
static void normals(uint64_t seed, const uint64_t* index, const uint32_t* context, int features, int lanes, T* out) {
    constexpr int W = FASTMAF_VECTOR_BYTES / 4;
    constexpr bool wide = sizeof(T) == 8;
    const uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
    for (int r = 0; r < lanes; r += W) {
        const int rows = lanes - r < W ? lanes - r : W;
        Words low{}, high{}, row{};
        for (int i = 0; i < rows; ++i) {
            low[i] = uint32_t(index[r + i]);
            high[i] = uint32_t(index[r + i] >> 32);
            row[i] = context[r + i];
        }
        for (int block = 0; 4 * block < features; ++block) {
            const int columns = features - 4 * block < 4 ? features - 4 * block : 4;
            Words word[4] = {low, high, row, Words{} + uint32_t(block)};
            philox(word, key0, key1);
            if constexpr (!wide) {
                for (int d = 0; d < columns; ++d) at(out + (4 * block + d) * lanes + r) = to_normal(word[d]);
            } else {
                Words fine[4] = {low, high, row, Words{} + (uint32_t(block) | 1u << 24)};
                philox(fine, key0, key1);
                for (int d = 0; d < columns; ++d)
                    for (int h = 0; h < rows; h += Lanes<T>::W) {
                        Vec<T> p, sign;
                        for (int i = 0; i < Lanes<T>::W; ++i) {
                            p[i] = (double(word[d][h + i] >> 1) + (double(fine[d][h + i]) + 0.5) * 0x1p-32) * 0x1p-32;
                            sign[i] = word[d][h + i] & 1 ? -1.0 : 1.0;
                        }
                        at(out + (4 * block + d) * lanes + r + h) = normal_quantile(p) * sign;
                    }
            }
        }
    }
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
