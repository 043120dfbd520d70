// Sampling on tensor cores: a warp takes 16 rows through all stages, degree by degree; see draw.hpp for the order of the work.
//
// The sums of a piece stay in the registers in which products leave them. What is finished becomes halves there, for the products that
// follow inside the piece, and in shared memory, for later pieces. Two sums of tiles side by side are a fragment of inputs as they are, and
// the thread that computes the law of a variable has it where the fragment wants it, so nothing crosses lanes.
//
// As in tensor.inl.hpp, what halves cannot hold becomes zero and marks its row: what is finished later and reads it is NaN, and generate()
// computes it in float. What is finished later reads it, or is of the same degree; marks per map keep those apart, which do not read each other.
#pragma once

#include "draw.hpp"
#include "tensor.inl.hpp"

namespace fastmaf {
namespace FASTMAF_ISA {

// The tape of a block, in a ring that its warps fill together.
template <int PARTS>
class Supply {
public:
    static constexpr int chunk = kDrawChunk * kTileBytes, ring = kDrawChunks * chunk, tile = PARTS * kTileBytes;
    template <class Team>
    FASTMAF_MEMBER Supply(const DrawView& view, char* shared, const Team& team)
        : begin_(view.tape), end_(view.end), next_(view.tape), ring_(shared + view.ring) {
        for (int i = 0; i + 2 < kDrawChunks; ++i) fetch(team);
    }
    // The next n tiles, at most a chunk, can be taken.
    template <class Team>
    FASTMAF_MEMBER void need(int n, const Team& team) {
        if (left_ < n) turn(team);
    }
    FASTMAF_MEMBER void take(Words (&b)[PARTS][4]) {
        FASTMAF_UNROLL(2)
        for (int p = 0; p < PARTS; ++p) load_four(b[p], ring_ + out_ + p * kTileBytes);
        skip(1);
    }
    // n tiles go by a warp without rows.
    template <class Team>
    FASTMAF_MEMBER void pass(int n, const Team& team) {
        while (left_ < n) turn(team);
        skip(n);
    }
    // From the last tile of the tape to the first: over what fills the last chunk.
    FASTMAF_MEMBER void rewind() { skip(left_); }

private:
    // One more chunk. As all warps meet here, it is there, and nobody reads the chunk before the one at hand any more.
    template <class Team>
    FASTMAF_MEMBER void turn(const Team& team) {
        wait_copies<kDrawChunks - 3>();
        team.sync();
        fetch(team);
        left_ += chunk / tile;
    }
    template <class Team>
    FASTMAF_MEMBER void fetch(const Team& team) {
        for (int i = team.rank; i < kDrawChunk; i += team.warps()) copy_async(ring_ + in_ + i * kTileBytes, next_ + i * kTileBytes);
        next_ += chunk;
        if (next_ == end_) next_ = begin_;
        in_ = (in_ + chunk) % ring;
        commit_copies();
    }
    FASTMAF_MEMBER void skip(int n) {
        left_ -= n;
        out_ = (out_ + n * tile) % ring;
    }
    const char *begin_, *end_, *next_;
    char* ring_;
    int in_ = 0, out_ = 0, left_ = 0;
};

// What a warp has of its rows during a stage.
template <int HIDDEN, int PARTS>
struct Drawing {
    const StageView<float>& view;
    const DrawStage& stage;
    Half* inputs[HIDDEN + 1];  // of each map, from its first row on
    int part_rows;             // rows between the parts of inputs
    int begin;                 // its first row
    Sums<1> hidden_sums[HIDDEN][kDrawTiles], final_sums[kDrawFinal];
    Words marks[2] = {};  // per half of the rows: bit m is set once an input of map m was lost
    Vec<double> log_det[2] = {};

