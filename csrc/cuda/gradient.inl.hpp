// A tile of rows forward and backward, and sums over tiles: the whole of the device's arithmetic of gradients. As in evaluate.inl.hpp the
// warps of a block are a team, a vector's sums belong to one warp, and nothing depends on the number of warps but the time.
#pragma once

#include "../ops/vjp.inl.hpp"
#include "evaluate.inl.hpp"
#include "gradient.hpp"

namespace fastmaf {
namespace FASTMAF_ISA {

// The scratch of a tile.
template <class T>
struct Kept {
    Trace<T>* trace;  // [stages + 1]
    double *log_det, *density, *again;
    T *cotangent, *dx[2];
};

template <class T, class Team>
FASTMAF_FN Kept<T> keep(const GradientView<T>& view, char* scratch, const Team& team) {
    auto at_byte = [&](int64_t byte) { return byte < 0 ? nullptr : reinterpret_cast<T*>(scratch + byte); };
    T** const pointers = reinterpret_cast<T**>(scratch + view.pointers);
    Kept<T> kept;
    kept.trace = reinterpret_cast<Trace<T>*>(scratch + view.traces);
    for (int i = 0; i < 5 * view.maps; ++i)
        if (team.mine(i)) pointers[i] = at_byte(view.buffers[i]);
    for (int k = 0; k <= view.flow.stage_count; ++k) {
        if (!team.mine(k)) continue;
        T** const first = pointers + view.first[k];
        Trace<T>& own = kept.trace[k];
        own.x = at_byte(view.x[k]);
        own.read = at_byte(view.read[k]);
        own.scaled = at_byte(view.scaled[k]);
        own.units = first;
        own.raw = first + view.maps;
        own.delta = first + 2 * view.maps;
        own.alone = first + 3 * view.maps;
        own.whole = first + 4 * view.maps;
    }
    kept.log_det = reinterpret_cast<double*>(scratch + view.log_det);
    kept.density = reinterpret_cast<double*>(scratch + view.density);
    kept.again = reinterpret_cast<double*>(scratch + view.again);
    kept.cotangent = at_byte(view.cotangent);
    for (int i = 0; i < 2; ++i) kept.dx[i] = at_byte(view.dx[i]);
    return kept;
}

// Contexts from the first tile into all. Rows of density zero, and their contexts, go on as zeros: nothing that they meet is infinite.
// Only a NaN stays.
template <class T, class Team>
FASTMAF_FN void spread(const GradientView<T>& view, int vectors, const Kept<T>& kept, const double* density, const Team& team) {
    constexpr int W = Lanes<T>::W, lanes = lanes_of<T>();
    const int context = view.flow.context;
    T* const x = kept.trace[0].x;
    for (int i = 0; i < context + view.flow.features; ++i)
        for (int j = 0; j < vectors; ++j) {
            if (!team.mine(i * vectors + j)) continue;
            const int place = i * lanes + j * W;
            const D own = widen(at(x + place)), zero = own == own ? D{} : own;
            const Vec<T> value = narrow<T>(at(density + j * W) == -__builtin_inf() ? zero : own);
            for (int k = 0; k <= (i < context ? view.flow.stage_count : 0); ++k) at(kept.trace[k].x + place) = value;
        }
}

template <class T, class Team>
FASTMAF_FN void forward_stage(const FlowView<T>& flow, int k, int vectors, const Kept<T>& kept, const Team& team) {
    constexpr int W = Lanes<T>::W, lanes = lanes_of<T>();
    const StageView<T>& stage = flow.stages[k];
    const Trace<T> here = kept.trace[k];
    T* const next = kept.trace[k + 1].x + stage.context * lanes;
    if (here.read != here.x) {
        team.sync();
        for (int j = 0; j < vectors; ++j) {
            if (team.mine(j)) traced_inputs<T>(stage, here, j * W, 1);
        }
    }
    run_steps<T>(
        stage, vectors, team, [&](const Step& step) { traced_panel<T>(stage, step, here, vectors); },
        [&](const Step& step, int j) { traced_law<T>(stage, step, here, next + j * W, j * W, 1, kept.log_det + j * W); });
}

// Behind the last stage: the densities but for the constant, into `density`, and 1 into `again` for rows that have none, far out or at
// infinity, and have to go forward again as zeros.
template <class T, class Team>
FASTMAF_FN void weigh(const GradientView<T>& view, const Job<T>& job, int64_t begin, const Kept<T>& kept, const Team& team) {
    constexpr int W = Lanes<T>::W, lanes = lanes_of<T>();
    const FlowView<T>& flow = view.flow;
    const T* const noise = kept.trace[flow.stage_count].x + flow.context * lanes;
    for (int j = 0; j < job.vectors; ++j) {
        if (!team.mine(j)) continue;
        double* const sums = kept.log_det + j * W;
        if (!flow.has_base) add_base(noise + j * W, flow.features, sums);
        D density = at(sums);
        const Vec<T> value = narrow<T>(flow.constant + density);
        const D spoilt = widen(value - value);  // zero, unless the value is not finite
        if (any(spoilt != 0)) {
            const D missing = missing_in(flow, job, begin + j * W), lost = missing == missing ? splat<double>(-__builtin_inf()) : missing;
            density = spoilt == 0 ? density : lost;
        }
        const D went = at(kept.again + j * W);  // -inf for rows that were zeros from the start
        at(kept.density + j * W) = density;
        at(kept.again + j * W) = density == -__builtin_inf() ? (went == -__builtin_inf() ? D{} : splat<double>(1)) : D{};
    }
}

// Values, cotangents, which are zero where the density is and in lanes without a row, and the gradient in the last tile.
template <class T, class Team>
FASTMAF_FN void turn(const GradientView<T>& view, const GradientJob<T>& job, int64_t begin, const Kept<T>& kept, const Team& team) {
    constexpr int W = Lanes<T>::W, lanes = lanes_of<T>();
    const FlowView<T>& flow = view.flow;
    const T* const noise = kept.trace[flow.stage_count].x + flow.context * lanes;
    T* const dx = one_of(kept.dx, flow.stage_count);
    for (int j = 0; j < job.rows.vectors; ++j) {
        if (!team.mine(j)) continue;
        const Index row = counted(uint64_t(begin + j * W), uint64_t(job.rows.rows - 1));
        const D density = at(kept.density + j * W);
        if (job.rows.log_prob) scatter<T>(job.rows.log_prob, row, narrow<T>(flow.constant + density), job.rows.rows - begin - j * W);
        D given = splat<double>(1);
        if (job.cotangent.rows.data) given = column_of(job.cotangent, offset_of(job.cotangent, row), 0);
        const Index lane = counted(uint64_t(begin + j * W), ~uint64_t(0));
        given = lane < uint64_t(job.rows.rows) ? given : D{};
        const Vec<T> g = narrow<T>(density == -__builtin_inf() ? D{} : given);
        at(kept.cotangent + j * W) = g;
        for (int c = 0; c < flow.context; ++c) at(dx + c * lanes + j * W) = Vec<T>{};
        for (int v = 0; v < flow.features && !flow.has_base; ++v)
            at(dx + (flow.context + v) * lanes + j * W) = -at(noise + v * lanes + j * W) * g;
    }
}

template <class T, class Team>
FASTMAF_FN void backward_stage(const GradientView<T>& view, int k, int vectors, int inner, const Kept<T>& kept, const Team& team) {
    constexpr int W = Lanes<T>::W, lanes = lanes_of<T>();
    const StageView<T>& stage = view.backward[k];
    const Trace<T> here = kept.trace[k];
    const T* const above = one_of(kept.dx, k + 1);
    T* const below = one_of(kept.dx, k);
    const bool clips = here.read != here.x && !stage.reads_noise && inner < 2;
    team.sync();
    for (int c = 0; c < stage.context; ++c)
        for (int j = 0; j < vectors; ++j)
            if (team.mine(c * vectors + j)) at(below + c * lanes + j * W) = at(above + c * lanes + j * W);
    for (int s = 0; s < stage.features; ++s)
        for (int j = 0; j < vectors; ++j) {
            if (!team.mine(s * vectors + j)) continue;
            if (stage.reads_noise)
                at(below + (stage.context + s) * lanes + j * W) = Vec<T>{};
            else
                law_gradient<T>(stage, here, s, j * W, at(static_cast<const T*>(kept.cotangent) + j * W), above, below);
            if (clips) part_clipped<T>(stage, here, s, j * W, below);
        }
    run_steps<T>(
        stage, vectors, team, [&](const Step& step) { gradient_panel<T>(stage, step, here, view.zeros, below, inner, vectors); },
        [&](const Step& step, int j) {
            backward_law<T>(stage, step, here, j * W, 1, static_cast<const T*>(kept.cotangent) + j * W, above, below);
        });
    if (!clips) return;
    team.sync();
    for (int s = 0; s < stage.features; ++s)
        for (int j = 0; j < vectors; ++j)
            if (team.mine(s * vectors + j)) join_clipped<T>(stage, here, s, j * W, below);
}

// d/dx through the affine and the bijection of a column; g: the cotangent where log|dz/dx| counts, else zero.
FASTMAF_INLINE D leave(const ColumnView& column, D x, D dz, D cotangent, D g) {
    D slope = splat<double>(1), bend{};  // dz/dx, d log|dz/dx| / dx
    if (column.kind == Bijection::logit) {
        slope = 1 / (x - column.lower) + 1 / (column.upper - x);
        bend = 1 / (column.upper - x) - 1 / (x - column.lower);
    } else if (column.kind == Bijection::log_above) {
        slope = 1 / (x - column.lower);
        bend = -slope;
    } else if (column.kind == Bijection::log_below) {
        slope = 1 / (column.upper - x);
        bend = slope;
    }
    const D value = dz * column.scale * slope + g * bend;
    return slope - slope == 0 ? value : (cotangent == 0 ? D{} : value);  // on a bound
}

// The gradients in the columns of rows or contexts, of one vector. Far out that of a row may be no number in T, though its density is
// one: it is zero then.
template <class T>
FASTMAF_FN void write_gradient(const ColumnView* columns, const int* places, int width, const Source& source, const T* dz, D density,
                               D cotangent, bool variables, Index row, int64_t left, T* out) {
    constexpr int lanes = lanes_of<T>();
    const Index from = offset_of(source, row);
    D settles{};
    for (int pass = 0; pass < 2; ++pass) {
        D lost{};
        for (int c = 0; c < width; ++c) {
            const D own = widen(at(dz + (places ? places[c] : c) * lanes));
            const Vec<T> value = narrow<T>(leave(columns[c], column_of(source, from, c), own, cotangent, variables ? cotangent : D{}));
            const D wide = widen(value);
            lost = wide - wide == 0 ? lost : splat<double>(1);
            scatter<T>(out, row * uint64_t(width) + uint64_t(c), narrow<T>(settles != 0 ? D{} : wide), left);
        }
        settles = (density - density) + (cotangent - cotangent) == 0 ? lost : D{};
        if (!any(settles != 0)) return;
    }
}

// Density and gradients of the rows from `begin`.
template <class T, class Team>
FASTMAF_FN void differentiate(const GradientView<T>& view, const GradientJob<T>& job, int64_t begin, char* scratch, const Team& team) {
    constexpr int W = Lanes<T>::W, lanes = lanes_of<T>();
    const FlowView<T>& flow = view.flow;
    const int count = flow.stage_count, vectors = job.rows.vectors;
    team.sync();  // the scratch still serves the tile before
    const Kept<T> kept = keep(view, scratch, team);
    Tile<T> tile{};
    tile.x[0] = tile.x[1] = reinterpret_cast<T*>(scratch + view.x[0]);
    tile.log_det = kept.log_det;
    load_rows(flow, job.rows, begin, tile, team);
    load_contexts(flow, job.rows, begin, tile, team);
    team.sync();
    for (int j = 0; j < vectors; ++j)
        if (team.mine(j)) at(kept.again + j * W) = at(kept.log_det + j * W);
    const double* zero = kept.log_det;
    for (int pass = 0; pass < 2; ++pass) {
        spread(view, vectors, kept, zero, team);
        for (int k = 0; k < count; ++k) forward_stage(flow, k, vectors, kept, team);
        team.sync();
        if (pass) break;
        weigh(view, job.rows, begin, kept, team);
        team.sync();
        D again{};
        for (int j = 0; j < vectors; ++j) again += at(kept.again + j * W);
        if (!any(again != 0)) break;
        zero = kept.density;
    }
    turn(view, job, begin, kept, team);
    const bool wanted = job.d_x || job.d_context;
    for (int k = count; k-- > 0;) backward_stage(view, k, vectors, wanted ? 0 : k ? 1 : 2, kept, team);
    team.sync();
    for (int j = 0; wanted && j < vectors; ++j) {
        const int64_t first = begin + j * W, left = job.rows.rows - first;
        const Index row = counted(uint64_t(first), uint64_t(job.rows.rows - 1));
        const D density = at(kept.density + j * W), g = widen(at(kept.cotangent + j * W));
        for (int part = 0; part < 2; ++part) {  // the variables, the contexts
            T* const out = part ? job.d_context : job.d_x;
            if (!out || !team.mine(2 * j + part)) continue;
            write_gradient<T>(part ? flow.context_columns : flow.columns, part ? nullptr : flow.first, part ? flow.context : flow.features,
                              part ? job.rows.context : job.rows.x, kept.dx[0] + (part ? 0 : flow.context * lanes) + j * W, density, g,
                              part == 0, row, left, out);
        }
    }
}

// A part of the way of the rows from `begin`, whose scratch keeps the parts before.
template <class T, class Team>
FASTMAF_FN void go(const GradientView<T>& view, const GradientJob<T>& job, const Stretch& stretch, int64_t begin, char* scratch,
                   const Team& team) {
    const int vectors = job.rows.vectors;
    const Kept<T> kept = keep(view, scratch, team);
    if (!stretch.backward && stretch.first == 0) {
        Tile<T> tile{};
        tile.x[0] = tile.x[1] = reinterpret_cast<T*>(scratch + view.x[0]);
        tile.log_det = kept.log_det;
        load_rows(view.flow, job.rows, begin, tile, team);
        load_contexts(view.flow, job.rows, begin, tile, team);
        team.sync();
        spread(view, vectors, kept, kept.log_det, team);
    }
    team.sync();
    if (stretch.backward) {
        for (int k = stretch.last; k-- > stretch.first;) backward_stage(view, k, vectors, k ? 1 : 2, kept, team);
        return;
    }
    for (int k = stretch.first; k < stretch.last; ++k) forward_stage(view.flow, k, vectors, kept, team);
    if (stretch.last < view.flow.stage_count) return;
    team.sync();
    weigh(view, job.rows, begin, kept, team);
    team.sync();
    turn(view, job, begin, kept, team);
}

// The sums over the rows of some tiles that weights get of a task, rows in lanes. `out` is laid out like the master.
template <class T, class Team>
FASTMAF_FN void sum_task(const GradientView<T>& view, const WeightTask& task, const char* tiles, int count, int vectors, T* out,
                         const Team& team) {
    constexpr int W = Lanes<T>::W, lanes = lanes_of<T>(), R = 8, K = 4;
    auto at_byte = [&](int tile, int64_t byte) { return reinterpret_cast<const T*>(tiles + tile * view.scratch + byte); };
    if (!task.rows) {
        if (!team.mine(0)) return;
        Vec<T> sum{};
        for (int t = 0; t < count; ++t)
            for (int j = 0; j < vectors; ++j) sum += at(at_byte(t, view.cotangent) + j * W);
        store_one(out + task.bias, lane_sum<T>(sum));
        return;
    }
    const int maps = view.first[task.stage];
    const int64_t delta = view.buffers[2 * view.maps + maps + task.map] + task.row * lanes * int64_t(sizeof(T));
    const int64_t from = task.from >= 0 ? view.buffers[maps + task.from]
                                        : view.read[task.stage] + (task.from == kTile ? 0 : view.flow.context * lanes * int64_t(sizeof(T)));
    int turn = 0;
    for (int first = 0; first < task.limit[task.rows - 1]; first += K) {
        if (!team.mine(turn++)) continue;
        Vec<T> acc[R][K];
        FASTMAF_UNROLL(8)
        for (int i = 0; i < R; ++i) FASTMAF_UNROLL(4)
        for (int k = 0; k < K; ++k) acc[i][k] = Vec<T>{};
        for (int t = 0; t < count; ++t)
            for (int j = 0; j < vectors; ++j) {
                const T *const d = at_byte(t, delta) + j * W, *const x = at_byte(t, from) + j * W;
                Vec<T> in[K];
                FASTMAF_UNROLL(4)
                for (int k = 0; k < K; ++k) in[k] = at(x + (first + k < task.inputs ? first + k : first) * lanes);
                FASTMAF_UNROLL(8)
                for (int i = 0; i < R; ++i) {
                    const Vec<T> own = at(d + (i < task.rows ? i : 0) * lanes);
                    FASTMAF_UNROLL(4)
                    for (int k = 0; k < K; ++k) acc[i][k] = fma(own, in[k], acc[i][k]);
                }
            }
        FASTMAF_UNROLL(8)
        for (int i = 0; i < R; ++i) FASTMAF_UNROLL(4)
        for (int k = 0; k < K; ++k) {
            const T sum = lane_sum<T>(acc[i][k]);
            if (i < task.rows && first + k < task.limit[i]) store_one(out + task.offset[i] + first + k, sum);
        }
    }
    for (int i = 0; task.bias >= 0 && i < task.rows; ++i) {
        if (!team.mine(turn++)) continue;
        Vec<T> sum{};
        for (int t = 0; t < count; ++t)
            for (int j = 0; j < vectors; ++j) sum += at(at_byte(t, delta) + i * lanes + j * W);
        store_one(out + task.bias + i, lane_sum<T>(sum));
    }
}

// A task over the rows of a group; `tiles`: of all `rows` rows.
template <class T, class Team>
FASTMAF_FN void sum_weights(const GradientView<T>& view, const WeightsView<T>& weights, const char* tiles, int64_t rows, int vectors,
                            int task, int64_t group, T* out, const Team& team) {
    const int width = 32 * vectors, most = kGroup / width;
    const int64_t all = (rows + width - 1) / width, first = group * most;
    sum_task(view, weights.tasks[task], tiles + first * view.scratch, int(all - first < most ? all - first : most), vectors,
             out + group * (weights.size + 1), team);
}

template <class From>
FASTMAF_FN void sum_slices(const Sum<From>& sum, int64_t i) {
    const int64_t slices = (sum.b + sum.slice - 1) / sum.slice, a = i / sum.c / slices, slice = i / sum.c % slices;
    const int64_t begin = slice * sum.slice, end = begin + sum.slice < sum.b ? begin + sum.slice : sum.b;
    const From* const in = sum.in + a * sum.b * sum.c + i % sum.c;
    double total = sum.add ? sum.out[i] : 0;
    for (int64_t b = begin; b < end; ++b) total += double(in[b * sum.c]);
    sum.out[i] = total;
}

// Which of the weights whose logarithms log|det| has a sum of is entry i of the master, or -1.
template <class T>
FASTMAF_INLINE int diagonal_of(const WeightsView<T>& weights, int64_t i) {
    int low = 0, high = weights.diagonals;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (weights.diagonal[middle] < i)
            low = middle + 1;
        else
            high = middle;
    }
    return low < weights.diagonals && weights.diagonal[low] == i ? low : -1;
}

// The gradient of parameter index[i] from its sum and that of the cotangents.
template <class T>
FASTMAF_FN void write_parameter(const WeightsView<T>& weights, const double* sums, int64_t i, T* out) {
    double value = sums[i];
    if (const int diagonal = diagonal_of(weights, i); diagonal >= 0)
        value += sums[weights.size] / double(weights.diagonal_weights[diagonal]);
    out[weights.index[i]] = T(value);
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
