// Gradients of log_prob. Forward keeps of every stage its variables, units and law; backward runs the transposed staircases, from the
// last map to the first, with the same panels: delta of a map's inputs = W^T delta of its outputs, times act'. A map that adds the sums
// of another one passes its delta on to them.
//
// With g the cotangent of a row, gz that of z and s as in ops/laws:  dx = gz e^-s + W_1^T delta_1,  dr = ds (ds/dr), and
//     standardize  dm = -gz e^-s,  ds = -gz z - g          affine  dm = gz,  ds = -gz x e^-s - g
// A norm z = (x - mean) scale + beta has no weights; its delta is that of log_gamma, gz (x - mean) scale + g, and that of beta, gz.
// Weight gradients: rows of the batch are the inner index. Units lie in lanes, which needs the inputs of each map transposed, and
// delta is read where backward left it; the sum runs over rows in index order, so its bits do not depend on threads or tiles.
#pragma once

#include "../ops/log_prob.inl.hpp"
#include "tile.hpp"

namespace fastmaf {
namespace FASTMAF_ISA {

template <class T>
static void forward_transform(const StageView<T>& stage, const Trace<T>& here, T* next, int vectors, double* log_det) {
    constexpr int W = Lanes<T>::W, L = lanes_of<T>();
    const T* parameters = here.units[stage.maps - 1];
    const T* x = here.x + stage.context * L;
    T* const inverse_scale = here.scaled + stage.features * L;
    T* const slope = inverse_scale + stage.features * L;
    for (int j = 0; j < vectors; ++j) {
        typename Lanes<T>::Wide sum{};
        for (int s = 0; s < stage.features; ++s) {
            const int own = s * L + j * W;
            const T* row = parameters + 2 * s * L + j * W;
            const Vec<T> scale = log_scale<T>(stage, at(row + L)), e = exp<T>(-scale);
            const Vec<T> z = to_z<T>(stage, at(x + own), at(row), scale);
            at(here.scaled + own) = stage.form == Form::affine ? at(x + own) * e : z;
            at(inverse_scale + own) = e;
            at(slope + own) = log_scale_slope<T>(stage, scale);
            at(next + stage.next[s] * L + j * W) = stage.scale ? (z - stage.loc[s]) * stage.scale[s] : z;
            sum -= widen(scale);
        }
        add_to<T>(log_det + j * W, sum);
    }
}

template <class T>
static void forward(const StageView<T>& stage, const Trace<T>& here, const Trace<T>& next, int lanes, double* log_det) {
    constexpr int W = Lanes<T>::W, L = lanes_of<T>();
    const int vectors = (lanes + W - 1) / W;
    T* const behind = next.x + stage.context * L;
    for (int i = 0; i < stage.step_count; ++i) {
        const Step& step = stage.steps[i];
        if (step.kind == Kind::law) {
            if (stage.output == Output::transform)
                forward_transform<T>(stage, here, behind, vectors, log_det);
            else
                density_law<T>(stage, step, here.units, 0, here.x + stage.context * L, behind, vectors, log_det);
            continue;
        }
        const int add = step.map < stage.maps && step.finish == Finish::unit ? stage.adds[step.map] : -1;
        const T* added = add < 0 ? nullptr : here.raw[add] ? here.raw[add] : here.units[add];
        run_panel<T>(stage, step, buffer<T>(stage, step.in, here.x, here.units), here.units[step.out],
                     step.map < stage.maps ? here.raw[step.map] : nullptr, added, vectors, nullptr);
    }
}

// The gradient in the outputs of the last map, and what x has of it beside the network.
template <class T>
static void backward_law(const StageView<T>& stage, const Trace<T>& here, int vectors, const T* cotangent, const T* above, T* below) {
    constexpr int W = Lanes<T>::W, L = lanes_of<T>();
    const int features = stage.features;
    const T* const x = here.x + stage.context * L;
    T* const dx = below + stage.context * L;
    T* const delta = here.delta[stage.maps - 1];
    for (int s = 0; s < features; ++s)
        for (int j = 0; j < vectors; ++j) {
            const int own = s * L + j * W;
            const Vec<T> g = at(cotangent + j * W);
            if (is_base(stage.output)) {
                const int first = stage.first[s] * L + j * W;
                const Conditional<T> p{stage, here.units[stage.maps - 1] + first, stage.first[s + 1] - stage.first[s]};
                at(dx + own) = conditional_gradient<T>(p, at(x + own), g, delta + first);
                continue;
            }
            Vec<T> gz = at(above + (stage.context + stage.next[s]) * L + j * W);
            if (stage.output == Output::linear) {
                at(delta + own) = at(here.delta[0] + own) = gz;
            } else if (stage.output == Output::norm) {
                at(dx + own) = gz * stage.scale[s];
                if (!stage.trainable) continue;
                at(delta + own) = fma(gz, (at(x + own) - stage.loc[s]) * stage.scale[s], g);
                at(delta + features * L + own) = gz;
            } else {
                if (stage.scale) gz *= stage.scale[s];
                const Vec<T> direct = gz * at(here.scaled + features * L + own);
                const Vec<T> ds = -gz * at(here.scaled + own) - g;
                at(delta + 2 * s * L + j * W) = stage.form == Form::affine ? gz : -direct;
                at(delta + (2 * s + 1) * L + j * W) = ds * at(here.scaled + 2 * features * L + own);
                at(dx + own) = direct;
            }
        }
}

template <class T>
static void backward(const StageView<T>& stage, const Trace<T>& here, int lanes, const T* cotangent, const T* above, T* below, int inner) {
    constexpr int W = Lanes<T>::W, L = lanes_of<T>();
    const int vectors = (lanes + W - 1) / W;
    const T zeros[8] = {};
    for (int i = 0; i < stage.context; ++i)
        for (int j = 0; j < vectors; ++j) at(below + i * L + j * W) = at(above + i * L + j * W);
    backward_law<T>(stage, here, vectors, cotangent, above, below);
    for (int i = 0; i < stage.step_count; ++i) {
        const Step& step = stage.steps[i];
        if (step.kind == Kind::law) {
            flip<T>(here.delta[0], stage.features, vectors);
            continue;
        }
        const bool hidden = step.out >= 0;
        if (!hidden && (inner == 2 || (inner == 1 && step.out == kTile && step.row < stage.context))) continue;
        T* const out = buffer<T>(stage, step.out, below, here.delta) + step.row * L;
        panel<T>(vectors, step.width, stage.tape + step.tape, here.delta[step.in] + step.begin * L, step.end - step.begin, step.rows,
                 step.start == Start::zero ? zeros : nullptr, false, out);
        if (!hidden || !is_network(stage.output)) continue;
        if (stage.activated[step.out]) {
            const T* argument = keeps_argument(stage.activation) ? here.raw[step.out] : here.units[step.out];
            times_derivative<T>(stage.activation, out, argument + step.row * L, step.rows, vectors, L);
        }
        for (int m = step.out + 1; m < stage.maps; ++m)
            if (stage.adds[m] == step.out)
                for (int r = 0; r < step.rows; ++r)
                    for (int j = 0; j < vectors; ++j) at(out + r * L + j * W) += at(here.delta[m] + (step.row + r) * L + j * W);
    }
}

// One stage of a transpose: swap the off-diagonal blocks of size B of a W x W matrix held in W vectors.
template <class T, int B>
FASTMAF_INLINE void swap_blocks(Vec<T> (&v)[Lanes<T>::W]) {
    constexpr int W = Lanes<T>::W;
    if constexpr (B < W) {
        Bits<T> low, high;
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
            low[i] = i & B ? W + i - B : i;
            high[i] = i & B ? W + i : i + B;
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i)
            if (!(i & B)) {
                const Vec<T> a = v[i], b = v[i + B];
                v[i] = shuffle<T>(a, b, low);
                v[i + B] = shuffle<T>(a, b, high);
            }
        swap_blocks<T, 2 * B>(v);
    }
}

template <class T>
static void transpose(const T* in, int units, int lanes, T* out, int64_t row, int64_t capacity) {
    constexpr int W = Lanes<T>::W, L = lanes_of<T>();
    for (int u = 0; u < units; u += W) {
        T* chunk = out + (u / L) * capacity * L + u % L;
        for (int r = 0; r < lanes; r += W) {
            Vec<T> v[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) v[i] = u + i < units ? at(in + (u + i) * L + r) : Vec<T>{};
            swap_blocks<T, 1>(v);
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) at(chunk + (row + r + i) * L) = v[i];
        }
    }
}

