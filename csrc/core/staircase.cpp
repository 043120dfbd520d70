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
    for (int i : order) result.push_back(key[size_t(i)]);
    return result;
}

int count_below(const std::vector<int64_t>& sorted, int64_t bound) {
    return int(std::lower_bound(sorted.begin(), sorted.end(), bound) - sorted.begin());
}

}  // namespace

int Staircase::first_reader(int input) const {
    return int(std::upper_bound(limit.begin(), limit.end(), input) - limit.begin());
}

SortedMade sort_made(const MadeSpec& made, int context) {
    SortedMade sorted;
    sorted.variables = sorted_by(made.ranks);
    const std::vector<int64_t> ranks = permuted(made.ranks, sorted.variables);
    sorted.groups.push_back(0);
    for (size_t s = 1; s <= ranks.size(); ++s)
        if (s == ranks.size() || ranks[s] != ranks[s - 1]) sorted.groups.push_back(int(s));

    // Inputs of the first map: the context, which everybody may read, then the variables.
    std::vector<int64_t> inputs(size_t(context), INT64_MIN);
    inputs.insert(inputs.end(), ranks.begin(), ranks.end());
    for (const MapSpec& map : made.maps) {
        const bool final = map.degrees.empty();
        Staircase stairs;
        stairs.inputs = int(inputs.size());
        stairs.offset.push_back(0);
        std::vector<int64_t> degrees;
        if (final) {
            for (int64_t rank : ranks) degrees.insert(degrees.end(), 2, rank - 1);  // strictly below the rank
        } else {
            sorted.units.push_back(sorted_by(map.degrees));
            degrees = permuted(map.degrees, sorted.units.back());
            std::vector<int> known;
            for (size_t g = 0; g + 1 < sorted.groups.size(); ++g) known.push_back(count_below(degrees, ranks[size_t(sorted.groups[g])]));
            sorted.known.push_back(known);
        }
        for (int64_t degree : degrees) {
            stairs.limit.push_back(count_below(inputs, degree + 1));
            stairs.offset.push_back(stairs.offset.back() + stairs.limit.back());
        }
        sorted.maps.push_back(stairs);
        inputs = degrees;
    }
    return sorted;
}

}  // namespace fastmaf
