// Gradients and training. Tiles of rows run forward and backward and leave, per map, delta and the inputs, transposed where the map is
// wide; tasks of a few panels of weights then sum their gradients over these rows. There are two ways to share the work, chosen by the model:
//
//     large   all threads run the tiles of a chunk of rows; then all threads take tasks over the whole chunk
//     small   each thread takes a block of rows through tiles and tasks while it is in its cache; the blocks' gradients are summed
//
// Chunks and blocks depend on the model and on the number of rows alone, and every sum has its order, so bits do not depend on threads.
//
// A norm with the statistics of the batch ties its rows together: there all tiles go through one stage before any enters the next.
#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <limits>
#include <optional>

#include "backend.hpp"
#include "call.hpp"
#include "cut.hpp"
#include "rows.hpp"
#include "scratch.hpp"

namespace fastmaf {

namespace {

constexpr int kMostLanes = 48;  // of a tile

// What a chunk may keep. Chunks that stay in L2 were slower on two threads: each ends with all threads waiting.
constexpr int64_t kChunkBytes = int64_t(64) << 20;
// Rows of a block, twice as many in large batches: fewer sums to add up, and eight threads still have one each. 96 left more of a usual
// batch to one of two.
constexpr int64_t kBlockRows = 64;

// Polls every 100 ms.
class PollClock {
public:
    explicit PollClock(const Poll& poll) : poll_(poll) {}
    void tick() {
        const auto now = Clock::now();
        if (!poll_ || now - last_ < std::chrono::milliseconds(100)) return;
        poll_();
        last_ = now;
    }

private:
    using Clock = std::chrono::steady_clock;
    const Poll& poll_;
    Clock::time_point last_ = Clock::now();
};

// Of the bijection of a column: dz/dx, and d log|dz/dx| / dx.
struct Slopes {
    double slope = 1, bend = 0;

    Slopes(const Columns& columns, size_t c, double x) {
        const double lower = columns.lower[c], upper = columns.upper[c];
        switch (columns.kind[c]) {
            case Bijection::identity: break;
            case Bijection::logit:
                slope = 1 / (x - lower) + 1 / (upper - x);
                bend = 1 / (upper - x) - 1 / (x - lower);
                break;
            case Bijection::log_above:
                slope = 1 / (x - lower);
                bend = -slope;
                break;
            case Bijection::log_below:
                slope = 1 / (upper - x);
                bend = slope;
                break;
        }
    }
};

// d/dx through the affine and the bijection of a column; `density`: with the gradient of log|dz/dx|.
template <class T>
T leave(const Columns& columns, size_t c, double x, T dz, T cotangent, bool density) {
    const Slopes at(columns, c, x);
    const double g = density ? double(cotangent) : 0;
    const bool zero = cotangent == 0 && !(at.slope - at.slope == 0);  // on a bound
    return zero ? T(0) : T(double(dz) * columns.scale[c] * at.slope + g * at.bend);
}

// Far out the gradient of a row may be no number in T, though its density is one: it is zero then.
template <class T>
void settle_row(double log_prob, T cotangent, T* d, int width) {
    if (std::isfinite(log_prob) && std::isfinite(cotangent) && !std::all_of(d, d + width, [](T v) { return std::isfinite(v); }))
        std::fill(d, d + width, T(0));
}

// A few rows without parameters, one by one with units in lanes.
template <class T>
class FewRows {
public:
    FewRows(const Weights<T>& weights, const Kernels<T>& kernels, const Batch& batch)
        : plan_(weights.plan()),
          constant_(weights.constant()),
          forward_(weights.views(Direction::density)),
          backward_(weights.views(Direction::backward)),
          kernels_(kernels),
          reader_(batch) {}

    // Of one row; false if it has no density, so that it has to go through a tile.
    bool pass(int64_t row, T cotangent, T* value, T* d_x, T* d_context) const {
        const Room room = make_room();
        const int features = plan_.features(), context = plan_.context();
        const Columns &columns = plan_.spec().columns, &context_columns = plan_.spec().context_columns;
        double log_prob = 0, of_context = 0;
        auto load = [&](const Columns& columns, int c, double* from, T* to, double* log_det) {
            const size_t i = size_t(c);
            kernels_.load(from + c, 1, columns.kind[i], columns.lower[i], columns.upper[i], columns.loc[i], columns.scale[i], to, log_det);
        };
        reader_.columns(row, 1, 0, features, 1, room.variables);
        for (int v = 0; v < features; ++v)
            load(columns, v, room.variables, room.trace[0].x + context + plan_.first()[size_t(v)], &log_prob);
        if (context) reader_.context_columns(row, 1, 0, context, 1, room.contexts);
        for (int c = 0; c < context; ++c) load(context_columns, c, room.contexts, room.trace[0].x + c, &of_context);
        if (!std::isfinite(log_prob + of_context)) return false;
        for (size_t k = 0; k < forward_.size(); ++k) {
            std::copy_n(room.trace[0].x, context, room.trace[k + 1].x);
            kernels_.forward_row(forward_[k], room.trace[k], room.trace[k + 1].x + context, &log_prob);
        }
        const T* const noise = room.trace[forward_.size()].x + context;
        kernels_.base(noise, features, 1, 1, &log_prob);
        const T density = T(constant_ + log_prob);
        if (!std::isfinite(density)) return false;
        if (value) *value = density;
        if (!d_x && !d_context) return true;

        T* above = room.dx[0];
        T* below = room.dx[1];
        std::fill(above, above + context, T(0));
        for (int v = 0; v < features; ++v) above[context + v] = -noise[v] * cotangent;
        for (size_t k = forward_.size(); k-- > 0; std::swap(above, below))
            kernels_.backward_row(backward_[k], room.trace[k], cotangent, above, below, d_context != nullptr);
        for (int v = 0; d_x && v < features; ++v)
            d_x[v] = leave(columns, size_t(v), room.variables[v], above[context + plan_.first()[size_t(v)]], cotangent, true);
        for (int c = 0; d_context && c < context; ++c)
            d_context[c] = leave(context_columns, size_t(c), room.contexts[c], above[c], cotangent, false);
        if (d_x) settle_row(log_prob, cotangent, d_x, features);
        if (d_context) settle_row(log_prob, cotangent, d_context, context);
        return true;
    }

private:
    struct Room {
        Trace<T>* trace;  // [stages + 1]
        T* dx[2];
        double *variables, *contexts;  // as they are given
    };

