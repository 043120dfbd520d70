// Gradients of log_prob. Forward keeps of every stage its variables, units and law; backward runs the transposed staircases, from the
// last map to the first, with the same panels: delta of a map's inputs = W^T delta of its outputs, times act'. A map that adds the sums
// of another one passes its delta on to them.
//
// With g the cotangent of a row, gz that of z and s as in ops/laws:  dx = gz e^-s + W_1^T delta_1,  dr = ds (ds/dr), and
//     standardize  dm = -gz e^-s,  ds = -gz z - g          affine  dm = gz,  ds = -gz x e^-s - g
// A norm z = (x - mean) scale + beta has no weights; its delta is that of log_gamma, gz (x - mean) scale + g, and that of beta, gz.
//
// Weight gradients: rows of the batch are the inner index, and delta is read where backward left it. There are two ways, by the map:
//     wide     inputs lie in lanes, which needs them transposed; the sum runs over rows in index order
//     narrow   rows lie in lanes, so that a staircase of few inputs, or few units, leaves none idle; 16 (float) or 8 (double) interleaved
//              sums, of the rows that are equal modulo that, are added up as a tree
// so bits depend neither on threads nor on tiles.
#pragma once

#include "../ops/log_prob.inl.hpp"
#include "tile.hpp"

namespace fastmaf {
namespace FASTMAF_ISA {

// The law of a transform as backward needs it; see Trace.
template <class T>
struct TracedLaw {
    Vec<T> z, log_scale, scaled, inverse_scale, slope;

    FASTMAF_MEMBER TracedLaw(const StageView<T>& stage, Vec<T> x, Vec<T> m, Vec<T> raw)
        : log_scale(FASTMAF_ISA::log_scale<T>(stage, raw)), inverse_scale(scale_of<T>(-log_scale)), slope(log_scale_slope<T>(stage, raw)) {
        z = to_z<T>(stage, x, m, log_scale);
        scaled = stage.form == Form::affine ? x * inverse_scale : z;
    }
};

// The gradients in m, r and, beside the network, x; gz that in z.
template <class T>
struct LawGradient {
    Vec<T> dm, dr, dx;

    FASTMAF_MEMBER LawGradient(const StageView<T>& stage, Vec<T> g, Vec<T> gz, Vec<T> scaled, Vec<T> inverse_scale, Vec<T> slope) {
        dx = gz * inverse_scale;
        dm = stage.form == Form::affine ? gz : -dx;
        dr = (-gz * scaled - g) * slope;
    }
};

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
            const TracedLaw<T> law(stage, at(x + own), at(row), at(row + L));
            at(here.scaled + own) = law.scaled;
            at(inverse_scale + own) = law.inverse_scale;
            at(slope + own) = law.slope;
            at(next + stage.next[s] * L + j * W) = stage.scale ? (law.z - stage.loc[s]) * stage.scale[s] : law.z;
            sum -= widen(law.log_scale);
        }
        add_to<T>(log_det + j * W, sum);
    }
}

template <class T>
static void forward(const StageView<T>& stage, const Trace<T>& here, const Trace<T>& next, int lanes, double* log_det) {
    constexpr int W = Lanes<T>::W, L = lanes_of<T>();
    const int vectors = (lanes + W - 1) / W;
    T* const behind = next.x + stage.context * L;
    if (here.read != here.x) {
        copy_contexts<T>(stage, here.x, here.read, vectors);
        clip_inputs<T>(stage, here.x + stage.context * L, here.read + stage.context * L, 0, stage.features, vectors);
    }
    for (int i = 0; i < stage.step_count; ++i) {
        const Step& step = stage.steps[i];
        if (step.kind == Kind::law) {
            if (stage.output == Output::transform)
                forward_transform<T>(stage, here, behind, vectors, log_det);
            else
                density_law<T>(stage, step, here.units, 0, here.x + stage.context * L, behind, vectors, log_det);
            continue;
        }
        const bool complete = step.finish == Finish::unit;
        const int add = complete ? stage.adds[step.map] : -1, context = complete ? stage.context_units[step.map] : -1;
        Beside<T> beside{};
        if (step.map < stage.maps) beside.raw = here.raw[step.map];
        if (add >= 0) beside.add = here.raw[add] ? here.raw[add] : here.units[add];
        if (context >= 0) beside.context = here.units[context], beside.alone = here.alone[step.map];
        run_panel<T>(stage, step, buffer<T>(stage, step.in, here.read, here.units), here.units[step.out], beside.of(stage, step), vectors,
                     nullptr);
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
                const T* const inverse_scale = here.scaled + features * L + own;
                const LawGradient<T> law(stage, g, gz, at(here.scaled + own), at(inverse_scale), at(inverse_scale + features * L));
                at(delta + 2 * s * L + j * W) = law.dm;
                at(delta + (2 * s + 1) * L + j * W) = law.dr;
                at(dx + own) = law.dx;
            }
        }
}

