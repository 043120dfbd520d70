// The loops over the steps of all stages: sub-tiles of rows share a pass over the tape. The density of one row alone runs with units in
// lanes over the same tape.
#pragma once

#include "../ops/sample.inl.hpp"

namespace fastmaf {
namespace FASTMAF_ISA {

FASTMAF_INLINE int vectors_of(int rows, int subtile, int width) {
    const int left = rows - subtile * kVectors * width;
    return left >= kVectors * width ? kVectors : (left + width - 1) / width;
}

template <class T>
static void fold(const StageView<T>& stage, const T* context, T* folded) {
    for (int s = 0; s < stage.step_count; ++s)
        if (folds(stage.steps[s])) fold_step<T>(stage, stage.steps[s], context, 1, folded);
}

template <class T>
static int to_noise(const StageView<T>* stages, int count, const Tile<T>& tile) {
    constexpr int lanes = lanes_of<T>();
    for (int k = 0; k < count; ++k) {
        const StageView<T>& stage = stages[k];
        T* const x = tile.x[k % 2];
        T* const next = tile.x[(k + 1) % 2] + stage.context * lanes;
        for (int i = 0; i < stage.step_count; ++i) {
            const Step& step = stage.steps[i];
            for (int s = 0; s < tile.subtiles; ++s) {
                const int vectors = vectors_of(tile.rows, s, Lanes<T>::W);
                const int64_t shift = s * tile.stride;
                if (step.kind == Kind::panel)
                    panel_step<T>(stage, step, x, tile.units, tile.raw, shift, vectors, tile.folded ? tile.folded[k] : nullptr);
                else
                    density_law<T>(stage, step, tile.units, shift, x + stage.context * lanes + shift, next + shift, vectors,
                                   tile.log_det + s * lanes);
            }
        }
    }
    return count % 2;
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
                const int64_t shift = s * tile.stride, variables = shift + stage.context * lanes;
                if (step.kind == Kind::panel)
                    panel_step<T>(stage, step, x, tile.units, tile.raw, shift, vectors, tile.folded ? tile.folded[k] : nullptr);
                else
                    sampler_law<T>(stage, step, tile.units, shift, tile.x[(k + 1) % 2] + variables,
                                   tile.uniform ? tile.uniform + shift : nullptr, x + variables, vectors, tile.density, tile.log_det + s * lanes);
            }
        }
    }
    return 0;
}

template <class T>
static void base(const T* z, int features, int lanes, int n, double* log_det) {
    double sum[lanes_of<T>()];
    for (int r = 0; r < n; ++r) sum[r] = 0;
    for (int s = 0; s < features; ++s)
        for (int r = 0; r < n; ++r) sum[r] += double(z[s * lanes + r]) * double(z[s * lanes + r]);
    for (int r = 0; r < n; ++r) log_det[r] -= 0.5 * sum[r];
}

// Eight rows of a panel in lanes.
template <class T>
struct Eight {
    typedef T V __attribute__((vector_size(8 * sizeof(T)), aligned(sizeof(T)), may_alias));
};

template <class T>
FASTMAF_INLINE typename Eight<T>::V fma_eight(typename Eight<T>::V w, T x, typename Eight<T>::V sum) {
    using V = typename Eight<T>::V;
    if constexpr (sizeof(V) < FASTMAF_VECTOR_BYTES) {
#if defined(__AVX512F__)
        return (V)_mm256_fmadd_ps((__m256)w, _mm256_set1_ps(x), (__m256)sum);
#else
        return w * x + sum;
#endif
    } else if constexpr (sizeof(V) == FASTMAF_VECTOR_BYTES) {
        return (V)fma((Vec<T>)w, splat<T>(x), (Vec<T>)sum);
    } else {  // several vectors
        constexpr int parts = int(sizeof(V)) / FASTMAF_VECTOR_BYTES;
        union Parts {
            V whole;
            Vec<T> part[parts];
        } a, b;
        a.whole = w;
        b.whole = sum;
#pragma GCC unroll 4
        for (int i = 0; i < parts; ++i) b.part[i] = fma(a.part[i], splat<T>(x), b.part[i]);
        return b.whole;
    }
}

// P consecutive panels of width 8: all of them up to the first one's end, the rest up to theirs.
template <class T, int P>
FASTMAF_INLINE void row_panels(const Step* step, const T* tape, const T* x, int k, typename Eight<T>::V* sum) {
    typename Eight<T>::V acc[P];
    const T* w[P];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
        acc[p] = sum[p];
        w[p] = tape + step[p].tape;
    }
    const int end = step[0].end;
    for (; k < end; ++k) {
        const T in = x[k];
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) acc[p] = fma_eight<T>(*reinterpret_cast<const typename Eight<T>::V*>(w[p] + k * 8), in, acc[p]);
    }
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) sum[p] = acc[p];
    if constexpr (P > 1) row_panels<T, P - 1>(step + 1, tape, x, k, sum + 1);
}

