#include "staircase.hpp"

#include <algorithm>
#include <numeric>

namespace fastmaf {

namespace {

std::vector<int> sorted_by(const std::vector<int64_t>& key) {
    std::vector<int> order(key.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return key[size_t(a)] < key[size_t(b)]; });
    return order;
}

std::vector<int64_t> permuted(const std::vector<int64_t>& key, const std::vector<int>& order) {
    std::vector<int64_t> result;
    result.reserve(order.size());
    for (int i : order) result.push_back(key[size_t(i)]);
    return result;
}

int count_below(const std::vector<int64_t>& sorted, int64_t bound) {
    return int(std::lower_bound(sorted.begin(), sorted.end(), bound) - sorted.begin());
}

int count_up_to(const std::vector<int64_t>& sorted, int64_t bound) {
    return int(std::upper_bound(sorted.begin(), sorted.end(), bound) - sorted.begin());
}

}  // namespace

int Staircase::first_reader(int input) const { return int(std::upper_bound(limit.begin(), limit.end(), input) - limit.begin()); }

Sorted sort_stage(const StageSpec& stage, int context) {
    Sorted sorted;
    const int features = int(stage.variable.size());
    auto add_row = [](Staircase& stairs, int limit) {
        stairs.limit.push_back(limit);
        stairs.offset.push_back(stairs.offset.back() + limit);
    };
    auto staircase = [](int inputs) {
        Staircase stairs;
        stairs.inputs = inputs;
        stairs.offset.push_back(0);
        return stairs;
    };
    if (stage.output == Output::norm) {
        for (int s = 0; s < features; ++s) sorted.variables.push_back(s);
        sorted.maps.push_back(staircase(0));
        for (int j = 0; stage.trainable && j < 2 * features; ++j) add_row(sorted.maps[0], 0);
        return sorted;
    }
    if (stage.output == Output::linear) {
        sorted.maps.assign(2, staircase(features));
        for (int s = 0; s < features; ++s) {
            sorted.variables.push_back(features - 1 - s);
            add_row(sorted.maps[0], s + 1);
            add_row(sorted.maps[1], s);
        }
        return sorted;
    }
    sorted.variables = sorted_by(stage.ranks);
    const std::vector<int64_t> ranks = permuted(stage.ranks, sorted.variables);
    sorted.groups.push_back(0);
    for (size_t s = 1; s <= ranks.size(); ++s)
        if (s == ranks.size() || ranks[s] != ranks[s - 1]) sorted.groups.push_back(int(s));
    sorted.first.push_back(0);
    for (int coordinate : sorted.variables) sorted.first.push_back(sorted.first.back() + stage.rows[size_t(coordinate)]);

    // Inputs of the first map: the context, which everybody may read, then the variables.
    std::vector<int64_t> inputs(stage.maps[0].context ? size_t(context) : 0, INT64_MIN);
    inputs.insert(inputs.end(), ranks.begin(), ranks.end());
    auto add_map = [&](const std::vector<int64_t>& reads, const std::vector<int64_t>& degrees) {
        sorted.maps.push_back(staircase(int(reads.size())));
        for (int64_t degree : degrees) add_row(sorted.maps.back(), count_up_to(reads, degree));
    };
    for (size_t m = 0; m + 1 < stage.maps.size(); ++m) {
        sorted.units.push_back(sorted_by(stage.maps[m].degrees));
        const std::vector<int64_t> degrees = permuted(stage.maps[m].degrees, sorted.units.back());
        std::vector<int> known;
        for (size_t g = 0; g + 1 < sorted.groups.size(); ++g) known.push_back(count_below(degrees, ranks[size_t(sorted.groups[g])]));
        sorted.known.push_back(known);
        add_map(inputs, degrees);
        inputs = degrees;
        sorted.added.emplace_back();
        if (const int adds = stage.maps[m].adds; adds >= 0 && sorted.units[m] != sorted.units[size_t(adds)]) {
            std::vector<int> place(size_t(stage.maps[m].rows));
            for (size_t j = 0; j < place.size(); ++j) place[size_t(sorted.units[size_t(adds)][j])] = int(j);
            for (int unit : sorted.units[m]) sorted.added.back().push_back(place[size_t(unit)]);
        }
    }
    std::vector<int64_t> outputs;  // strictly below the rank
    for (size_t s = 0; s < ranks.size(); ++s) outputs.insert(outputs.end(), size_t(sorted.first[s + 1] - sorted.first[s]), ranks[s] - 1);
    add_map(inputs, outputs);
    if (stage.direct()) {
        inputs.assign(stage.late_context() ? size_t(context) : 0, INT64_MIN);
        if (stage.skip) inputs.insert(inputs.end(), ranks.begin(), ranks.end());
        add_map(inputs, outputs);
    }
    for (int m : stage.joined()) {
        sorted.maps.push_back(staircase(context));
        for (int j = 0; j < stage.maps[size_t(m)].rows; ++j) add_row(sorted.maps.back(), context);
    }
    return sorted;
}

}  // namespace fastmaf
