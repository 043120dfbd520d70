// A tile of rows from the caller's array to the result: what one block of warps does, and the whole of the device's arithmetic.
//
// The warps of a block form a team. They share the panels of a map, and the vectors and columns elsewhere; where one needs what another
// wrote, all meet. A vector's log-determinant belongs to one warp throughout, so its sum has one order. `mine` deals out the parts.
// Nothing here depends on the number of warps but the time.
#pragma once

#include "../ops/columns.inl.hpp"
#include "../ops/rng.inl.hpp"
#include "../ops/sample.inl.hpp"
#include "launch.hpp"

namespace fastmaf {
namespace FASTMAF_ISA {

template <class T, class Team>
FASTMAF_FN Tile<T> tile_of(const FlowView<T>& flow, const Job<T>& job, char* scratch, const Team& team) {
    T** const pointers = reinterpret_cast<T**>(scratch + flow.pointers);
    if (team.mine(0))
        for (int m = 0; m < flow.maps; ++m) {
            pointers[m] = reinterpret_cast<T*>(scratch + flow.units[m]);
            pointers[flow.maps + m] = flow.raw[m] < 0 ? nullptr : reinterpret_cast<T*>(scratch + flow.raw[m]);
        }
    Tile<T> tile{};
    tile.subtiles = 1;
    for (int i = 0; i < 2; ++i) tile.x[i] = reinterpret_cast<T*>(scratch + flow.x[i]);
    tile.read = flow.read ? reinterpret_cast<T*>(scratch + flow.read) : nullptr;
    tile.units = pointers;
    tile.raw = pointers + flow.maps;
    tile.uniform = flow.has_base ? reinterpret_cast<T*>(scratch + flow.uniform) : nullptr;
    tile.log_det = reinterpret_cast<double*>(scratch + flow.log_det);
    tile.density = job.log_prob != nullptr;
    tile.folded = job.folded;
    return tile;
}

FASTMAF_INLINE Index offset_of(const Source& source, Index row) {
    return row / uint64_t(source.inner) * uint64_t(source.rows.outer) + row % uint64_t(source.inner) * uint64_t(source.rows.inner);
}
FASTMAF_INLINE D column_of(const Source& source, Index offset, int c) {
    return gather(source.rows.dtype, source.rows.data + c * source.rows.column, offset);
}

// The value of a column in the tile; slope = log|dz/dx| of its bijection.
FASTMAF_INLINE D load(const ColumnView& column, D x, D& slope) {
    slope = D{};
    const D z = column.kind == Bijection::identity ? x : to_line(x, column.kind, column.lower, column.upper, column.range, slope);
    return (z - column.loc) * column.scale;
}

// NaN where a number lies at or outside a bound.
FASTMAF_INLINE D spoilt(D z, D slope) { return slope == -__builtin_inf() ? splat<double>(__builtin_nan("")) : z; }

// A context at or outside a bound has no meaning.
FASTMAF_INLINE D load_context(const ColumnView& column, D x) {
    D slope;
    const D z = load(column, x, slope);
    return spoilt(z, slope);
}

// -inf for a value that a discrete variable cannot have, else 0.
FASTMAF_INLINE D refusal(D x, int values) {
    const D never = splat<double>(-__builtin_inf()), whole = (x + Constants<double>::shifter) - Constants<double>::shifter;
    const D inside = x >= 0 ? (x < double(values) ? (x == whole ? D{} : never) : never) : never;
    return x == x ? inside : D{};
}

template <class T, class Team>
FASTMAF_FN void load_contexts(const FlowView<T>& flow, const Job<T>& job, int64_t begin, const Tile<T>& tile, const Team& team) {
    constexpr int W = Lanes<T>::W, lanes = lanes_of<T>();
    if (job.folded && !flow.late_context) return;
    for (int j = 0; j < job.vectors; ++j) {
        const Index row = offset_of(job.context, counted(uint64_t(begin + j * W), uint64_t(job.rows - 1)));
        for (int c = 0; c < flow.context; ++c) {
            if (!team.mine(c * job.vectors + j)) continue;
            const Vec<T> value = narrow<T>(load_context(flow.context_columns[c], column_of(job.context, row, c)));
            at(tile.x[0] + c * lanes + j * W) = value;
            at(tile.x[1] + c * lanes + j * W) = value;
        }
    }
}

// Of two that take turns as input and output, the one that stage or map k reads. An index would keep the pointers in memory.
template <class T>
FASTMAF_INLINE T* one_of(T* const (&x)[2], int k) {
    return k % 2 ? x[1] : x[0];
}

// Variables into x[0], log-determinants of their bijections into log_det. Rows at or outside a bound go on as zeros.
template <class T, class Team>
FASTMAF_FN void load_rows(const FlowView<T>& flow, const Job<T>& job, int64_t begin, const Tile<T>& tile, const Team& team) {
    constexpr int W = Lanes<T>::W, lanes = lanes_of<T>();
    T* const x = tile.x[0] + flow.context * lanes;
    for (int j = 0; j < job.vectors; ++j) {
        const Index row = offset_of(job.x, counted(uint64_t(begin + j * W), uint64_t(job.rows - 1)));
        if (team.mine(j)) at(tile.log_det + j * W) = D{};
        for (int v = 0; v < flow.features; ++v) {
            const ColumnView& column = flow.columns[v];
            const bool plain = column.kind == Bijection::identity && column.values == 0;
            if (!team.mine(plain ? v * job.vectors + j : j)) continue;
            const D own = column_of(job.x, row, v);
            D slope;
            const D z = load(column, own, slope);
            const bool free = job.most != 0;  // any value goes on, but as NaN at or outside a bound
            at(x + flow.first[v] * lanes + j * W) = narrow<T>(free && column.kind != Bijection::identity ? spoilt(z, slope) : z);
            if (column.kind != Bijection::identity && !free) at(tile.log_det + j * W) += slope;
            if (column.values && !free) at(tile.log_det + j * W) += refusal(widen(narrow<T>(own)), column.values);
        }
    }
    if (!flow.bounded) return;
    team.sync();
    for (int v = 0; v < flow.features; ++v)
        for (int j = 0; j < job.vectors; ++j) {
            if (!team.mine(v * job.vectors + j)) continue;
            const D own = widen(at(x + v * lanes + j * W)), kept = own == own ? D{} : own;
            at(x + v * lanes + j * W) = narrow<T>(at(tile.log_det + j * W) == -__builtin_inf() ? kept : own);
        }
}

// Noise of the counters of the rows: normal numbers, and uniform ones for a base.
template <class T, class Team>
FASTMAF_FN void draw_noise(const FlowView<T>& flow, const Job<T>& job, int64_t begin, T* normal, T* uniform, const Team& team) {
    constexpr int W = Lanes<T>::W, lanes = lanes_of<T>();
    for (int j = 0; j < job.vectors; ++j) {
        const Index own = counted(uint64_t(begin + j * W), uint64_t(job.rows - 1)), row = own + job.begin;
        const Index index = job.index ? gather_index(job.index, own) : row % job.inner + job.offset;
        const Index group = job.index ? gather_index(job.group, own) : row / job.inner + uint64_t(job.context_offset);
        const Counters counters{low_words(index), high_words(index), low_words(group)};
        for (int block = 0; 4 * block < flow.features; ++block) {
            if (!team.mine(block * job.vectors + j)) continue;
            const int columns = flow.features - 4 * block < 4 ? flow.features - 4 * block : 4;
            if (flow.normals)
                normal_block<T>(counters, job.seed, block, columns, lanes, W, normal + j * W);
            else
                for (int d = 4 * block; d < 4 * block + columns; ++d) at(normal + d * lanes + j * W) = Vec<T>{};
            if (flow.has_base) uniform_block<T>(counters, job.seed, block, columns, lanes, W, uniform + j * W);
        }
    }
}

// log_det -= |z|^2 / 2 of one vector.
template <class T>
FASTMAF_FN void add_base(const T* z, int features, double* log_det) {
    typename Lanes<T>::Wide sum{};
    for (int s = 0; s < features; ++s) {
        const typename Lanes<T>::Wide own = widen(at(z + s * lanes_of<T>()));
        sum += own * own;
    }
    at(log_det) -= 0.5 * sum;
}

// f(step) for each step of a stage, panels by one warp each; `law` gets a step and a vector. Steps of a kind, and panels of one map, do
// not read what the others of them write.
template <class T, class Team, class Panel, class LawStep>
FASTMAF_INLINE void run_steps(const StageView<T>& stage, int vectors, const Team& team, Panel panel_of, LawStep law) {
    int last = 0, turn = 0;
    for (int i = 0; i < stage.step_count; ++i) {
        const Step& step = stage.steps[i];
        const int kind = step.kind == Kind::panel ? step.map : -1;
        if (i == 0 || kind != last) {
            team.sync();
            turn = 0;
        }
        last = kind;
        if (step.kind == Kind::panel) {
            if (team.mine(turn++)) panel_of(step);
        } else {
            for (int j = 0; j < vectors; ++j)
                if (team.mine(j)) law(step, j);
        }
    }
}

// What the maps of a stage read, with the context and, unless they are yet to come, the variables or, from `next`, the noise.
template <class T, class Team>
FASTMAF_INLINE T* inputs_of(const StageView<T>& stage, T* x, const T* next, const Tile<T>& tile, bool variables, int vectors,
                            const Team& team) {
    constexpr int W = Lanes<T>::W, lanes = lanes_of<T>();
    if (!stage.reads_apart) return x;
    team.sync();  // x is there, and nobody reads the inputs of the stage before
    for (int j = 0; j < vectors; ++j) {
        if (!team.mine(j)) continue;
        copy_contexts<T>(stage, x + j * W, tile.read + j * W, 1);
        const int64_t first = stage.context * lanes + j * W;
        if (!variables) continue;
        if (stage.reads_noise)
            take_noise<T>(stage, next + j * W, tile.read + first, 0, stage.features, 1);
        else
            clip_inputs<T>(stage, x + first, tile.read + first, 0, stage.features, 1);
    }
    return tile.read;
}

template <class T, class Team>
FASTMAF_FN void density_stage(const FlowView<T>& flow, int k, int vectors, const Tile<T>& tile, const Team& team) {
    constexpr int W = Lanes<T>::W, lanes = lanes_of<T>();
    const StageView<T>& stage = flow.stages[k];
    const T* const folded = tile.folded ? tile.folded[k] : nullptr;
    T *const x = one_of(tile.x, k), *const next = one_of(tile.x, k + 1) + stage.context * lanes;
    T* const read = inputs_of<T>(stage, x, next, tile, !stage.reads_noise, vectors, team);
    run_steps<T>(
        stage, vectors, team, [&](const Step& step) { panel_step<T>(stage, step, read, tile.units, tile.raw, 0, vectors, folded); },
        [&](const Step& step, int j) {
            const int first = stage.context * lanes + j * W;
            density_law<T>(stage, step, tile.units, j * W, x + first, next + j * W, 1, tile.log_det + j * W);
            if (stage.reads_noise) take_noise<T>(stage, next + j * W, read + first, step.row, step.rows, 1);
        });
}

template <class T, class Team>
FASTMAF_FN void sampler_stage(const FlowView<T>& flow, int k, int vectors, const Tile<T>& tile, const Team& team) {
    constexpr int W = Lanes<T>::W, lanes = lanes_of<T>();
    const StageView<T>& stage = flow.stages[k];
    const T* const folded = tile.folded ? tile.folded[k] : nullptr;
    T *const x = one_of(tile.x, k), *const z = one_of(tile.x, k + 1) + stage.context * lanes;
    T* const read = inputs_of<T>(stage, x, z, tile, stage.reads_noise, vectors, team);
    run_steps<T>(
        stage, vectors, team, [&](const Step& step) { panel_step<T>(stage, step, read, tile.units, tile.raw, 0, vectors, folded); },
        [&](const Step& step, int j) {
            sampler_law<T>(stage, step, tile.units, j * W, z + j * W, tile.uniform ? tile.uniform + j * W : nullptr,
                           x + stage.context * lanes + j * W, 1, tile.density, tile.log_det + j * W);
            const int first = stage.context * lanes + j * W;
            if (read != x && !stage.reads_noise) clip_inputs<T>(stage, x + first, read + first, step.row, step.rows, 1);
        });
}

// Probabilities of the values of discrete variables, NaN for others, in the order of the columns.
template <class T, class Team>
FASTMAF_FN void write_probabilities(const FlowView<T>& flow, const Job<T>& job, int64_t begin, const Tile<T>& tile, const Team& team) {
    constexpr int W = Lanes<T>::W, lanes = lanes_of<T>();
    const StageView<T>& stage = flow.stages[flow.stage_count - 1];
    for (int v = 0; v < flow.features; ++v)
        for (int j = 0; j < job.vectors; ++j) {
            if (!team.mine(v * job.vectors + j)) continue;
            const int s = flow.first[v];
            const Conditional<T> p(stage, s, tile.units[stage.maps - 1] + stage.first[s] * lanes + j * W);
            const Index row = counted(uint64_t(begin + j * W), uint64_t(job.rows - 1)) * uint64_t(job.width);
            const Vec<T> all = p.continuous ? splat<T>(T(__builtin_nan(""))) : log_total<T>(p);
            for (int c = 0; c < job.most; ++c) {
                const Vec<T> value = p.continuous ? all : c < p.count ? probability<T>(p, all, c) : Vec<T>{};
                scatter<T>(job.out, row + uint64_t(v * job.most + c), value, job.rows - begin - j * W);
            }
        }
}

template <class T, class U>
FASTMAF_INLINE bool has_nan_in(const Job<T>& job, const U* rows, int features, int64_t begin) {
    for (int j = 0; j < job.vectors; ++j) {
        const Index row = counted(uint64_t(begin + j * Lanes<T>::W), uint64_t(job.rows - 1));
        for (int d = 0; d < features; ++d) {
            const Vec<U> own = read_back(rows, row * uint64_t(features) + uint64_t(d));
            if (any(own != own)) return true;
        }
    }
    return false;
}

// Whether a result of the rows from `begin` is NaN. All warps look, so all find the same.
template <class T>
FASTMAF_FN bool has_nan(const FlowView<T>& flow, const Job<T>& job, int64_t begin) {
    return (job.log_prob && has_nan_in(job, job.log_prob, 1, begin)) || (job.out && has_nan_in(job, job.out, flow.features, begin)) ||
           (job.other && has_nan_in(job, job.other, flow.features, begin));
}

template <class T, class U>
FASTMAF_INLINE void write_result(const Job<T>& job, U* p, Index offset, Vec<U> v, int64_t n) {
    if (job.fills) {
        const Vec<U> own = read_back(p, offset);
        v = own == own ? own : v;
    }
    scatter<U>(p, offset, v, n);
}

// Whether a kernel computes in the dtype, or in halves: what these do not yield it leaves, as NaN, to a kernel of the first kind.
enum class Arithmetic : int { whole, halves };

// The density of the rows from `first`, or log|det| of the map to the noise, from the sums. Far out and at infinity these meet inf - inf:
// where they say NaN or infinity the result is NaN if `lost` says that a number is missing, else -inf.
template <Arithmetic KIND, class T, class Lost>
FASTMAF_INLINE void write_density(const FlowView<T>& flow, const Job<T>& job, int64_t first, D sums, int64_t left, Lost lost) {
    const T infinity = T(__builtin_inf());
    Vec<T> density = narrow<T>((job.map ? flow.log_scales : flow.constant) + sums);
    if (any((density < infinity) == 0)) {
        Vec<T> other = splat<T>(T(__builtin_nan("")));
        if (KIND == Arithmetic::whole) {
            const D missing = lost();
            other = narrow<T>(missing == missing ? splat<double>(-__builtin_inf()) : missing);
        }
        density = density < infinity ? density : other;
    }
    write_result<T>(job, job.log_prob, counted(uint64_t(first), uint64_t(job.rows - 1)), density, left);
}

// NaN where a row of noise is not finite, else zero.
template <class T>
FASTMAF_FN D spoilt_by(const T* z, int features) {
    constexpr int lanes = lanes_of<T>();
    D spoilt{};
    for (int d = 0; d < features; ++d) spoilt += 0.0 * widen(at(z + d * lanes));
    return spoilt;
}

// NaN for rows in which a number is missing, or in their contexts.
template <class T>
FASTMAF_FN D missing_in(const FlowView<T>& flow, const Job<T>& job, int64_t first) {
    const Index row = counted(uint64_t(first), uint64_t(job.rows - 1)), x = offset_of(job.x, row), context = offset_of(job.context, row);
    D missing{};
    for (int v = 0; v < flow.features; ++v) {
        const D own = column_of(job.x, x, v);
        missing = own == own ? missing : own;
    }
    for (int c = 0; c < flow.context; ++c) {
        const D own = load_context(flow.context_columns[c], column_of(job.context, context, c));
        missing = own == own ? missing : own;
    }
    return missing;
}

// Of the rows [begin, end), from the tile behind `count` stages.
template <Arithmetic KIND, class T, class Team>
FASTMAF_FN void write_results(const FlowView<T>& flow, const Job<T>& job, int64_t begin, int64_t end, const Tile<T>& tile, int count,
                              const Team& team) {
    constexpr int W = Lanes<T>::W, lanes = lanes_of<T>();
    const T* const z = one_of(tile.x, count) + flow.context * lanes;
    for (int j = 0; j < job.vectors; ++j) {
        const int64_t first = begin + j * W, left = (end < job.rows ? end : job.rows) - first;
        const Index row = counted(uint64_t(first), uint64_t(job.rows - 1));
        double* const log_det = tile.log_det + j * W;
        if (job.log_prob && team.mine(j)) {
            if (!job.map && !flow.has_base) add_base(z + j * W, flow.features, log_det);
            // Others still look at log_det.
            const D sums = job.map ? at(log_det) + spoilt_by(z + j * W, flow.features) : D(at(log_det));
            write_density<KIND>(flow, job, first, sums, left, [&] { return missing_in(flow, job, first); });
        }
        if (!job.out) continue;
        for (int d = 0; d < flow.features; ++d) {
            if (!team.mine(d * job.vectors + j)) continue;
            const D own = widen(at(z + flow.noise[d] * lanes + j * W)), none = splat<double>(__builtin_nan(""));
            write_result<T>(job, job.out, row * uint64_t(flow.features) + uint64_t(d),
                            narrow<T>(at(log_det) == -__builtin_inf() ? none : own), left);
        }
    }
}

// Density, noise or probabilities of the rows from `begin`.
template <class T, class Team>
FASTMAF_FN void evaluate(const FlowView<T>& flow, const Job<T>& job, int64_t begin, char* scratch, const Team& team) {
    if (job.fills && !has_nan(flow, job, begin)) return;
    team.sync();  // the scratch still serves the tile before
    const Tile<T> tile = tile_of(flow, job, scratch, team);
    load_rows(flow, job, begin, tile, team);
    load_contexts(flow, job, begin, tile, team);
    const int count = (job.log_prob && !job.map) || job.most ? flow.stage_count : flow.transforms;
    for (int k = 0; k < count; ++k) density_stage(flow, k, job.vectors, tile, team);
    team.sync();
    if (job.most) return write_probabilities(flow, job, begin, tile, team);
    write_results<Arithmetic::whole>(flow, job, begin, job.rows, tile, count, team);
}

// Before the stages of a sampler, of which there are `count`: noise, from counters or from the rows of x, contexts, and the noise's density.
template <class T, class Team>
FASTMAF_FN void begin_samples(const FlowView<T>& flow, const Job<T>& job, int64_t begin, int count, const Tile<T>& tile, const Team& team) {
    constexpr int W = Lanes<T>::W, lanes = lanes_of<T>();
    T* const noise = one_of(tile.x, count) + flow.context * lanes;
    if (job.draws) draw_noise(flow, job, begin, noise, tile.uniform, team);
    load_contexts(flow, job, begin, tile, team);
    for (int j = 0; j < job.vectors; ++j) {
        if (team.mine(j)) at(tile.log_det + j * W) = D{};
        if (job.draws) continue;
        const Index row = offset_of(job.x, counted(uint64_t(begin + j * W), uint64_t(job.rows - 1)));
        for (int d = 0; d < flow.features; ++d)
            if (team.mine(d * job.vectors + j)) at(noise + flow.noise[d] * lanes + j * W) = narrow<T>(column_of(job.x, row, d));
    }
    if (job.log_prob && !job.map && !flow.has_base) {
        team.sync();
        for (int j = 0; j < job.vectors; ++j)
            if (team.mine(j)) add_base(noise + j * W, flow.features, tile.log_det + j * W);
    }
}

template <class T, class U>
FASTMAF_INLINE void write_sample(const Job<T>& job, U* out, Index place, D value, U low, U high, int64_t left) {
    write_result<T>(job, out, place, at_least<U>(at_most<U>(narrow<U>(value), high), low), left);
}

// Behind them, of the rows [begin, end): columns in the user's numbers.
template <Arithmetic KIND, class T, class Team>
FASTMAF_FN void write_samples(const FlowView<T>& flow, const Job<T>& job, int64_t begin, int64_t end, const Tile<T>& tile,
                              const Team& team) {
    constexpr int W = Lanes<T>::W, lanes = lanes_of<T>();
    for (int j = 0; j < job.vectors; ++j) {
        const int64_t first = begin + j * W, left = (end < job.rows ? end : job.rows) - first;
        const Index row = counted(uint64_t(first), uint64_t(job.rows - 1));
        for (int v = 0; v < flow.features; ++v) {
            const ColumnView& column = flow.columns[v];
            const bool plain = column.kind == Bijection::identity;
            if (!team.mine(plain ? v * job.vectors + j : j)) continue;
            D value = widen(at(tile.x[0] + (flow.context + flow.first[v]) * lanes + j * W)) / column.scale + column.loc, slope = D{};
            if (!plain) {
                value = from_line(value, column.kind, column.lower, column.upper, column.range, slope);
                at(tile.log_det + j * W) += slope;
            }
            const Index place = row * uint64_t(flow.features) + uint64_t(v);
            if (job.other)
                write_sample(job, job.other, place, value, flow.other_low[v], flow.other_high[v], left);
            else
                write_sample(job, job.out, place, value, flow.low[v], flow.high[v], left);
        }
        if (!job.log_prob || !team.mine(j)) continue;
        if (job.map) {
            const Vec<T> inverse = narrow<T>(-(flow.log_scales + at(tile.log_det + j * W))), zero = inverse - inverse;
            // What halves cannot do is left to the other kernel.
            const Vec<T> own = KIND == Arithmetic::whole ? inverse : zero == 0 ? inverse : zero;
            write_result<T>(job, job.log_prob, row, own, left);
            continue;
        }
        write_density<KIND>(flow, job, first, at(tile.log_det + j * W), left, [&] {
            D missing{};
            for (int v = 0; v < flow.features; ++v) {
                const D own = widen(at(tile.x[0] + (flow.context + v) * lanes + j * W));
                missing = own == own ? missing : own;
            }
            return missing;
        });
    }
}

// Samples of the rows from `begin`.
template <class T, class Team>
FASTMAF_FN void generate(const FlowView<T>& flow, const Job<T>& job, int64_t begin, char* scratch, const Team& team) {
    if (job.fills && !has_nan(flow, job, begin)) return;
    team.sync();
    const Tile<T> tile = tile_of(flow, job, scratch, team);
    const int count = job.draws ? flow.stage_count : flow.transforms;
    begin_samples(flow, job, begin, count, tile, team);
    for (int k = count; k-- > 0;) sampler_stage(flow, k, job.vectors, tile, team);
    team.sync();
    write_samples<Arithmetic::whole>(flow, job, begin, job.rows, tile, team);
}

// The shared context added to the biases of the first map of a stage. context: room for its numbers, each in all lanes.
template <class T, class Team>
FASTMAF_FN void fold(const FlowView<T>& flow, const Job<T>& job, int k, T* context, T* folded, const Team& team) {
    constexpr int W = Lanes<T>::W;
    for (int c = 0; c < flow.context; ++c)
        if (team.mine(c)) at(context + c * W) = narrow<T>(load_context(flow.context_columns[c], column_of(job.context, Index{}, c)));
    team.sync();
    const StageView<T>& stage = flow.stages[k];
    for (int s = team.thread(); s < stage.step_count; s += team.threads())
        if (folds(stage.steps[s])) fold_step<T>(stage, stage.steps[s], context, W, folded);
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
