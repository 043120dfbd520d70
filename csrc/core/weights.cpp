#include "weights.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include <unistd.h>

#include "floats.hpp"

namespace fastmaf {

namespace {

constexpr double kHalfLog2Pi = 0.91893853320467274178;

const long kCache = [] {
    const long size = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return size > 0 ? size : 1l << 20;
}();

}  // namespace

template <class T>
Weights<T>::Weights(std::shared_ptr<const Plan> plan) : plan_(std::move(plan)), master_(plan_->index().size()) {
    const PlainFloats floats;
    const size_t features = size_t(plan_->features());
    for (size_t k = 0; k < plan_->stages(); ++k) {
        const StageSpec& stage = plan_->spec().stages[k];
        const Sorted& sorted = plan_->sorted()[k];
        statistics_.push_back({stage.mean, stage.var});
        loc_.emplace_back();
        scale_.emplace_back();
        for (size_t s = 0; s < features; ++s) {
            if (stage.scale.empty() && stage.output != Output::norm) continue;
            const size_t coordinate = size_t(sorted.variables[s]);
            loc_[k].push_back(stage.trainable ? T(0) : T(stage.loc[coordinate]));
            scale_[k].push_back(stage.trainable ? T(1) : T(stage.scale[coordinate]));
        }
        bias_.emplace_back();
        for (const Staircase& map : sorted.maps) bias_[k].emplace_back(size_t(padded_rows(map.rows())), T(0));
        norm_scale_.emplace_back();
        norm_shift_.emplace_back();
        auto norm = [&](size_t m, const std::vector<double>& values) -> const T* {
            if (values.empty()) return nullptr;
            norms_.emplace_back();
            for (int unit : sorted.units[m]) norms_.back().push_back(T(values[size_t(unit)]));
            return norms_.back().data();
        };
        for (size_t m = 0; m < stage.maps.size(); ++m) {
            norm_scale_[k].push_back(norm(m, stage.maps[m].norm_scale));
            norm_shift_[k].push_back(norm(m, stage.maps[m].norm_shift));
        }
        bias_pointers_.emplace_back();
        for (const auto& bias : bias_[k]) bias_pointers_[k].push_back(bias.data());
    }
    refresh_scales();
}

template <class T>
Weights<T>::Weights(const Weights& other) : Weights(other.plan_) {
    const PlainFloats floats;
    master_ = other.master_;
    statistics_ = other.statistics_;
    repack();
}

template <class T>
size_t Weights<T>::memory() const {
    size_t numbers = master_.size();
    for (const auto& stage : bias_)
        for (const auto& bias : stage) numbers += bias.size();
    for (const auto& packed : packed_)
        if (const Packed* const made = packed.get()) {
            numbers += made->tape.size();
            for (const auto& bias : made->inverse_bias) numbers += bias.size();
        }
    return numbers * sizeof(T);
}

template <class T>
void Weights<T>::set_parameters(const T* parameters) {
    const PlainFloats floats;
    const std::vector<uint32_t>& index = plan_->index();
    for (size_t i = 0; i < index.size(); ++i) master_[i] = parameters[index[i]];
    repack();
}

template <class T>
void Weights<T>::set_parameters(const std::vector<Piece>& parameters) {
    const PlainFloats floats;
    const std::vector<uint32_t>& index = plan_->index();
    std::vector<int64_t> end;
    end.reserve(parameters.size());
    for (const Piece& piece : parameters) end.push_back((end.empty() ? 0 : end.back()) + piece.count);
    if ((end.empty() ? 0 : end.back()) != plan_->parameter_count())
        throw std::logic_error("the flow has " + std::to_string(plan_->parameter_count()) + " parameters; others are given");
    int64_t begin = 0, stop = 0;  // of the piece at hand: neighbours in the master mostly share it
    const char* data = nullptr;
    for (size_t i = 0; i < index.size(); ++i) {
        const int64_t place = index[i];
        if (place < begin || place >= stop) {
            const size_t piece = size_t(std::upper_bound(end.begin(), end.end(), place) - end.begin());
            stop = end[piece];
            begin = stop - parameters[piece].count;
            data = parameters[piece].data;
        }
        std::memcpy(&master_[i], data + (place - begin) * int64_t(sizeof(T)), sizeof(T));
    }
    repack();
}

template <class T>
void Weights<T>::spread(const T* like_master, T* parameters) const {
    const std::vector<uint32_t>& index = plan_->index();
    std::fill(parameters, parameters + plan_->parameter_count(), T(0));
    for (size_t i = 0; i < index.size(); ++i) parameters[index[i]] = like_master[i];
}

template <class T>
void Weights<T>::set_statistics(size_t stage, const double* mean, const double* var) {
    const PlainFloats floats;
    statistics_[stage].mean.assign(mean, mean + plan_->features());
    statistics_[stage].var.assign(var, var + plan_->features());
    refresh_scales();
}

// Scales that all rows share, and the sum of their logarithms.
template <class T>
void Weights<T>::refresh_scales() {
    const Plan& plan = *plan_;
    const size_t features = size_t(plan.features());
    constant_ = -double(plan.continuous()) * kHalfLog2Pi;
    fixed_ = constant_;
    log_scales_ = 0;
    auto add = [&](double log_scale, double fixed) {
        constant_ += log_scale;
        log_scales_ += log_scale;
        fixed_ += fixed;
    };
    auto add_fixed = [&](double scale) { add(std::log(std::fabs(scale)), std::log(std::fabs(scale))); };
    for (double scale : plan.spec().columns.scale) add_fixed(scale);
    for (size_t k = 0; k < plan.stages(); ++k) {
        const StageSpec& stage = plan.spec().stages[k];
        for (double scale : stage.scale) add_fixed(scale);
        const T* const log_gammas = master_.data() + plan.bias_offset(k, 0);
        for (size_t v = 0; stage.trainable && v < features; ++v) {
            const double log_gamma = double(log_gammas[v]), variance = statistics_[k].var[v] + stage.eps;
            loc_[k][v] = T(statistics_[k].mean[v]);
            scale_[k][v] = T(std::exp(log_gamma) / std::sqrt(variance));
            add(log_gamma - 0.5 * std::log(variance), stage.of_batch ? 0 : -0.5 * std::log(variance));
        }
        const T* const upper = master_.data() + plan.weight_offset(k, 0);
        for (size_t r = 0; stage.output == Output::linear && r < features; ++r)
            add(std::log(std::fabs(double(upper[plan.sorted()[k].maps[0].offset[r + 1] - 1]))), 0);
    }
}

template <class T>
void Weights<T>::copy_bias(size_t stage, size_t map, int row, int rows) {
    if (!plan_->bias_count(stage, map)) return;
    std::copy_n(master_.data() + plan_->bias_offset(stage, map) + row, rows, bias_[stage][map].data() + row);
}

// What the sampler reads in place of a Linear z = L U x + b: into what is laid out like the master, the inverses of its triangles, each
// made in double; as their biases, those of y = L^-1 (z - b) and none.
template <class T>
void Weights<T>::invert(size_t stage, T* like_master, Packed& packed) const {
    const Sorted& sorted = plan_->sorted()[stage];
    const size_t n = size_t(plan_->features());
    std::vector<double> inverse(n * n);
    for (size_t m = 0; m < 2; ++m) {
        const Staircase& stairs = sorted.maps[m];
        const T* const weights = master_.data() + plan_->weight_offset(stage, m);
        // Row by row by substitution: row i of the inverse is (e_i - sum_{j<i} w_ij row j) / w_ii; L has ones on its diagonal.
        std::fill(inverse.begin(), inverse.end(), 0.0);
        for (size_t i = 0; i < n; ++i) {
            const T* const row = weights + stairs.offset[i];
            const double pivot = m == 0 ? double(row[i]) : 1.0;
            for (size_t j = 0; j < i; ++j)
                for (size_t c = 0; c <= j; ++c) inverse[i * n + c] -= double(row[j]) * inverse[j * n + c];
            for (size_t c = 0; c < i; ++c) inverse[i * n + c] /= pivot;
            inverse[i * n + i] = 1 / pivot;
        }
        T* const out = like_master + plan_->weight_offset(stage, m);
        for (size_t i = 0; i < n; ++i)
            for (int c = 0; c < stairs.limit[i]; ++c) out[stairs.offset[i] + c] = T(inverse[i * n + size_t(c)]);
    }
    const T* const bias = master_.data() + plan_->bias_offset(stage, 1);
    AlignedVector<T> of_upper(size_t(padded_rows(int(n))), T(0)), of_lower(of_upper);
    for (size_t i = 0; i < n; ++i) {
        double sum = 0;
        for (size_t c = 0; c <= i; ++c) sum -= inverse[i * n + c] * double(bias[c]);
        of_lower[i] = T(sum);
    }
    packed.inverse_bias.push_back(std::move(of_upper));
    packed.inverse_bias.push_back(std::move(of_lower));
}

// What kernels see of a stage, but for its steps, its tape and, in the sampler of a Linear, its biases.
template <class T>
StageView<T> Weights<T>::view(size_t k) const {
    const Plan& plan = *plan_;
    const StageSpec& stage = plan.spec().stages[k];
    StageView<T> view{};
    view.output = stage.output;
    view.features = plan.features();
    view.context = plan.context();
    view.maps = int(plan.adds(k).size());
    view.contexts = int(plan.widths(k).size()) - view.maps;
    view.rows = plan.widths(k).data();
    view.activated = plan.activated(k).data();
    view.adds = plan.adds(k).data();
    view.added = plan.added(k).data();
    view.adders = plan.adders(k).data();
    view.context_units = plan.context_units(k).data();
    view.joins = plan.joins(k).data();
    view.plain = view.contexts == 0;
    for (size_t m = 0; m < plan.adds(k).size(); ++m)
        view.plain = view.plain && plan.adds(k)[m] < 0 && (m >= stage.maps.size() || stage.maps[m].norm_scale.empty());
    view.norm_scale = norm_scale_[k].data();
    view.norm_shift = norm_shift_[k].data();
    view.raw = plan.raw(k).data();
    view.activation = stage.activation;
    view.law = stage.law;
    view.form = stage.form;
    for (int i = 0; i < 2; ++i) view.constant[i] = T(stage.constant[i]);
    view.input_clip = T(stage.input_clip);
    view.reads_noise = stage.reads_noise;
    view.reads_apart = stage.reads_apart();
    view.components = stage.components;
    view.first = plan.sorted()[k].first.data();
    view.values = stage.output == Output::base ? plan.sorted_values().data() : nullptr;
    view.trainable = stage.trainable;
    view.next = plan.next(k).data();
    view.loc = scale_[k].empty() ? nullptr : loc_[k].data();
    view.scale = scale_[k].empty() ? nullptr : scale_[k].data();
    view.bias = bias_pointers_[k].data();
    return view;
}

template <class T>
auto Weights<T>::pack(const Layout& layout, Direction direction) const -> std::unique_ptr<Packed> {
    const PlainFloats floats;
    const Plan& plan = *plan_;
    auto packed = std::make_unique<Packed>();
    const bool inverts = direction == Direction::sampler || direction == Direction::sampler_backward;
    std::vector<size_t> inverted;  // stages
    for (size_t k = 0; k < plan.stages(); ++k)
        if (inverts && plan.spec().stages[k].output == Output::linear) inverted.push_back(k);
    AlignedVector<T> with_inverses;
    if (!inverted.empty()) with_inverses = master_;
    for (size_t k : inverted) invert(k, with_inverses.data(), *packed);
    const T* const source = inverted.empty() ? master_.data() : with_inverses.data();

    packed->tape.resize(size_t(layout.size()));
    layout.gather(source, packed->tape.data());

    for (const auto& bias : packed->inverse_bias) packed->inverse_bias_pointers.push_back(bias.data());
    for (size_t k = 0, linear = 0; k < plan.stages(); ++k) {
        StageView<T> own = view(k);
        if (linear < inverted.size() && inverted[linear] == k) own.bias = packed->inverse_bias_pointers.data() + 2 * linear++;
        own.steps = layout.steps(k).data();
        own.step_count = int(layout.steps(k).size());
        own.tape = packed->tape.data();
        own.far = packed->tape.size() * sizeof(T) > size_t(kCache);
        packed->views.push_back(own);
    }
    return packed;
}

template <class T>
auto Weights<T>::packed(Direction direction) const -> const Packed& {
    if (const Packed* const made = packed_[int(direction)].get()) return *made;
    const Layout& layout = plan_->layout(direction);
    return packed_[int(direction)].get([&] { return pack(layout, direction); });
}

template <class T>
void Weights<T>::repack() {
    for (Direction direction : {Direction::density, Direction::backward})
        if (Packed* const packed = packed_[int(direction)].get()) plan_->layout(direction).gather<T>(master_.data(), packed->tape.data());
    for (size_t k = 0; k < plan_->stages(); ++k)
        for (size_t m = 0; m < plan_->sorted()[k].maps.size(); ++m) copy_bias(k, m, 0, plan_->sorted()[k].maps[m].rows());
    finish_step();
}

template <class T>
void Weights<T>::repack_rows(size_t stage, size_t map, int row, int rows) {
    copy_bias(stage, map, row, rows);
    for (Direction direction : {Direction::density, Direction::backward})
        plan_->layout(direction).gather<T>(stage, map, row, rows, master_.data(), packed_[int(direction)].get()->tape.data());
}

template <class T>
void Weights<T>::finish_step() {
    refresh_scales();
    for (Direction direction : {Direction::sampler, Direction::sampler_backward}) packed_[int(direction)].drop();
}

template class Weights<float>;
template class Weights<double>;

}  // namespace fastmaf
