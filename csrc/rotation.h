// rotate_values: what every kernel has to know of the matrix (docs/FORMAT.md).
#pragma once

namespace kivi {

// Consecutive channels that it mixes.
constexpr int rotation_size(int head_dim) { return head_dim & -head_dim; }

// The nearest float32 to 1 / sqrt(size), for the sizes of head_dim: 16 to 256.
constexpr float rotation_norm(int size) {
  return size == 16    ? 0.25f
         : size == 32  ? 0.17677669529663687f
         : size == 64  ? 0.125f
         : size == 128 ? 0.08838834764831845f
                       : 0.0625f;
}

}  // namespace kivi