// kRows rows of delta times NV vectors of inputs; sums [kRows][lanes] go on from what is there unless they begin.
template <class T, int NV>
static void weight_gradient_block(const T* const* delta, const int* tile_rows, const int64_t* tile_begin, int tiles, int top,
                                  const T* inputs, bool begin, T* sums) {
    constexpr int W = Lanes<T>::W, L = lanes_of<T>();
    Vec<T> acc[kRows][NV];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) acc[i][j] = begin ? Vec<T>{} : at(sums + i * L + j * W);
    for (int t = 0; t < tiles; ++t) accumulate<T, kRows, NV, 1, L>(acc, delta[t] + top * L, inputs + tile_begin[t] * L, L, tile_rows[t]);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) at(sums + i * L + j * W) = acc[i][j];
}

// At most kTaskRows rows of a map. A few tiles of one chunk of inputs stay in L1 while all rows pass over them.
template <class T>
static void weight_gradient(const T* const* delta, const int* tile_rows, const int64_t* tile_begin, int tiles, int rows, const T* inputs,
                            int64_t capacity, const int* limit, const int64_t* offset, bool add, T* gradient) {
    constexpr int W = Lanes<T>::W, L = lanes_of<T>(), together = 4;
    T sums[kTaskRows * L] __attribute__((aligned(64)));
    for (int first = 0; first < limit[rows - 1]; first += L) {
        const T* chunk = inputs + (first / L) * capacity * L;
        for (int t = 0; t < tiles; t += together)
            for (int top = 0; top < rows; top += kRows) {
                const int left = limit[(top + kRows < rows ? top + kRows : rows) - 1] - first;
                if (left <= 0) continue;
                auto run = left > 2 * W ? weight_gradient_block<T, 3> : left > W ? weight_gradient_block<T, 2> : weight_gradient_block<T, 1>;
                run(delta + t, tile_rows + t, tile_begin + t, tiles - t < together ? tiles - t : together, top, chunk, t == 0, sums + top * L);
            }
        for (int i = 0; i < rows; ++i) {
            T* out = gradient + offset[i] + first;
            for (int j = 0; j < kVectors; ++j) store_first<T>(out + j * W, at(sums + i * L + j * W), limit[i] - first - j * W, add);
        }
    }
}

// Eight rows of a map at a time, so that their sums do not wait for each other.
template <class T>
static void bias_gradient(const T* const* delta, const int* tile_rows, const int64_t* tile_begin, int tiles, int rows, bool add, T* gradient) {
    constexpr int W = Lanes<T>::W, L = lanes_of<T>(), sums = 64 / int(sizeof(T)), parts = sums / W, R = 8;
    for (int top = 0; top < rows; top += R) {
        T total[R] = {};
        for (int p = 0; p < parts; ++p) {
            Vec<T> acc[R] = {};
            for (int t = 0; t < tiles; ++t) {
                const int ahead = int((p + parts - tile_begin[t] / W % parts) % parts);
                for (int r = ahead * W; r < tile_rows[t]; r += parts * W)
#pragma GCC unroll 8
                    for (int i = 0; i < R; ++i) acc[i] += at(delta[t] + (top + i) * L + r);
            }
            for (int w = 0; w < W; ++w)
#pragma GCC unroll 8
                for (int i = 0; i < R; ++i) total[i] += acc[i][w];
        }
        for (int i = 0; i < R && top + i < rows; ++i) gradient[top + i] = add ? gradient[top + i] + total[i] : total[i];
    }
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
