// The gradient of a row alone, units in lanes: forward as its density, but everything is kept; backward over the same tape as a tile. There
// the panels of a map end together and begin one after the other, as those of the density begin together and end one after the other.
// Every sum has the order that it has in a tile, so bits are the same.
#pragma once

#include "tiles.inl.hpp"
#include "vjp.inl.hpp"

namespace fastmaf {
namespace FASTMAF_ISA {

// The parameters of W variables, (m, r) each: all m, then all r.
template <class T>
FASTMAF_INLINE void split_pairs(const T* pairs, Vec<T>& first, Vec<T>& second) {
    constexpr int W = Lanes<T>::W;
    Bits<T> even, odd;
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
        even[i] = 2 * i;
        odd[i] = 2 * i + 1;
    }
    const Vec<T> a = at(pairs), b = at(pairs + W);
    first = shuffle<T>(a, b, even);
    second = shuffle<T>(a, b, odd);
}

template <class T>
FASTMAF_INLINE void join_pairs(Vec<T> first, Vec<T> second, T* pairs) {
    constexpr int W = Lanes<T>::W;
    Bits<T> low, high;
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
        low[i] = i / 2 + i % 2 * W;
        high[i] = W / 2 + i / 2 + i % 2 * W;
    }
    at(pairs) = shuffle<T>(first, second, low);
    at(pairs + W) = shuffle<T>(first, second, high);
}

// As traced_transform.
template <class T>
FASTMAF_INLINE void traced_row(const StageView<T>& stage, const Trace<T>& here, T* next, double* log_det) {
    constexpr int W = Lanes<T>::W;
    const int features = stage.features, stride = row_stride(features);
    const T* const x = here.x + stage.context;
    double sum = 0;
    for (int s = 0; s < features; s += W) {
        Vec<T> m, raw;
        split_pairs<T>(here.units[stage.maps - 1] + 2 * s, m, raw);
        const TracedLaw<T> law(stage, load_loose(x + s), m, raw);
        at(here.scaled + s) = law.scaled;
        at(here.scaled + stride + s) = law.inverse_scale;
        at(here.scaled + 2 * stride + s) = law.slope;
        const int n = features - s < W ? features - s : W;
        for (int i = 0; i < n; ++i) {
            const T z = law.z[i];
            next[stage.next[s + i]] = stage.scale ? (z - stage.loc[s + i]) * stage.scale[s + i] : z;
        }
        // The order of a tile's sums: each stage's log-scales from zero, then onto the total.
        for (int i = 0; i < n; ++i) sum -= double(law.log_scale[i]);
    }
    *log_det += sum;
}

template <class T>
static void forward_row(const StageView<T>& stage, const Trace<T>& here, T* next, double* log_det) {
    constexpr int W = Lanes<T>::W;
    if (here.read != here.x) {
        const int first = stage.context;
        for (int c = 0; c < first; ++c) here.read[c] = here.x[c];
        for (int s = first; s < first + stage.features; s += W) store_loose<T>(here.read + s, clipped<T>(stage, load_loose(here.x + s)));
    }
    for (int i = 0; i < stage.step_count; ++i) {
        while (stage.steps[i].kind == Kind::panel) {
            RowMap<T> map(stage, stage.steps + i, here.read, here.units, nullptr);
            const int m = map.step->map;
            if (here.raw[m]) map.out = here.raw[m];
            map.run(0, map.panels);
            i += map.panels;
            if (!stage.activated[m]) continue;
            with_activation<T>(stage.activation, [&](auto f) {
                for (int u = 0; u < stage.rows[m]; u += W) at(here.units[m] + u) = f(at(map.out + u));
            });
        }
        if (stage.output == Output::linear)
            row_linear<T>(stage, stage.steps[i].row, here.units, next);
        else
            traced_row<T>(stage, here, next, log_det);
    }
}

// P consecutive panels of backward, N of them under way: these as far as the next one begins. As in row_panels, only the last one's tape may
// be narrower than eight.
template <class T, int P, int N = 1>
FASTMAF_INLINE void row_suffixes(const Step* step, const T* const* w, int last_width, const T* x, Eight<T>* sum) {
    Eight<T> acc[N];
    const T* from[N];
    int k = step[N - 1].begin;
#pragma GCC unroll 16
    for (int p = 0; p < N; ++p) {
        acc[p] = sum[p];
        from[p] = w[p] + (k - step[p].begin) * 8;
    }
    const int n = (N < P ? step[N < P ? N : 0].begin : step[0].end) - k;
    const T* const in = x + k;
    const T* last = from[N - 1];
    for (k = 0; k < n; ++k, last += N < P ? 8 : last_width) {
#pragma GCC unroll 16
        for (int p = 0; p + 1 < N; ++p) acc[p].add(from[p] + k * 8, in[k]);
        acc[N - 1].add(last, in[k]);
    }
#pragma GCC unroll 16
    for (int p = 0; p < N; ++p) sum[p] = acc[p];
    if constexpr (N < P) row_suffixes<T, P, N + 1>(step, w, last_width, x, sum);
}