// Behind the panels of a step, whose rows hold the gradient in the units of a hidden map: the gradients in its sums, in the sums of its
// weights and in the units of its context.
template <class T>
static void backward_units(const StageView<T>& stage, const Trace<T>& here, const Step& step, int vectors) {
    constexpr int W = Lanes<T>::W, L = lanes_of<T>();
    const int map = step.out, first = step.row * L;
    T* const out = here.delta[map] + first;
    const T* const scale = stage.norm_scale[map];
    if (stage.activated[map]) {
        const T* const unit = (keeps_argument(stage.activation) ? here.raw[map] : here.units[map]) + first;
        if (scale && keeps_argument(stage.activation)) {
            T argument[L] __attribute__((aligned(64)));
            for (int r = 0; r < step.rows; ++r) {
                const Vec<T> own = splat<T>(scale[step.row + r]), shift = splat<T>(stage.norm_shift[map][step.row + r]);
                for (int j = 0; j < vectors; ++j) at(argument + j * W) = fma(at(unit + r * L + j * W), own, shift);
                times_derivative<T>(stage.activation, out + r * L, argument, 1, vectors, L);
            }
        } else {
            times_derivative<T>(stage.activation, out, unit, step.rows, vectors, L);
        }
    }
    for (int r = 0; scale && r < step.rows; ++r)
        for (int j = 0; j < vectors; ++j) at(out + r * L + j * W) *= scale[step.row + r];
    for (int m = map + 1; m < stage.maps; ++m) {
        if (stage.adds[m] != map) continue;
        const T* const from = here.whole[m] ? here.whole[m] : here.delta[m];
        for (int r = 0; r < step.rows; ++r) {
            const int row = stage.adders[m] ? stage.adders[m][step.row + r] : step.row + r;
            for (int j = 0; row >= 0 && j < vectors; ++j) at(out + r * L + j * W) += at(from + row * L + j * W);
        }
    }
    const int context = stage.context_units[map];
    if (context < 0) return;
    T* const joined = here.delta[context] + first;
    const T* const unit = here.units[context] + first;
    const bool gated = stage.joins[map] == Joins::gated;
    for (int r = 0; r < step.rows; ++r)
        for (int j = 0; j < vectors; ++j) {
            const int own = r * L + j * W;
            const Vec<T> whole = at(out + own), gate = at(unit + own);
            if (here.whole[map]) at(here.whole[map] + first + own) = whole;
            at(joined + own) = gated ? whole * at(here.alone[map] + first + own) * gate * (1 - gate) : whole;
            if (gated) at(out + own) = whole * gate;
        }
    if (stage.joins[map] == Joins::activated) times_derivative<T>(stage.activation, joined, unit, step.rows, vectors, L);
}

