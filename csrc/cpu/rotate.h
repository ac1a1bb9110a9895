// The rotation of values: an orthonormal Hadamard matrix on each run of channels as long as the largest power of two
// that divides head_dim. It is symmetric, so it is its own inverse: store applies it before values are quantized, and
// attention once to what it sums up over tiles.
#pragma once

#include "../rotation.h"
#include "vec.h"

namespace kivi::cpu::KIVI_ISA {

// (a, b) -> (a + b, a - b) for lanes i and i + WIDTH, from the closest ones on: the order is part of the format.
template <int WIDTH = 1>
KIVI_INLINE Floats butterflies(Floats v) {
  if constexpr (WIDTH == kLanes) {
    return v;
  } else {
    const Words minus = (Words)((lane_index() & WIDTH) != 0) & 0x80000000u;
    return butterflies<2 * WIDTH>(swap<WIDTH>(v) + (Floats)((Words)v ^ minus));
  }
}

// x [head_dim], in place; each operation is rounded to float32.
inline void rotate(float* x, int head_dim) {
  const int size = rotation_size(head_dim);
  for (int channel = 0; channel < head_dim; channel += kLanes) {
    save(x + channel, butterflies(load<Floats>(x + channel)));
  }
  for (int width = kLanes; width < size; width *= 2) {
    for (int channel = 0; channel < head_dim; channel += kLanes) {
      if (channel & width) continue;
      const Floats a = load<Floats>(x + channel), b = load<Floats>(x + channel + width);
      save(x + channel, a + b);
      save(x + channel + width, a - b);
    }
  }
  for (int channel = 0; channel < head_dim; channel += kLanes)
    save(x + channel, load<Floats>(x + channel) * rotation_norm(size));
}

}  // namespace kivi::cpu::KIVI_ISA
