// Gradients of log_prob, the part that units and variables have in them. Forward keeps of every stage its variables, units and law;
// backward runs the transposed staircases, from the last map to the first, with the same panels: delta of a map's inputs = W^T delta of
// its outputs, times act'. A map that adds the sums of another one passes its delta on to them.
//
// With g the cotangent of a row, gz that of z and s as in ops/laws:  dx = gz e^-s + W_1^T delta_1,  dr = ds (ds/dr), and
//     standardize  dm = -gz e^-s,  ds = -gz z - g          affine  dm = gz,  ds = -gz x e^-s - g
// Where the network reads z instead, W_1^T delta_1 belongs to gz, and dx = gz e^-s: the law waits, rank by rank, for what higher ranks give.
//
// The sampler, by the implicit rule: x has of z, of the context and of the weights what  dz/dx dx + dz/dweights dweights = dz  says. With
// gx the cotangent of x, the one w of z solves  (dz/dx)^T w = gx,  and all others are those of the density under -w, without its g. Where
// the network reads x, W_1^T delta_1 belongs to gx, and w = gx e^s waits for it, rank by rank.
// A norm z = (x - mean) scale + beta has no weights; its delta is that of log_gamma, gz (x - mean) scale + g, and that of beta, gz.
//
// `shift` says where the vectors of a call begin in a tile: a call may have one vector of it, or all.
#pragma once

#include "log_prob.inl.hpp"
#include "trace.hpp"

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
FASTMAF_FN void traced_transform(const StageView<T>& stage, int first, int count, const Trace<T>& here, T* next, int64_t shift, int vectors,
                                 double* log_det) {
    constexpr int W = Lanes<T>::W, L = lanes_of<T>();
    const T* parameters = here.units[stage.maps - 1] + shift;
    const T* x = here.x + stage.context * L + shift;
    T* const scaled = here.scaled + shift;
    T* const inverse_scale = scaled + stage.features * L;
    T* const slope = inverse_scale + stage.features * L;
    for (int j = 0; j < vectors; ++j) {
        typename Lanes<T>::Wide sum{};
        for (int s = first; s < first + count; ++s) {
            const int own = s * L + j * W;
            const T* row = parameters + 2 * s * L + j * W;
            const TracedLaw<T> law(stage, at(x + own), at(row), at(row + L));
            at(scaled + own) = law.scaled;
            at(inverse_scale + own) = law.inverse_scale;
            at(slope + own) = law.slope;
            at(next + stage.next[s] * L + j * W) = stage.scale ? (law.z - stage.loc[s]) * stage.scale[s] : law.z;
            sum -= widen(law.log_scale);
        }
        add_to<T>(log_det + j * W, sum);
    }
}

// What the maps of a stage read, with the context and, unless it is yet to come, what they read of the variables.
template <class T>
FASTMAF_INLINE void traced_inputs(const StageView<T>& stage, const Trace<T>& here, int64_t shift, int vectors) {
    const int64_t first = stage.context * lanes_of<T>() + shift;
    copy_contexts<T>(stage, here.x + shift, here.read + shift, vectors);
    if (!stage.reads_noise) clip_inputs<T>(stage, here.x + first, here.read + first, 0, stage.features, vectors);
}

// A law step of the density; `next`: the variables of the next tile, from the first of these vectors on.
template <class T>
FASTMAF_FN void traced_law(const StageView<T>& stage, const Step& step, const Trace<T>& here, T* next, int64_t shift, int vectors,
                           double* log_det) {
    const int64_t first = stage.context * lanes_of<T>() + shift;
    if (stage.output != Output::transform) return density_law<T>(stage, step, here.units, shift, here.x + first, next, vectors, log_det);
    traced_transform<T>(stage, step.row, step.rows, here, next, shift, vectors, log_det);
    if (stage.reads_noise) take_noise<T>(stage, next, here.read + first, step.row, step.rows, vectors);
}

