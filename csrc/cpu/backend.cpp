#include "backend.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <thread>

#include <unistd.h>

#include "call.hpp"
#include "cut.hpp"
#include "rows.hpp"
#include "scratch.hpp"

namespace fastmaf {

namespace {

constexpr int64_t kCrewBytes = 512 << 10;  // of the tape, for each thread that works on a single row

const long kCache = [] {
    const long size = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return size > 0 ? size : 1l << 20;
}();

// Sub-tiles that share one pass over the tape: several when the tape of one stage outgrows the cache. Measured: 1.3 times faster than one
// at (784, 1024), a little slower at (43, 512), whose MADEs fit.
template <class T>
int subtiles(const Weights<T>& weights, Direction direction) {
    const size_t per_stage = weights.tape(direction).size() * sizeof(T) / std::max<size_t>(1, weights.plan().stages());
    return per_stage > size_t(kCache) ? 4 : 1;
}

// Scratch of a tile, carved the same way for measuring and for use.
template <class T>
struct Room {
    Tile<T> tile;
    double* column;   // [kColumns][lanes of all sub-tiles]
    uint64_t* index;  // [lanes] counters of one sub-tile
    uint32_t* context;

    Room(Carver& carve, const Plan& plan, int lanes, int subtiles) {
        const size_t width = size_t(plan.features() + plan.context());
        const size_t all = size_t(lanes) * size_t(subtiles);
        tile.subtiles = subtiles;
        tile.log_det = carve.take<double>(all);
        column = carve.take<double>(kColumns * all);
        index = carve.take<uint64_t>(size_t(lanes));
        context = carve.take<uint32_t>(size_t(lanes));
        const size_t before = carve.used();
        for (T*& x : tile.x) x = carve.take<T>(width * size_t(lanes));
        tile.read = plan.reads_apart() ? carve.take<T>(width * size_t(lanes)) : nullptr;
        tile.uniform = plan.has_base() ? carve.take<T>(size_t(plan.features()) * size_t(lanes)) : nullptr;
        auto buffers = [&](const std::vector<int>& rows) {
            T** pieces = carve.take<T*>(rows.size());
            for (size_t m = 0; m < rows.size(); ++m) {
                T* piece = carve.take<T>(size_t(rows[m]) * size_t(lanes));
                if (pieces) pieces[m] = piece;
            }
            return pieces;
        };
        tile.units = buffers(plan.unit_rows());
        tile.raw = buffers(plan.raw_rows());
        const size_t block = carve.used() - before;
        tile.stride = int64_t(block / sizeof(T));
        for (int s = 1; s < subtiles; ++s) carve.take<char>(block);
        tile.density = false;
        tile.rows = 0;
        tile.folded = nullptr;
    }
};

// Folds the context that all rows share.
template <class T>
void fold(const Kernels<T>& k, const Weights<T>& weights, Direction direction, const Rows& context, Folded<T>& folded) {
    const Plan& plan = weights.plan();
    const int width = plan.context();
    const Columns& columns = plan.spec().context_columns;
    folded.row.assign(size_t(width), T(0));
    for (int c = 0; c < width; ++c) {
        double value = read(context.data + c * context.column, context.dtype), unused = 0;
        k.load(&value, 1, columns.kind[size_t(c)], columns.lower[size_t(c)], columns.upper[size_t(c)], columns.loc[size_t(c)],
               columns.scale[size_t(c)], &folded.row[size_t(c)], &unused);
        spoil_outside(&unused, 1, &folded.row[size_t(c)]);
    }
    const auto& views = weights.views(direction);
    size_t size = 0;
    for (const StageView<T>& stage : views) size += size_t(padded_rows(stage.rows[0]));
    folded.biases.assign(size, T(0));
    folded.pointers.clear();
    T* own = folded.biases.data();
    for (const StageView<T>& stage : views) {
        k.fold(stage, folded.row.data(), own);
        folded.pointers.push_back(own);
        own += padded_rows(stage.rows[0]);
    }
}

// f(s, first, count) for the rows [first, first + count) of each sub-tile s of a tile of n rows.
template <class F>
void each_subtile(int64_t n, int lanes, F f) {
    for (int64_t s = 0; s * lanes < n; ++s) f(s, s * lanes, int(std::min<int64_t>(lanes, n - s * lanes)));
}

// Loads the variables of rows [begin, begin + n) into x[0]. log_det gets those of their bijections, and -inf where a discrete variable has
// a value that it cannot have. Where values are `free` to be any, those at or outside a bound go on as NaN.
template <class T>
void load_variables(const Kernels<T>& k, const Plan& plan, const RowReader& reader, int64_t begin, int64_t n, bool free, double* block,
                    Tile<T>& tile) {
    const Columns& columns = plan.spec().columns;
    const int lanes = 3 * k.width, features = plan.features();
    const int64_t stride = int64_t(lanes) * tile.subtiles;
    T* const x = tile.x[0] + plan.context() * lanes;
    std::fill(tile.log_det, tile.log_det + stride, 0.0);
    for (int v = 0; v < features; ++v) {
        if (v % kColumns == 0) reader.columns(begin, n, v, std::min(kColumns, features - v), stride, block);
        const double* const values = block + v % kColumns * stride;
        const size_t c = size_t(v);
        const int possible = free ? 0 : plan.values(v);
        each_subtile(n, lanes, [&](int64_t s, int64_t first, int count) {
            T* const lane = x + s * tile.stride + plan.first()[c] * lanes;
            double own[48] = {};
            k.load(values + first, count, columns.kind[c], columns.lower[c], columns.upper[c], columns.loc[c], columns.scale[c], lane,
                   free ? own : tile.log_det + first);
            if (free) spoil_outside(own, count, lane);
            if (possible) k.refuse_other(values + first, count, possible, tile.log_det + first);
            std::fill(lane + count, lane + round_up(count, k.width), lane[count - 1]);
        });
    }
    each_subtile(n, lanes, [&](int64_t s, int64_t first, int count) {
        zero_outside(tile.log_det + first, count, round_up(count, k.width), features, lanes, x + s * tile.stride);
    });
}

// Loads the contexts of rows [begin, begin + n) into the top of both tiles.
template <class T>
void load_contexts(const Kernels<T>& k, const Plan& plan, const RowReader& reader, int64_t begin, int64_t n, double* block, Tile<T>& tile) {
    const Columns& columns = plan.spec().context_columns;
    const int lanes = 3 * k.width, context = plan.context();
    const int64_t stride = int64_t(lanes) * tile.subtiles;
    for (int i = 0; i < context; ++i) {
        if (i % kColumns == 0) reader.context_columns(begin, n, i, std::min(kColumns, context - i), stride, block);
        const double* const values = block + i % kColumns * stride;
        const size_t c = size_t(i);
        each_subtile(n, lanes, [&](int64_t s, int64_t first, int count) {
            double of_bound[48] = {};
            T* const lane = tile.x[0] + s * tile.stride + i * lanes;
            k.load(values + first, count, columns.kind[c], columns.lower[c], columns.upper[c], columns.loc[c], columns.scale[c], lane,
                   of_bound);
            spoil_outside(of_bound, count, lane);
            std::fill(lane + count, lane + round_up(count, k.width), lane[count - 1]);
            std::copy_n(lane, round_up(count, k.width), tile.x[1] + s * tile.stride + i * lanes);
        });
    }
}

// Noise of rows [begin, begin + n), as it is, into the tile where the sampler begins.
template <class T>
void load_noise(const Kernels<T>& k, const Plan& plan, const RowReader& reader, int64_t begin, int64_t n, double* block,
                const Tile<T>& tile, T* noise) {
    const int width = k.width, lanes = 3 * width, features = plan.features();
    const int64_t stride = int64_t(lanes) * tile.subtiles;
    for (int v = 0; v < features; ++v) {
        if (v % kColumns == 0) reader.columns(begin, n, v, std::min(kColumns, features - v), stride, block);
        const double* const values = block + v % kColumns * stride;
        each_subtile(n, lanes, [&](int64_t s, int64_t first, int count) {
            T* const lane = noise + s * tile.stride + plan.noise()[size_t(v)] * lanes;
            for (int r = 0; r < count; ++r) lane[r] = T(values[first + r]);
            std::fill(lane + count, lane + round_up(count, width), lane[count - 1]);
        });
    }
}

// Noise of the counters of rows [begin, begin + n): normal numbers into the tile where the sampler begins, uniform ones for a base.
template <class T>
void draw_noise(const Kernels<T>& k, const Plan& plan, const Draw& draw, int64_t begin, int64_t n, const Room<T>& room, T* noise) {
    const Tile<T>& tile = room.tile;
    const int lanes = 3 * k.width, features = plan.features();
    each_subtile(n, lanes, [&](int64_t s, int64_t first, int count) {
        for (int r = 0; r < lanes; ++r) {
            const int64_t row = begin + first + std::min(r, count - 1);
            room.index[r] = draw.index ? draw.index[row] : uint64_t(row % draw.rows) + draw.offset;
            room.context[r] = draw.index ? uint32_t(draw.group[row]) : uint32_t(row / draw.rows) + draw.context_offset;
        }
        if (plan.continuous() > 0) k.normals(draw.seed, room.index, room.context, features, lanes, noise + s * tile.stride);
        if (plan.has_base()) k.uniforms(draw.seed, room.index, room.context, features, lanes, tile.uniform + s * tile.stride);
    });
}

// How many threads share one row: worth their while only where its weights are too many for one core's cache to hand over quickly.
template <class T>
int crew_size(const Weights<T>& weights, int threads) {
    const Plan& plan = weights.plan();
    if (!plan.row_path() || threads == 1) return 1;
    for (int rows : plan.unit_rows())
        if (rows > 8 * kCrewPanels * kCrewGroups) return 1;
    const int64_t bytes = int64_t(weights.tape(Direction::density).size() * sizeof(T));
    return int(std::clamp<int64_t>(bytes / kCrewBytes, 1, std::min(threads, 8)));
}

// Helps with a row as soon as somebody has begun it.
template <class T>
void assist(const Kernels<T>& k, const std::vector<StageView<T>>& views, int count, const Tile<T>& row, Crew& crew) {
    while (__atomic_load_n(&crew.claims, __ATOMIC_ACQUIRE) == 0) crew.yield();
    if (__atomic_load_n(&crew.claims, __ATOMIC_ACQUIRE) == kCrewOver) return;
    k.assist_row(views.data(), count, row.x, row.read, row.units, row.folded, &crew);
}

// The probabilities of discrete variables, from their final rows to rows of `out`, `most` for each variable; NaN for continuous ones.
template <class T>
void write_probabilities(const Kernels<T>& k, const Weights<T>& weights, T* final, int64_t rows, int most, T* out) {
    const Plan& plan = weights.plan();
    const StageView<T>& stage = weights.views(Direction::density).back();
    const int width = k.width, lanes = 3 * width, features = plan.features();
    k.probabilities(stage, final, int((rows + width - 1) / width));
    for (int v = 0; v < features; ++v) {
        const int s = plan.first()[size_t(v)], count = stage.first[s + 1] - stage.first[s];
        for (int64_t r = 0; r < rows; ++r) {
            T* const values = out + (r * features + v) * most;
            for (int c = 0; c < most; ++c)
                values[c] = !stage.values[s] ? T(NAN) : c < count ? final[(stage.first[s] + c) * lanes + r] : T(0);
        }
    }
}

// Density, noise and probabilities share everything but what they write.
template <class T>
void evaluate(const Weights<T>& weights, const Batch& batch, T* log_prob, T* noise, T* probabilities, T* map_log_det, const Poll& poll,
              Workspace<T>* workspace) {
    const int64_t total = batch.rows();
    if (total == 0) return;
    const Call<T> call(workspace);
    const Kernels<T>& k = call.kernels;
    const Plan& plan = weights.plan();
    const auto& views = weights.views(Direction::density);
    const int lanes = 3 * k.width, features = plan.features(), context = plan.context();
    const int count = int(noise ? plan.transforms() : plan.stages());
    const int most = probabilities ? plan.most_values() : 0;
    const RowReader reader(batch);
    const bool shared = context > 0 && reader.shared_context();
    Folded<T> here;
    Folded<T>& folded = workspace ? workspace->folded : here;
    if (shared) fold(k, weights, Direction::density, batch.context, folded);
    const int tiles_together = subtiles(weights, Direction::density);
    const Cut cut(total, k.width, int64_t(lanes) * tiles_together, call.threads);
    Carver measure;
    Room<T>(measure, plan, lanes, tiles_together);

    const int together = total == 1 ? crew_size(weights, call.threads) : 1;
    Crew crew{0, 0, [] { std::this_thread::yield(); }};
    Tile<T> shared_row{};

    auto run = [&](int64_t t) {
        Carver carve(thread_scratch(measure.used()));
        Room<T> room(carve, plan, lanes, tiles_together);
        Tile<T>& tile = room.tile;
        const int64_t begin = cut.begin(t), n = cut.size(t, total);
        tile.folded = shared ? folded.pointers.data() : nullptr;
        auto write = [&](int64_t first, int64_t rows, const T* z, int64_t step, int64_t stride, double* log_det) {
            for (int64_t r = 0; r < rows; ++r) {
                if (log_prob) {
                    const T value = T(weights.constant() + log_det[r]);
                    log_prob[first + r] = value < std::numeric_limits<T>::infinity() ? value : reader.lost_density<T>(plan, first + r);
                }
                const bool none = log_det[r] == -std::numeric_limits<double>::infinity();  // at or outside a bound
                if (noise)
                    for (int d = 0; d < features; ++d)
                        noise[(first + r) * features + d] =
                            none ? std::numeric_limits<T>::quiet_NaN() : z[plan.noise()[size_t(d)] * stride + r * step];
                if (map_log_det) {
                    const T* const own = noise + (first + r) * features;
                    const T value = T(weights.log_scales() + log_det[r]);
                    const bool all = std::isfinite(value) && std::all_of(own, own + features, [](T v) { return std::isfinite(v); });
                    map_log_det[first + r] = all ? value : reader.lost_density<T>(plan, first + r);
                }
            }
        };
        if (n <= kRowPath && plan.row_path()) {
            tile.subtiles = 1;
            for (int64_t r = 0; r < n; ++r) {
                load_variables(k, plan, reader, begin + r, 1, false, room.column, tile);
                if (!shared) load_contexts(k, plan, reader, begin + r, 1, room.column, tile);
                // Lane 0 of the tile becomes a contiguous row.
                for (int i = 0; i < context + features; ++i) tile.x[0][i] = tile.x[0][i * lanes];
                for (int i = 0; i < context; ++i) tile.x[1][i] = tile.x[1][i * lanes];
                if (together > 1) shared_row = tile;
                const int at = k.to_noise_row(views.data(), count, tile.x, tile.read, tile.units, tile.log_det, tile.folded,
                                              together > 1 ? &crew : nullptr);
                const T* z = tile.x[at] + context;
                if (log_prob) k.base(z, features, 1, 1, tile.log_det);
                write(begin + r, 1, z, 0, 1, tile.log_det);
            }
            return;
        }
        tile.rows = int(n);
        tile.subtiles = int((n + lanes - 1) / lanes);
        load_variables(k, plan, reader, begin, n, probabilities, room.column, tile);
        if (!shared || plan.late_context()) load_contexts(k, plan, reader, begin, n, room.column, tile);
        const int at = k.to_noise(views.data(), count, tile);
        each_subtile(n, lanes, [&](int64_t s, int64_t first, int rows) {
            if (probabilities)
                write_probabilities(k, weights, tile.units[views.back().maps - 1] + s * tile.stride, rows, most,
                                    probabilities + (begin + first) * features * most);
            const T* z = tile.x[at] + s * tile.stride + context * lanes;
            if (log_prob && !plan.has_base()) k.base(z, features, lanes, rows, tile.log_det + first);
            write(begin + first, rows, z, 1, lanes, tile.log_det + first);
        });
    };
    if (together == 1) return parallel_for(call.threads, cut.tiles, run, poll ? &poll : nullptr);
    parallel_briefly(call.threads, together, [&](int64_t t) {
        if (t > 0) return assist<T>(k, views, count, shared_row, crew);
        struct Over {
            Crew& crew;
            ~Over() { __atomic_store_n(&crew.claims, kCrewOver, __ATOMIC_RELEASE); }
        } over{crew};
        run(0);
    });
}

// Sampling: noise from counters, or from the batch when `draw` is null.
template <class T, class Out>
void generate(const Weights<T>& weights, const Batch& batch, const Draw* draw, Out* out, T* log_prob, T* map_log_det, const Poll& poll,
              Workspace<T>* workspace) {
    const int64_t total = batch.rows();
    if (total == 0) return;
    const Call<T> call(workspace);
    const Kernels<T>& k = call.kernels;
    const Plan& plan = weights.plan();
    const auto& views = weights.views(Direction::sampler);
    const int lanes = 3 * k.width, features = plan.features(), context = plan.context();
    const int count = int(draw ? plan.stages() : plan.transforms());
    const RowReader reader(batch);
    const bool shared = context > 0 && reader.shared_context();
    Folded<T> here;
    Folded<T>& folded = workspace ? workspace->folded : here;
    if (shared) fold(k, weights, Direction::sampler, batch.context, folded);
    const int tiles_together = subtiles(weights, Direction::sampler);
    const Cut cut(total, k.width, int64_t(lanes) * tiles_together, call.threads);
    const Columns& columns = plan.spec().columns;
    const std::vector<Out>&low = plan.range<Out>().low, &high = plan.range<Out>().high;
    Carver measure;
    Room<T>(measure, plan, lanes, tiles_together);

    auto run = [&](int64_t t) {
        Carver carve(thread_scratch(measure.used()));
        Room<T> room(carve, plan, lanes, tiles_together);
        Tile<T>& tile = room.tile;
        const int64_t begin = cut.begin(t), n = cut.size(t, total);
        tile.folded = shared ? folded.pointers.data() : nullptr;
        tile.rows = int(n);
        tile.subtiles = int((n + lanes - 1) / lanes);
        tile.density = log_prob != nullptr;
        std::fill(tile.log_det, tile.log_det + int64_t(lanes) * tile.subtiles, 0.0);
        T* const noise = tile.x[count % 2] + context * lanes;
        if (draw)
            draw_noise(k, plan, *draw, begin, n, room, noise);
        else
            load_noise(k, plan, reader, begin, n, room.column, tile, noise);
        if (!shared || plan.late_context()) load_contexts(k, plan, reader, begin, n, room.column, tile);
        if (log_prob && !plan.has_base())
            each_subtile(n, lanes, [&](int64_t s, int64_t first, int rows) {
                k.base(noise + s * tile.stride, features, lanes, rows, tile.log_det + first);
            });
        k.from_noise(views.data(), count, tile);
        double* const value = room.column;
        each_subtile(n, lanes, [&](int64_t s, int64_t first, int rows) {
            double* const log_det = tile.log_det + first;
            Out* const own = out + (begin + first) * features;
            for (int v = 0; v < features; ++v) {
                const size_t c = size_t(v);
                k.store(tile.x[0] + s * tile.stride + (context + plan.first()[c]) * lanes, rows, columns.kind[c], columns.lower[c],
                        columns.upper[c], columns.loc[c], columns.scale[c], value, log_det);
                for (int r = 0; r < rows; ++r) {
                    const Out x = Out(value[r]);
                    own[r * features + v] = x < low[c] ? low[c] : x > high[c] ? high[c] : x;
                }
            }
            for (int r = 0; map_log_det && r < rows; ++r) map_log_det[begin + first + r] = T(-(weights.log_scales() + log_det[r]));
            for (int r = 0; log_prob && r < rows; ++r) {
                constexpr T infinity = std::numeric_limits<T>::infinity();
                T density = T(weights.constant() + log_det[r]);
                if (!(density < infinity)) {  // as that of the row would be
                    const Out* const x = own + r * features;
                    density = std::any_of(x, x + features, [](Out v) { return std::isnan(v); }) ? T(NAN) : -infinity;
                }
                log_prob[begin + first + r] = density;
            }
        });
    };
    parallel_for(call.threads, cut.tiles, run, poll ? &poll : nullptr);
}

}  // namespace

template <class T>
void log_prob(const Weights<T>& weights, const Batch& batch, T* out, const Poll& poll, Workspace<T>* workspace) {
    evaluate<T>(weights, batch, out, nullptr, nullptr, nullptr, poll, workspace);
}

template <class T>
void conditional_probs(const Weights<T>& weights, const Batch& batch, T* out, const Poll& poll, Workspace<T>* workspace) {
    evaluate<T>(weights, batch, nullptr, nullptr, out, nullptr, poll, workspace);
}

template <class T>
void to_noise(const Weights<T>& weights, const Batch& batch, T* out, const Poll& poll, Workspace<T>* workspace, T* log_det) {
    evaluate<T>(weights, batch, nullptr, out, nullptr, log_det, poll, workspace);
}

template <class T, class Out>
void from_noise(const Weights<T>& weights, const Batch& noise, Out* out, const Poll& poll, Workspace<T>* workspace, T* log_det) {
    generate<T>(weights, noise, nullptr, out, static_cast<T*>(nullptr), log_det, poll, workspace);
}

template <class T, class Out>
void sample(const Weights<T>& weights, const Draw& draw, Out* out, T* log_prob, const Poll& poll, Workspace<T>* workspace) {
    Batch batch;
    batch.outer = draw.contexts;
    batch.inner = draw.rows;
    batch.context = draw.context;
    generate<T>(weights, batch, &draw, out, log_prob, static_cast<T*>(nullptr), poll, workspace);
}

template <class T>
Peak peak(double seconds, int threads) {
    const Call<T> call;
    auto rate = [&](bool registers) {
        using Clock = std::chrono::steady_clock;
        std::vector<double> flop(size_t(threads), 0.0);
        const auto start = Clock::now();
        parallel_for(threads, threads, [&](int64_t t) {
            AlignedVector<T> scratch(16384, T(1e-3));
            do flop[size_t(t)] += call.kernels.peak(2000, registers, scratch.data());
            while (std::chrono::duration<double>(Clock::now() - start).count() < seconds);
        });
        const double elapsed = std::chrono::duration<double>(Clock::now() - start).count();
        double total = 0;
        for (double f : flop) total += f;
        return total / elapsed * 1e-9;
    };
    return {rate(false), rate(true)};
}

char* thread_scratch(size_t bytes) {
    thread_local AlignedVector<char> block;
    if (block.size() < bytes) {
        block = {};
        block.resize(bytes);
    }
    if (poisoned()) std::memset(block.data(), 0xFF, block.size());
    return block.data();
}

namespace {
std::atomic<bool> poison{false};
}
void set_poison(bool on) { poison = on; }
bool poisoned() { return poison.load(std::memory_order_relaxed); }

#define FASTMAF_INSTANTIATE(T) \
    template void log_prob<T>(const Weights<T>&, const Batch&, T*, const Poll&, Workspace<T>*); \
    template void conditional_probs<T>(const Weights<T>&, const Batch&, T*, const Poll&, Workspace<T>*); \
    template void to_noise<T>(const Weights<T>&, const Batch&, T*, const Poll&, Workspace<T>*, T*); \
    template void from_noise<T>(const Weights<T>&, const Batch&, float*, const Poll&, Workspace<T>*, T*); \
    template void from_noise<T>(const Weights<T>&, const Batch&, double*, const Poll&, Workspace<T>*, T*); \
    template void sample<T>(const Weights<T>&, const Draw&, float*, T*, const Poll&, Workspace<T>*); \
    template void sample<T>(const Weights<T>&, const Draw&, double*, T*, const Poll&, Workspace<T>*); \
    template Peak peak<T>(double, int);
FASTMAF_INSTANTIATE(float)
FASTMAF_INSTANTIATE(double)

}  // namespace fastmaf