    Room make_room() const {
        Carver measure;
        carve(measure);
        Carver carver(thread_scratch(measure.used()));
        return carve(carver);
    }
    Room carve(Carver& carve) const {
        const size_t stages = plan_.stages(), maps = plan_.unit_rows().size();
        const int features = plan_.features(), context = plan_.context();
        auto row = [&](int numbers) { return carve.take<T>(size_t(row_size(numbers))); };
        Room room;
        room.variables = carve.take<double>(size_t(features));
        room.contexts = carve.take<double>(size_t(context));
        for (T*& d : room.dx) d = row(context + features);
        T** const delta = carve.take<T*>(maps);
        for (size_t m = 0; m < maps; ++m) {
            T* const own = row(plan_.unit_rows()[m]);
            if (delta) delta[m] = own;
        }
        room.trace = carve.take<Trace<T>>(stages + 1);
        for (size_t k = 0; k <= stages; ++k) {
            Trace<T> own{};
            own.x = own.read = row(context + features);
            own.delta = delta;
            if (k < stages) {
                const StageSpec& stage = plan_.spec().stages[k];
                const auto& widths = plan_.widths(k);
                if (stage.input_clip > 0) own.read = row(context + features);
                if (stage.output == Output::transform) own.scaled = carve.take<T>(3 * size_t(row_stride(features)));
                own.units = carve.take<T*>(widths.size());
                own.raw = carve.take<T*>(widths.size());
                for (size_t m = 0; m < widths.size(); ++m) {
                    T* const units = row(widths[m]);
                    T* const raw = plan_.activated(k)[m] && keeps_argument(stage.activation) ? row(widths[m]) : nullptr;
                    if (!own.units) continue;  // measuring
                    own.units[m] = units;
                    own.raw[m] = raw;
                }
            }
            if (room.trace) room.trace[k] = own;
        }
        return room;
    }

