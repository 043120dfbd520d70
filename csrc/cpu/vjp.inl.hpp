// Gradients of log_prob. Forward keeps of every MADE its variables, units and law; backward runs the transposed staircases, from the
// last map to the first, with the same panels: delta of a map's inputs = W^T delta of its outputs, times act'.
//
// With g the cotangent of a row, gz that of z and s as in ops/laws:  dx = gz e^-s + W_1^T delta_1,  dr = ds (ds/dr), and
//     standardize  dm = -gz e^-s,  ds = -gz z - g          affine  dm = gz,  ds = -gz x e^-s - g
// Weight gradients: rows of the batch are the inner index. Units lie in lanes, which needs the inputs of each map transposed, and
// delta is read where backward left it; the sum runs over rows in index order, so its bits do not depend on threads or tiles.
#pragma once

#include "log_prob.inl.hpp"

namespace fastmaf {
namespace FASTMAF_ISA {

template <class T>
static void forward(const MadeView<T>* mades, int count, const Trace<T>* trace, int lanes, double* log_det) {
    constexpr int W = Lanes<T>::W, L = lanes_of<T>();
    const int vectors = (lanes + W - 1) / W;
    for (int k = 0; k < count; ++k) {
        const MadeView<T>& made = mades[k];
        const Trace<T>& kept = trace[k];
        for (int i = 0; i < made.step_count; ++i) {
            Step step = made.steps[i];
            if (step.kind == Kind::law) break;
            T* argument = step.map + 1 < made.maps ? kept.argument[step.map] : nullptr;
            const T* in = step.map ? kept.units[step.map - 1] : kept.x;
            if (argument) {
                step.finish = Finish::raw;
                run_panel<T>(made, step, in, argument, vectors, nullptr);
                T* out = kept.units[step.map] + step.row * L;
                for (int r = 0; r < step.rows; ++r)
                    for (int j = 0; j < vectors; ++j) at(out + r * L + j * W) = at(argument + (step.row + r) * L + j * W);
                activate<T>(made.activation, out, step.rows, vectors, L);
            } else {
                run_panel<T>(made, step, in, kept.units[step.map], vectors, nullptr);
            }
        }
        const T* parameters = kept.units[made.maps - 1];
        const T* x = kept.x + made.context * L;
        T* next = trace[k + 1].x + made.context * L;
        T* const inverse_scale = kept.scaled + made.features * L;
        T* const slope = inverse_scale + made.features * L;
        for (int j = 0; j < vectors; ++j) {
            typename Lanes<T>::Wide sum{};
            for (int s = 0; s < made.features; ++s) {
                const int at_s = s * L + j * W;
                const T* row = parameters + 2 * s * L + j * W;
                const Vec<T> scale = log_scale<T>(made, at(row + L)), e = exp<T>(-scale);
                const Vec<T> z = to_z<T>(made, at(x + at_s), at(row), scale);
                at(kept.scaled + at_s) = made.form == Form::affine ? at(x + at_s) * e : z;
                at(inverse_scale + at_s) = e;
                at(slope + at_s) = log_scale_slope<T>(made, scale);
                at(next + made.next[s] * L + j * W) = made.scale ? (z - made.loc[s]) * made.scale[s] : z;
                sum -= widen(scale);
            }
            add_to<T>(log_det + j * W, sum);
        }
    }
}

template <class T>
static void backward(const MadeView<T>* mades, int count, const Trace<T>* trace, int lanes, const T* cotangent, T* const dx[2], bool inner) {
    constexpr int W = Lanes<T>::W, L = lanes_of<T>();
    const int vectors = (lanes + W - 1) / W;
    const int features = mades[0].features, context = mades[0].context;
    const T zeros[8] = {};
    T* const of_noise = dx[count % 2];
    const T* noise = trace[count].x + context * L;
    for (int i = 0; i < context; ++i)
        for (int j = 0; j < vectors; ++j) at(of_noise + i * L + j * W) = Vec<T>{};
    for (int s = 0; s < features; ++s)
        for (int j = 0; j < vectors; ++j) at(of_noise + (context + s) * L + j * W) = -at(noise + s * L + j * W) * at(cotangent + j * W);
    for (int k = count; k-- > 0;) {
        const MadeView<T>& made = mades[k];
        const Trace<T>& kept = trace[k];
        const T* above = dx[(k + 1) % 2];
        T* const below = dx[k % 2];
        T* const d_parameters = kept.delta[made.maps - 1];
        const T* const inverse_scale = kept.scaled + features * L;
        const T* const slope = inverse_scale + features * L;
        for (int i = 0; i < context; ++i)
            for (int j = 0; j < vectors; ++j) at(below + i * L + j * W) = at(above + i * L + j * W);
        for (int s = 0; s < features; ++s)
            for (int j = 0; j < vectors; ++j) {
                const int at_s = s * L + j * W;
                Vec<T> gz = at(above + (context + made.next[s]) * L + j * W);
                if (made.scale) gz *= made.scale[s];
                const Vec<T> direct = gz * at(inverse_scale + at_s);
                const Vec<T> ds = -gz * at(kept.scaled + at_s) - at(cotangent + j * W);
                at(d_parameters + 2 * s * L + j * W) = made.form == Form::affine ? gz : -direct;
                at(d_parameters + (2 * s + 1) * L + j * W) = ds * at(slope + at_s);
                at(below + (context + s) * L + j * W) = direct;
            }
        for (int i = 0; i < made.step_count; ++i) {
            const Step& step = made.steps[i];
            if (step.map == 0 && inner && (k == 0 || step.row < context)) continue;
            T* out = (step.map ? kept.delta[step.map - 1] : below) + step.row * L;
            // Sums of hidden units begin at zero, those of the variables with what the law gave.
            panel<T>(vectors, step.width, made.tape + step.tape, kept.delta[step.map] + step.begin * L, step.end - step.begin, step.rows,
                     step.map ? zeros : nullptr, false, out);
            if (step.map) {
                const T* argument = kept.argument[step.map - 1];
                times_derivative<T>(made.activation, out, (argument ? argument : kept.units[step.map - 1]) + step.row * L, step.rows,
                                    vectors, L);
            }
        }
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

// At most 64 rows of a map. A few tiles of one chunk of inputs stay in L1 while all rows pass over them.
template <class T>
static void weight_gradient(const T* const* delta, const int* tile_rows, const int64_t* tile_begin, int tiles, int rows, const T* inputs,
                            int64_t capacity, const int* limit, const int64_t* offset, bool add, T* gradient) {
    constexpr int W = Lanes<T>::W, L = lanes_of<T>(), together = 4;
    T sums[64 * L] __attribute__((aligned(64)));
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
        T acc[R][sums] __attribute__((aligned(64))) = {};
        for (int t = 0; t < tiles; ++t)
            for (int r = 0; r < tile_rows[t]; r += W) {
                const int p = int((tile_begin[t] + r) / W % parts) * W;
#pragma GCC unroll 8
                for (int i = 0; i < R; ++i) at(acc[i] + p) += at(delta[t] + (top + i) * L + r);
            }
        T total[R] = {};
        for (int p = 0; p < sums; ++p)
#pragma GCC unroll 8
            for (int i = 0; i < R; ++i) total[i] += acc[i][p];
        for (int i = 0; i < R && top + i < rows; ++i) gradient[top + i] = add ? gradient[top + i] + total[i] : total[i];
    }
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