// Where the sums begin at zero, `out` has room for whole panels; else they go on from what lies there, and other numbers lie behind it.
template <class T, int P>
static void row_suffix_group(const Step* step, const T* tape, const T* x, T* out) {
    const bool zero = step->start == Start::zero;
    Eight<T> sum[P];
    const T* w[P];
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
        if (zero)
            sum[p] = Eight<T>{};
        else
            sum[p].load(out + step[p].row);
        w[p] = tape + step[p].tape;
    }
    row_suffixes<T, P>(step, w, step[P - 1].width, x, sum);
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p)
        if (p + 1 < P || zero || step[p].rows == 8)
            sum[p].store(out + step[p].row);
        else
            sum[p].store_first(out + step[p].row, step[p].rows);
}

// As law_gradient, of all variables: the gradient in the outputs of the last map, and what x has of it beside the network; where maps read
// variables clipped, that waits in `scaled`.
template <class T>
FASTMAF_INLINE void row_law_gradient(const StageView<T>& stage, const Trace<T>& here, T cotangent, const T* above, T* dx) {
    constexpr int W = Lanes<T>::W;
    const int features = stage.features, stride = row_stride(features);
    T* const delta = here.delta[stage.maps - 1];
    if (stage.output == Output::linear) {
        for (int s = 0; s < features; ++s) delta[s] = here.delta[0][s] = above[stage.next[s]];
        return;
    }
    const bool clips = here.read != here.x;
    for (int s = 0; s < features; s += W) {
        T of_z[W] __attribute__((aligned(64))) = {};
        const int n = features - s < W ? features - s : W;
        for (int i = 0; i < n; ++i) {
            const T gz = above[stage.next[s + i]];
            of_z[i] = stage.scale ? gz * stage.scale[s + i] : gz;
        }
        T* const scaled = here.scaled + s;
        const LawGradient<T> law(stage, splat<T>(cotangent), at(static_cast<const T*>(of_z)), at(scaled), at(scaled + stride),
                                 at(scaled + 2 * stride));
        join_pairs<T>(law.dm, law.dr, delta + 2 * s);
        if (clips) at(scaled) = law.dx;
        store_loose<T>(dx + s, clips ? Vec<T>{} : law.dx);
    }
}

template <class T>
static void backward_row(const StageView<T>& stage, const Trace<T>& here, T cotangent, const T* above, T* below, bool of_context) {
    constexpr int W = Lanes<T>::W;
    const int features = stage.features, context = stage.context;
    T* const dx = below + context;
    const bool clips = here.read != here.x;
    for (int c = 0; c < context; ++c) below[c] = above[c];
    row_law_gradient<T>(stage, here, cotangent, above + context, dx);
    for (int i = 0; i < stage.step_count;) {
        const Step* const step = stage.steps + i;
        if (step->kind == Kind::law) {
            flip_row(here.delta[0], features);
            ++i;
            continue;
        }
        auto of_contexts = [&](const Step& step) { return step.out == kTile && step.row < context; };
        const bool contexts = of_contexts(*step);
        int count = 1;
        while (i + count < stage.step_count && step[count].kind == Kind::panel && step[count].map == step->map &&
               of_contexts(step[count]) == contexts)
            ++count;
        i += count;
        if (contexts && !of_context) continue;
        T* const out = buffer<T>(stage, step->out, below, here.delta, 1);
        side_by_side<T>(step, count, [&](auto panels, const Step* step) {
            row_suffix_group<T, decltype(panels)::value>(step, stage.tape, here.delta[step->in], out);
        });
        if (step->out < 0 || !is_network(stage.output)) continue;
        const T* const argument = keeps_argument(stage.activation) ? here.raw[step->out] : here.units[step->out];
        times_derivative<T>(stage.activation, out, argument, 1, (stage.rows[step->out] + W - 1) / W, 0);
    }
    for (int s = 0; clips && s < features; s += W) {
        const Vec<T> x = load_loose(here.x + context + s), read = load_loose(here.read + context + s);
        store_loose<T>(dx + s, at(here.scaled + s) + (x == read ? load_loose(dx + s) : Vec<T>{}));
    }
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