    const Plan& plan_;
    const double constant_;
    const std::vector<StageView<T>>&forward_, &backward_;
    const Kernels<T>& kernels_;
    const RowReader reader_;
};

constexpr size_t kNowhere = ~size_t(0);

// Where the maps of one stage lie among the rows that a chunk keeps.
struct Places {
    std::vector<size_t> delta, units;  // first row of each map's delta among those of a tile; of its units, if a narrow map reads them
    size_t x = kNowhere;               // of the stage's tile, likewise
    std::vector<size_t> inputs;        // first row of each wide map's transposed inputs, in whole chunks of lanes
};

// Whether weight gradients cost less with rows in lanes than with inputs there, which come 16 at a time and transposed. Measured, in
// products: transposing an input costs as much as 40, adding up lanes a quarter of the products, or all of them again for a block's few rows.
bool is_narrow(const Staircase& stairs, int rows, bool in_blocks) {
    int64_t with_rows = 0, with_inputs = 40 * stairs.inputs;
    for (int row = 0; row < rows; row += 8) {
        const int here = std::min(8, rows - row), limit = stairs.limit[size_t(row + here - 1)];
        with_rows += here * limit;
        with_inputs += 8 * round_up(limit, 16);
    }
    return with_rows * (in_blocks ? 8 : 5) < with_inputs * 4;
}

// Some rows of one map's weights.
struct Task {
    int stage, map, row, rows;
    int64_t cost;
};

// What weight gradients need of some rows.
template <class T>
struct Kept {
    T* tiles = nullptr;   // [tile][kept rows][lanes]: deltas, and what narrow maps read
    T* inputs = nullptr;  // per wide map [chunk of lanes][capacity][lanes]
    int64_t capacity = 0;
    std::vector<int> tile_rows;
    std::vector<int64_t> tile_begin;
};

// What a pass differentiates in place of the density: z of the map to the noise, or x of that from it.
template <class T>
struct Maps {
    bool from_noise;
    const T* cotangent;  // [rows][features]
};

template <class T>
class Gradients {
public:
    Gradients(const Weights<T>& weights, bool parameters, const Kernels<T>& kernels)
        : weights_(weights), plan_(weights.plan()), parameters_(parameters), kernels_(kernels) {
        const Plan& plan = plan_;
        weights.views(Direction::density);
        weights.views(Direction::backward);
        lanes_ = 3 * kernels_.width;
        int64_t per_row = 0;  // numbers kept of a row at most, counted in units that every lane count divides
        for (size_t k = 0; k < plan.stages(); ++k) {
            for (int width : plan.widths(k)) per_row += width;
            for (const Staircase& stairs : plan.sorted()[k].maps) per_row += round_up(stairs.inputs, 48);
        }
        for (const StageSpec& stage : plan.spec().stages) together_ = together_ || stage.of_batch;
        small_ = parameters && !together_ && int64_t(weights.master().size()) < per_row * kBlockRows / 2;
        for (size_t k = 0; k < plan.stages(); ++k) {
            Places places;
            auto keep = [&](int rows) {
                const size_t place = kept_rows_;
                kept_rows_ += size_t(rows);
                return place;
            };
            for (int width : plan.widths(k)) places.delta.push_back(keep(width));
            places.units.assign(places.delta.size(), kNowhere);
            const Sorted& sorted = plan.sorted()[k];
            for (size_t m = 0; m < sorted.maps.size(); ++m) {
                const Staircase& stairs = sorted.maps[m];
                const int rows = plan.widths(k)[plan.written(k, m)];
                const bool narrow = parameters && is_narrow(stairs, rows, small_);
                places.inputs.push_back(narrow ? kNowhere : input_rows_);
                if (narrow) {
                    const int in = plan.wires(k)[m].first;
                    size_t& source = in >= 0 ? places.units[size_t(in)] : places.x;
                    if (source == kNowhere) source = keep(in >= 0 ? plan.widths(k)[size_t(in)] : plan.features() + plan.context());
                } else {
                    input_rows_ += size_t(round_up(stairs.inputs, lanes_));
                }
                for (int row = 0; row < rows; row += kTaskRows) {
                    const int here = std::min(kTaskRows, rows - row);
                    tasks_.push_back({int(k), int(m), row, here, stairs.offset[size_t(row + here)] - stairs.offset[size_t(row)]});
                }
            }
            places_.push_back(places);
        }
        std::stable_sort(tasks_.begin(), tasks_.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
        chunk_ = std::clamp<int64_t>(kChunkBytes / (std::max<int64_t>(1, per_row) * int64_t(sizeof(T))) / 48 * 48, 48, 65536 / 48 * 48);
    }

    const std::vector<Task>& tasks() const { return tasks_; }
    bool together() const { return together_; }  // in training, norms take the statistics of the batch
    int64_t chunk() const { return chunk_; }

    // Forward and backward of rows [begin, begin + n) of the batch, n <= chunk(). cotangent, value, d_x, d_context: per row of the chunk.
    // If there are parameters, keeps what `gradient` needs. With `maps` the cotangents are those of log|det|, and d_x is the noise's if the
    // map goes from it.
    template <class V>
    void pass(int threads, const Batch& batch, int64_t begin, int64_t n, const T* cotangent, V* value, T* d_x, T* d_context,
              const Maps<T>* maps = nullptr) {
        const RowReader reader(batch);
        const Cut cut(n, kernels_.width, lanes_, threads);
        used_cotangent_.resize(size_t(n));
        const bool wanted = d_x || d_context;
        auto run = [&](Room& room, Kept<T>& kept, int64_t first, int rows, int64_t place) {
            load(room, reader, begin + first, rows);
            for (size_t k = 0; k < (maps ? plan_.transforms() : plan_.stages()); ++k) forward(room, k, rows);
            if (maps) {
                const T* const own = maps->cotangent + first * plan_.features();
                map(room, reader, begin + first, rows, {maps->from_noise, own}, cotangent + first, used_cotangent_.data() + first, d_x,
                    d_context, first);
                if (parameters_) keep(room, kept, rows, place);
                return;
            }
            if (weigh<V>(room, reader, begin + first, rows)) {
                double weighed[kMostLanes];
                std::copy_n(room.log_det, rows, weighed);
                for (size_t k = 0; k < plan_.stages(); ++k) forward(room, k, rows);
                std::copy_n(weighed, rows, room.log_det);
            }
            close(room, rows, cotangent + first, used_cotangent_.data() + first, value ? value + first : nullptr);
            for (size_t k = plan_.stages(); k-- > 0;) backward(room, k, rows, wanted);
            if (d_x) write_dx(room, reader, begin + first, rows, d_x + first * plan_.features());
            if (d_context) write_dcontext(room, reader, begin + first, rows, d_context + first * plan_.context());
            if (parameters_) keep(room, kept, rows, place);
        };
        if (small_) {
            const int64_t most = n < 8 * kBlockRows ? kBlockRows : 2 * kBlockRows;
            const int64_t blocks = (n + most - 1) / most, rows = (n + blocks - 1) / blocks;
            block_gradients_.resize(size_t(blocks) * weights_.master().size());
            blocks_ = int(blocks);
            parallel_for(threads, blocks, [&](int64_t b) {
                const int64_t first = b * rows, here = std::min(rows, n - first);
                T* const out = block_gradients_.data() + size_t(b) * weights_.master().size();
                if (here <= 0) return std::fill(out, out + weights_.master().size(), T(0));
                const Cut inner(here, kernels_.width, lanes_, 1);
                Kept<T> kept;
                auto lay_out = [&](char* base) {
                    Carver carve(base);
                    place(kept, inner, here, carve.take<T>(kept_size(inner)), carve.take<T>(input_size(here)));
                    Room room(carve, *this, kept.tiles);
                    for (int64_t t = 0; base && t < inner.tiles; ++t) {
                        if (t) room.aim(*this, kept.tiles + size_t(t) * kept_stride());
                        run(room, kept, first + inner.begin(t), int(inner.size(t, here)), inner.begin(t));
                    }
                    return carve.used();
                };
                lay_out(thread_scratch(lay_out(nullptr)));
                for (const Task& task : tasks_) sum(kept, task, false, out);
            });
        } else {
            make_room(cut, n);
            parallel_for(threads, cut.tiles, [&](int64_t t) {
                Carver carve(thread_scratch(room_size()));
                Room room(carve, *this, parameters_ ? tiles_.data() + size_t(t) * kept_stride() : nullptr);
                run(room, kept_, cut.begin(t), int(cut.size(t, n)), cut.begin(t));
            });
        }
        total_cotangent_ = 0;
        for (int64_t r = 0; r < n; ++r) total_cotangent_ += double(used_cotangent_[size_t(r)]);
    }

    // The same for a whole batch of `training` whose norms take the statistics of the batch, rows weighted by their cotangents. It keeps
    // all activations of the batch: no bound but batch_size holds for its memory. What a poll throws leaves weights and moments as they were.
    template <class V>
    void pass_together(int threads, Weights<T>& training, const Batch& batch, int64_t n, const T* cotangent, V* value, PollClock& clock) {
        const RowReader reader(batch);
        const Cut cut(n, kernels_.width, lanes_, threads);
        used_cotangent_.assign(cotangent, cotangent + n);
        total_cotangent_ = 0;
        for (int64_t r = 0; r < n; ++r) total_cotangent_ += double(cotangent[r]);
        std::vector<double> share;
        for (int64_t r = 0; r < n; ++r) share.push_back(double(cotangent[r]) / total_cotangent_);
        make_room(cut, n);
        rooms_.resize(room_size() * size_t(cut.tiles));
        std::vector<Room> rooms;
        for (int64_t t = 0; t < cut.tiles; ++t) {
            Carver carve(rooms_.data() + room_size() * size_t(t));
            rooms.emplace_back(carve, *this, tiles_.data() + size_t(t) * kept_stride());
        }
        auto each_tile = [&](auto body) {
            parallel_for(threads, cut.tiles, [&](int64_t t) { body(rooms[size_t(t)], cut.begin(t), int(cut.size(t, n))); });
            clock.tick();
        };
        const auto& stages = plan_.spec().stages;
        const size_t features = size_t(plan_.features());
        // Sums over all rows of f(variable, row of the batch, x, gradient in this tile), for each variable.
        auto sums = [&](size_t k, auto f) {
            std::vector<double> result(features, 0.0);
            for (size_t v = 0; v < features; ++v)
                for (int64_t t = 0; t < cut.tiles; ++t) {
                    const size_t row = (size_t(plan_.context()) + v) * size_t(lanes_);
                    const T *x = rooms[size_t(t)].trace[k].x + row, *d = rooms[size_t(t)].dx[k % 2] + row;
                    for (int64_t r = 0; r < cut.size(t, n); ++r) result[v] += f(v, cut.begin(t) + r, double(x[r]), double(d[r]));
                }
            return result;
        };
        each_tile([&](Room& room, int64_t first, int rows) { load(room, reader, first, rows); });
        for (size_t k = 0; k < stages.size(); ++k) {
            if (stages[k].of_batch) {
                const auto mean = sums(k, [&](size_t, int64_t r, double x, double) { return share[size_t(r)] * x; });
                const auto var =
                    sums(k, [&](size_t v, int64_t r, double x, double) { return share[size_t(r)] * (x - mean[v]) * (x - mean[v]); });
                training.set_statistics(k, mean.data(), var.data());
            }
            each_tile([&](Room& room, int64_t, int rows) { forward(room, k, rows); });
        }
        each_tile([&](Room& room, int64_t first, int rows) {
            weigh<V>(room, reader, first, rows);
            close(room, rows, cotangent + first, used_cotangent_.data() + first, value + first);
        });
        for (size_t k = stages.size(); k-- > 0;) {
            each_tile([&](Room& room, int64_t, int rows) { backward(room, k, rows, false); });
            if (!stages[k].of_batch) continue;
            // d mean = -sum dx, d var = -(sum dx (x - mean) + sum g) / (2 (var + eps)), dx before these.
            const auto shift = sums(k, [](size_t, int64_t, double, double d) { return -d; });
            auto bend = sums(k, [&](size_t v, int64_t, double x, double d) { return d * (x - weights_.statistics(k).mean[v]); });
            for (size_t v = 0; v < features; ++v) bend[v] = -(bend[v] + total_cotangent_) / (weights_.statistics(k).var[v] + stages[k].eps);
            each_tile([&](Room& room, int64_t first, int rows) {
                for (size_t v = 0; v < features; ++v) {
                    const size_t row = (size_t(plan_.context()) + v) * size_t(lanes_);
                    const T* x = room.trace[k].x + row;
                    T* d = room.dx[k % 2] + row;
                    for (int r = 0; r < rows; ++r)
                        d[r] += T(share[size_t(first + r)] * (shift[v] + bend[v] * (double(x[r]) - weights_.statistics(k).mean[v])));
                }
            });
        }
        each_tile([&](Room& room, int64_t first, int rows) { keep(room, kept_, rows, first); });
    }

    // The gradient of one task over the rows of the last pass, into a vector laid out like the master.
    void gradient(const Task& task, bool add, T* out) const {
        const int64_t size = int64_t(weights_.master().size());
        if (small_) {
            for (const auto& range : ranges(task))
                kernels_.sum_blocks(block_gradients_.data() + range.first, size, blocks_, range.second, add, out + range.first);
        } else {
            sum(kept_, task, add, out);
        }
        if (plan_.spec().stages[size_t(task.stage)].output != Output::linear || task.map != 0) return;
        const auto& offset = plan_.sorted()[size_t(task.stage)].maps[0].offset;  // log|det| is the sum of log|u_ii|
        for (int row = task.row; row < task.row + task.rows; ++row) {
            const size_t diagonal = size_t(plan_.weight_offset(size_t(task.stage), 0) + offset[size_t(row + 1)] - 1);
            out[diagonal] += T(total_cotangent_ / double(weights_.master()[diagonal]));
        }
    }

    // Where the weights and the biases of a task lie in the master: begin and count.
    std::array<std::pair<int64_t, int64_t>, 2> ranges(const Task& task) const {
        const size_t stage = size_t(task.stage), map = size_t(task.map);
        const auto& offset = plan_.sorted()[stage].maps[map].offset;
        const int64_t begin = offset[size_t(task.row)];
        return {{{plan_.weight_offset(stage, map) + begin, offset[size_t(task.row + task.rows)] - begin},
                 {plan_.bias_offset(stage, map) + task.row, plan_.bias_count(stage, map) ? task.rows : 0}}};
    }

private:
    size_t kept_stride() const { return (kept_rows_ + 8) * size_t(lanes_); }
    size_t kept_size(const Cut& cut) const { return size_t(cut.tiles) * kept_stride(); }
    static int64_t capacity(int64_t rows) { return round_up(rows, 48) + 48; }
    size_t input_size(int64_t rows) const { return input_rows_ * size_t(capacity(rows)); }

    static void place(Kept<T>& kept, const Cut& cut, int64_t rows, T* tiles, T* inputs) {
        kept.tiles = tiles;
        kept.inputs = inputs;
        kept.capacity = capacity(rows);
        kept.tile_rows.clear();
        kept.tile_begin.clear();
        for (int64_t t = 0; t < cut.tiles; ++t) {
            kept.tile_begin.push_back(cut.begin(t));
            kept.tile_rows.push_back(int(cut.size(t, rows)));
        }
    }

    // Of the inputs of a narrow map, among the rows kept of a tile.
    size_t input_row(size_t stage, size_t map) const {
        const int in = plan_.wires(stage)[map].first;
        if (in >= 0) return places_[stage].units[size_t(in)];
        return places_[stage].x + (in == kTile ? 0 : size_t(plan_.context()));
    }

    // What weights need of the chunk, in the memory of this object.
    void make_room(const Cut& cut, int64_t n) {
        if (!parameters_) return;
        tiles_.resize(kept_size(cut));
        inputs_.resize(input_size(n));
        place(kept_, cut, n, tiles_.data(), inputs_.data());
    }
    size_t room_size() const {
        Carver measure;
        Room(measure, *this, nullptr);
        return measure.used();
    }

    void sum(const Kept<T>& kept, const Task& task, bool add, T* gradient) const {
        const Kernels<T>& k = kernels_;
        const size_t stage = size_t(task.stage), map = size_t(task.map), tiles = kept.tile_rows.size();
        const Staircase& stairs = plan_.sorted()[stage].maps[map];
        auto in_tiles = [&](size_t row) {
            std::vector<const T*> pointers(tiles);
            for (size_t t = 0; t < tiles; ++t) pointers[t] = kept.tiles + t * kept_stride() + row * size_t(lanes_);
            return pointers;
        };
        const std::vector<const T*> delta = in_tiles(places_[stage].delta[plan_.written(stage, map)] + size_t(task.row));
        const int* limit = stairs.limit.data() + task.row;
        const int64_t* offset = stairs.offset.data() + task.row;
        T* const weights = gradient + plan_.weight_offset(stage, map);
        if (const size_t inputs = places_[stage].inputs[map]; inputs != kNowhere)
            k.wide_gradient(delta.data(), kept.tile_rows.data(), kept.tile_begin.data(), int(tiles), task.rows,
                            kept.inputs + inputs * size_t(kept.capacity), kept.capacity, limit, offset, add, weights);
        else
            k.narrow_gradient(delta.data(), in_tiles(input_row(stage, map)).data(), kept.tile_rows.data(), kept.tile_begin.data(),
                              int(tiles), task.rows, limit, offset, add, weights);
        if (plan_.bias_count(stage, map))
            k.bias_gradient(delta.data(), kept.tile_rows.data(), kept.tile_begin.data(), int(tiles), task.rows, add,
                            gradient + plan_.bias_offset(stage, map) + task.row);
    }

    // Scratch of one tile. What weights need lies in the chunk's memory.
    struct Room {
        Trace<T>* trace;  // [stages + 1]
        size_t stages;
        T* dx[2];
        T* cotangent;
        double *log_det, *column;

        Room(Carver& carve, const Gradients& owner, T* kept) {
            const Plan& plan = owner.plan_;
            const size_t lanes = size_t(owner.lanes_), features = size_t(plan.features());
            const size_t width = features + size_t(plan.context());
            log_det = carve.take<double>(lanes);
            column = carve.take<double>(kColumns * lanes);
            cotangent = carve.take<T>(lanes);
            for (T*& d : dx) d = carve.take<T>(width * lanes);
            if (!kept) kept = carve.take<T>(owner.kept_stride());
            stages = plan.stages();
            trace = carve.take<Trace<T>>(stages + 1);
            for (size_t k = 0; k <= stages; ++k) {
                Trace<T> own{};
                const bool last = k == stages, apart = !last && plan.spec().stages[k].reads_apart();
                if (last || owner.places_[k].x == kNowhere || apart) own.x = carve.take<T>(width * lanes);
                if (!last) {
                    const StageSpec& stage = plan.spec().stages[k];
                    if (stage.output == Output::transform || apart) own.scaled = carve.take<T>(3 * features * lanes);
                    own.read = apart && owner.places_[k].x == kNowhere ? carve.take<T>(width * lanes) : own.x;
                    const auto& widths = plan.widths(k);
                    own.units = carve.take<T*>(widths.size());
                    own.raw = carve.take<T*>(widths.size());
                    own.delta = carve.take<T*>(widths.size());
                    own.alone = carve.take<T*>(widths.size());
                    own.whole = carve.take<T*>(widths.size());
                    for (size_t m = 0; m < widths.size(); ++m) {
                        const bool argument = m < stage.maps.size() && stage.maps[m].activated && keeps_argument(stage.activation);
                        const size_t size = size_t(widths[m]) * lanes;
                        T* const units = owner.places_[k].units[m] == kNowhere ? carve.take<T>(size) : nullptr;
                        T* const raw = argument || (m < plan.raw(k).size() && plan.raw(k)[m]) ? carve.take<T>(size) : nullptr;
                        const bool gated = m < stage.maps.size() && stage.maps[m].joins == Joins::gated;
                        T* const alone = gated ? carve.take<T>(size) : nullptr;
                        T* const whole = gated && stage.maps[m].adds >= 0 ? carve.take<T>(size) : nullptr;
                        if (!own.units) continue;  // measuring
                        own.units[m] = units;
                        own.raw[m] = raw;
                        own.alone[m] = alone;
                        own.whole[m] = whole;
                    }
                }
                if (trace) trace[k] = own;
            }
            if (kept) aim(owner, kept);
        }

        // At the rows that are kept of a tile.
        void aim(const Gradients& owner, T* kept) {
            auto point = [&](T*& pointer, size_t row) {
                if (row != kNowhere) pointer = kept + row * size_t(owner.lanes_);
            };
            for (size_t k = 0; k < stages; ++k) {
                const Places& places = owner.places_[k];
                const bool apart = owner.plan_.spec().stages[k].reads_apart();
                point(trace[k].read, places.x);
                if (!apart) trace[k].x = trace[k].read;
                for (size_t m = 0; m < places.delta.size(); ++m) {
                    point(trace[k].units[m], places.units[m]);
                    point(trace[k].delta[m], places.delta[m]);
                }
            }
        }
    };

    int padded(int rows) const { return int(round_up(rows, kernels_.width)); }

    // The first tile, and the contexts in all of them. Idle lanes repeat the last row.
    void load(Room& room, const RowReader& reader, int64_t begin, int n) {
        const int features = plan_.features(), context = plan_.context(), lanes = lanes_;
        std::fill(room.log_det, room.log_det + lanes, 0.0);
        auto load = [&](const Columns& columns, int c, const double* column, int row, double* log_det) {
            kernels_.load(column, n, columns.kind[size_t(c)], columns.lower[size_t(c)], columns.upper[size_t(c)], columns.loc[size_t(c)],
                          columns.scale[size_t(c)], room.trace[0].x + row * lanes, log_det);
            T* lane = room.trace[0].x + row * lanes;
            std::fill(lane + n, lane + padded(n), lane[n - 1]);
        };
        for (int v = 0; v < features; ++v) {
            const double* column = room.column + v % kColumns * lanes;
            if (v % kColumns == 0) reader.columns(begin, n, v, std::min(kColumns, features - v), lanes, room.column);
            load(plan_.spec().columns, v, column, context + plan_.first()[size_t(v)], room.log_det);
            if (const int values = plan_.values(v)) kernels_.refuse_other(column, n, values, room.log_det);
        }
        for (int c = 0; c < context; ++c) {
            double of_bound[kMostLanes] = {};
            if (c % kColumns == 0) reader.context_columns(begin, n, c, std::min(kColumns, context - c), lanes, room.column);
            load(plan_.spec().context_columns, c, room.column + c % kColumns * lanes, c, of_bound);
            spoil_outside(of_bound, padded(n), room.trace[0].x + c * lanes);
            for (size_t j = 1; j <= room.stages; ++j) std::copy_n(room.trace[0].x + c * lanes, padded(n), room.trace[j].x + c * lanes);
        }
        for (int r = 0; r < n; ++r)
            if (room.log_det[r] == -std::numeric_limits<double>::infinity()) zero_row(room, r, n);
    }

    // A row of density zero, and its context, go on as zeros: nothing that it meets is infinite. Only a NaN stays.
    void zero_row(Room& room, int r, int n) {
        const int width = plan_.context() + plan_.features();
        for (int lane = r; lane < (r + 1 < n ? r + 1 : padded(n)); ++lane)
            for (size_t k = 0; k <= room.stages; ++k)
                for (int i = 0; i < (k ? plan_.context() : width); ++i) {
                    T& own = room.trace[k].x[i * lanes_ + lane];
                    if (own == own) own = 0;
                }
    }

    void forward(Room& room, size_t k, int n) {
        kernels_.forward(weights_.views(Direction::density)[k], room.trace[k], room.trace[k + 1], padded(n), room.log_det);
    }

    // Behind forward: log_det becomes the density, but for the constant. Rows that have none in V, far out or at infinity, become rows of
    // density zero; returns whether there are any, which then have to go forward again.
    template <class V>
    bool weigh(Room& room, const RowReader& reader, int64_t begin, int n) {
        const T* noise = room.trace[plan_.stages()].x + plan_.context() * lanes_;
        if (!plan_.has_base()) kernels_.base(noise, plan_.features(), lanes_, n, room.log_det);
        bool again = false;
        for (int r = 0; r < n; ++r) {
            double& density = room.log_det[r];
            constexpr double zero = -std::numeric_limits<double>::infinity();
            if (density == zero && is_zero(room, r)) continue;
            if (std::isfinite(V(weights_.constant() + density))) continue;
            density = double(reader.lost_density<T>(plan_, begin + r));
            if (density == zero) zero_row(room, r, n);
            again = again || density == zero;
        }
        return again;
    }

    // Whether a row went through as zeros.
    bool is_zero(const Room& room, int r) const {
        for (int i = 0; i < plan_.context() + plan_.features(); ++i)
            if (room.trace[0].x[i * lanes_ + r] != 0) return false;
        return true;
    }

    // Between forward and backward: the gradient in the noise. `used`: cotangents, zero where the density is.
    template <class V>
    void close(Room& room, int n, const T* cotangent, T* used, V* value) {
        const int features = plan_.features(), context = plan_.context();
        const size_t count = plan_.stages();
        const T* noise = room.trace[count].x + context * lanes_;
        for (int r = 0; r < padded(n); ++r)
            room.cotangent[r] = r < n && room.log_det[r] != -std::numeric_limits<double>::infinity() ? cotangent[r] : T(0);
        std::copy_n(room.cotangent, n, used);
        T* const dx = room.dx[count % 2];
        std::fill(dx, dx + context * lanes_, T(0));
        for (int v = 0; v < features && !plan_.has_base(); ++v)
            for (int r = 0; r < padded(n); ++r) dx[(context + v) * lanes_ + r] = -noise[v * lanes_ + r] * room.cotangent[r];
        for (int r = 0; value && r < n; ++r) value[r] = V(weights_.constant() + room.log_det[r]);
    }

    void backward(Room& room, size_t k, int n, bool wanted) {
        kernels_.backward(weights_.views(Direction::backward)[k], room.trace[k], padded(n), room.cotangent, room.dx[(k + 1) % 2],
                          room.dx[k % 2],
                          wanted ? 0
                          : k    ? 1
                                 : 2);
    }

    // Forward has gone to the noise: everything else for the two maps. d_rows, d_context: of the chunk, these rows from `first` on.
    void map(Room& room, const RowReader& reader, int64_t begin, int n, const Maps<T>& maps, const T* cotangent, T* used, T* d_rows,
             T* d_context, int64_t first) {
        const int features = plan_.features(), context = plan_.context(), lanes = lanes_;
        const size_t count = plan_.transforms(), to = maps.from_noise ? count : 0;
        std::vector<char> none(size_t(n), 0);  // rows without noise, and those far out whose gradient is no number: theirs are zero
        for (int r = 0; r < n; ++r) none[size_t(r)] = !std::isfinite(room.log_det[r]) || lost(room.trace[count].x, r);
        for (bool again = std::count(none.begin(), none.end(), 1) > 0, done = false; !done;) {
            if (again) {
                for (int r = 0; r < n; ++r)
                    if (none[size_t(r)]) clear_row(room, r, n);
                for (size_t k = 0; k < count; ++k) forward(room, k, n);
            }
            for (int r = 0; r < padded(n); ++r) room.cotangent[r] = r < n && !none[size_t(r)] ? cotangent[r] : T(0);
            enter(room, reader, begin, n, maps, none);
            for (size_t k = 0; maps.from_noise && k < count; ++k)
                kernels_.backward_sampler(weights_.views(Direction::sampler_backward)[k], room.trace[k], padded(n), room.dx[k % 2],
                                          room.dx[(k + 1) % 2], d_context ? 0 : 1);
            for (size_t k = count; !maps.from_noise && k-- > 0;) backward(room, k, n, true);
            done = true;
            for (int r = 0; r < n; ++r) {
                bool finite = !lost(room.dx[to % 2], r);
                for (size_t k = 0; k < count; ++k)
                    for (int i = 0; plan_.spec().stages[k].output == Output::transform && i < 2 * features; ++i)
                        finite = finite && std::isfinite(room.trace[k].delta[plan_.spec().stages[k].maps.size() - 1][i * lanes + r]);
                if (finite || none[size_t(r)]) continue;
                none[size_t(r)] = 1;
                again = true;
                done = false;
            }
        }
        std::copy_n(room.cotangent, n, used);
        if (plan_.has_base()) leave_out(room, count);

        std::fill_n(room.log_det, n, 0.0);  // of what is not finite in the results nothing else is asked
        if (d_rows && maps.from_noise) {
            T* const out = d_rows + first * features;
            for (int v = 0; v < features; ++v)
                for (int r = 0; r < n; ++r)
                    out[int64_t(r) * features + v] = room.dx[to % 2][(context + plan_.noise()[size_t(v)]) * lanes + r];
        } else if (d_rows) {
            write_dx(room, reader, begin, n, d_rows + first * features);
        }
        if (d_context) write_dcontext(room, reader, begin, n, d_context + first * context, to % 2);
        for (int r = 0; r < n; ++r) {
            if (!none[size_t(r)]) continue;
            if (d_rows) std::fill_n(d_rows + (first + r) * features, features, T(0));
            if (d_context) std::fill_n(d_context + (first + r) * context, context, T(0));
        }
    }

    // Whether a number of a row is not finite in a tile, its context aside.
    bool lost(const T* tile, int r) const {
        for (int v = plan_.context(); v < plan_.context() + plan_.features(); ++v)
            if (!std::isfinite(tile[v * lanes_ + r])) return true;
        return false;
    }
    // A row and its context go on as zeros.
    void clear_row(Room& room, int r, int n) {
        for (int lane = r; lane < (r + 1 < n ? r + 1 : padded(n)); ++lane)
            for (size_t k = 0; k <= room.stages; ++k)
                for (int i = 0; i < plan_.context() + (k ? 0 : plan_.features()); ++i) room.trace[k].x[i * lanes_ + lane] = 0;
    }
    // A stage through which nothing has gone gives its weights nothing.
    void leave_out(Room& room, size_t k) {
        const Trace<T>& trace = room.trace[k];
        std::fill_n(trace.read, (plan_.context() + plan_.features()) * lanes_, T(0));
        for (size_t m = 0; m < plan_.widths(k).size(); ++m) {
            const size_t size = size_t(plan_.widths(k)[m]) * size_t(lanes_);
            std::fill_n(trace.units[m], size, T(0));
            std::fill_n(trace.delta[m], size, T(0));
        }
    }
    // The cotangents of a map's results, where its backward begins.
    void enter(Room& room, const RowReader& reader, int64_t begin, int n, const Maps<T>& maps, const std::vector<char>& none) {
        const int features = plan_.features(), context = plan_.context();
        T* const given = room.dx[maps.from_noise ? 0 : plan_.transforms() % 2];
        std::fill_n(given, context * lanes_, T(0));
        for (int v = 0; v < features; ++v) {
            T* const own = given + (context + (maps.from_noise ? plan_.first() : plan_.noise())[size_t(v)]) * lanes_;
            std::fill_n(own, padded(n), T(0));
            if (maps.from_noise) reader.column(begin, n, v, room.column);
            for (int r = 0; r < n; ++r) {
                if (none[size_t(r)]) continue;
                const double result = double(maps.cotangent[int64_t(r) * features + v]);
                const Columns& columns = plan_.spec().columns;
                own[r] =
                    T(maps.from_noise ? result / (Slopes(columns, size_t(v), room.column[r]).slope * columns.scale[size_t(v)]) : result);
            }
        }
    }

    void write_dx(Room& room, const RowReader& reader, int64_t begin, int n, T* d_x) {
        for (int v = 0; v < plan_.features(); ++v) {
            reader.column(begin, n, v, room.column);
            out_of(plan_.spec().columns, v, room.dx[0] + (plan_.context() + plan_.first()[size_t(v)]) * lanes_, room, n, true, d_x + v,
                   plan_.features());
        }
        settle(room, n, d_x, plan_.features());
    }

    void write_dcontext(Room& room, const RowReader& reader, int64_t begin, int n, T* d_context, size_t tile = 0) {
        for (int c = 0; c < plan_.context(); ++c) {
            reader.context_column(begin, n, c, room.column);
            out_of(plan_.spec().context_columns, c, room.dx[tile] + c * lanes_, room, n, false, d_context + c, plan_.context());
        }
        settle(room, n, d_context, plan_.context());
    }

    // One column of all rows.
    static void out_of(const Columns& columns, int column, const T* dz, const Room& room, int n, bool density, T* out, int stride) {
        for (int r = 0; r < n; ++r)
            out[int64_t(r) * stride] = leave(columns, size_t(column), room.column[r], dz[r], room.cotangent[r], density);
    }
    static void settle(const Room& room, int n, T* d, int width) {
        for (int r = 0; r < n; ++r, d += width) settle_row(room.log_det[r], room.cotangent[r], d, width);
    }

    void keep(Room& room, Kept<T>& kept, int n, int64_t place) {
        for (size_t k = 0; k < plan_.stages(); ++k) {
            const Trace<T>& trace = room.trace[k];
            for (size_t m = 0; m < plan_.wires(k).size(); ++m) {
                if (places_[k].inputs[m] == kNowhere) continue;
                const int in = plan_.wires(k)[m].first;
                const T* from = in >= 0 ? trace.units[in] : in == kTile ? trace.read : trace.read + plan_.context() * lanes_;
                const int inputs = in >= 0 ? plan_.widths(k)[size_t(in)] : plan_.sorted()[k].maps[m].inputs;
                kernels_.transpose(from, inputs, padded(n), kept.inputs + places_[k].inputs[m] * size_t(kept.capacity), place,
                                   kept.capacity);
            }
        }
    }

    const Weights<T>& weights_;
    const Plan& plan_;
    const bool parameters_;
    const Kernels<T>& kernels_;  // one set for life: layouts depend on its lanes
    int lanes_ = 0;
    size_t kept_rows_ = 0, input_rows_ = 0;
    std::vector<Places> places_;
    std::vector<Task> tasks_;
    int64_t chunk_ = 48;
    bool small_ = false, together_ = false;
    AlignedVector<T> tiles_, inputs_, block_gradients_;  // [block][master]
    Kept<T> kept_;
    int blocks_ = 0;
    AlignedVector<char> rooms_;
    std::vector<T> used_cotangent_;
    double total_cotangent_ = 0;
};

Batch part(const Batch& batch, const int64_t* index, int64_t rows) {
    Batch result = batch;
    result.index = index;
    result.outer = 1;
    result.inner = rows;
    return result;
}

// pass(begin, n) for chunks of all rows, and what they give the parameters, if anybody asks.
template <class T, class Pass>
void sweep(const Weights<T>& weights, Gradients<T>& gradients, int threads, int64_t total, T* d_parameters, PollClock& clock, Pass pass) {
    AlignedVector<T> gradient(d_parameters ? weights.master().size() : 0, T(0));
    for (int64_t begin = 0; begin < total; begin += gradients.chunk()) {
        clock.tick();
        pass(begin, std::min(gradients.chunk(), total - begin));
        if (d_parameters)
            parallel_for(threads, int64_t(gradients.tasks().size()),
                         [&](int64_t t) { gradients.gradient(gradients.tasks()[size_t(t)], true, gradient.data()); });
    }
    if (!d_parameters) return;
    std::fill(d_parameters, d_parameters + weights.plan().parameter_count(), T(0));
    for (size_t i = 0; i < gradient.size(); ++i) d_parameters[weights.plan().index()[i]] = gradient[i];
}

template <class T>
void map_vjp(const Weights<T>& weights, const Batch& batch, const Maps<T>& maps, const T* of_log_det, T* d_rows, T* d_context,
             T* d_parameters, const Poll& poll) {
    const int64_t features = weights.plan().features(), context = weights.plan().context();
    const Call<T> call;
    Gradients<T> gradients(weights, d_parameters != nullptr, call.kernels);
    PollClock clock(poll);
    if (maps.from_noise) weights.views(Direction::sampler_backward);  // not by a thread for which others wait
    const std::vector<T> zeros(of_log_det ? 0 : size_t(gradients.chunk()), T(0));
    sweep(weights, gradients, call.threads, batch.rows(), d_parameters, clock, [&](int64_t begin, int64_t n) {
        const Maps<T> own{maps.from_noise, maps.cotangent + begin * features};
        gradients.template pass<T>(call.threads, batch, begin, n, of_log_det ? of_log_det + begin : zeros.data(), nullptr,
                                   d_rows ? d_rows + begin * features : nullptr, d_context ? d_context + begin * context : nullptr, &own);
    });
}

}  // namespace

template <class T>
void vjp(const Weights<T>& weights, const Batch& batch, const T* cotangent, T* value, T* d_x, T* d_context, T* d_parameters,
         const Poll& poll, Workspace<T>* workspace) {
    const int64_t total = batch.rows(), features = weights.plan().features(), context = weights.plan().context();
    const Call<T> call(workspace);
    std::optional<Gradients<T>> own;
    auto tiles = [&]() -> Gradients<T>& {
        if (workspace && !d_parameters) {
            if (!workspace->gradients) workspace->gradients = std::make_shared<Gradients<T>>(weights, false, call.kernels);
            return *static_cast<Gradients<T>*>(workspace->gradients.get());
        }
        if (!own) own.emplace(weights, d_parameters != nullptr, call.kernels);
        return *own;
    };
    PollClock clock(poll);
    auto pass = [&](int64_t begin, int64_t n) {
        tiles().pass(call.threads, batch, begin, n, cotangent + begin, value ? value + begin : nullptr,
                     d_x ? d_x + begin * features : nullptr, d_context ? d_context + begin * context : nullptr);
    };
    if (!d_parameters && total <= kRowPath && weights.plan().row_path()) {
        if (workspace && !workspace->gradients) pass(0, total);  // once, so that a later row without density finds what it needs
        const FewRows<T> rows(weights, call.kernels, batch);
        for (int64_t r = 0; r < total; ++r)
            if (!rows.pass(r, cotangent[r], value ? value + r : nullptr, d_x ? d_x + r * features : nullptr,
                           d_context ? d_context + r * context : nullptr))
                pass(r, 1);
        return;
    }
    sweep(weights, tiles(), call.threads, total, d_parameters, clock, pass);
}

template <class T>
void to_noise_vjp(const Weights<T>& weights, const Batch& batch, const T* cotangent, const T* of_log_det, T* d_rows, T* d_context,
                  T* d_parameters, const Poll& poll) {
    map_vjp(weights, batch, {false, cotangent}, of_log_det, d_rows, d_context, d_parameters, poll);
}

template <class T>
void from_noise_vjp(const Weights<T>& weights, const Batch& batch, const T* cotangent, T* d_rows, T* d_context, T* d_parameters,
                    const Poll& poll) {
    map_vjp(weights, batch, {true, cotangent}, static_cast<const T*>(nullptr), d_rows, d_context, d_parameters, poll);
}

// One of the networks that share the weights of a trainer.
template <class T>
struct Member {
    explicit Member(std::shared_ptr<Weights<T>> weights) : weights(std::move(weights)), gradients(*this->weights, true, kernels<T>()) {}
    std::shared_ptr<Weights<T>> weights;
    Gradients<T> gradients;
};

template <class T>
struct TrainerState {
    explicit TrainerState(AdamSettings settings) : settings(settings) {}

