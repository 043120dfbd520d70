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
        T* const read = stage.reads_apart ? tile.read : x;
        for (int s = 0; read != x && s < tile.subtiles; ++s) {
            const int vectors = vectors_of(tile.rows, s, Lanes<T>::W);
            const int64_t shift = s * tile.stride, variables = shift + stage.context * lanes;
            copy_contexts<T>(stage, x + shift, read + shift, vectors);
            if (!stage.reads_noise) clip_inputs<T>(stage, x + variables, read + variables, 0, stage.features, vectors);
        }
        for (int i = 0; i < stage.step_count; ++i) {
            const Step& step = stage.steps[i];
            for (int s = 0; s < tile.subtiles; ++s) {
                const int vectors = vectors_of(tile.rows, s, Lanes<T>::W);
                const int64_t shift = s * tile.stride, variables = shift + stage.context * lanes;
                if (step.kind == Kind::panel)
                    panel_step<T>(stage, step, read, tile.units, tile.raw, shift, vectors, tile.folded ? tile.folded[k] : nullptr);
                else {
                    density_law<T>(stage, step, tile.units, shift, x + variables, next + shift, vectors, tile.log_det + s * lanes);
                    if (stage.reads_noise) take_noise<T>(stage, next + shift, read + variables, step.row, step.rows, vectors);
                }
            }
        }
    }
    return count % 2;
}

// Final rows of discrete variables become the probabilities of their values.
template <class T>
static void probabilities(const StageView<T>& stage, T* rows, int vectors) {
    for (int s = 0; s < stage.features; ++s)
        for (int j = 0; j < vectors; ++j) {
            T* const own = rows + stage.first[s] * lanes_of<T>() + j * Lanes<T>::W;
            const Conditional<T> p(stage, s, own);
            if (p.continuous) continue;
            const Vec<T> all = log_total<T>(p);
            for (int c = 0; c < p.count; ++c) at(own + c * lanes_of<T>()) = probability<T>(p, all, c);
        }
}

template <class T>
static int from_noise(const StageView<T>* stages, int count, const Tile<T>& tile) {
    constexpr int lanes = lanes_of<T>();
    for (int k = count; k-- > 0;) {
        const StageView<T>& stage = stages[k];
        T* const x = tile.x[k % 2];
        const T* const behind = tile.x[(k + 1) % 2] + stage.context * lanes;
        T* const read = stage.reads_apart ? tile.read : x;
        for (int s = 0; read != x && s < tile.subtiles; ++s) {
            const int vectors = vectors_of(tile.rows, s, Lanes<T>::W);
            const int64_t shift = s * tile.stride, variables = shift + stage.context * lanes;
            copy_contexts<T>(stage, x + shift, read + shift, vectors);
            if (stage.reads_noise) take_noise<T>(stage, behind + shift, read + variables, 0, stage.features, vectors);
        }
        for (int i = 0; i < stage.step_count; ++i) {
            const Step& step = stage.steps[i];
            for (int s = 0; s < tile.subtiles; ++s) {
                const int vectors = vectors_of(tile.rows, s, Lanes<T>::W);
                const int64_t shift = s * tile.stride, variables = shift + stage.context * lanes;
                if (step.kind == Kind::panel)
                    panel_step<T>(stage, step, read, tile.units, tile.raw, shift, vectors, tile.folded ? tile.folded[k] : nullptr);
                else {
                    sampler_law<T>(stage, step, tile.units, shift, behind + shift, tile.uniform ? tile.uniform + shift : nullptr,
                                   x + variables, vectors, tile.density, tile.log_det + s * lanes);
                    if (read != x && !stage.reads_noise)
                        clip_inputs<T>(stage, x + variables, read + variables, step.row, step.rows, vectors);
                }
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

// Eight rows of a panel in lanes, of one vector or of several.
template <class T>
struct Eight {
    static constexpr int bytes = 8 * sizeof(T) < FASTMAF_VECTOR_BYTES ? 8 * sizeof(T) : FASTMAF_VECTOR_BYTES;
    static constexpr int lanes = bytes / int(sizeof(T)), parts = 8 / lanes;
    typedef T Part __attribute__((vector_size(bytes), aligned(sizeof(T)), may_alias));
    Part part[parts];

    FASTMAF_MEMBER void load(const T* p) {
#pragma GCC unroll 4
        for (int i = 0; i < parts; ++i) part[i] = *reinterpret_cast<const Part*>(p + i * lanes);
    }
    FASTMAF_MEMBER void store(T* p) const {
#pragma GCC unroll 4
        for (int i = 0; i < parts; ++i) *reinterpret_cast<Part*>(p + i * lanes) = part[i];
    }
    FASTMAF_MEMBER void store_first(T* p, int n) const {
        T all[8];
        store(all);
        for (int i = 0; i < n; ++i) p[i] = all[i];
    }
    // += w x
    FASTMAF_MEMBER void add(const T* w, T x) {
#pragma GCC unroll 4
        for (int i = 0; i < parts; ++i) {
            const Part own = *reinterpret_cast<const Part*>(w + i * lanes);
#if defined(__AVX512F__)
            if constexpr (bytes < FASTMAF_VECTOR_BYTES)
                part[i] = (Part)_mm256_fmadd_ps((__m256)own, _mm256_set1_ps(x), (__m256)part[i]);
            else
#endif
                part[i] = (Part)fma((Vec<T>)own, splat<T>(x), (Vec<T>)part[i]);
        }
    }
};

// P consecutive panels: all of them up to the first one's end, the rest up to theirs. The last one's tape may be narrower than eight: the
// lanes beyond then sum whatever lies behind, and nobody reads them.
template <class T, int P>
FASTMAF_INLINE void row_panels(const Step* step, const T* tape, int last_width, const T* x, int k, Eight<T>* sum) {
    Eight<T> acc[P];
    const T* w[P];
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
        acc[p] = sum[p];
        w[p] = tape + step[p].tape;
    }
    const int end = step[0].end;
    const T* last = w[P - 1] + k * last_width;
    for (; k < end; ++k, last += last_width) {
        const T in = x[k];
#pragma GCC unroll 16
        for (int p = 0; p + 1 < P; ++p) acc[p].add(w[p] + k * 8, in);
        acc[P - 1].add(last, in);
    }
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) sum[p] = acc[p];
    if constexpr (P > 1) row_panels<T, P - 1>(step + 1, tape, last_width, x, k, sum + 1);
}

template <class T, int P>
static void row_group(const Step* step, const T* tape, const T* x, int k, const T* bias, T* out) {
    Eight<T> sum[P];
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) sum[p].load(bias + step[p].row);
    row_panels<T, P>(step, tape, step[P - 1].width, x, k, sum);
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) sum[p].store(out + step[p].row);
}

