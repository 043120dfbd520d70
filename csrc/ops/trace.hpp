// What gradients keep of a tile of rows. Plain pointers, no code.
#pragma once

namespace fastmaf {

// Everything that gradients keep of one stage, for one tile.
template <class T>
struct Trace {
    T* x;       // [context + features][lanes]
    T* read;    // what the maps read: x itself, or a copy with clipped variables or with the noise in their place
    T** units;  // [maps]
    T** raw;    // [maps] sums, where they are kept beside the activations: for the maps that add them, or for act'
    T* scaled;  // dz/ds [features][lanes] but for its sign, then e^-s, then ds/dr; see ops/laws. Later d/dx by the law, if read is not x
    T** delta;  // [maps] d(sum of cotangent * log_prob) / d(output of map m before its activation, and before a gate)
    T** alone;  // [maps] sums that a gate meets, or null
    T** whole;  // [maps] gradient behind the gate, where the map adds sums; or null
};

}  // namespace fastmaf
