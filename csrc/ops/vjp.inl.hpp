// Gradients of log_prob, the part that units and variables have in them. Forward keeps of every stage its variables, units and law;
// backward runs the transposed staircases, from the last map to the first, with the same panels: delta of a map's inputs = W^T delta of
// its outputs, times act'. A map that adds the sums of another one passes its delta on to them.
//
// With g the cotangent of a row, gz that of z and s as in ops/laws:  dx = gz e^-s + W_1^T delta_1,  dr = ds (ds/dr), and
//     standardize  dm = -gz e^-s,  ds = -gz z - g          affine  dm = gz,  ds = -gz x e^-s - g
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
FASTMAF_FN void traced_transform(const StageView<T>& stage, const Trace<T>& here, T* next, int64_t shift, int vectors, double* log_det) {
    constexpr int W = Lanes<T>::W, L = lanes_of<T>();
    const T* parameters = here.units[stage.maps - 1] + shift;
    const T* x = here.x + stage.context * L + shift;
    T* const scaled = here.scaled + shift;
    T* const inverse_scale = scaled + stage.features * L;
    T* const slope = inverse_scale + stage.features * L;
    for (int j = 0; j < vectors; ++j) {
        typename Lanes<T>::Wide sum{};
        for (int s = 0; s < stage.features; ++s) {
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

// A law step of the density; `next`: the variables of the next tile, from the first of these vectors on.
template <class T>
FASTMAF_FN void traced_law(const StageView<T>& stage, const Step& step, const Trace<T>& here, T* next, int64_t shift, int vectors,
                           double* log_det) {
    if (stage.output == Output::transform) return traced_transform<T>(stage, here, next, shift, vectors, log_det);
    density_law<T>(stage, step, here.units, shift, here.x + stage.context * lanes_of<T>() + shift, next, vectors, log_det);
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
        const T* const inverse_scale = here.scaled + features * L + own;
        const LawGradient<T> law(stage, g, gz, at(here.scaled + own), at(inverse_scale), at(inverse_scale + features * L));
        at(delta + 2 * s * L + shift) = law.dm;
        at(delta + (2 * s + 1) * L + shift) = law.dr;
        at(dx + own) = law.dx;
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
// whole tile.
template <class T>
FASTMAF_INLINE void gradient_panel(const StageView<T>& stage, const Step& step, const Trace<T>& here, const T* zeros, T* below, int inner,
                                   int vectors) {
    constexpr int L = lanes_of<T>();
    const bool hidden = step.out >= 0;
    if (!hidden && (inner == 2 || (inner == 1 && step.out == kTile && step.row < stage.context))) return;
    T* const out = buffer<T>(stage, step.out, below, here.delta) + step.row * L;
    panel<T>(vectors, step.width, stage.far, stage.tape + step.tape, here.delta[step.in] + step.begin * L, step.end - step.begin, step.rows,
             step.start == Start::zero ? zeros : nullptr, false, out);
    if (hidden && is_network(stage.output)) unit_gradients<T>(stage, here, step, vectors);
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
