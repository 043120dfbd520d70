// Units sorted by degree turn a mask into a staircase: row j of a map reads inputs [0, limit[j]).
// The entries of all rows, one row after the other, are the trainable weights of the map; nothing masked is stored.
#pragma once

#include <cstdint>
#include <vector>

#include "types.hpp"

namespace fastmaf {

struct Staircase {
    int inputs = 0;
    std::vector<int> limit;       // [rows] nondecreasing
    std::vector<int64_t> offset;  // [rows + 1] where row j begins among the weights of the map

    int rows() const { return int(limit.size()); }
    int first_reader(int input) const;  // the first row that reads `input`
};

// A stage with its units and variables sorted.
//
// A network has its hidden maps, the final one, if there are direct weights, those from the context or the variables, or both, to the
// final rows, and those from the context to units of its own that join the sums of a hidden map. A Linear
// z = L U x + b has two maps: U over the coordinates from the last to the first, which makes it a staircase, and L without its
// diagonal over those from the first to the last. A norm has no weights, only "biases": log_gamma, then beta.
struct Sorted {
    std::vector<int> variables;           // [features] coordinate of the s-th variable in the order
    std::vector<int> first;               // [features + 1] first final row of the s-th variable
    std::vector<std::vector<int>> units;  // per hidden map: the unit at each sorted place
    std::vector<Staircase> maps;          // the input of the first one of a network is [context; variables], or the variables alone
    std::vector<std::vector<int>> added;  // per hidden map: the place of the unit whose sum each unit adds; empty if it is its own
    std::vector<int> groups;              // variables [groups[g], groups[g + 1]) share a rank
    std::vector<std::vector<int>> known;  // known[l][g]: units of hidden map l that variables of group g may read
};

Sorted sort_stage(const StageSpec& stage, int context);

}  // namespace fastmaf
