// What the sampler on tensor cores takes beside the packed flow: halves of the weights in the order in which it uses them. Plain structures.
//
// Each warp of a block has 16 rows and takes them through all stages by itself; the weights go past all warps at once. A stage is a list of
// pieces: some variables, and the units that come to life with them. A piece first sums what all its units and variables read of that which
// was alive before, long products that wait in registers. Then come its operations, each of which finishes some variables or some units of
// one map and adds what others in the piece read of them. The tape holds, in this order,
//
//     sums        per map with units in the piece: [32 inputs][tile of 8 units]
//     operations  per 16 units of its source that it touches: [pair of tiles that reads them]
//
// each as large as a tile in tensor.hpp. That of an operation holds 16 inputs of two tiles of units: registers 0 and 1 those of the first, 2 and 3
// those of the second.
//
// Units and the final rows have columns of their own: those of a piece begin at an even one. The inputs of the first map are the context and
// the variables as they are.
#pragma once

#include "tensor.hpp"

namespace fastmaf {

constexpr int kDrawHidden = 3;                  // most hidden maps of a stage
constexpr int kDrawTiles = 8;                   // of 8 units of a hidden map in a piece, at most
constexpr int kDrawVariables = 16;              // in a piece, at most: one step of inputs
constexpr int kDrawFinal = kDrawVariables / 4;  // tiles of the final rows
constexpr int kDrawChunk = 8, kDrawChunks = 4;  // parts of tiles that travel together; chunks in the ring: two to read, two that come

struct DrawOperation {
    int map;                   // whose units are finished; -1: variables
    int first, end;            // these of the piece
    int first_pair, end_pair;  // of tiles of the next map that take them
};

struct DrawPiece {
    int variable;                 // the first one
    int column[kDrawHidden + 1];  // per map where its units begin; of the final one, its rows
    int tiles[kDrawHidden + 1];   // per map how many it has here, an even number
    int steps[kDrawHidden + 1];   // of 16 inputs that were alive before
    int first_operation, end_operation;
};

struct DrawMap {
    int stride;           // halves from one row of its inputs to the next: an odd number of 16 bytes
    const float* affine;  // [columns][2] scale and bias of each unit
};

struct DrawStage {
    int maps = 0, pieces = 0;  // no maps: the stage runs as without tensor cores
    int tiles = 0;             // of the tape
    const DrawMap* map = nullptr;
    const DrawPiece* piece = nullptr;
    const DrawOperation* operation = nullptr;
};

struct DrawView {
    int hidden = 0, parts = 0;  // hidden maps of each stage; parts of a weight
    int groups = 0;             // of 16 rows, each with a warp; 0: no tensor cores
    int rows = 0;               // for which there is shared memory
    const DrawStage* stages = nullptr;
    const char *tape = nullptr, *end = nullptr;  // whole chunks
    // In shared memory, in bytes: inputs of each map [part][rows][stride], for each row whether a context was lost, and the ring.
    int64_t inputs[kDrawHidden + 1] = {}, lost = 0, ring = 0, shared = 0;
};

// The variable of a piece whose number is input k of a step: thread t of a quad has variables t, t + 4, t + 8 and t + 12, whose laws it computes.
constexpr int variable_of(int k) { return 4 * (k / 8 * 2 + k % 2) + k % 8 / 2; }

// Parts of the inputs of a map: of variables always both.
constexpr int input_parts(int map, int parts) { return map == 0 ? 2 : parts; }

}  // namespace fastmaf
