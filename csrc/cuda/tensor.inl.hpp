// Density on tensor cores: a tile of rows through all stages, those of plain networks by products of halves summed in float.
//
// The variables lie where evaluate.inl.hpp keeps them, in float, and laws, columns and bases are its own. A stage turns its inputs into
// halves; each map reads halves and writes halves of its activations, all in shared memory; the law is applied to the sums of the final
// map in the registers where they are. Weights stream through a ring of each warp, ahead of their use across maps, stages and tiles.
//
// Halves have little room. An input that is NaN or too large becomes zero, and `lost` keeps the first such input of each row and map: as
// units are sorted by degree, all that depends on it stands behind the first unit that reads it. What it leads to is NaN in the end,
// where evaluate() finds it and computes it in float. So nothing that is not finite meets a weight, masked or not, and what does not
// depend on an input has the same bits whatever that input is.
#pragma once

#include "evaluate.inl.hpp"
#include FASTMAF_MMA
#include "tensor.hpp"

namespace fastmaf {
namespace FASTMAF_ISA {

// The tape of a warp's team, in a ring: as many tiles under way as there are slots but one.
template <int PARTS>
class Feed {
public:
    static constexpr int slots = slots_of(PARTS), bytes = PARTS * kTileBytes;
    FASTMAF_MEMBER Feed(const TensorView& tensor, char* shared, int rank)
        : begin_(tensor.tape[rank / tensor.shape.groups]),
          end_(tensor.tape[rank / tensor.shape.groups + 1]),
          next_(begin_),
          ring_(shared + tensor.ring + rank * slots * bytes) {
        for (int i = 0; i + 1 < slots; ++i) fetch();
    }
    FASTMAF_MEMBER void take(Words (&b)[PARTS][4]) {
        wait_copies<slots - 2>();
        FASTMAF_UNROLL(2)
        for (int p = 0; p < PARTS; ++p) load_four(b[p], ring_ + out_ * bytes + p * kTileBytes);
        out_ = out_ + 1 == slots ? 0 : out_ + 1;
        fetch();
    }

private:
    FASTMAF_MEMBER void fetch() {
        if (begin_ != end_) {
            FASTMAF_UNROLL(2)
            for (int p = 0; p < PARTS; ++p) copy_async(ring_ + in_ * bytes + p * kTileBytes, next_ + p * kTileBytes);
            next_ += bytes;
            if (next_ == end_) next_ = begin_;
            in_ = in_ + 1 == slots ? 0 : in_ + 1;
        }
        commit_copies();
    }
    const char *begin_, *end_, *next_;
    char* ring_;
    int in_ = 0, out_ = 0;
};

// What a warp sums for a tile of units: 16 MT rows.
template <int MT>
using Sums = Vec<float>[MT][4];

// The parts of 16 inputs of a warp's rows.
template <int MT, int AP>
using Inputs = Words[AP][MT][4];

template <int MT, int AP>
FASTMAF_INLINE void load_inputs(Inputs<MT, AP>& a, const Half* in, int stride, int part) {
    FASTMAF_UNROLL(2)
    for (int p = 0; p < AP; ++p) {
        FASTMAF_UNROLL(4)
        for (int m = 0; m < MT; ++m) load_a(a[p][m], in + p * part + 16 * m * stride, stride);
    }
}

// sums += the product of 16 inputs, the first ones of a tile of weights or the others. With parts on both sides the small products come
// first and are summed apart with the large one: tensor cores do not round to nearest.
template <int MT, int AP, int BP>
FASTMAF_INLINE void multiply(Sums<MT>& sums, const Inputs<MT, AP>& a, const Words (&b)[BP][4], int step) {
    if constexpr (BP == 1) {
        FASTMAF_UNROLL(2)
        for (int p = AP; p-- > 0;) {
            FASTMAF_UNROLL(4)
            for (int m = 0; m < MT; ++m) multiply_add(sums[m], a[p][m], b[0][2 * step], b[0][2 * step + 1]);
        }
    } else {
        Sums<MT> own = {};
        FASTMAF_UNROLL(3)
        for (int product = 3; product-- > 0;) {  // low high, high low, high high
            const int of_a = product == 2, of_b = product == 1;
            FASTMAF_UNROLL(4)
            for (int m = 0; m < MT; ++m) multiply_add(own[m], a[of_a][m], b[of_b][2 * step], b[of_b][2 * step + 1]);
        }
        FASTMAF_UNROLL(4)
        for (int m = 0; m < MT; ++m) {
            FASTMAF_UNROLL(4)
            for (int i = 0; i < 4; ++i) sums[m][i] += own[m][i];
        }
    }
}

// A strip for 16 MT rows, whose inputs begin at `in` and those of the low part `part` halves behind.
template <int MT, int AP, int BP>
FASTMAF_INLINE void multiply_strip(Sums<MT> (&sums)[kStripTiles], const Strip& strip, const Half* in, int stride, int part,
                                   Feed<BP>& feed) {
    const int all = strip.tiles == kStripTiles ? strip.end[0] : 0;
    int last = 0;
    FASTMAF_UNROLL(4)
    for (int t = 0; t < kStripTiles; ++t) last = strip.end[t] > last ? strip.end[t] : last;
    for (int begin = 0; begin < last; begin += 2) {
        Words b[kStripTiles][BP][4];
        Inputs<MT, AP> a;
        if (begin + 1 < all) {
            FASTMAF_UNROLL(4)
            for (int t = 0; t < kStripTiles; ++t) feed.take(b[t]);
            FASTMAF_UNROLL(2)
            for (int step = 0; step < 2; ++step) {
                load_inputs<MT, AP>(a, in + 16 * (begin + step), stride, part);
                FASTMAF_UNROLL(4)
                for (int t = 0; t < kStripTiles; ++t) multiply<MT, AP, BP>(sums[t], a, b[t], step);
            }
        } else {
            FASTMAF_UNROLL(4)
            for (int t = 0; t < kStripTiles; ++t)
                if (begin < strip.end[t]) feed.take(b[t]);
            FASTMAF_UNROLL(2)
            for (int step = 0; step < 2; ++step) {
                if (begin + step >= last) break;
                load_inputs<MT, AP>(a, in + 16 * (begin + step), stride, part);
                FASTMAF_UNROLL(4)
                for (int t = 0; t < kStripTiles; ++t)
                    if (begin + step < strip.end[t]) multiply<MT, AP, BP>(sums[t], a, b[t], step);
            }
        }
    }
}

// f(tile) for the tiles of a strip, whose sums it finds in sums[0].
template <int MT, class F>
FASTMAF_INLINE void each_tile(Sums<MT> (&sums)[kStripTiles], int tiles, F f) {
    FASTMAF_ROLLED
    for (int t = 0; t < tiles; ++t) {
        f(t);
        FASTMAF_UNROLL(3)
        for (int u = 0; u + 1 < kStripTiles; ++u) {
            FASTMAF_UNROLL(4)
            for (int m = 0; m < MT; ++m) {
                FASTMAF_UNROLL(4)
                for (int i = 0; i < 4; ++i) sums[u][m][i] = sums[u + 1][m][i];
            }
        }
    }
}

FASTMAF_INLINE auto fits_half(Vec<float> v) { return magnitude<float>(v) <= kHalfLimit; }

// The places of a lane among the rows of a warp's tile, in the register r of C.
FASTMAF_INLINE Words row_of(int begin, unsigned r) { return fragments::c_row(lane_words(), r) + uint32_t(begin); }

// Activations of hidden units as halves, `rows` from `begin` on: the sums of units from strip.row on.
template <int MT, int PARTS>
FASTMAF_INLINE void write_units(Sums<MT> (&sums)[kStripTiles], const Strip& strip, const TensorMap& map, Activation activation, int begin,
                                Half* out, int stride, int part, int* lost) {
    with_activation<float>(activation, [&](auto activated) {
        each_tile<MT>(sums, strip.tiles, [&](int t) {
            const Words unit = fragments::c_column(lane_words(), 0) + uint32_t(strip.row + kTileUnits * t);
            Vec<float> affine[4];
            take_four(affine, map.affine, 2u * unit);
            FASTMAF_UNROLL(8)
            for (int i = 0; i < 2 * MT; ++i) {
                const Words row = row_of(begin + 16 * (i / 2), unsigned(2 * (i % 2)));
                Vec<float> v[2];
                FASTMAF_UNROLL(2)
                for (int u = 0; u < 2; ++u) v[u] = activated(fma(sums[0][i / 2][2 * (i % 2) + u], affine[2 * u], affine[2 * u + 1]));
                const auto first = fits_half(v[0]), second = fits_half(v[1]);
                const auto astray = (first & second) == 0;
                if (any(astray)) lower(lost, row, select_words(first, unit + 1u, unit), astray);
                v[0] = select(first, v[0] * kHalfScale, Vec<float>{});
                v[1] = select(second, v[1] * kHalfScale, Vec<float>{});
                const Words high = halves(v[0], v[1]), place = row * uint32_t(stride) + unit;
                put_halves(out, place, high);
                if (PARTS == 2) put_halves(out + part, place, halves(v[0] - low_half(high), v[1] - high_half(high)));
            }
        });
    });
}

// The law, on the sums of the final rows from strip.row on: row 2s is the shift of the s-th variable, the next one its raw log-scale.
template <int MT>
FASTMAF_INLINE void write_variables(Sums<MT> (&sums)[kStripTiles], const Strip& strip, const TensorMap& map, const StageView<float>& stage,
                                    int begin, const int* lost, const float* x, float* next, double* log_det) {
    constexpr int lanes = lanes_of<float>();
    const Vec<float> none = splat<float>(__builtin_nanf(""));
    Vec<double> totals[2 * MT] = {};
    each_tile<MT>(sums, strip.tiles, [&](int t) {
        const Words row = fragments::c_column(lane_words(), 0) + uint32_t(strip.row + kTileUnits * t), own = row / 2u;
        const auto there = own < uint32_t(stage.features);
        const Words s = select_words(there, own, Words{}), to = take(stage.next, s) * uint32_t(lanes);
        Vec<float> affine[4], loc{}, scale = splat<float>(1);
        take_four(affine, map.affine, 2u * row);
        if (stage.scale) {
            loc = take(stage.loc, s);
            scale = take(stage.scale, s);
        }
        FASTMAF_UNROLL(8)
        for (int i = 0; i < 2 * MT; ++i) {
            const Words place = row_of(begin + 16 * (i / 2), unsigned(2 * (i % 2)));
            const Vec<float> m = fma(sums[0][i / 2][2 * (i % 2)], affine[0], affine[1]);
            const Vec<float> raw = fma(sums[0][i / 2][2 * (i % 2) + 1], affine[2], affine[3]);
            const Vec<float> a = log_scale<float>(stage, raw);
            Vec<float> z = to_z<float>(stage, take(x, s * uint32_t(lanes) + place), m, a);
            if (stage.scale) z = (z - loc) * scale;
            const Words from = take(lost, place);
            const auto astray = from < uint32_t(map.inputs);
            Vec<float> change = -a;
            if (any(astray)) {
                const auto reads = astray & (take(map.reader, select_words(astray, from, Words{})) < row + 2u);
                z = select(reads, none, z);
                change = select(reads, none, change);
            }
            put(next, to + place, z, there);
            totals[i] += select_wide(there, widen(change));
        }
    });
    FASTMAF_UNROLL(8)
    for (int i = 0; i < 2 * MT; ++i) {
        const Words place = row_of(begin + 16 * (i / 2), unsigned(2 * (i % 2)));
        put(log_det, place, take_wide(log_det, place) + quad_sum(totals[i]), lane_words() % 4u == 0u);
    }
}

// The inputs of a stage as halves.
template <class Team>
FASTMAF_FN void write_inputs(const StageView<float>& stage, const TensorMap& map, const float* x, int rows, int vectors, Half* out,
                             int* lost, const Team& team) {
    constexpr int W = Lanes<float>::W, lanes = lanes_of<float>();
    for (int k = 0; k < (map.inputs + 15) / 16 * 16; k += 8)
        for (int j = 0; j < vectors; ++j) {
            if (!team.mine(k / 8 * vectors + j)) continue;
            const Words row = lane_words() + uint32_t(j * W);
            const auto there = row < uint32_t(rows);
            Words high[4], low[4], first = Words{} + uint32_t(kNowhere);
            FASTMAF_UNROLL(4)
            for (int i = 3; i >= 0; --i) {
                Vec<float> v[2];
                FASTMAF_UNROLL(2)
                for (int u = 1; u >= 0; --u) {
                    const int input = k + 2 * i + u;
                    v[u] = input < map.inputs ? at(x + input * lanes + j * W) : Vec<float>{};
                    if (input >= stage.context) v[u] = clipped<float>(stage, v[u]);
                    const auto fit = fits_half(v[u]);
                    first = select_words(fit, first, Words{} + uint32_t(input));
                    v[u] = select(fit, v[u] * kHalfScale, Vec<float>{});
                }
                high[i] = halves(v[0], v[1]);
                low[i] = halves(v[0] - low_half(high[i]), v[1] - high_half(high[i]));
            }
            const Words place = select_words(there, row, Words{}) * uint32_t(map.stride) + uint32_t(k);
            put_eight(out, place, high, there);
            if (map.parts == 2) put_eight(out + rows * map.stride, place, low, there);
            const auto astray = (first < uint32_t(kNowhere)) & there;
            if (any(astray)) lower(lost, row, first, astray);
        }
}

// What the shared memory of a block holds of a row tile.
struct Halves {
    Half* units[2];
    int* lost;     // [maps][rows]
    double* sums;  // [teams][rows]
};

template <int MT, int AP, int BP, class Team>
FASTMAF_INLINE void run_map(const TensorView& tensor, const TensorStage& stage, int m, const Halves& halves, const StageView<float>& view,
                            const float* x, float* next, Feed<BP>& feed, const Team& team) {
    const TensorShape& shape = tensor.shape;
    const TensorMap& map = stage.map[m];
    const int mine = team.rank / shape.groups, begin = team.rank % shape.groups * 16 * MT;
    const Half* const in = one_of(halves.units, m) + begin * map.stride;
    for (int i = map.first[mine]; i < map.first[mine + 1]; ++i) {
        const Strip strip = map.strips[i];
        Sums<MT> sums[kStripTiles] = {};
        multiply_strip<MT, AP, BP>(sums, strip, in, map.stride, shape.rows * map.stride, feed);
        if (m + 1 < stage.maps) {
            const int stride = stage.map[m + 1].stride;
            write_units<MT, BP>(sums, strip, map, view.activation, begin, one_of(halves.units, m + 1), stride, shape.rows * stride,
                                halves.lost + (m + 1) * shape.rows);
        } else {
            write_variables<MT>(sums, strip, map, view, begin, halves.lost + m * shape.rows, x, next, halves.sums + mine * shape.rows);
        }
    }
}

// The first lost unit of a map, for each row: what reads the first lost input.
template <class Team>
FASTMAF_FN void pass_losses(const TensorMap& map, int rows, int vectors, const int* lost, int* next, const Team& team) {
    for (int j = 0; j < vectors; ++j) {
        if (!team.mine(j)) continue;
        const Words row = lane_words() + uint32_t(j * Lanes<float>::W), own = select_words(row < uint32_t(rows), row, Words{});
        const Words from = take(lost, own);
        const auto astray = (from < uint32_t(map.inputs)) & (row < uint32_t(rows));
        if (any(astray)) lower(next, own, take(map.reader, select_words(astray, from, Words{})), astray);
    }
}

template <int MT, int PARTS, class Team>
FASTMAF_INLINE void tensor_stage(const FlowView<float>& flow, const TensorView& tensor, int k, int vectors, const Tile<float>& tile,
                                 const Halves& halves, Feed<PARTS>& feed, const Team& team) {
    constexpr int W = Lanes<float>::W, lanes = lanes_of<float>();
    const StageView<float>& view = flow.stages[k];
    const TensorStage& stage = tensor.stages[k];
    const int rows = tensor.shape.rows;
    const float* const x = one_of(tile.x, k);
    float* const next = one_of(tile.x, k + 1) + flow.context * lanes;
    team.sync();  // the variables are there, and all have left the stage before
    for (int i = team.thread(); i < stage.maps * rows; i += team.threads()) halves.lost[i] = kNowhere;
    team.sync();
    write_inputs(view, stage.map[0], x, rows, vectors, halves.units[0], halves.lost, team);
    for (int m = 0; m < stage.maps; ++m) {
        team.sync();
        if (m + 1 < stage.maps) pass_losses(stage.map[m], rows, vectors, halves.lost + m * rows, halves.lost + (m + 1) * rows, team);
        if (PARTS == 1 && stage.map[m].parts == 2)
            run_map<MT, 2, PARTS>(tensor, stage, m, halves, view, x + flow.context * lanes, next, feed, team);
        else
            run_map<MT, PARTS, PARTS>(tensor, stage, m, halves, view, x + flow.context * lanes, next, feed, team);
    }
    team.sync();
    for (int j = 0; j < vectors; ++j) {
        if (!team.mine(j)) continue;
        const Words row = lane_words() + uint32_t(j * W);
        const auto there = row < uint32_t(rows);
        const Words own = select_words(there, row, Words{});
        for (int i = 0; i < tensor.shape.teams; ++i) {
            double* const sums = halves.sums + i * rows;
            add_to<float>(tile.log_det + j * W, take_wide(sums, own));
            put(sums, own, Vec<double>{}, there);
        }
    }
}

FASTMAF_INLINE Halves halves_of(const TensorView& tensor, char* shared) {
    return {{reinterpret_cast<Half*>(shared + tensor.units[0]), reinterpret_cast<Half*>(shared + tensor.units[1])},
            reinterpret_cast<int*>(shared + tensor.lost),
            reinterpret_cast<double*>(shared + tensor.sums)};
}

// Before the first tile of a block: whatever products read beside units that are there is finite from here on.
template <class Team>
FASTMAF_FN void clear_halves(char* shared, int64_t bytes, const Team& team) {
    uint32_t* const words = reinterpret_cast<uint32_t*>(shared);
    for (int64_t i = team.thread(); i < bytes / 4; i += team.threads()) words[i] = 0;
}

// As evaluate(), for the density and the noise. What halves cannot do is NaN in the results.
template <int MT, int PARTS, class Team>
FASTMAF_FN void evaluate_halves(const FlowView<float>& flow, const TensorView& tensor, const Job<float>& job, int64_t begin, char* scratch,
                                char* shared, Feed<PARTS>& feed, const Team& team) {
    team.sync();
    const Tile<float> tile = tile_of(flow, job, scratch, team);
    const Halves halves = halves_of(tensor, shared);
    load_rows(flow, job, begin, tile, team);
    load_contexts(flow, job, begin, tile, team);
    const int count = job.log_prob && !job.map ? flow.stage_count : flow.transforms;
    for (int k = 0; k < count; ++k)
        if (tensor.stages[k].maps)
            tensor_stage<MT, PARTS>(flow, tensor, k, job.vectors, tile, halves, feed, team);
        else
            density_stage(flow, k, job.vectors, tile, team);
    team.sync();
    write_results<Arithmetic::halves>(flow, job, begin, begin + tensor.shape.rows, tile, count, team);
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