    // Weights in the user's order, where members share them; else the only member trains its own master.
    bool shared = false;
    T* weights() { return shared ? user_weights.data() : members[0]->weights->master().data(); }

    AdamSettings settings;
    std::vector<std::unique_ptr<Member<T>>> members;
    AlignedVector<T> m, v, gradient, user_weights, user_gradient;
    std::vector<T> cotangent;
    std::vector<double> value;
    int64_t steps = 0;
};

template <class T>
Trainer<T>::Trainer(std::vector<std::shared_ptr<Weights<T>>> members, bool shared, AdamSettings settings)
    : state_(std::make_unique<TrainerState<T>>(settings)) {
    TrainerState<T>& s = *state_;
    s.shared = shared;
    std::vector<T> parameters(size_t(members.at(0)->plan().parameter_count()));
    members[0]->get_parameters(parameters.data());
    set_members(std::move(members));
    const size_t size = s.shared ? parameters.size() : s.members[0]->weights->master().size();
    s.user_weights.assign(parameters.begin(), parameters.end());
    s.m.assign(size, T(0));
    s.v.assign(size, T(0));
}

template <class T>
void Trainer<T>::set_members(std::vector<std::shared_ptr<Weights<T>>> members) {
    TrainerState<T>& s = *state_;
    s.members.clear();
    for (auto& weights : members) s.members.push_back(std::make_unique<Member<T>>(std::move(weights)));
}

template <class T>
Trainer<T>::~Trainer() = default;
template <class T>
int64_t Trainer<T>::steps() const {
    return state_->steps;
}
template <class T>
void Trainer<T>::set_steps(int64_t steps) {
    state_->steps = steps;
}
template <class T>
int64_t Trainer<T>::parameter_count() const {
    return state_->members[0]->weights->plan().parameter_count();
}

template <class T>
void Trainer<T>::get_parameters(T* parameters) const {
    if (state_->shared)
        std::copy(state_->user_weights.begin(), state_->user_weights.end(), parameters);
    else
        state_->members[0]->weights->get_parameters(parameters);
}

template <class T>
void Trainer<T>::set_parameters(const T* parameters) {
    std::copy_n(parameters, size_t(parameter_count()), state_->user_weights.data());
    for (auto& member : state_->members) member->weights->set_parameters(parameters);
}

template <class T>
void Trainer<T>::get_moments(T* first, T* second) const {
    const TrainerState<T>& s = *state_;
    if (s.shared) {
        std::copy(s.m.begin(), s.m.end(), first);
        std::copy(s.v.begin(), s.v.end(), second);
    } else {
        s.members[0]->weights->spread(s.m.data(), first);
        s.members[0]->weights->spread(s.v.data(), second);
    }
}

template <class T>
void Trainer<T>::set_moments(const T* first, const T* second) {
    TrainerState<T>& s = *state_;
    for (size_t i = 0; i < s.m.size(); ++i) {
        const size_t place = s.shared ? i : size_t(s.members[0]->weights->plan().index()[i]);
        s.m[i] = first[place];
        s.v[i] = second[place];
    }
}

// Puts the statistics of norms back at the end of a scope, whatever batches have left there.
template <class T>
class Restored {
public:
    explicit Restored(Weights<T>& weights) : weights_(weights) {
        for (size_t k = 0; k < weights.plan().stages(); ++k) statistics_.push_back(weights.statistics(k));
    }
    ~Restored() {
        const auto& stages = weights_.plan().spec().stages;
        for (size_t k = 0; k < stages.size(); ++k)
            if (stages[k].of_batch) weights_.set_statistics(k, statistics_[k].mean.data(), statistics_[k].var.data());
    }

private:
    Weights<T>& weights_;
    std::vector<typename Weights<T>::Statistics> statistics_;
};

template <class T>
double Trainer<T>::epoch(const Batch& batch, const double* weights, const Steps& steps, int64_t& done, const Poll& poll,
                         const Total& total) {
    TrainerState<T>& s = *state_;
    const Call<T> call;
    const Kernels<T>& k = call.kernels;
    const AdamSettings& a = s.settings;
    double sum = 0;
    PollClock clock(poll);
    std::vector<std::unique_ptr<Restored<T>>> restored;
    for (auto& member : s.members)
        if (member->gradients.together()) restored.push_back(std::make_unique<Restored<T>>(*member->weights));
    for (done = 0; done < steps.count; ++done) {
        const int64_t begin = done ? steps.ends[done - 1] : 0, size = steps.ends[done] - begin;
        const Batch rows = part(batch, batch.index + begin, size);
        auto weight = [&](int64_t i) { return weights ? weights[rows.index[i]] : 1.0; };
        s.cotangent.resize(size_t(size));
        s.value.resize(size_t(size));
        for (int64_t i = 0; i < size; ++i) s.cotangent[size_t(i)] = T(-weight(i) / steps.mass[done]);

        Member<T>& member = *s.members[size_t(s.steps) % s.members.size()];
        Weights<T>& trained = *member.weights;
        Gradients<T>& gradients = member.gradients;
        const auto& tasks = gradients.tasks();
        if (s.shared) trained.set_parameters(s.user_weights.data());
        if (s.shared || total)
            s.gradient.assign(trained.master().size(), T(0));  // no task writes units that nobody reads, nor any without rows
        else
            s.gradient.resize(trained.master().size());
        auto gradient_of = [&](int64_t t, bool add) { gradients.gradient(tasks[size_t(t)], add, s.gradient.data()); };
        const int64_t chunk = gradients.together() ? size : gradients.chunk(), chunks = (size + chunk - 1) / chunk;
        double loss = 0;
        for (int64_t c = 0; c < chunks; ++c) {
            const int64_t first = c * chunk, n = std::min(chunk, size - first);
            if (gradients.together())
                gradients.pass_together(call.threads, trained, rows, n, s.cotangent.data(), s.value.data(), clock);
            else
                gradients.pass(call.threads, rows, first, n, s.cotangent.data() + first, s.value.data() + first, static_cast<T*>(nullptr),
                               static_cast<T*>(nullptr));
            for (int64_t i = first; i < first + n; ++i) loss -= weight(i) * s.value[size_t(i)];
            if (c + 1 < chunks) parallel_for(call.threads, int64_t(tasks.size()), [&](int64_t t) { gradient_of(t, c > 0); });
        }
        if (!total && !std::isfinite(loss)) return sum;

        // The last chunk's gradient, the step and the repacking of some rows are one task, unless something must be known of the whole
        // gradient in between.
        const int64_t step = s.steps + 1;
        AdamStep<T> adam = adam_step<T>(a, step, steps.rates[done]);
        const bool ready = a.clip_norm > 0 || s.shared || total;
        T* gradient = s.gradient.data();
        if (ready && chunks > 0) parallel_for(call.threads, int64_t(tasks.size()), [&](int64_t t) { gradient_of(t, chunks > 1); });
        if (s.shared) {
            s.user_gradient.assign(s.user_weights.size(), T(0));
            gradient = s.user_gradient.data();
            for (size_t i = 0; i < s.gradient.size(); ++i) gradient[trained.plan().index()[i]] = s.gradient[i];
        }
        if (total) {
            total(gradient, int64_t(s.m.size()), &loss);
            if (!std::isfinite(loss)) return sum;
        }
        if (a.clip_norm > 0) {
            const double norm = std::sqrt(k.sum_squares(gradient, s.weights(), T(2 * a.l2), int64_t(s.m.size())));
            adam.scale = T(std::min(1.0, a.clip_norm / (norm + 1e-6)));
        }
        auto apply = [&](int64_t first, int64_t count) {
            k.adam(s.weights() + first, s.m.data() + first, s.v.data() + first, gradient + first, count, adam);
        };
        if (s.shared) {
            constexpr int64_t together = 1 << 14;
            const int64_t count = int64_t(s.m.size());
            parallel_for(call.threads, (count + together - 1) / together,
                         [&](int64_t t) { apply(t * together, std::min(together, count - t * together)); });
        } else {
            parallel_for(call.threads, int64_t(tasks.size()), [&](int64_t t) {
                const Task& task = tasks[size_t(t)];
                if (!ready) gradient_of(t, chunks > 1);
                for (const auto& range : gradients.ranges(task)) apply(range.first, range.second);
                for (int row = 0; row < task.rows; row += 8)
                    trained.repack_rows(size_t(task.stage), size_t(task.map), task.row + row, std::min(8, task.rows - row));
            });
            trained.finish_step();
        }
        s.steps = step;
        sum += loss;
        clock.tick();
    }
    return sum;
}

void shuffle(uint64_t seed, uint32_t stream, uint32_t epoch, int64_t rows, int64_t* order) {
    const Call<float> call;
    std::vector<std::pair<uint64_t, int64_t>> keys(static_cast<size_t>(rows));
    for (int64_t i = 0; i < rows; i += 64) {
        uint32_t words[4][64];
        call.kernels.words(seed, uint64_t(i), 64, epoch, stream << 24, words);
        for (int64_t j = i; j < std::min(rows, i + 64); ++j) keys[size_t(j)] = {uint64_t(words[1][j - i]) << 32 | words[0][j - i], j};
    }
    std::sort(keys.begin(), keys.end());
    for (int64_t i = 0; i < rows; ++i) order[i] = keys[size_t(i)].second;
}

#define FASTMAF_INSTANTIATE(T) \
    template void vjp<T>(const Weights<T>&, const Batch&, const T*, T*, T*, T*, T*, const Poll&, Workspace<T>*); \
    template void to_noise_vjp<T>(const Weights<T>&, const Batch&, const T*, const T*, T*, T*, T*, const Poll&); \
    template void from_noise_vjp<T>(const Weights<T>&, const Batch&, const T*, T*, T*, T*, const Poll&); \
    template class Trainer<T>;
FASTMAF_INSTANTIATE(float)
FASTMAF_INSTANTIATE(double)

}  // namespace fastmaf