// A panel step of the density, of a whole tile.
template <class T>
FASTMAF_INLINE void traced_panel(const StageView<T>& stage, const Step& step, const Trace<T>& here, int vectors) {
    const bool complete = step.finish == Finish::unit;
    const int add = complete ? stage.adds[step.map] : -1, context = complete ? stage.context_units[step.map] : -1;
    Beside<T> beside{};
    if (step.map < stage.maps) beside.raw = here.raw[step.map];
    if (add >= 0) beside.add = here.raw[add] ? here.raw[add] : here.units[add];
    if (context >= 0) beside.context = here.units[context], beside.alone = here.alone[step.map];
    run_panel<T>(stage, step, buffer<T>(stage, step.in, here.read, here.units), here.units[step.out], beside.of(stage, step), vectors,
                 nullptr);
}

// Of the s-th variable of a transform, from the gradient in its z: those in the outputs of the last map and, by the law, in x.
template <class T>
FASTMAF_INLINE void transform_gradient(const StageView<T>& stage, const Trace<T>& here, int s, int64_t shift, Vec<T> g, Vec<T> gz, T* dx) {
    constexpr int L = lanes_of<T>();
    T* const delta = here.delta[stage.maps - 1] + 2 * s * L + shift;
    const T* const scaled = here.scaled + s * L + shift;
    const T* const inverse_scale = scaled + stage.features * L;
    const LawGradient<T> law(stage, g, gz, at(scaled), at(inverse_scale), at(inverse_scale + stage.features * L));
    at(delta) = law.dm;
    at(delta + L) = law.dr;
    at(dx + s * L + shift) = law.dx;
}

// Of the s-th variable: the gradient in the outputs of the last map, and what x has of it beside the network. `above`, `below`: the
// gradients in the next tile and in this one.
template <class T>
FASTMAF_INLINE void law_gradient(const StageView<T>& stage, const Trace<T>& here, int s, int64_t shift, Vec<T> g, const T* above,
                                 T* below) {
    constexpr int L = lanes_of<T>();
    const int features = stage.features;
    const int64_t own = s * L + shift;
    const T* const x = here.x + stage.context * L;
    T* const dx = below + stage.context * L;
    T* const delta = here.delta[stage.maps - 1];
    if (stage.output == Output::base) {
        const int64_t first = stage.first[s] * L + shift;
        const Conditional<T> p(stage, s, here.units[stage.maps - 1] + first);
        at(dx + own) = conditional_gradient<T>(p, at(x + own), g, delta + first);
        return;
    }
    Vec<T> gz = at(above + (stage.context + stage.next[s]) * L + shift);
    if (stage.output == Output::linear) {
        at(delta + own) = at(here.delta[0] + own) = gz;
    } else if (stage.output == Output::norm) {
        at(dx + own) = gz * stage.scale[s];
        if (!stage.trainable) return;
        at(delta + own) = fma(gz, (at(x + own) - stage.loc[s]) * stage.scale[s], g);
        at(delta + features * L + own) = gz;
    } else {
        if (stage.scale) gz *= stage.scale[s];
        transform_gradient<T>(stage, here, s, shift, g, gz, dx);
    }
}

// What all maps give what they read of the s-th variable; nothing beyond the clip.
template <class T>
FASTMAF_INLINE Vec<T> through_maps(const StageView<T>& stage, const Trace<T>& here, int s, int64_t shift, const T* below) {
    const int64_t row = (stage.context + s) * lanes_of<T>() + shift;
    const Vec<T> through = at(below + row);
    if (!(stage.input_clip > 0)) return through;
    const Vec<T> kept = magnitude<T>(at(here.read + row)) < stage.input_clip ? through : Vec<T>{};
    return stage.reads_noise ? kept : at(here.x + row) == at(here.read + row) ? through : Vec<T>{};
}

