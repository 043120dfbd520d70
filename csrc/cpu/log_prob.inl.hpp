// Density: a tile of rows goes through all maps of all MADEs; the variables arrive in the order of the first MADE and leave each law in
// the order of the next, so permutations cost nothing. One row alone runs with units in lanes over the same tape.
#pragma once

#include "../ops/laws.inl.hpp"
#include "masked_linear.inl.hpp"

namespace fastmaf {
namespace FASTMAF_ISA {

FASTMAF_INLINE Lanes<float>::Wide widen(Vec<float> v) { return __builtin_convertvector(v, Lanes<float>::Wide); }
FASTMAF_INLINE Lanes<double>::Wide widen(Vec<double> v) { return v; }

// Log-determinants are summed in double, lane by lane.
template <class T>
FASTMAF_INLINE void add_to(double* sums, typename Lanes<T>::Wide v) {
    typedef typename Lanes<T>::Wide Loose __attribute__((aligned(8), may_alias));
    *reinterpret_cast<Loose*>(sums) += v;
}

FASTMAF_INLINE int vectors_of(int rows, int subtile, int width) {
    const int left = rows - subtile * kVectors * width;
    return left >= kVectors * width ? kVectors : (left + width - 1) / width;
}

// parameters [2 features][lanes] and x [features][lanes] -> z, scattered into the rows of the next tile.
template <class T>
static void density_law(const MadeView<T>& made, const T* parameters, const T* x, T* next, int vectors, double* log_det) {
    constexpr int W = Lanes<T>::W, lanes = lanes_of<T>();
    for (int j = 0; j < vectors; ++j) {
        typename Lanes<T>::Wide sum{};
        for (int s = 0; s < made.features; ++s) {
            const T* row = parameters + 2 * s * lanes + j * W;
            const Vec<T> scale = log_scale<T>(made, at(row + lanes));
            Vec<T> z = to_z<T>(made, at(x + s * lanes + j * W), at(row), scale);
            if (made.scale) z = (z - made.loc[s]) * made.scale[s];
            at(next + made.next[s] * lanes + j * W) = z;
            sum -= widen(scale);
        }
        add_to<T>(log_det + j * W, sum);
    }
}

template <class T>
static int to_noise(const MadeView<T>* mades, int count, const Tile<T>& tile) {
    constexpr int lanes = lanes_of<T>();
    for (int k = 0; k < count; ++k) {
        const MadeView<T>& made = mades[k];
        T* const x = tile.x[k % 2];
        T* const next = tile.x[(k + 1) % 2];
        for (int i = 0; i < made.step_count; ++i) {
            const Step& step = made.steps[i];
            for (int s = 0; s < tile.subtiles; ++s) {
                const int vectors = vectors_of(tile.rows, s, Lanes<T>::W);
                const int64_t at_tile = s * tile.stride;
                if (step.kind == Kind::panel)
                    run_panel<T>(made, step, (step.map ? tile.units[step.map - 1] : x) + at_tile, tile.units[step.map] + at_tile, vectors,
                                 tile.folded ? tile.folded[k] : nullptr);
                else
                    density_law<T>(made, tile.units[made.maps - 1] + at_tile, x + at_tile + made.context * lanes,
                                   next + at_tile + made.context * lanes, vectors, tile.log_det + s * lanes);
            }
        }
    }
    return count % 2;
}

template <class T>
static void base(const T* z, int features, int lanes, int n, double* log_det) {
    double sum[lanes_of<T>()];
    for (int r = 0; r < n; ++r) sum[r] = 0;
    for (int s = 0; s < features; ++s)
        for (int r = 0; r < n; ++r) sum[r] += double(z[s * lanes + r]) * double(z[s * lanes + r]);
    for (int r = 0; r < n; ++r) log_det[r] -= 0.5 * sum[r];
}

// ---- one row ---------------------------------------------------------------------------------------------------------------------

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
static void row_map(const MadeView<T>& made, const Step* step, int count, const T* x, const T* folded, T* out) {
    const int skip = folded && step->map == 0 ? made.context : 0;
    const T* bias = skip ? folded : made.bias[step->map];
    const Step& last = step[count - 1];
    if (last.width == 4) row_tail<T, 4>(last, made.tape, x, skip, bias, out);
    if (last.width == 2) row_tail<T, 2>(last, made.tape, x, skip, bias, out);
    count -= last.width < 8;
    for (; count >= 8; count -= 8, step += 8) row_group<T, 8>(step, made.tape, x, skip, bias, out);
    switch (count) {
        case 7: return row_group<T, 7>(step, made.tape, x, skip, bias, out);
        case 6: return row_group<T, 6>(step, made.tape, x, skip, bias, out);
        case 5: return row_group<T, 5>(step, made.tape, x, skip, bias, out);
        case 4: return row_group<T, 4>(step, made.tape, x, skip, bias, out);
        case 3: return row_group<T, 3>(step, made.tape, x, skip, bias, out);
        case 2: return row_group<T, 2>(step, made.tape, x, skip, bias, out);
        case 1: return row_group<T, 1>(step, made.tape, x, skip, bias, out);
    }
}

// Buffers hold their rows padded to a multiple of 16, so whole vectors may be processed.
template <class T>
static int to_noise_row(const MadeView<T>* mades, int count, T* const x[2], T** units, double* log_det, const T* const* folded) {
    constexpr int W = Lanes<T>::W;
    double sum = 0;
    for (int k = 0; k < count; ++k) {
        const MadeView<T>& made = mades[k];
        const T* in = x[k % 2];
        for (int i = 0; i < made.step_count && made.steps[i].kind == Kind::panel;) {
            const int map = made.steps[i].map;
            int panels = 1;
            while (made.steps[i + panels].kind == Kind::panel && made.steps[i + panels].map == map) ++panels;
            row_map<T>(made, made.steps + i, panels, in, folded ? folded[k] : nullptr, units[map]);
            if (map + 1 < made.maps) activate<T>(made.activation, units[map], 1, (made.rows[map] + W - 1) / W, 0);
            in = units[map];
            i += panels;
        }
        const T* parameters = units[made.maps - 1];
        const T* variables = x[k % 2] + made.context;
        T* next = x[(k + 1) % 2] + made.context;
        for (int s = 0; s < made.features; s += W) {
            Vec<T> m{}, raw{}, v{};
            const int n = made.features - s < W ? made.features - s : W;
            for (int i = 0; i < n; ++i) {
                m[i] = parameters[2 * (s + i)];
                raw[i] = parameters[2 * (s + i) + 1];
                v[i] = variables[s + i];
            }
            const Vec<T> scale = log_scale<T>(made, raw), z = to_z<T>(made, v, m, scale);
            for (int i = 0; i < n; ++i) {
                T value = z[i];
                if (made.scale) value = (value - made.loc[s + i]) * made.scale[s + i];
                next[made.next[s + i]] = value;
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