// A number as a type.
template <int P>
struct Count {
    static constexpr int value = P;
};

template <int P, class F>
FASTMAF_INLINE void rest_side_by_side(const Step* step, int count, F run) {
    if constexpr (P > 0) {
        if (count == P) return run(Count<P>{}, step);
        rest_side_by_side<P - 1>(step, count, run);
    }
}

// run(Count<P>, first of them) for P panels of a map after the other. A sum waits for itself at every input, so as many panels as there
// are registers run side by side.
template <class T, class F>
FASTMAF_INLINE void side_by_side(const Step* step, int count, F run) {
    constexpr int most = 14 / Eight<T>::parts, some = most / 2 + 1;
    for (; count > most; count -= some, step += some) run(Count<some>{}, step);
    rest_side_by_side<most>(step, count, run);
}

// Consecutive panels of a map, `first` rows of x already in the bias.
template <class T>
static void row_range(const Step* step, int count, const T* tape, const T* x, int first, const T* bias, T* out) {
    side_by_side<T>(step, count,
                    [&](auto panels, const Step* step) { row_group<T, decltype(panels)::value>(step, tape, x, first, bias, out); });
}

// One map of a row: its panels, what they read, and where its sums go.
template <class T>
struct RowMap {
    const Step* step;
    int panels, first;
    const T *tape, *x, *bias;
    T* out;

    // The last map of a stage has a law behind it.
    RowMap(const StageView<T>& stage, const Step* step, T* tile, T* const* units, const T* folded) : step(step), panels(1) {
        while (step[panels].kind == Kind::panel && step[panels].map == step->map) ++panels;
        first = folded && folds(*step) ? stage.context : 0;
        tape = stage.tape;
        x = buffer<T>(stage, step->in, tile, units, 1);
        bias = first ? folded : stage.bias[step->map];
        out = units[step->out];
    }
    void run(int begin, int count) const { row_range<T>(step + begin, count, tape, x, first, bias, out); }
};