// Where the network reads the noise: of the s-th variable, to whose z all maps have added, in `below`, what they give it.
template <class T>
FASTMAF_INLINE void noise_gradient(const StageView<T>& stage, const Trace<T>& here, int s, int64_t shift, Vec<T> g, const T* above,
                                   T* below) {
    constexpr int L = lanes_of<T>();
    const Vec<T> gz = at(above + (stage.context + stage.next[s]) * L + shift) + through_maps<T>(stage, here, s, shift, below);
    transform_gradient<T>(stage, here, s, shift, g, gz, below + stage.context * L);
}

// A law step of backward: of a Linear, or of a network that reads the noise.
template <class T>
FASTMAF_FN void backward_law(const StageView<T>& stage, const Step& step, const Trace<T>& here, int64_t shift, int vectors,
                             const T* cotangent, const T* above, T* below) {
    constexpr int W = Lanes<T>::W;
    if (stage.output == Output::linear) return flip<T>(here.delta[0] + shift, stage.features, vectors);
    for (int s = step.row; s < step.row + step.rows; ++s)
        for (int j = 0; j < vectors; ++j) noise_gradient<T>(stage, here, s, shift + j * W, at(cotangent + j * W), above, below);
}

// Of the s-th variable of a transform, from the gradient in the x that a sampler makes: those in the outputs of the last map and, which is
// returned, in z.
template <class T>
FASTMAF_INLINE Vec<T> drawn_gradient(const StageView<T>& stage, const Trace<T>& here, int s, int64_t shift, Vec<T> gx) {
    constexpr int L = lanes_of<T>();
    T* const delta = here.delta[stage.maps - 1] + 2 * s * L + shift;
    const T* const scaled = here.scaled + s * L + shift;
    const T* const inverse_scale = scaled + stage.features * L;
    const Vec<T> gz = gx / at(inverse_scale);
    const LawGradient<T> law(stage, Vec<T>{}, -gz, at(scaled), at(inverse_scale), at(inverse_scale + stage.features * L));
    at(delta) = law.dm;
    at(delta + L) = law.dr;
    return gz;
}

// The gradients in the variables of the sampler, before its steps. Where the network reads x, that in x waits in the tile above; a Linear
// takes it from where it is.
template <class T>
FASTMAF_INLINE void begin_drawn(const StageView<T>& stage, const Trace<T>& here, int s, int64_t shift, T* below, T* above) {
    constexpr int L = lanes_of<T>();
    T& own = below[(stage.context + s) * L + shift];
    T& next = above[(stage.context + stage.next[s]) * L + shift];
    const Vec<T> gx = at(&own);
    if (stage.output == Output::norm) {
        const Vec<T> gz = gx / splat<T>(stage.scale[s]);
        at(&next) = gz;
        if (!stage.trainable) return;
        at(here.delta[0] + s * L + shift) = -gx * (at(here.x + (stage.context + s) * L + shift) - stage.loc[s]);
        at(here.delta[0] + (stage.features + s) * L + shift) = -gz;
    } else if (stage.output == Output::transform) {
        at(&next) = stage.reads_noise ? drawn_gradient<T>(stage, here, s, shift, gx) : gx;
        at(&own) = Vec<T>{};
    }
}

// A law step of the sampler's backward.
template <class T>
FASTMAF_FN void drawn_law(const StageView<T>& stage, const Step& step, const Trace<T>& here, int64_t shift, int vectors, T* below,
                          T* above) {
    constexpr int W = Lanes<T>::W, L = lanes_of<T>();
    T* const variables = below + stage.context * L + shift;
    T* const behind = above + stage.context * L + shift;
    if (stage.output == Output::linear) {
        T *const upper = here.delta[0] + shift, *const lower = here.delta[1] + shift;
        for (int i = 0; i < stage.features; ++i)
            for (int j = 0; j < vectors; ++j) {
                const int own = i * L + j * W;
                if (step.row == 0) {  // back to the order of the coordinates
                    at(variables + own) = at(lower + own) = at(upper + (stage.features - 1 - i) * L + j * W);
                } else {
                    const Vec<T> gz = at(variables + own);
                    at(behind + stage.next[i] * L + j * W) = gz;
                    at(lower + own) = -gz;
                    at(upper + own) = -at(upper + own);
                }
            }
        return;
    }
    for (int s = step.row; s < step.row + step.rows; ++s)
        for (int j = 0; j < vectors; ++j) {
            T* const next = behind + stage.next[s] * L + j * W;
            const Vec<T> gx = at(next) + through_maps<T>(stage, here, s, shift + j * W, below);
            const Vec<T> gz = drawn_gradient<T>(stage, here, s, shift + j * W, gx);
            at(next) = stage.scale ? gz / splat<T>(stage.scale[s]) : gz;
        }
}

