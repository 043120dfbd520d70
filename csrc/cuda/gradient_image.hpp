// What gradients need of a flow beside its densities, as blocks of memory.
#pragma once

#include "../ops/trace.hpp"
#include "gradient.hpp"
#include "image.hpp"

namespace fastmaf {

// `flow`: that of the density, where it lies already. `lanes`: rows of the widest tile.
template <class T>
GradientView<T> lay_out_gradients(Image& image, const Weights<T>& weights, const FlowView<T>& flow, int lanes, PlacedWeights<T>& placed) {
    const Plan& plan = weights.plan();
    GradientView<T> view{};
    view.flow = flow;
    view.backward = put_stages(image, weights, Direction::backward, placed);
    view.zeros = image.put(std::vector<T>(8, T(0)));

    Room room;
    const int64_t row = lanes * int64_t(sizeof(T)), width = plan.features() + plan.context();
    std::vector<int64_t> x, read, scaled, buffers[5];
    std::vector<int> first;
    for (size_t k = 0; k <= plan.stages(); ++k) {
        x.push_back(room.take(width * row));
        read.push_back(x.back());
        scaled.push_back(-1);
        first.push_back(int(buffers[0].size()));
        if (k == plan.stages()) break;
        const StageSpec& stage = plan.spec().stages[k];
        if (stage.reads_apart()) read.back() = room.take(width * row);
        if (stage.reads_apart() || stage.output == Output::transform) scaled.back() = room.take(3 * plan.features() * row);
        for (size_t m = 0; m < plan.widths(k).size(); ++m) {
            const MapSpec* const map = m < stage.maps.size() ? &stage.maps[m] : nullptr;
            const bool argument = map && map->activated && keeps_argument(stage.activation);
            const bool gated = map && map->joins == Joins::gated;
            const bool there[5] = {true, argument || (m < plan.raw(k).size() && plan.raw(k)[m]), true, gated, gated && map->adds >= 0};
            for (int b = 0; b < 5; ++b) buffers[b].push_back(there[b] ? room.take(plan.widths(k)[m] * row) : -1);
        }
    }
    view.maps = int(buffers[0].size());
    std::vector<int64_t> all;
    for (const auto& own : buffers) all.insert(all.end(), own.begin(), own.end());
    view.buffers = image.put(all);
    view.x = image.put(x);
    placed.x = x;
    view.read = image.put(read);
    view.scaled = image.put(scaled);
    view.first = image.put(first);
    view.traces = room.take((int64_t(plan.stages()) + 1) * int64_t(sizeof(Trace<T>)));
    view.pointers = room.take(5 * view.maps * int64_t(sizeof(T*)));
    for (int64_t* sums : {&view.log_det, &view.density, &view.again}) *sums = room.take(lanes * int64_t(sizeof(double)));
    view.cotangent = room.take(row);
    for (int64_t& dx : view.dx) dx = room.take(width * row);
    view.scratch = room.size();
    return view;
}

template <class T>
WeightsView<T> lay_out_weights(Image& image, const Weights<T>& weights) {
    const Plan& plan = weights.plan();
    WeightsView<T> view{};
    view.size = int64_t(plan.index().size());
    view.index = image.put(plan.index());
    std::vector<WeightTask> tasks;
    std::vector<int64_t> diagonal;
    std::vector<T> diagonal_weights;
    for (size_t k = 0; k < plan.stages(); ++k)
        for (size_t m = 0; m < plan.sorted()[k].maps.size(); ++m) {
            const Staircase& stairs = plan.sorted()[k].maps[m];
            const int rows = plan.widths(k)[plan.written(k, m)];
            std::vector<int64_t> offset;
            for (int i = 0; i < rows; ++i) offset.push_back(plan.weight_offset(k, m) + stairs.offset[size_t(i)]);
            const int* const limits = image.put(stairs.limit.data(), size_t(rows));
            const int64_t* const offsets = image.put(offset);
            for (int i = 0; i < rows; i += kPanel)
                tasks.push_back({int(k), int(plan.written(k, m)), i, std::min(kPanel, rows - i), plan.wires(k)[m].first, stairs.inputs,
                                 limits + i, offsets + i, plan.bias_count(k, m) ? plan.bias_offset(k, m) + i : -1});
            if (plan.spec().stages[k].output != Output::linear || m) continue;
            for (int i = 0; i < rows; ++i) {
                diagonal.push_back(offset[size_t(i)] + stairs.limit[size_t(i)] - 1);
                diagonal_weights.push_back(weights.master()[size_t(diagonal.back())]);
            }
        }
    tasks.push_back({0, -1, 0, 0, 0, 0, nullptr, nullptr, view.size});
    view.task_count = int(tasks.size());
    view.tasks = image.put(tasks);
    view.diagonals = int(diagonal.size());
    view.diagonal = image.put(diagonal);
    view.diagonal_weights = image.put(diagonal_weights);
    return view;
}

}  // namespace fastmaf
