// Sampling: the stages from the last to the first, each by the steps of its sampler tape. A law step finishes the variables of one rank,
// x from z by the law, and the panels after it bring the units of that degree to life. Every weight is used once.
// A unit's sum begins in the output rows themselves: what a block could already add waits there until its degree is reached.
#pragma once

#include "log_prob.inl.hpp"

namespace fastmaf {
namespace FASTMAF_ISA {

// Variables [first, first + count): z from the rows of the tile behind, x to the rows of this one.
template <class T>
FASTMAF_FN void transform_draw(const StageView<T>& stage, int first, int count, const T* parameters, const T* z, T* x, int vectors,
                               double* log_det) {
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
FASTMAF_FN void base_draw(const StageView<T>& stage, int first, int count, const T* parameters, const T* noise, const T* uniform, T* x,
                          int vectors, double* log_det) {
    constexpr int W = Lanes<T>::W, lanes = lanes_of<T>();
    for (int j = 0; j < vectors; ++j) {
        typename Lanes<T>::Wide sum{};
        for (int s = first; s < first + count; ++s) {
            const Conditional<T> p(stage, s, parameters + stage.first[s] * lanes + j * W);
            const int column = stage.next[s] * lanes + j * W;
            const Vec<T> value = conditional_draw<T>(p, at(noise + column), at(uniform + column));
            at(x + s * lanes + j * W) = value;
            if (log_det) sum += widen(conditional_log_prob<T>(p, value));
        }
        if (log_det) add_to<T>(log_det + j * W, sum);
    }
}

template <class T>
FASTMAF_FN void norm_draw(const StageView<T>& stage, const T* z, T* x, int vectors) {
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
FASTMAF_FN void linear_draw(const StageView<T>& stage, int part, T* const* units, const T* z, int vectors) {
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

// z, uniform and x: the variables of the tile behind, its uniform numbers and the variables of this one; `shift`: where the sub-tile lies.
template <class T>
FASTMAF_FN void sampler_law(const StageView<T>& stage, const Step& step, T* const* units, int64_t shift, const T* z, const T* uniform, T* x,
                            int vectors, bool density, double* log_det) {
    const T* const last = units[stage.maps - 1] + shift;
    switch (stage.output) {
        case Output::transform: return transform_draw<T>(stage, step.row, step.rows, last, z, x, vectors, log_det);
        case Output::norm: return norm_draw<T>(stage, z, x, vectors);
        case Output::linear: {
            T* const shifted[2] = {units[0] + shift, units[1] + shift};
            return linear_draw<T>(stage, step.row, shifted, z, vectors);
        }
        default: return base_draw<T>(stage, step.row, step.rows, last, z, uniform, x, vectors, density ? log_det : nullptr);
    }
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