// Where maps read variables clipped: what the law gives x waits beside it while the maps give theirs ...
template <class T>
FASTMAF_INLINE void part_clipped(const StageView<T>& stage, const Trace<T>& here, int s, int64_t shift, T* below) {
    const int64_t own = s * lanes_of<T>() + shift, row = own + stage.context * lanes_of<T>();
    at(here.scaled + own) = at(below + row);
    at(below + row) = Vec<T>{};
}
// ... of which a variable beyond the clip gets nothing.
template <class T>
FASTMAF_INLINE void join_clipped(const StageView<T>& stage, const Trace<T>& here, int s, int64_t shift, T* below) {
    const int64_t own = s * lanes_of<T>() + shift, row = own + stage.context * lanes_of<T>();
    const Vec<T> through = at(here.x + row) == at(here.read + row) ? at(below + row) : Vec<T>{};
    at(below + row) = at(here.scaled + own) + through;
}

// Behind the panels of a step, whose rows hold the gradient in the units of a hidden map: the gradients in its sums, in the sums of its
// weights and in the units of its context.
template <class T>
FASTMAF_FN void unit_gradients(const StageView<T>& stage, const Trace<T>& here, const Step& step, int vectors) {
    constexpr int W = Lanes<T>::W, L = lanes_of<T>();
    const int map = step.out, first = step.row * L;
    T* const out = here.delta[map] + first;
    const T* const scale = stage.norm_scale[map];
    if (stage.activated[map]) {
        const T* const unit = (keeps_argument(stage.activation) ? here.raw[map] : here.units[map]) + first;
        if (scale && keeps_argument(stage.activation))
            with_derivative<T>(stage.activation, [&](auto f) {
                for (int r = 0; r < step.rows; ++r) {
                    const Vec<T> own = splat<T>(scale[step.row + r]), offset = splat<T>(stage.norm_shift[map][step.row + r]);
                    for (int j = 0; j < vectors; ++j) at(out + r * L + j * W) *= f(fma(at(unit + r * L + j * W), own, offset));
                }
            });
        else
            times_derivative<T>(stage.activation, out, unit, step.rows, vectors, L);
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

// A panel step of backward, of a whole tile. `zeros`: eight of them. `inner` leaves out rows that nobody asked for: 1 the context, 2 the
// whole tile, of which a network that reads the noise needs the variables.
template <class T>
FASTMAF_INLINE void gradient_panel(const StageView<T>& stage, const Step& step, const Trace<T>& here, const T* zeros, T* below, int inner,
                                   int vectors) {
    constexpr int L = lanes_of<T>();
    const bool hidden = step.out >= 0;
    const bool of_context = step.out == kTile && step.row < stage.context;
    if (!hidden && ((inner == 2 && !stage.reads_noise) || (inner && of_context))) return;
    T* const out = buffer<T>(stage, step.out, below, here.delta) + step.row * L;
    const T* const in = buffer<T>(stage, step.in, below, here.delta) + step.begin * L;
    panel<T>(vectors, step.width, stage.far, stage.tape + step.tape, in, step.end - step.begin, step.rows,
             step.start == Start::zero ? zeros : nullptr, false, out);
    if (hidden && is_network(stage.output)) unit_gradients<T>(stage, here, step, vectors);
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