template <class T, int P>
static void row_group(const Step* step, const T* tape, const T* x, int k, const T* bias, T* out) {
    using V = typename Eight<T>::V;
    V sum[P];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) sum[p] = *reinterpret_cast<const V*>(bias + step[p].row);
    row_panels<T, P>(step, tape, x, k, sum);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) *reinterpret_cast<V*>(out + step[p].row) = sum[p];
}

// The last panel of a map, when it is narrower than eight.
template <class T, int WIDTH>
static void row_tail(const Step& step, const T* tape, const T* x, int k, const T* bias, T* out) {
    T sum[WIDTH];
    const T* w = tape + step.tape + k * WIDTH;
#pragma GCC unroll 4
    for (int i = 0; i < WIDTH; ++i) sum[i] = i < step.rows ? bias[step.row + i] : T(0);
    for (; k < step.end; ++k, w += WIDTH)
#pragma GCC unroll 4
        for (int i = 0; i < WIDTH; ++i) sum[i] = fma_one(w[i], x[k], sum[i]);
    for (int i = 0; i < step.rows; ++i) out[step.row + i] = sum[i];
}

template <class T>
static void row_map(const StageView<T>& stage, const Step* step, int count, const T* x, const T* folded, T* out) {
    const int skip = folded && step->map == 0 ? stage.context : 0;
    const T* bias = skip ? folded : stage.bias[step->map];
    const Step& last = step[count - 1];
    if (last.width == 4) row_tail<T, 4>(last, stage.tape, x, skip, bias, out);
    if (last.width == 2) row_tail<T, 2>(last, stage.tape, x, skip, bias, out);
    count -= last.width < 8;
    for (; count >= 8; count -= 8, step += 8) row_group<T, 8>(step, stage.tape, x, skip, bias, out);
    switch (count) {
        case 7: return row_group<T, 7>(step, stage.tape, x, skip, bias, out);
        case 6: return row_group<T, 6>(step, stage.tape, x, skip, bias, out);
        case 5: return row_group<T, 5>(step, stage.tape, x, skip, bias, out);
        case 4: return row_group<T, 4>(step, stage.tape, x, skip, bias, out);
        case 3: return row_group<T, 3>(step, stage.tape, x, skip, bias, out);
        case 2: return row_group<T, 2>(step, stage.tape, x, skip, bias, out);
        case 1: return row_group<T, 1>(step, stage.tape, x, skip, bias, out);
    }
}

// Buffers hold their rows padded to a multiple of 16, so whole vectors may be processed.
template <class T>
static int to_noise_row(const StageView<T>* stages, int count, T* const x[2], T** units, double* log_det, const T* const* folded) {
    constexpr int W = Lanes<T>::W;
    double sum = 0;
    for (int k = 0; k < count; ++k) {
        const StageView<T>& stage = stages[k];
        const T* in = x[k % 2];
        for (int i = 0; i < stage.step_count && stage.steps[i].kind == Kind::panel;) {
            const int map = stage.steps[i].map;
            int panels = 1;
            while (stage.steps[i + panels].kind == Kind::panel && stage.steps[i + panels].map == map) ++panels;
            row_map<T>(stage, stage.steps + i, panels, in, folded ? folded[k] : nullptr, units[map]);
            if (map + 1 < stage.maps) activate<T>(stage.activation, units[map], 1, (stage.rows[map] + W - 1) / W, 0);
            in = units[map];
            i += panels;
        }
        const T* parameters = units[stage.maps - 1];
        const T* variables = x[k % 2] + stage.context;
        T* next = x[(k + 1) % 2] + stage.context;
        for (int s = 0; s < stage.features; s += W) {
            Vec<T> m{}, raw{}, v{};
            const int n = stage.features - s < W ? stage.features - s : W;
            for (int i = 0; i < n; ++i) {
                m[i] = parameters[2 * (s + i)];
                raw[i] = parameters[2 * (s + i) + 1];
                v[i] = variables[s + i];
            }
            const Vec<T> scale = log_scale<T>(stage, raw), z = to_z<T>(stage, v, m, scale);
            for (int i = 0; i < n; ++i) {
                T value = z[i];
                if (stage.scale) value = (value - stage.loc[s + i]) * stage.scale[s + i];
                next[stage.next[s + i]] = value;
            }
            // The order of a tile's sums: each MADE's log-scales from zero, then onto the total.
            for (int i = 0; i < n; ++i) sum -= double(scale[i]);
        }
        *log_det += sum;
        sum = 0;
    }
    return count % 2;
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
