// Sampling: the stages from the last to the first, each by the steps of its sampler tape. A law step finishes the variables of one rank,
// x from z by the law, and the panels after it bring the units of that degree to life. Every weight is used once.
// A unit's sum begins in the output rows themselves: what a block could already add waits there until its degree is reached.
#pragma once

#include "../ops/rng.inl.hpp"
#include "log_prob.inl.hpp"

namespace fastmaf {
namespace FASTMAF_ISA {

// Variables [first, first + count): z from the rows of the tile behind, x to the rows of this one.
template <class T>
static void transform_draw(const StageView<T>& stage, int first, int count, const T* parameters, const T* z, T* x, int vectors, double* log_det) {
    constexpr int W = Lanes<T>::W, lanes = lanes_of<T>();
    for (int j = 0; j < vectors; ++j) {
        typename Lanes<T>::Wide sum{};
        for (int s = first; s < first + count; ++s) {
            const T* row = parameters + 2 * s * lanes + j * W;
            const Vec<T> scale = log_scale<T>(stage, at(row + lanes));
            Vec<T> noise = at(z + stage.next[s] * lanes + j * W);
            if (stage.scale) noise = noise / stage.scale[s] + stage.loc[s];
            at(x + s * lanes + j * W) = to_x<T>(stage, noise, at(row), scale);
            sum -= widen(scale);
        }
        add_to<T>(log_det + j * W, sum);
    }
}

// Draws of the variables [first, first + count) of a base from the noise and the uniform numbers, which lie by column.
template <class T>
static void base_draw(const StageView<T>& stage, int first, int count, const T* parameters, const T* noise, const T* uniform, T* x, int vectors,
                      double* log_det) {
    constexpr int W = Lanes<T>::W, lanes = lanes_of<T>();
    for (int j = 0; j < vectors; ++j) {
        typename Lanes<T>::Wide sum{};
        for (int s = first; s < first + count; ++s) {
            const Conditional<T> p{stage, parameters + stage.first[s] * lanes + j * W, stage.first[s + 1] - stage.first[s]};
            const int column = stage.next[s] * lanes + j * W;
            const Vec<T> value = conditional_draw<T>(p, at(noise + column), at(uniform + column));
            at(x + s * lanes + j * W) = value;
            if (log_det) sum += widen(conditional_log_prob<T>(p, value));
        }
        if (log_det) add_to<T>(log_det + j * W, sum);
    }
}

template <class T>
static void norm_draw(const StageView<T>& stage, const T* z, T* x, int vectors) {
    constexpr int W = Lanes<T>::W, lanes = lanes_of<T>();
    const T* beta = stage.trainable ? stage.bias[0] + stage.features : nullptr;
    for (int s = 0; s < stage.features; ++s)
        for (int j = 0; j < vectors; ++j) {
            const Vec<T> own = at(z + stage.next[s] * lanes + j * W);
            at(x + s * lanes + j * W) = (beta ? own - beta[s] : own) / stage.scale[s] + stage.loc[s];
        }
}

// Before L^-1: z in the order of the coordinates. Before U^-1: the diagonal of L^-1 added, then turned around.
template <class T>
static void linear_draw(const StageView<T>& stage, int part, T* const* units, const T* z, int vectors) {
    constexpr int W = Lanes<T>::W, lanes = lanes_of<T>();
    for (int i = 0; i < stage.features; ++i)
        for (int j = 0; j < vectors; ++j) {
            const int own = i * lanes + j * W;
            if (part == 0)
                at(units[1] + own) = at(z + stage.next[i] * lanes + j * W);
            else
                at(units[0] + own) += at(units[1] + own);
        }
    if (part == 1) flip<T>(units[0], stage.features, vectors);
}

template <class T>
static int from_noise(const StageView<T>* stages, int count, const Tile<T>& tile) {
    constexpr int lanes = lanes_of<T>();
    for (int k = count; k-- > 0;) {
        const StageView<T>& stage = stages[k];
        T* const x = tile.x[k % 2];
        for (int i = 0; i < stage.step_count; ++i) {
            const Step& step = stage.steps[i];
            for (int s = 0; s < tile.subtiles; ++s) {
                const int vectors = vectors_of(tile.rows, s, Lanes<T>::W);
                const int64_t shift = s * tile.stride;
                if (step.kind == Kind::panel) {
                    panel_step<T>(stage, step, x, tile.units, tile.raw, shift, vectors, tile.folded ? tile.folded[k] : nullptr);
                    continue;
                }
                T* const own = x + stage.context * lanes + shift;
                const T* const z = tile.x[(k + 1) % 2] + stage.context * lanes + shift;
                const T* const last = tile.units[stage.maps - 1] + shift;
                if (stage.output == Output::transform) {
                    transform_draw<T>(stage, step.row, step.rows, last, z, own, vectors, tile.log_det + s * lanes);
                } else if (stage.output == Output::norm) {
                    norm_draw<T>(stage, z, own, vectors);
                } else if (stage.output == Output::linear) {
                    T* const shifted[2] = {tile.units[0] + shift, tile.units[1] + shift};
                    linear_draw<T>(stage, step.row, shifted, z, vectors);
                } else {
                    base_draw<T>(stage, step.row, step.rows, last, z, tile.uniform + shift, own, vectors,
                                 tile.density ? tile.log_det + s * lanes : nullptr);
                }
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

// Uniform numbers in (0, 1), laid out like the noise: the third stream of random words. In float the largest would round to 1.
template <class T>
static void uniforms(uint64_t seed, const uint64_t* index, const uint32_t* context, int features, int lanes, T* out) {
    constexpr int W = FASTMAF_VECTOR_BYTES / 4;
    constexpr double most = sizeof(T) == 4 ? 1 - 0x1p-24 : 1;
    for (int r = 0; r < lanes; r += W) {
        Words low{}, high{}, row{};
        for (int i = 0; i < W && r + i < lanes; ++i) {
            low[i] = uint32_t(index[r + i]);
            high[i] = uint32_t(index[r + i] >> 32);
            row[i] = context[r + i];
        }
        for (int d = 0; d < features; d += 4) {
            Words word[4] = {low, high, row, Words{} + (uint32_t(d / 4) | 2u << 24)};
            philox(word, uint32_t(seed), uint32_t(seed >> 32));
            for (int c = 0; c < 4 && d + c < features; ++c)
                for (int i = 0; i < W && r + i < lanes; ++i) {
                    const double u = (double(word[c][i]) + 0.5) * 0x1p-32;
                    out[(d + c) * lanes + r + i] = T(u < most ? u : most);
                }
        }
    }
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
