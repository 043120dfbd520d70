// Gradients and training. Tiles of rows run forward and backward and leave, per map, delta and the transposed inputs; tasks of a few
// panels of weights then sum their gradients over these rows. There are two ways to share the work, chosen by the model:
//
//     large   all threads run the tiles of a chunk of rows; then all threads take tasks over the whole chunk
//     small   each thread takes a block of rows through tiles and tasks while it is in its cache; the blocks' gradients are summed
//
// Chunks and blocks depend on the model and on the number of rows alone, and every sum has its order, so bits do not depend on threads.
#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <limits>

#include "backend.hpp"
#include "cut.hpp"
#include "isa.hpp"
#include "rows.hpp"
#include "scratch.hpp"
#include "threads.hpp"

namespace fastmaf {

namespace {

// What a chunk may keep. Chunks that stay in L2 were slower on two threads: each ends with all threads waiting.
constexpr int64_t kChunkBytes = int64_t(64) << 20;
constexpr int64_t kBlockRows = 64;  // 96 leaves more of a usual batch to one of two threads

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

// Where the maps of one MADE lie among the rows that a chunk keeps.
struct Places {
    std::vector<size_t> delta;   // first row of each map among a tile's deltas
    std::vector<size_t> inputs;  // first row of each map's transposed inputs, in whole chunks of lanes
};

// Up to eight panels of one map's weights, enough to reuse the inputs while they are in the cache.
constexpr int kTaskRows = 64;
struct Task {
    int made, map, row, rows;
    int64_t cost;
};

// What weight gradients need of some rows.
template <class T>
struct Kept {
    T* deltas = nullptr;  // [tile][delta rows][lanes]
    T* inputs = nullptr;  // per map [chunk of lanes][capacity][lanes]
    int64_t capacity = 0;
    std::vector<int> tile_rows;
    std::vector<int64_t> tile_begin;
};

template <class T>
class Gradients {
public:
    Gradients(const Program<T>& program, bool parameters) : program_(program), parameters_(parameters) {
        program.views(Direction::density);
        program.views(Direction::backward);
        lanes_ = 3 * kernels_.width;
        int64_t per_row = 0;  // numbers kept of a row, counted in units that every lane count divides
        for (size_t k = 0; k < program.mades(); ++k) {
            Places places;
            int inputs = program.features() + program.context();
            for (int width : program.widths(k)) {
                places.delta.push_back(delta_rows_);
                places.inputs.push_back(input_rows_);
                delta_rows_ += size_t(width);
                input_rows_ += size_t(round_up(inputs, lanes_));
                per_row += width + round_up(inputs, 48);
                inputs = width;
            }
            places_.push_back(places);
            for (size_t m = 0; m < program.widths(k).size(); ++m)
                for (int row = 0; row < program.widths(k)[m]; row += kTaskRows) {
                    const int rows = std::min(kTaskRows, program.widths(k)[m] - row);
                    const auto& offset = program.sorted()[k].maps[m].offset;
                    tasks_.push_back({int(k), int(m), row, rows, offset[size_t(row + rows)] - offset[size_t(row)]});
                }
        }
        std::stable_sort(tasks_.begin(), tasks_.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
        chunk_ = std::clamp<int64_t>(kChunkBytes / (std::max<int64_t>(1, per_row) * int64_t(sizeof(T))) / 48 * 48, 48, 65536 / 48 * 48);
        small_ = parameters && int64_t(program.master().size()) < per_row * kBlockRows / 2;
    }

    const std::vector<Task>& tasks() const { return tasks_; }
    int64_t chunk() const { return chunk_; }

    // Forward and backward of rows [begin, begin + n) of the batch, n <= chunk(). cotangent, value, d_x, d_context: per row of the chunk.
    // If there are parameters, keeps what `gradient` needs.
    template <class V>
    void pass(const Batch& batch, int64_t begin, int64_t n, const T* cotangent, V* value, T* d_x, T* d_context) {
        const RowReader reader(batch);
        const Cut cut(n, kernels_.width, lanes_);
        auto run = [&](Room& room, Kept<T>& kept, int64_t first, int here, int64_t place) {
            tile(room, kept, reader, begin + first, here, cotangent + first, value ? value + first : nullptr,
                 d_x ? d_x + first * program_.features() : nullptr, d_context ? d_context + first * program_.context() : nullptr, place);
        };
        if (small_) {
            const int64_t blocks = (n + kBlockRows - 1) / kBlockRows, rows = (n + blocks - 1) / blocks;
            block_gradients_.resize(size_t(blocks) * program_.master().size());
            blocks_ = int(blocks);
            parallel_for(blocks, [&](int64_t b) {
                const int64_t first = b * rows, here = std::min(rows, n - first);
                if (here <= 0) return;
                const Cut inner(here, kernels_.width, lanes_, 1);
                Kept<T> kept;
                auto lay_out = [&](char* base) {
                    Carver carve(base);
                    place(kept, inner, here, carve.take<T>(delta_size(inner)), carve.take<T>(input_size(here)));
                    Room room(carve, *this, kept.deltas);
                    for (int64_t t = 0; base && t < inner.tiles; ++t) {
                        if (t) room.aim(*this, kept.deltas + size_t(t) * delta_stride());
                        run(room, kept, first + inner.begin(t), int(inner.size(t, here)), inner.begin(t));
                    }
                    return carve.used();
                };
                lay_out(thread_scratch(lay_out(nullptr)));
                T* out = block_gradients_.data() + size_t(b) * program_.master().size();
                for (const Task& task : tasks_) sum(kept, task, false, out);
            });
            return;
        }
        if (parameters_) {
            deltas_.resize(delta_size(cut));
            inputs_.resize(input_size(n));
            place(kept_, cut, n, deltas_.data(), inputs_.data());
        }
        Carver measure;
        Room(measure, *this, nullptr);
        parallel_for(cut.tiles, [&](int64_t t) {
            Carver carve(thread_scratch(measure.used()));
            Room room(carve, *this, parameters_ ? deltas_.data() + size_t(t) * delta_stride() : nullptr);
            run(room, kept_, cut.begin(t), int(cut.size(t, n)), cut.begin(t));
        });
    }

    // The gradient of one task over the rows of the last pass, into a vector laid out like the master.
    void gradient(const Task& task, bool add, T* out) const {
        if (!small_) return sum(kept_, task, add, out);
        const int64_t size = int64_t(program_.master().size());
        for (const auto& range : ranges(task))
            kernels_.sum_blocks(block_gradients_.data() + range.first, size, blocks_, range.second, add, out + range.first);
    }

    // Where the weights and the biases of a task lie in the master: begin and count.
    std::array<std::pair<int64_t, int64_t>, 2> ranges(const Task& task) const {
        const size_t made = size_t(task.made), map = size_t(task.map);
        const auto& offset = program_.sorted()[made].maps[map].offset;
        const int64_t begin = offset[size_t(task.row)];
        return {{{program_.weight_offset(made, map) + begin, offset[size_t(task.row + task.rows)] - begin},
                 {program_.bias_offset(made, map) + task.row, task.rows}}};
    }

private:
    size_t delta_stride() const { return (delta_rows_ + 8) * size_t(lanes_); }
    size_t delta_size(const Cut& cut) const { return size_t(cut.tiles) * delta_stride(); }
    static int64_t capacity(int64_t rows) { return round_up(rows, 48) + 48; }
    size_t input_size(int64_t rows) const { return input_rows_ * size_t(capacity(rows)); }

    static void place(Kept<T>& kept, const Cut& cut, int64_t rows, T* deltas, T* inputs) {
        kept.deltas = deltas;
        kept.inputs = inputs;
        kept.capacity = capacity(rows);
        kept.tile_rows.clear();
        kept.tile_begin.clear();
        for (int64_t t = 0; t < cut.tiles; ++t) {
            kept.tile_begin.push_back(cut.begin(t));
            kept.tile_rows.push_back(int(cut.size(t, rows)));
        }
    }

    void sum(const Kept<T>& kept, const Task& task, bool add, T* gradient) const {
        const Kernels<T>& k = kernels_;
        const size_t made = size_t(task.made), map = size_t(task.map), tiles = kept.tile_rows.size();
        const Staircase& stairs = program_.sorted()[made].maps[map];
        std::vector<const T*> delta(tiles);
        for (size_t t = 0; t < tiles; ++t)
            delta[t] = kept.deltas + t * delta_stride() + (places_[made].delta[map] + size_t(task.row)) * size_t(lanes_);
        k.weight_gradient(delta.data(), kept.tile_rows.data(), kept.tile_begin.data(), int(tiles), task.rows,
                          kept.inputs + places_[made].inputs[map] * size_t(kept.capacity), kept.capacity, stairs.limit.data() + task.row,
                          stairs.offset.data() + task.row, add, gradient + program_.weight_offset(made, map));
        k.bias_gradient(delta.data(), kept.tile_rows.data(), kept.tile_begin.data(), int(tiles), task.rows, add,
                        gradient + program_.bias_offset(made, map) + task.row);
    }

    // Scratch of one tile. Deltas lie in the chunk's memory when weights need them.
    struct Room {
        std::vector<Trace<T>> trace;
        std::vector<std::vector<T*>> pointers;
        T* dx[2];
        T* cotangent;
        double *log_det, *column;

        Room(Carver& carve, const Gradients& owner, T* deltas) {
            const Program<T>& program = owner.program_;
            const size_t lanes = size_t(owner.lanes_), features = size_t(program.features());
            const size_t width = features + size_t(program.context());
            log_det = carve.take<double>(lanes);
            column = carve.take<double>(lanes);
            cotangent = carve.take<T>(lanes);
            for (T*& d : dx) d = carve.take<T>(width * lanes);
            T* own_deltas = deltas ? deltas : carve.take<T>((owner.delta_rows_ + 8) * lanes);
            for (size_t k = 0; k <= program.mades(); ++k) {
                Trace<T> kept{};
                kept.x = carve.take<T>(width * lanes);
                std::vector<T*> units, arguments, delta;
                if (k < program.mades()) {
                    kept.scaled = carve.take<T>(3 * features * lanes);
                    const auto& widths = program.widths(k);
                    const bool argument = keeps_argument(program.spec().mades[k].activation);
                    for (size_t m = 0; m < widths.size(); ++m) {
                        units.push_back(carve.take<T>(size_t(widths[m]) * lanes));
                        arguments.push_back(argument && m + 1 < widths.size() ? carve.take<T>(size_t(widths[m]) * lanes) : nullptr);
                        delta.push_back(own_deltas ? own_deltas + owner.places_[k].delta[m] * lanes : nullptr);
                    }
                }
                pointers.push_back(units);
                pointers.push_back(arguments);
                pointers.push_back(delta);
                trace.push_back(kept);
            }
            for (size_t k = 0; k < trace.size(); ++k) {
                trace[k].units = pointers[3 * k].data();
                trace[k].argument = pointers[3 * k + 1].data();
                trace[k].delta = pointers[3 * k + 2].data();
            }
        }

        // Another tile's deltas.
        void aim(const Gradients& owner, T* deltas) {
            for (size_t k = 0; k + 1 < trace.size(); ++k)
                for (size_t m = 0; m < pointers[3 * k + 2].size(); ++m)
                    pointers[3 * k + 2][m] = deltas + owner.places_[k].delta[m] * size_t(owner.lanes_);
        }
    };

    template <class V>
    void tile(Room& room, Kept<T>& kept, const RowReader& reader, int64_t begin, int n, const T* cotangent, V* value, T* d_x, T* d_context,
              int64_t place) {
        const Kernels<T>& k = kernels_;
        const int features = program_.features(), context = program_.context(), count = int(program_.mades());
        const int padded = int(round_up(n, k.width)), lanes = lanes_;
        std::fill(room.log_det, room.log_det + lanes, 0.0);
        auto load = [&](const Columns& columns, int c, int row, double* log_det) {
            k.load(room.column, n, columns.kind[size_t(c)], columns.lower[size_t(c)], columns.upper[size_t(c)], columns.loc[size_t(c)],
                   columns.scale[size_t(c)], room.trace[0].x + row * lanes, log_det);
            T* lane = room.trace[0].x + row * lanes;
            std::fill(lane + n, lane + padded, lane[n - 1]);
        };
        for (int v = 0; v < features; ++v) {
            reader.column(begin, n, v, room.column);
            load(program_.spec().columns, v, context + program_.first()[size_t(v)], room.log_det);
        }
        for (int c = 0; c < context; ++c) {
            double of_bound[48] = {};
            reader.context_column(begin, n, c, room.column);
            load(program_.spec().context_columns, c, c, of_bound);
            spoil_outside(of_bound, padded, room.trace[0].x + c * lanes);
            for (int j = 1; j <= count; ++j) std::copy_n(room.trace[0].x + c * lanes, padded, room.trace[size_t(j)].x + c * lanes);
        }
        zero_outside(room.log_det, n, padded, features, lanes, room.trace[0].x + context * lanes);
        for (int r = 0; r < padded; ++r)
            room.cotangent[r] = r < n && room.log_det[r] != -std::numeric_limits<double>::infinity() ? cotangent[r] : T(0);
        k.forward(program_.views(Direction::density).data(), count, room.trace.data(), padded, room.log_det);
        const T* noise = room.trace[size_t(count)].x + context * lanes;
        if (value) {
            k.base(noise, features, lanes, n, room.log_det);
            for (int r = 0; r < n; ++r) value[r] = V(program_.constant() + room.log_det[r]);
        }
        if (count) {
            k.backward(program_.views(Direction::backward).data(), count, room.trace.data(), padded, room.cotangent, room.dx, !d_x && !d_context);
        } else {
            for (int v = 0; v < features; ++v)
                for (int r = 0; r < padded; ++r) room.dx[0][(context + v) * lanes + r] = -noise[v * lanes + r] * room.cotangent[r];
            std::fill(room.dx[0], room.dx[0] + context * lanes, T(0));
        }
        if (d_x)
            for (int v = 0; v < features; ++v) {
                reader.column(begin, n, v, room.column);
                out_of(program_.spec().columns, v, room.dx[0] + (context + program_.first()[size_t(v)]) * lanes, room, n, true, d_x + v, features);
            }
        if (d_context)
            for (int c = 0; c < context; ++c) {
                reader.context_column(begin, n, c, room.column);
                out_of(program_.spec().context_columns, c, room.dx[0] + c * lanes, room, n, false, d_context + c, context);
            }
        if (!parameters_) return;
        for (int j = 0; j < count; ++j) {
            const auto& widths = program_.widths(size_t(j));
            const Trace<T>& trace = room.trace[size_t(j)];
            for (size_t m = 0; m < widths.size(); ++m)
                k.transpose(m ? trace.units[m - 1] : trace.x, m ? widths[m - 1] : features + context, padded,
                            kept.inputs + places_[size_t(j)].inputs[m] * size_t(kept.capacity), place, kept.capacity);
        }
    }

    // d/dx through the affine and the bijection of a column; `density`: with the gradient of log|dz/dx|.
    void out_of(const Columns& columns, int column, const T* dz, const Room& room, int n, bool density, T* out, int stride) const {
        const size_t c = size_t(column);
        const double lower = columns.lower[c], upper = columns.upper[c];
        for (int r = 0; r < n; ++r) {
            const double x = room.column[r], through = double(dz[r]) * columns.scale[c];
            const double g = density ? double(room.cotangent[r]) : 0;
            double slope = 1, bend = 0;  // dz/dx, d log|dz/dx| / dx
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
            const bool zero = room.cotangent[r] == 0 && !(slope - slope == 0);  // on a bound
            out[int64_t(r) * stride] = zero ? T(0) : T(through * slope + g * bend);
        }
    }

    const Program<T>& program_;
    const bool parameters_;
    const Kernels<T>& kernels_ = kernels<T>();  // one set for life: layouts depend on its lanes
    int lanes_ = 0;
    size_t delta_rows_ = 0, input_rows_ = 0;
    std::vector<Places> places_;
    std::vector<Task> tasks_;
    int64_t chunk_ = 48;
    bool small_ = false;
    AlignedVector<T> deltas_, inputs_, block_gradients_;  // [block][master]
    Kept<T> kept_;
    int blocks_ = 0;
};

Batch part(const Batch& batch, const int64_t* index, int64_t rows) {
    Batch result = batch;
    result.index = index;
    result.outer = 1;
    result.inner = rows;
    return result;
}

}  // namespace

template <class T>
void vjp(const Program<T>& program, const Batch& batch, const T* cotangent, T* value, T* d_x, T* d_context, T* d_parameters,
         const Poll& poll) {
    const int64_t total = batch.rows(), features = program.features(), context = program.context();
    Gradients<T> gradients(program, d_parameters != nullptr);
    AlignedVector<T> gradient(d_parameters ? program.master().size() : 0, T(0));
    PollClock clock(poll);
    for (int64_t begin = 0; begin < total; begin += gradients.chunk()) {
        const int64_t n = std::min(gradients.chunk(), total - begin);
        clock.tick();
        gradients.pass(batch, begin, n, cotangent + begin, value ? value + begin : nullptr, d_x ? d_x + begin * features : nullptr,
                       d_context ? d_context + begin * context : nullptr);
        if (d_parameters)
            parallel_for(int64_t(gradients.tasks().size()),
                         [&](int64_t t) { gradients.gradient(gradients.tasks()[size_t(t)], true, gradient.data()); });
    }
    if (!d_parameters) return;
    std::fill(d_parameters, d_parameters + program.parameter_count(), T(0));
    for (size_t i = 0; i < gradient.size(); ++i) d_parameters[program.index()[i]] = gradient[i];
}

template <class T>
struct TrainerState {
    TrainerState(const Program<T>& program, AdamSettings settings)
        : settings(settings), gradients(program, true), m(program.master().size(), T(0)), v(program.master().size(), T(0)),
          gradient(program.master().size(), T(0)) {}
    AdamSettings settings;
    Gradients<T> gradients;
    AlignedVector<T> m, v, gradient;
    std::vector<T> cotangent;
    std::vector<double> value;
    int64_t steps = 0;
};

template <class T>
Trainer<T>::Trainer(std::shared_ptr<Program<T>> program, AdamSettings settings)
    : program_(std::move(program)), state_(std::make_unique<TrainerState<T>>(*program_, settings)) {}
template <class T>
Trainer<T>::~Trainer() = default;
template <class T>
AlignedVector<T>& Trainer<T>::first_moment() { return state_->m; }
template <class T>
AlignedVector<T>& Trainer<T>::second_moment() { return state_->v; }
template <class T>
int64_t Trainer<T>::steps() const { return state_->steps; }
template <class T>
void Trainer<T>::set_steps(int64_t steps) { state_->steps = steps; }

template <class T>
double Trainer<T>::epoch(const Batch& batch, const double* weights, int64_t batch_size, const double* rates, double mean_weight,
                         int64_t& done, const Poll& poll) {
    TrainerState<T>& s = *state_;
    Program<T>& program = *program_;
    const Kernels<T>& k = kernels<T>();
    const auto& tasks = s.gradients.tasks();
    const int64_t total = batch.rows();
    double sum = 0;
    PollClock clock(poll);
    for (done = 0; done * batch_size < total; ++done) {
        const int64_t begin = done * batch_size, size = std::min(batch_size, total - begin);
        const Batch rows = part(batch, batch.index + begin, size);
        auto weight = [&](int64_t i) { return weights ? weights[rows.index[i]] : 1.0; };
        s.cotangent.resize(size_t(size));
        s.value.resize(size_t(size));
        for (int64_t i = 0; i < size; ++i) s.cotangent[size_t(i)] = T(-weight(i) / (double(size) * mean_weight));

        auto gradient_of = [&](int64_t t, bool add) { s.gradients.gradient(tasks[size_t(t)], add, s.gradient.data()); };
        const int64_t chunks = (size + s.gradients.chunk() - 1) / s.gradients.chunk();
        double loss = 0;
        for (int64_t c = 0; c < chunks; ++c) {
            const int64_t first = c * s.gradients.chunk(), n = std::min(s.gradients.chunk(), size - first);
            s.gradients.pass(rows, first, n, s.cotangent.data() + first, s.value.data() + first, static_cast<T*>(nullptr),
                             static_cast<T*>(nullptr));
            for (int64_t i = first; i < first + n; ++i) loss -= weight(i) * s.value[size_t(i)];
            if (c + 1 < chunks) parallel_for(int64_t(tasks.size()), [&](int64_t t) { gradient_of(t, c > 0); });
        }
        if (!std::isfinite(loss)) return sum;

        // The last chunk's gradient, the step and the repacking of some rows are one task, unless the norm of all gradients must be known in between.
        const AdamSettings& a = s.settings;
        const int64_t step = s.steps + 1;
        const double rate = rates[done] / (1 - std::pow(a.beta1, double(step)));
        const double root_correction = 1 / std::sqrt(1 - std::pow(a.beta2, double(step)));
        double scale = 1;
        const bool ready = a.clip_norm > 0;
        if (ready) {
            parallel_for(int64_t(tasks.size()), [&](int64_t t) { gradient_of(t, chunks > 1); });
            const double norm = std::sqrt(k.sum_squares(s.gradient.data(), program.master().data(), T(2 * a.l2), int64_t(s.gradient.size())));
            scale = std::min(1.0, a.clip_norm / (norm + 1e-6));
        }
        const AdamStep<T> adam{T(scale), T(2 * a.l2), T(1 - rates[done] * a.weight_decay), T(1 - a.beta1), T(a.beta2), T(1 - a.beta2),
                               T(rate), T(root_correction), T(a.eps)};
        parallel_for(int64_t(tasks.size()), [&](int64_t t) {
            const Task& task = tasks[size_t(t)];
            if (!ready) gradient_of(t, chunks > 1);
            for (const auto& range : s.gradients.ranges(task))
                k.adam(program.master().data() + range.first, s.m.data() + range.first, s.v.data() + range.first,
                       s.gradient.data() + range.first, range.second, adam);
            for (int row = 0; row < task.rows; row += 8)
                program.repack_rows(size_t(task.made), size_t(task.map), task.row + row, std::min(8, task.rows - row));
        });
        program.drop_sampler();
        s.steps = step;
        sum += loss;
        clock.tick();
    }
    return sum;
}

void shuffle(uint64_t seed, uint32_t stream, uint32_t epoch, int64_t rows, int64_t* order) {
    std::vector<std::pair<uint64_t, int64_t>> keys(static_cast<size_t>(rows));
    for (int64_t i = 0; i < rows; i += 64) {
        uint32_t words[4][64];
        kernels<float>().words(seed, uint64_t(i), 64, epoch, stream << 24, words);
        for (int64_t j = i; j < std::min(rows, i + 64); ++j) keys[size_t(j)] = {uint64_t(words[1][j - i]) << 32 | words[0][j - i], j};
    }
    std::sort(keys.begin(), keys.end());
    for (int64_t i = 0; i < rows; ++i) order[i] = keys[size_t(i)].second;
}

#define FASTMAF_INSTANTIATE(T)                                                                                              \
    template void vjp<T>(const Program<T>&, const Batch&, const T*, T*, T*, T*, T*, const Poll&);                           \
    template class Trainer<T>;
FASTMAF_INSTANTIATE(float)
FASTMAF_INSTANTIATE(double)

}  // namespace fastmaf
