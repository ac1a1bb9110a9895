// Online softmax over blocks of scores, in base 2: the logits arrive multiplied by log2(e), or get it with the soft
// cap.
#pragma once

#include "vec.h"

namespace kivi::cpu::KIVI_ISA {

// What the query is multiplied by before it meets the keys.
KIVI_INLINE float query_scale(float scale, float logits_soft_cap) {
  return logits_soft_cap > 0 ? scale : scale * kLog2E;
}

KIVI_INLINE Floats soft_capped(Floats logits, float logits_soft_cap) {
  return tanh_of(logits / logits_soft_cap) * (logits_soft_cap * kLog2E);
}

KIVI_INLINE float exp2_of(float x) { return exp2_nonpositive(splat(x))[0]; }

// Turns the scores of ROWS rows, [count] each (a multiple of 16, -inf where masked), into weights 2^(score - max) in
// place, keeps each row's running maximum and sum, and says what its older results must be multiplied by. Rows go
// together to hide the latency of the reductions.
template <int ROWS>
KIVI_INLINE void softmax_step(float* scores, int stride, int count, float logits_soft_cap, float* row_max,
                              float* row_sum, float* correction) {
  Floats largest[ROWS], base[ROWS], sums[ROWS] = {};
  for (int row = 0; row < ROWS; ++row) largest[row] = splat(-kInfinity);
  for (int i = 0; i < count; i += kLanes) {
    for (int row = 0; row < ROWS; ++row) {
      float* at = scores + row * stride + i;
      Floats s = load<Floats>(at);
      if (logits_soft_cap > 0) {  // the cap would lift a mask
        s = s == -kInfinity ? s : soft_capped(s, logits_soft_cap);
        save(at, s);
      }
      largest[row] = max_or_nan(largest[row], s);
    }
  }
  for (int row = 0; row < ROWS; ++row) {
    const float seen = reduce<Max>(largest[row]), old_max = row_max[row];
    row_max[row] = seen > old_max ? seen : old_max;
    base[row] = splat(row_max[row] == -kInfinity ? 0.0f : row_max[row]);  // nothing seen yet: -inf - -inf would be NaN
    correction[row] = exp2_nonpositive(old_max - base[row])[0];
  }
  for (int i = 0; i < count; i += kLanes) {
    for (int row = 0; row < ROWS; ++row) {
      float* at = scores + row * stride + i;
      const Floats weight = exp2_nonpositive(load<Floats>(at) - base[row]);
      save(at, weight);
      sums[row] += weight;
    }
  }
  for (int row = 0; row < ROWS; ++row) row_sum[row] = row_sum[row] * correction[row] + reduce<Add>(sums[row]);
}

}  // namespace kivi::cpu::KIVI_ISA
