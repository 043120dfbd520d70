// Density: a tile of rows goes through all maps of all stages; the variables arrive in the order of the first stage and leave each law
// in the order of the next, so permutations cost nothing. Log-determinants are summed in double, lane by lane.
#pragma once

#include "bases.inl.hpp"
#include "masked_linear.inl.hpp"

namespace fastmaf {
namespace FASTMAF_ISA {

// Parameters [2 features][lanes] and x [features][lanes] -> z, scattered into the rows of the next tile, of the variables
// [first, first + count).
template <class T>
FASTMAF_FN void transform_law(const StageView<T>& stage, int first, int count, const T* parameters, const T* x, T* next, int vectors,
                              double* log_det) {
    constexpr int W = Lanes<T>::W, lanes = lanes_of<T>();
    for (int j = 0; j < vectors; ++j) {
        typename Lanes<T>::Wide sum{};
        for (int s = first; s < first + count; ++s) {
            const T* row = parameters + 2 * s * lanes + j * W;
            const Vec<T> scale = log_scale<T>(stage, at(row + lanes));
            Vec<T> z = to_z<T>(stage, at(x + s * lanes + j * W), at(row), scale);
            if (stage.scale) z = (z - stage.loc[s]) * stage.scale[s];
            at(next + stage.next[s] * lanes + j * W) = z;
            sum -= widen(scale);
        }
        add_to<T>(log_det + j * W, sum);
    }
}

// Log-densities of the variables [first, first + count) of a base.
template <class T>
FASTMAF_FN void base_law(const StageView<T>& stage, int first, int count, const T* parameters, const T* x, int vectors, double* log_det) {
    constexpr int W = Lanes<T>::W, lanes = lanes_of<T>();
    for (int j = 0; j < vectors; ++j) {
        typename Lanes<T>::Wide sum{};
        for (int s = first; s < first + count; ++s) {
            const Conditional<T> p(stage, s, parameters + stage.first[s] * lanes + j * W);
            sum += widen(conditional_log_prob<T>(p, at(x + s * lanes + j * W)));
        }
        add_to<T>(log_det + j * W, sum);
    }
}

// The variables of a norm, scattered into the next tile.
template <class T>
FASTMAF_FN void norm_law(const StageView<T>& stage, const T* x, T* next, int vectors) {
    constexpr int W = Lanes<T>::W, lanes = lanes_of<T>();
    const T* beta = stage.trainable ? stage.bias[0] + stage.features : nullptr;
    for (int s = 0; s < stage.features; ++s)
        for (int j = 0; j < vectors; ++j) {
            const Vec<T> z = (at(x + s * lanes + j * W) - stage.loc[s]) * stage.scale[s];
            at(next + stage.next[s] * lanes + j * W) = beta ? z + beta[s] : z;
        }
}

// What the maps of a stage read of the variables [first, first + count).
template <class T>
FASTMAF_FN void clip_inputs(const StageView<T>& stage, const T* x, T* read, int first, int count, int vectors) {
    constexpr int W = Lanes<T>::W, lanes = lanes_of<T>();
    for (int s = first; s < first + count; ++s)
        for (int j = 0; j < vectors; ++j) at(read + s * lanes + j * W) = clipped<T>(stage, at(x + s * lanes + j * W));
}

// The same where they read the noise, which lies in the next tile.
template <class T>
FASTMAF_FN void take_noise(const StageView<T>& stage, const T* next, T* read, int first, int count, int vectors) {
    constexpr int W = Lanes<T>::W, lanes = lanes_of<T>();
    for (int s = first; s < first + count; ++s)
        for (int j = 0; j < vectors; ++j) at(read + s * lanes + j * W) = clipped<T>(stage, at(next + stage.next[s] * lanes + j * W));
}

// The contexts among what the maps of a stage read.
template <class T>
FASTMAF_FN void copy_contexts(const StageView<T>& stage, const T* x, T* read, int vectors) {
    constexpr int W = Lanes<T>::W, lanes = lanes_of<T>();
    for (int c = 0; c < stage.context; ++c)
        for (int j = 0; j < vectors; ++j) at(read + c * lanes + j * W) = at(x + c * lanes + j * W);
}

// Turns rows around: the last one first.
template <class T>
FASTMAF_FN void flip(T* units, int rows, int vectors) {
    constexpr int W = Lanes<T>::W, lanes = lanes_of<T>();
    for (int s = 0; 2 * s < rows - 1; ++s)
        for (int j = 0; j < vectors; ++j) {
            Vec<T>&a = at(units + s * lanes + j * W), &b = at(units + (rows - 1 - s) * lanes + j * W);
            const Vec<T> kept = a;
            a = b;
            b = kept;
        }
}

// A Linear: after U its units are turned around, after L they are added (its diagonal) and scattered into the next tile.
template <class T>
FASTMAF_FN void linear_law(const StageView<T>& stage, int part, T* const* units, T* next, int vectors) {
    constexpr int W = Lanes<T>::W, lanes = lanes_of<T>();
    if (part == 0) return flip<T>(units[0], stage.features, vectors);
    for (int i = 0; i < stage.features; ++i)
        for (int j = 0; j < vectors; ++j)
            at(next + stage.next[i] * lanes + j * W) = at(units[1] + i * lanes + j * W) + at(units[0] + i * lanes + j * W);
}

// x and next: the variables of this tile and of the next one; `shift`: where the sub-tile lies.
template <class T>
FASTMAF_FN void density_law(const StageView<T>& stage, const Step& step, T* const* units, int64_t shift, const T* x, T* next, int vectors,
                            double* log_det) {
    T* const last = units[stage.maps - 1] + shift;
    switch (stage.output) {
        case Output::transform: return transform_law<T>(stage, step.row, step.rows, last, x, next, vectors, log_det);
        case Output::norm: return norm_law<T>(stage, x, next, vectors);
        case Output::linear: {
            T* const shifted[2] = {units[0] + shift, units[1] + shift};
            return linear_law<T>(stage, step.row, shifted, next, vectors);
        }
        default: return base_law<T>(stage, step.row, step.rows, last, x, vectors, log_det);
    }
}

// One panel step of a sub-tile that lies `shift` behind the first one.
template <class T>
FASTMAF_INLINE void panel_step(const StageView<T>& stage, const Step& step, T* tile, T* const* units, T* const* raw, int64_t shift,
                               int vectors, const T* folded) {
    const T* const in = buffer<T>(stage, step.in, tile, units) + shift;
    T* const out = buffer<T>(stage, step.out, tile, units) + shift;
    if (stage.plain) return run_panel<T>(stage, step, in, out, nullptr, vectors, folded);
    const bool complete = step.finish == Finish::unit;
    const int add = complete ? stage.adds[step.map] : -1, context = complete ? stage.context_units[step.map] : -1;
    Beside<T> beside{};
    if (step.map < stage.maps && stage.raw[step.map]) beside.raw = raw[step.map] + shift;
    if (add >= 0) beside.add = (stage.raw[add] ? raw[add] : units[add]) + shift;
    if (context >= 0) beside.context = units[context] + shift;
    run_panel<T>(stage, step, in, out, beside.of(stage, step), vectors, folded);
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