// Takes a group of the job, from the front or from the back; -1 if none is left, or another job has begun.
FASTMAF_INLINE int take_group(Crew* crew, uint64_t job, bool front) {
    uint64_t claims = __atomic_load_n(&crew->claims, __ATOMIC_ACQUIRE);
    for (;;) {
        const int low = int(claims >> 16 & 0xffff), high = int(claims & 0xffff);
        if (claims >> 32 != job || low == high) return -1;
        const uint64_t next = front ? claims + 0x10000 : claims - 1;
        if (__atomic_compare_exchange_n(&crew->claims, &claims, next, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
            return front ? low : high - 1;
    }
}

template <class F>
FASTMAF_INLINE void wait_until(const Crew* crew, F ready) {
    for (int spins = 1; !ready(); ++spins) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
        if (spins % 128 == 0) crew->yield();
    }
}

template <class T>
FASTMAF_INLINE void run_group(const RowMap<T>& map, int group) {
    const int begin = group * kCrewPanels;
    map.run(begin, map.panels - begin < kCrewPanels ? map.panels - begin : kCrewPanels);
}

// `helped`: groups that others have taken so far.
template <class T>
static void lead(const RowMap<T>& map, Crew* crew, uint64_t job, uint64_t& helped) {
    const int groups = (map.panels + kCrewPanels - 1) / kCrewPanels;
    __atomic_store_n(&crew->claims, job << 32 | uint64_t(groups), __ATOMIC_RELEASE);
    int own = 0;
    for (int group; (group = take_group(crew, job, true)) >= 0; ++own) run_group<T>(map, group);
    helped += uint64_t(groups - own);
    wait_until(crew, [&] { return __atomic_load_n(&crew->done, __ATOMIC_ACQUIRE) == helped; });
}

template <class T>
static void assist_row(const StageView<T>* stages, int count, T* const x[2], T* read, T* const* units, const T* const* folded, Crew* crew) {
    uint64_t job = 0;
    for (int k = 0; k < count; ++k) {
        const StageView<T>& stage = stages[k];
        for (int i = 0; i < stage.step_count; ++i)
            while (stage.steps[i].kind == Kind::panel) {
                const RowMap<T> map(stage, stage.steps + i, stage.input_clip > 0 ? read : x[k % 2], units, folded ? folded[k] : nullptr);
                ++job;
                wait_until(crew, [&] { return __atomic_load_n(&crew->claims, __ATOMIC_ACQUIRE) >> 32 >= job; });
                for (int group; (group = take_group(crew, job, false)) >= 0;) {
                    run_group<T>(map, group);
                    __atomic_fetch_add(&crew->done, 1, __ATOMIC_ACQ_REL);
                }
                i += map.panels;
            }
    }
}

// As transform_law.
template <class T>
FASTMAF_INLINE void row_transform(const StageView<T>& stage, const T* parameters, const T* variables, T* next, double* log_det) {
    constexpr int W = Lanes<T>::W;
    double sum = 0;
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
}

template <class T>
FASTMAF_FN void flip_row(T* units, int rows) {
    for (int s = 0; 2 * s < rows - 1; ++s) {
        const T kept = units[s];
        units[s] = units[rows - 1 - s];
        units[rows - 1 - s] = kept;
    }
}

// As linear_law.
template <class T>
FASTMAF_FN void row_linear(const StageView<T>& stage, int part, T* const* units, T* next) {
    if (part == 0) return flip_row(units[0], stage.features);
    for (int i = 0; i < stage.features; ++i) next[stage.next[i]] = units[1][i] + units[0][i];
}

// Buffers hold their rows padded to a multiple of 16, so whole vectors may be processed.
template <class T>
static int to_noise_row(const StageView<T>* stages, int count, T* const x[2], T* read, T* const* units, double* log_det,
                        const T* const* folded, Crew* crew) {
    constexpr int W = Lanes<T>::W;
    uint64_t job = 0, helped = 0;
    for (int k = 0; k < count; ++k) {
        const StageView<T>& stage = stages[k];
        if (stage.input_clip > 0) {
            for (int c = 0; c < stage.context; ++c) read[c] = x[k % 2][c];
            for (int i = stage.context; i < stage.context + stage.features; ++i) {
                const T own = x[k % 2][i];
                read[i] = own < -stage.input_clip ? -stage.input_clip : own > stage.input_clip ? stage.input_clip : own;
            }
        }
        T* const next = x[(k + 1) % 2] + stage.context;
        for (int i = 0; i < stage.step_count; ++i) {
            while (stage.steps[i].kind == Kind::panel) {
                const RowMap<T> map(stage, stage.steps + i, stage.input_clip > 0 ? read : x[k % 2], units, folded ? folded[k] : nullptr);
                if (crew)
                    lead<T>(map, crew, ++job, helped);
                else
                    map.run(0, map.panels);
                const int m = stage.steps[i].map;
                if (stage.activated[m]) activate<T>(stage.activation, units[m], 1, (stage.rows[m] + W - 1) / W, 0);
                i += map.panels;
            }
            if (stage.output == Output::linear)
                row_linear<T>(stage, stage.steps[i].row, units, next);
            else
                row_transform<T>(stage, units[stage.maps - 1], x[k % 2] + stage.context, next, log_det);
        }
    }
    return count % 2;
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
