// From the record to what the core packs.
#pragma once

#include <string>
#include <vector>

#include "../core/types.hpp"
#include "record.hpp"

namespace fastmaf::record {

// What the core, and the CUDA kernels with it, have no kernel for; empty if they can run the whole flow.
std::string unsupported(const Record& record);

// The flow without its weights; of an ensemble, that of a member. Permutations become the variable that each coordinate carries, Affines that
// follow each other are merged. Only for a record that is supported.
FlowSpec lower(const Record& record, size_t member = 0);

// All trainable numbers in the user's order, in the dtype of the record; those that masks leave out are there, whatever they are.
std::vector<Piece> parameters(const Record& record);

}  // namespace fastmaf::record
