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

// A MADE with its units and variables sorted.
struct SortedMade {
    std::vector<int> variables;           // [features] coordinate of the s-th variable in the order
    std::vector<std::vector<int>> units;  // per hidden map: the unit at each sorted place
    std::vector<Staircase> maps;          // the input of the first one is [context; variables]
    std::vector<int> groups;              // variables [groups[g], groups[g + 1]) share a rank
    std::vector<std::vector<int>> known;  // known[l][g]: units of hidden map l that variables of group g may read
};

SortedMade sort_made(const MadeSpec& made, int context);

}  // namespace fastmaf
