// Decode kernels by dtype and head size: each file of instantiate/ defines those of one pair.
#pragma once

#include "decode.cuh"
#include "variants.inc"

namespace kivi::cuda {

// Null where the bits and boosted channels are not compiled. Takes a DecodeParams.
template <class T, int HEAD_DIM>
const void* decode_kernel_for(int k_bits, int v_bits, int boosted_channels);

#define KIVI_FIND_BOOSTED(K_BITS, V_BITS, BOOST, T, HEAD_DIM)                                            \
  if (k_bits == K_BITS && v_bits == V_BITS && boosted_channels == Boosted<HEAD_DIM, BOOST>::kChannels) { \
    return reinterpret_cast<const void*>(&decode_kernel<T, HEAD_DIM, K_BITS, V_BITS, BOOST>);            \
  }
#define KIVI_FIND(K_BITS, V_BITS, T, HEAD_DIM) KIVI_FIND_BOOSTED(K_BITS, V_BITS, 0, T, HEAD_DIM)
#define KIVI_DECODE_KERNELS(T, HEAD_DIM)                                                     \
  template <>                                                                                \
  const void* decode_kernel_for<T, HEAD_DIM>(int k_bits, int v_bits, int boosted_channels) { \
    KIVI_CUDA_BITS(KIVI_FIND, T, HEAD_DIM)                                                   \
    KIVI_CUDA_BOOSTED(KIVI_FIND_BOOSTED, T, HEAD_DIM)                                        \
    return nullptr;                                                                          \
  }

}  // namespace kivi::cuda
