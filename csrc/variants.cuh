// Finds the instance of a kernel: variants.inc lists the bits; store and gather are compiled for float32 too, and take
// the head size as a run-time value.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "params.h"
#include "variants.inc"

namespace kivi::cuda {

// A layout whose bits are those of the kernels that serve it: any do where nothing is quantized.
inline Layout with_kernel_bits(Layout layout) {
  if (layout.full_precision()) layout.k_bits = layout.v_bits = 2;
  return layout;
}

// Calls f<T, K_BITS, V_BITS>(), which returns null or what went wrong.
template <class F>
const char* with_variant(const Layout& served, Dtype dtype, const F& f) {
  const Layout layout = with_kernel_bits(served);
  const auto with_bits = [&]<class T>() -> const char* {
#define KIVI_CALL(K_BITS, V_BITS, ...) \
  if (layout.k_bits == K_BITS && layout.v_bits == V_BITS) return f.template operator()<T, K_BITS, V_BITS>();
    KIVI_CUDA_BITS(KIVI_CALL)
#undef KIVI_CALL
#define KIVI_NAME(K_BITS, V_BITS, ...) " " #K_BITS "-" #V_BITS
    return "these bits of keys and values are not compiled; accepted:" KIVI_CUDA_BITS(KIVI_NAME);
#undef KIVI_NAME
  };
  switch (dtype) {
    case Dtype::kFloat32:
      return with_bits.template operator()<float>();
    case Dtype::kBFloat16:
      return with_bits.template operator()<__nv_bfloat16>();
    default:
      return with_bits.template operator()<__half>();
  }
}

}  // namespace kivi::cuda
