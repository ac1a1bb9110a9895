// Decode kernels by dtype and head size: each file of instantiate/ defines those of one pair.
#pragma once

#include "decode.cuh"
#include "variants.inc"

namespace kivi::cuda {

// Null where the bits and boosted channels are not compiled. Takes a DecodeParams.
template <class T, int HEAD_DIM>
const void* decode_kernel_for(const Layout& layout);

// That the halves of a step share a tile is worth kernels of its own where channels are boosted: 5 % of their time.
template <class T, int HEAD_DIM, int K_BITS, int V_BITS, int BOOST>
const void* decode_kernel_of(const Layout& layout) {
  constexpr bool kMayHaveOneTile = BOOST > 0 && halves_at_once(HEAD_DIM, K_BITS) > 1;
  if (kMayHaveOneTile && layout.group_size > kHalfTokens) {
    return reinterpret_cast<const void*>(&decode_kernel<T, HEAD_DIM, K_BITS, V_BITS, BOOST, kMayHaveOneTile>);
  }
  return reinterpret_cast<const void*>(&decode_kernel<T, HEAD_DIM, K_BITS, V_BITS, BOOST, false>);
}

#define KIVI_FIND_BOOSTED(K_BITS, V_BITS, BOOST, T, HEAD_DIM)            \
  if (layout.k_bits == K_BITS && layout.v_bits == V_BITS &&              \
      layout.boosted_channels == Boosted<HEAD_DIM, BOOST>::kChannels) {  \
    return decode_kernel_of<T, HEAD_DIM, K_BITS, V_BITS, BOOST>(layout); \
  }
#define KIVI_FIND(K_BITS, V_BITS, T, HEAD_DIM) KIVI_FIND_BOOSTED(K_BITS, V_BITS, 0, T, HEAD_DIM)
#define KIVI_DECODE_KERNELS(T, HEAD_DIM)                             \
  template <>                                                        \
  const void* decode_kernel_for<T, HEAD_DIM>(const Layout& layout) { \
    KIVI_CUDA_BITS(KIVI_FIND, T, HEAD_DIM)                           \
    KIVI_CUDA_BOOSTED(KIVI_FIND_BOOSTED, T, HEAD_DIM)                \
    return nullptr;                                                  \
  }

}  // namespace kivi::cuda