template <class T>
static void backward(const StageView<T>& stage, const Trace<T>& here, int lanes, const T* cotangent, const T* above, T* below, int inner) {
    constexpr int W = Lanes<T>::W, L = lanes_of<T>();
    const int vectors = (lanes + W - 1) / W;
    const T zeros[8] = {};
    for (int i = 0; i < stage.context; ++i)
        for (int j = 0; j < vectors; ++j) at(below + i * L + j * W) = at(above + i * L + j * W);
    backward_law<T>(stage, here, vectors, cotangent, above, below);
    T* const dx = below + stage.context * L;
    const bool clips = here.read != here.x && inner < 2;
    for (int s = 0; clips && s < stage.features; ++s)
        for (int j = 0; j < vectors; ++j) {
            at(here.scaled + s * L + j * W) = at(dx + s * L + j * W);
            at(dx + s * L + j * W) = Vec<T>{};
        }
    for (int i = 0; i < stage.step_count; ++i) {
        const Step& step = stage.steps[i];
        if (step.kind == Kind::law) {
            flip<T>(here.delta[0], stage.features, vectors);
            continue;
        }
        const bool hidden = step.out >= 0;
        if (!hidden && (inner == 2 || (inner == 1 && step.out == kTile && step.row < stage.context))) continue;
        T* const out = buffer<T>(stage, step.out, below, here.delta) + step.row * L;
        panel<T>(vectors, step.width, stage.far, stage.tape + step.tape, here.delta[step.in] + step.begin * L, step.end - step.begin, step.rows,
                 step.start == Start::zero ? zeros : nullptr, false, out);
        if (hidden && is_network(stage.output)) backward_units<T>(stage, here, step, vectors);
    }
    for (int s = 0; clips && s < stage.features; ++s)
        for (int j = 0; j < vectors; ++j) {
            const int own = s * L + j * W, row = own + stage.context * L;
            const Vec<T> through = at(here.x + row) == at(here.read + row) ? at(dx + own) : Vec<T>{};
            at(dx + own) = at(here.scaled + own) + through;
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
static void wide_gradient_block(const T* const* delta, const int* tile_rows, const int64_t* tile_begin, int tiles, int top,
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
static void wide_gradient(const T* const* delta, const int* tile_rows, const int64_t* tile_begin, int tiles, int rows, const T* inputs,
                            int64_t capacity, const int* limit, const int64_t* offset, bool add, T* gradient) {
    constexpr int W = Lanes<T>::W, L = lanes_of<T>(), together = 4;
    T sums[kTaskRows * L] __attribute__((aligned(64)));
    for (int first = 0; first < limit[rows - 1]; first += L) {
        const T* chunk = inputs + (first / L) * capacity * L;
        for (int t = 0; t < tiles; t += together)
            for (int top = 0; top < rows; top += kRows) {
                const int left = limit[(top + kRows < rows ? top + kRows : rows) - 1] - first;
                if (left <= 0) continue;
                auto run = left > 2 * W ? wide_gradient_block<T, 3> : left > W ? wide_gradient_block<T, 2> : wide_gradient_block<T, 1>;
                run(delta + t, tile_rows + t, tile_begin + t, tiles - t < together ? tiles - t : together, top, chunk, t == 0, sums + top * L);
            }
        for (int i = 0; i < rows; ++i) {
            T* out = gradient + offset[i] + first;
            for (int j = 0; j < kVectors; ++j) store_first<T>(out + j * W, at(sums + i * L + j * W), limit[i] - first - j * W, add);
        }
    }
}

// The lanes of N vectors added up, as a tree that halves them. v[0] has the N sums side by side, each in W / N lanes.
template <class T, int N, int D = Lanes<T>::W / 2>
FASTMAF_INLINE void add_lanes(Vec<T>* v) {
    constexpr int W = Lanes<T>::W;
    if constexpr (D > 0) {
        constexpr int half = N > 1 ? N / 2 : 1;
        Bits<T> low{}, high{};
#pragma GCC unroll 16
        for (int l = 0; l < W; ++l) {
            const bool second = l % (2 * D) >= D;
            low[l] = second ? (N > 1 ? W : 0) + l - D : l;
            high[l] = second ? (N > 1 ? W : 0) + l : l + D;
        }
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i) {
            const Vec<T> a = v[i], b = v[N > 1 ? i + half : i];
            v[i] = shuffle<T>(a, b, low) + shuffle<T>(a, b, high);
        }
        add_lanes<T, half, D / 2>(v);
    }
}

// Sums over rows of the batch, which lie in lanes: of R numbers for each of NI inputs.
template <class T, int R, int NI>
struct RowSums {
    static constexpr int W = Lanes<T>::W, parts = 64 / int(sizeof(T)) / W;
    static constexpr int together = R < W ? R : W;  // sums that end in one vector
    Vec<T> part[parts][NI][R];

    // The first vector of a tile that belongs to a part.
    static int64_t first(int p, int64_t tile_begin) { return (p + parts - tile_begin / W % parts) % parts * W; }

    FASTMAF_MEMBER void finish() {
        for (int half = parts / 2; half > 0; half /= 2)
            for (int p = 0; p < half; ++p)
                for (int j = 0; j < NI; ++j)
                    for (int i = 0; i < R; ++i) part[p][j][i] += part[p + half][j][i];
#pragma GCC unroll 8
        for (int j = 0; j < NI; ++j)
#pragma GCC unroll 4
            for (int i = 0; i < R; i += together) add_lanes<T, together>(part[0][j] + i);
    }
    T operator()(int i, int j) const { return part[0][j][i / together * together][i % together * (W / together)]; }
};

// R rows of delta times NI inputs from `first` on.
template <class T, int R, int NI>
static void narrow_gradient_block(const T* const* delta, const T* const* inputs, const int* tile_rows, const int64_t* tile_begin, int tiles,
                                  int top, int rows, int first, const int* limit, const int64_t* offset, bool add, T* gradient) {
    using Sums = RowSums<T, R, NI>;
    constexpr int W = Lanes<T>::W, L = lanes_of<T>(), step = Sums::parts * W;
    Sums sums;
    for (int p = 0; p < Sums::parts; ++p) {
        Vec<T> acc[R][NI];
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
            for (int j = 0; j < NI; ++j) acc[i][j] = Vec<T>{};
        for (int t = 0; t < tiles; ++t) {
            const T *d = delta[t] + top * L, *x = inputs[t] + first * L;
            for (int64_t r = Sums::first(p, tile_begin[t]); r < tile_rows[t]; r += step) {
                Vec<T> in[NI];
#pragma GCC unroll 8
                for (int j = 0; j < NI; ++j) in[j] = at(x + j * L + r);
#pragma GCC unroll 8
                for (int i = 0; i < R; ++i) {
                    const Vec<T> own = loaded<T>(d + i * L + r);
#pragma GCC unroll 8
                    for (int j = 0; j < NI; ++j) acc[i][j] = fma(own, in[j], acc[i][j]);
                }
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
            for (int j = 0; j < NI; ++j) sums.part[p][j][i] = acc[i][j];
    }
    sums.finish();
    for (int i = 0; i < R && top + i < rows; ++i) {
        T* const out = gradient + offset[top + i] + first;
        const int left = limit[top + i] - first;
#pragma GCC unroll 8
        for (int j = 0; j < NI; ++j)
            if (j < left) out[j] = add ? out[j] + sums(i, j) : sums(i, j);
    }
}

// At most kTaskRows rows of a map. delta, inputs: [units of the map, its inputs][lanes] of each tile. All rows pass over a few inputs before
// the next ones, so that these stay in L2. The last few rows take more inputs at a time instead of idle rows.
template <class T>
static void narrow_gradient(const T* const* delta, const T* const* inputs, const int* tile_rows, const int64_t* tile_begin, int tiles, int rows,
                            const int* limit, const int64_t* offset, bool add, T* gradient) {
    constexpr int R = kRows, few = kRows / 2, together = 24;
    for (int begin = 0; begin < limit[rows - 1]; begin += together)
        for (int top = 0; top < rows; top += R) {
            const int all = limit[(top + R < rows ? top + R : rows) - 1], end = all < begin + together ? all : begin + together;
            const bool last = rows - top <= few;
            for (int first = begin; first < end; first += last ? 6 : 3) {
                const int left = end - first;
                auto run = last       ? left > 3 ? narrow_gradient_block<T, few, 6> : narrow_gradient_block<T, few, 3>
                           : left > 2 ? narrow_gradient_block<T, R, 3>
                           : left > 1 ? narrow_gradient_block<T, R, 2>
                                      : narrow_gradient_block<T, R, 1>;
                run(delta, inputs, tile_rows, tile_begin, tiles, top, rows, first, limit, offset, add, gradient);
            }
        }
}

template <class T>
static void bias_gradient(const T* const* delta, const int* tile_rows, const int64_t* tile_begin, int tiles, int rows, bool add, T* gradient) {
    using Sums = RowSums<T, kRows, 1>;
    constexpr int W = Lanes<T>::W, L = lanes_of<T>(), step = Sums::parts * W;
    for (int top = 0; top < rows; top += kRows) {
        Sums sums;
        for (int p = 0; p < Sums::parts; ++p) {
            Vec<T> acc[kRows] = {};
            for (int t = 0; t < tiles; ++t)
                for (int64_t r = Sums::first(p, tile_begin[t]); r < tile_rows[t]; r += step)
#pragma GCC unroll 8
                    for (int i = 0; i < kRows; ++i) acc[i] += at(delta[t] + (top + i) * L + r);
#pragma GCC unroll 8
            for (int i = 0; i < kRows; ++i) sums.part[p][0][i] = acc[i];
        }
        sums.finish();
        for (int i = 0; i < kRows && top + i < rows; ++i) gradient[top + i] = add ? gradient[top + i] + sums(i, 0) : sums(i, 0);
    }
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