    FASTMAF_MEMBER Words row(int half) const { return row_of(begin, 2u * unsigned(half)); }
    FASTMAF_MEMBER auto marked(int half, int map) const { return (marks[half] >> uint32_t(map) & 1u) != 0u; }
};

// sums[i] += a[step(i)] b[i], without one waiting for the other: the small products of all of them, then the large ones. As in multiply(),
// what has parts on both sides is summed apart.
template <int N, int AP, int PARTS, class Step, class Weights>
FASTMAF_INLINE void multiply_each(Sums<1> (&sums)[N], const Inputs<1, AP>* a, Step step, Weights weights) {
    constexpr int products = PARTS == 2 ? 3 : AP;
    FASTMAF_UNROLL(3)
    for (int product = products; product-- > 0;) {  // low high, high low, high high
        const int of_a = PARTS == 2 ? product == 2 : product, of_b = PARTS == 2 && product == 1;
        FASTMAF_UNROLL(8)
        for (int i = 0; i < N; ++i) {
            const Words* const b = weights(i, of_b);
            multiply_add(sums[i][0], a[step(i)][of_a][0], b[0], b[1]);
        }
    }
}

// sums of N tiles += the product of 32 inputs.
template <int N, int AP, int PARTS, class Team>
FASTMAF_INLINE void add_inputs(Sums<1>* sums, const Inputs<1, AP> (&a)[2], Supply<PARTS>& supply, const Team& team) {
    Words b[N][PARTS][4];
    supply.need(N, team);
    FASTMAF_UNROLL(4)
    for (int t = 0; t < N; ++t) supply.take(b[t]);
    Sums<1> own[2 * N] = {};
    multiply_each<2 * N, AP, PARTS>(
        own, a, [](int i) { return i % 2; }, [&](int i, int part) { return b[i / 2][part] + i % 2 * 2; });
    FASTMAF_UNROLL(4)
    for (int t = 0; t < N; ++t) {
        FASTMAF_UNROLL(4)
        for (int c = 0; c < 4; ++c) sums[t][0][c] += own[2 * t][0][c] + own[2 * t + 1][0][c];
    }
}

// sums of `tiles` tiles, an even number, over the inputs that were alive before.
template <int AP, int PARTS, int TILES, class Team>
FASTMAF_INLINE void sum_before(Sums<1> (&sums)[TILES], int tiles, int steps, const Half* in, int stride, int part, Supply<PARTS>& supply,
                               const Team& team) {
    FASTMAF_UNROLL(8)
    for (int t = 0; t < TILES; ++t) {
        FASTMAF_UNROLL(4)
        for (int i = 0; i < 4; ++i) sums[t][0][i] = Vec<float>{};
    }
    for (int step = 0; step < steps && tiles; step += 2) {
        Inputs<1, AP> a[2];
        FASTMAF_UNROLL(2)
        for (int i = 0; i < 2; ++i) load_inputs<1, AP>(a[i], in + 16 * (step + i), stride, part);
        FASTMAF_UNROLL(2)
        for (int t = 0; t < TILES; t += 4) {
            if (t + 4 <= tiles)
                add_inputs<4, AP, PARTS>(sums + t, a, supply, team);
            else if (t + 2 == tiles)
                add_inputs<2, AP, PARTS>(sums + t, a, supply, team);
        }
    }
}

// sums of N pairs of tiles += the product of 16 inputs.
template <int N, int AP, int PARTS>
FASTMAF_INLINE void add_step(Sums<1>* sums, const Inputs<1, AP>& a, Supply<PARTS>& supply) {
    Words b[N][PARTS][4];
    FASTMAF_UNROLL(2)
    for (int pair = 0; pair < N; ++pair) supply.take(b[pair]);
    Sums<1> own[2 * N] = {};
    multiply_each<2 * N, AP, PARTS>(
        own, &a, [](int) { return 0; }, [&](int i, int part) { return b[i / 2][part] + i % 2 * 2; });
    FASTMAF_UNROLL(4)
    for (int t = 0; t < 2 * N; ++t) {
        FASTMAF_UNROLL(4)
        for (int c = 0; c < 4; ++c) sums[t][0][c] += own[t][0][c];
    }
}

// What an operation has finished, added to the pairs of tiles that read it.
template <int AP, int PARTS, int TILES, class Team>
FASTMAF_INLINE void pass_on(Sums<1> (&sums)[TILES], const DrawOperation& operation, const Inputs<1, AP>& a, Supply<PARTS>& supply,
                            const Team& team) {
    supply.need(operation.end_pair - operation.first_pair, team);
    FASTMAF_UNROLL(2)
    for (int pair = 0; pair < TILES / 2; pair += 2) {
        const bool first = pair >= operation.first_pair && pair < operation.end_pair;
        const bool second = pair + 1 >= operation.first_pair && pair + 1 < operation.end_pair;
        if (first && second)
            add_step<2, AP, PARTS>(sums + 2 * pair, a, supply);
        else if (first)
            add_step<1, AP, PARTS>(sums + 2 * pair, a, supply);
        else if (second)
            add_step<1, AP, PARTS>(sums + 2 * pair + 2, a, supply);
    }
}

// The rows in which something was lost, known to all lanes of their quads.
FASTMAF_INLINE void mark(Words (&marks)[2], const Words (&lost)[2], int map) {
    if (!any((lost[0] | lost[1]) != 0u)) return;
    FASTMAF_UNROLL(2)
    for (int half = 0; half < 2; ++half) marks[half] |= quad_or(lost[half]) << uint32_t(map);
}

// Variables [first, end) of a piece by the law, x from z; then what the first map has of them.
template <int HIDDEN, int PARTS, class Team>
FASTMAF_INLINE void finish_variables(Drawing<HIDDEN, PARTS>& drawing, const DrawPiece& piece, const DrawOperation& operation, int context,
                                     const float* z, float* x, Supply<PARTS>& supply, const Team& team) {
    constexpr int lanes = lanes_of<float>();
    const StageView<float>& view = drawing.view;
    const DrawMap& map = drawing.stage.map[HIDDEN];
    const Vec<float> none = splat<float>(__builtin_nanf(""));
    const Words thread = lane_words() % 4u;
    Vec<float> value[2][kDrawFinal];
    Words lost[2] = {};
    FASTMAF_UNROLL(4)
    for (int t = 0; t < kDrawFinal; ++t) {
        value[0][t] = value[1][t] = Vec<float>{};
        if (4 * t + 4 <= operation.first || 4 * t >= operation.end) continue;
        const Words own = thread + uint32_t(4 * t);
        const auto there = (own >= uint32_t(operation.first)) & (own < uint32_t(operation.end));
        const Words s = select_words(there, own, Words{} + uint32_t(operation.first)) + uint32_t(piece.variable);
        const Words from = take(view.next, s) * uint32_t(lanes);
        Vec<float> affine[4], loc{}, scale = splat<float>(1);
        take_four(affine, map.affine, 2u * (uint32_t(piece.column[HIDDEN] + kTileUnits * t) + 2u * thread));
        if (view.scale) {
            loc = take(view.loc, s);
            scale = take(view.scale, s);
        }
        FASTMAF_UNROLL(2)
        for (int half = 0; half < 2; ++half) {
            const Words row = drawing.row(half);
            const Vec<float> m = fma(drawing.final_sums[t][0][2 * half], affine[0], affine[1]);
            Vec<float> a = log_scale<float>(view, fma(drawing.final_sums[t][0][2 * half + 1], affine[2], affine[3]));
            Vec<float> noise = take(z, from + row);
            if (view.scale) noise = noise / scale + loc;
            Vec<float> v = to_x<float>(view, noise, m, a);
            const auto astray = drawing.marked(half, HIDDEN);
            v = select(astray, none, v);
            a = select(astray, none, a);
            put(x, s * uint32_t(lanes) + row, v, there);
            drawing.log_det[half] -= select_wide(there, widen(a));
            const Vec<float> read = clipped<float>(view, v);
            const auto fit = fits_half(read);
            lost[half] |= select_words(there & (fit == 0), Words{} + 1u, Words{});
            value[half][t] = select(there & fit, read * kHalfScale, Vec<float>{});
        }
    }
    mark(drawing.marks, lost, 0);
    Inputs<1, 2> a;
    FASTMAF_UNROLL(4)
    for (int r = 0; r < 4; ++r) {
        const int half = r % 2, t = r / 2 * 2;
        a[0][0][r] = halves(value[half][t], value[half][t + 1]);
        a[1][0][r] = halves(value[half][t] - low_half(a[0][0][r]), value[half][t + 1] - high_half(a[0][0][r]));
        FASTMAF_UNROLL(2)
        for (int i = 0; i < 2; ++i) {
            const Words own = thread + uint32_t(4 * (t + i));
            const auto there = (own >= uint32_t(operation.first)) & (own < uint32_t(operation.end));
            const Words place = fragments::c_row(lane_words(), 2u * unsigned(half)) * uint32_t(drawing.stage.map[0].stride) +
                                select_words(there, own, Words{}) + uint32_t(context + piece.variable);
            FASTMAF_UNROLL(2)
            for (int p = 0; p < 2; ++p)
                put_half(drawing.inputs[0] + p * drawing.part_rows * drawing.stage.map[0].stride, place, a[p][0][r] >> uint32_t(16 * i),
                         there);
        }
    }
    pass_on<2, PARTS>(drawing.hidden_sums[0], operation, a, supply, team);
}

// Units [first, end) of a hidden map in a piece: their activations; then what the next map has of them.
template <int MAP, int HIDDEN, int PARTS, class Team>
FASTMAF_INLINE void finish_units(Drawing<HIDDEN, PARTS>& drawing, const DrawPiece& piece, const DrawOperation& operation,
                                 Supply<PARTS>& supply, const Team& team) {
    const DrawMap &map = drawing.stage.map[MAP], &next = drawing.stage.map[MAP + 1];
    const Vec<float> none = splat<float>(__builtin_nanf(""));
    Words lost[2] = {};
    FASTMAF_ROLLED
    for (int step = operation.first / 16; 16 * step < operation.end; ++step) {
        Sums<1> own[2] = {};
        FASTMAF_UNROLL(4)
        for (int i = 0; i < kDrawTiles / 2; ++i)
            if (i == step) {
                FASTMAF_UNROLL(4)
                for (int c = 0; c < 4; ++c) {
                    own[0][0][c] = drawing.hidden_sums[MAP][2 * i][0][c];
                    own[1][0][c] = drawing.hidden_sums[MAP][2 * i + 1][0][c];
                }
            }
        FASTMAF_UNROLL(2)
        for (int u = 0; u < 2; ++u) {
            Vec<float> affine[4];
            const Words unit = fragments::c_column(lane_words(), 0) + uint32_t(16 * step + 8 * u);
            take_four(affine, map.affine, 2u * (unit + uint32_t(piece.column[MAP])));
            FASTMAF_UNROLL(4)
            for (int c = 0; c < 4; ++c) own[u][0][c] = fma(own[u][0][c], affine[c % 2 * 2], affine[c % 2 * 2 + 1]);
        }
        with_activation<float>(drawing.view.activation, [&](auto activated) {
            FASTMAF_UNROLL(2)
            for (int u = 0; u < 2; ++u) {
                FASTMAF_UNROLL(4)
                for (int c = 0; c < 4; ++c) own[u][0][c] = activated(own[u][0][c]);
            }
        });
        Inputs<1, PARTS> a;
        FASTMAF_UNROLL(2)
        for (int u = 0; u < 2; ++u) {
            const Words unit = fragments::c_column(lane_words(), 0) + uint32_t(16 * step + 8 * u);
            FASTMAF_UNROLL(2)
            for (int half = 0; half < 2; ++half) {
                const auto astray = drawing.marked(half, MAP);
                Vec<float> v[2];
                Words finished{};  // halves that are units of this operation
                FASTMAF_UNROLL(2)
                for (int i = 0; i < 2; ++i) {
                    v[i] = select(astray, none, own[u][0][2 * half + i]);
                    const auto done = unit + uint32_t(i) < uint32_t(operation.end);
                    const auto here = done & (unit + uint32_t(i) >= uint32_t(operation.first));
                    const auto fit = fits_half(v[i]);
                    lost[half] |= select_words(here & (fit == 0), Words{} + 1u, Words{});
                    finished |= select_words(here, Words{} + (i ? 0xFFFF0000u : 0xFFFFu), Words{});
                    v[i] = select(done & fit, v[i] * kHalfScale, Vec<float>{});
                }
                Words part[2];
                part[0] = halves(v[0], v[1]);
                if (PARTS == 2) part[1] = halves(v[0] - low_half(part[0]), v[1] - high_half(part[0]));
                const Words place =
                    fragments::c_row(lane_words(), 2u * unsigned(half)) * uint32_t(next.stride) + uint32_t(piece.column[MAP]) + unit;
                FASTMAF_UNROLL(2)
                for (int p = 0; p < PARTS; ++p) {
                    put_halves(drawing.inputs[MAP + 1] + p * drawing.part_rows * next.stride, place, part[p],
                               unit < uint32_t(operation.end));
                    a[p][0][2 * u + half] = part[p] & finished;
                }
            }
        }
        if constexpr (MAP + 1 < HIDDEN)
            pass_on<PARTS, PARTS>(drawing.hidden_sums[MAP + 1], operation, a, supply, team);
        else
            pass_on<PARTS, PARTS>(drawing.final_sums, operation, a, supply, team);
    }
    mark(drawing.marks, lost, MAP + 1);
}

template <int MAP, int HIDDEN, int PARTS, class Team>
FASTMAF_INLINE void sum_maps(Drawing<HIDDEN, PARTS>& drawing, const DrawPiece& piece, Supply<PARTS>& supply, const Team& team) {
    const int stride = drawing.stage.map[MAP].stride;
    if constexpr (MAP < HIDDEN) {
        sum_before<input_parts(MAP, PARTS), PARTS>(drawing.hidden_sums[MAP], piece.tiles[MAP], piece.steps[MAP], drawing.inputs[MAP],
                                                   stride, drawing.part_rows * stride, supply, team);
        sum_maps<MAP + 1>(drawing, piece, supply, team);
    } else {
        sum_before<PARTS, PARTS>(drawing.final_sums, piece.tiles[MAP], piece.steps[MAP], drawing.inputs[MAP], stride,
                                 drawing.part_rows * stride, supply, team);
    }
}

template <int MAP, int HIDDEN, int PARTS, class Team>
FASTMAF_INLINE void finish_map(Drawing<HIDDEN, PARTS>& drawing, const DrawPiece& piece, const DrawOperation& operation,
                               Supply<PARTS>& supply, const Team& team) {
    if (operation.map == MAP) return finish_units<MAP>(drawing, piece, operation, supply, team);
    if constexpr (MAP + 1 < HIDDEN) finish_map<MAP + 1>(drawing, piece, operation, supply, team);
}

template <int HIDDEN, int PARTS, class Team>
FASTMAF_FN void draw_stage(const FlowView<float>& flow, const DrawView& draws, int k, int vectors, const Tile<float>& tile, char* shared,
                           Supply<PARTS>& supply, const Team& team) {
    constexpr int lanes = lanes_of<float>();
    const DrawStage& stage = draws.stages[k];
    int* const lost = reinterpret_cast<int*>(shared + draws.lost);
    float* const x = tile.x[k % 2];
    const float* const z = tile.x[(k + 1) % 2] + flow.context * lanes;
    team.sync();  // the stage behind is done
    if (flow.context) {
        TensorMap context{};
        context.inputs = flow.context;
        context.stride = stage.map[0].stride;
        context.parts = 2;
        for (int i = team.thread(); i < draws.rows; i += team.threads()) lost[i] = kNowhere;
        team.sync();
        write_inputs(flow.stages[k], context, x, draws.rows, vectors, reinterpret_cast<Half*>(shared + draws.inputs[0]), lost, team);
        team.sync();
    }
    if (team.rank >= draws.groups) return supply.pass(stage.tiles, team);
    Drawing<HIDDEN, PARTS> drawing{flow.stages[k], stage, {}, draws.rows, 16 * team.rank, {}, {}};
    FASTMAF_UNROLL(4)
    for (int m = 0; m <= HIDDEN; ++m)
        drawing.inputs[m] = reinterpret_cast<Half*>(shared + draws.inputs[m]) + drawing.begin * stage.map[m].stride;
    FASTMAF_UNROLL(2)
    for (int half = 0; half < 2 && flow.context; ++half)
        drawing.marks[half] = select_words(take(lost, drawing.row(half)) < uint32_t(kNowhere), Words{} + 1u, Words{});
    for (int i = 0; i < stage.pieces; ++i) {
        const DrawPiece piece = stage.piece[i];
        sync_warp();  // the halves of other lanes are there
        sum_maps<0>(drawing, piece, supply, team);
        DrawOperation next = stage.operation[piece.first_operation];
        for (int o = piece.first_operation; o < piece.end_operation; ++o) {
            const DrawOperation operation = next;  // the one behind is under way meanwhile
            next = stage.operation[o + 1 < piece.end_operation ? o + 1 : o];
            if (operation.map < 0)
                finish_variables(drawing, piece, operation, flow.context, z, x + flow.context * lanes, supply, team);
            else
                finish_map<0>(drawing, piece, operation, supply, team);
        }
    }
    FASTMAF_UNROLL(2)
    for (int half = 0; half < 2; ++half) {
        const Words row = drawing.row(half);
        put(tile.log_det, row, take_wide(tile.log_det, row) + quad_sum(drawing.log_det[half]), lane_words() % 4u == 0u);
    }
}

// As generate(), for the rows of one tile. What halves cannot do is NaN in the results.
template <int HIDDEN, int PARTS, class Team>
FASTMAF_FN void generate_halves(const FlowView<float>& flow, const DrawView& draws, const Job<float>& job, int64_t begin, char* scratch,
                                char* shared, Supply<PARTS>& supply, const Team& team) {
    team.sync();
    const Tile<float> tile = tile_of(flow, job, scratch, team);
    const int count = job.draws ? flow.stage_count : flow.transforms;
    begin_samples(flow, job, begin, count, tile, team);
    supply.rewind();
    for (int k = count; k-- > 0;)
        if (draws.stages[k].maps)
            draw_stage<HIDDEN, PARTS>(flow, draws, k, job.vectors, tile, shared, supply, team);
        else
            sampler_stage(flow, k, job.vectors, tile, team);
    team.sync();
    write_samples<Arithmetic::halves>(flow, job, begin, begin + 16 * draws.groups, tile, team);
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
