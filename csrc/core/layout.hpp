// The steps of one direction of a flow, and where the weights that they read come from.
//
// A panel step multiplies a strip of at most eight rows of a map with a range of its inputs; a law step turns finished parameters into z
// (density) or x (sampling). The weights of a panel lie on the tape as [input][width], so that steps read memory in one direction. Density
// runs map by map; the sampler brings units to life degree by degree in blocks (left-looking); backward runs the transposed maps from the
// last to the first, and that of the sampler by degree from the highest: what units have of the gradient is complete when all that read
// them have theirs. Where a network reads the noise, the steps of density and sampler change places, and so do their backwards. A map reads
// the tile of variables or the units of the map before it, and writes units of its own; direct weights add to the final rows. The sampler
// of a Linear runs over the inverses of its triangles, its backward over these transposed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "staircase.hpp"
#include "types.hpp"

namespace fastmaf {

class Plan;

// backward: of the density; sampler_backward: of the sampler.
enum class Direction { density, sampler, backward, sampler_backward };
constexpr int kDirections = 4;

constexpr int kPanel = 8;  // rows of the widest

constexpr uint32_t kNoSource = ~uint32_t(0);  // of an entry of a tape: zero

class Layout {
public:
    Layout(const Plan& plan, Direction direction);

    const std::vector<Step>& steps(size_t stage) const { return steps_[stage]; }
    int64_t size() const { return size_; }  // entries of the tape

    // The one way in which weights get to a tape: brings rows [row, row + rows) of a map there from the master, or from what is laid out
    // like it. Entries that nothing comes to are zero from the start and stay so.
    template <class V>
    void gather(size_t stage, size_t map, int row, int rows, const V* master, V* tape) const;
    // The same for all maps.
    template <class V>
    void gather(const V* master, V* tape) const {
        for (size_t k = 0; k < blocks_.size(); ++k)
            for (size_t m = 0; m < blocks_[k].size(); ++m) gather(k, m, 0, blocks_[k][m].stairs->rows(), master, tape);
    }
    // The master entry that each entry of the tape is, or kNoSource.
    std::vector<uint32_t> sources() const;

private:
    // A map: where its weights begin in the master, and which steps are its panels.
    struct Block {
        const Staircase* stairs;
        int64_t weights;
        std::vector<int> panels;
    };

    bool transposed_;  // whether panels are strips of the inputs of a map, not of its rows
    int64_t size_ = 0;
    size_t master_size_;
    std::vector<std::vector<Step>> steps_;    // [stage]
    std::vector<std::vector<Block>> blocks_;  // [stage][map]
};

extern template void Layout::gather(size_t, size_t, int, int, const float*, float*) const;
extern template void Layout::gather(size_t, size_t, int, int, const double*, double*) const;

}  // namespace fastmaf
