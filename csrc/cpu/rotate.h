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

// One run of SIZE channels, in registers.
template <int SIZE>
KIVI_INLINE void rotate_run(float* x) {
  constexpr int kVectors = SIZE / kLanes;
  Floats v[kVectors];
  for (int i = 0; i < kVectors; ++i) v[i] = butterflies(load<Floats>(x + i * kLanes));
  for (int width = 1; width < kVectors; width *= 2) {
    for (int i = 0; i < kVectors; ++i) {
      if (i & width) continue;
      const Floats a = v[i], b = v[i + width];
      v[i] = a + b;
      v[i + width] = a - b;
    }
  }
  for (int i = 0; i < kVectors; ++i) save(x + i * kLanes, v[i] * rotation_norm(SIZE));
}

// x [head_dim], in place; each operation is rounded to float32.
inline void rotate(float* x, int head_dim) {
  const int size = rotation_size(head_dim);
  for (int channel = 0; channel < head_dim; channel += size) {
    switch (size) {
      case 16:
        rotate_run<16>(x + channel);
        break;
      case 32:
        rotate_run<32>(x + channel);
        break;
      case 64:
        rotate_run<64>(x + channel);
        break;
      case 128:
        rotate_run<128>(x + channel);
        break;
      default:
        rotate_run<256>(x + channel);
    }
  }
}

}  // namespace kivi::cpu::KIVI_ISA
