// Packed codes and scales as operands of the tensor cores.
//
// A code needs no conversion: masked out of its word it is an fp16 subnormal, code * 2^(position - 24), which the
// tensor core multiplies exactly. `position` is a bit in the low byte of a half-word, so one shift by 8 serves half of
// a word, and what it costs in size, 2^position, is taken out of the other operand. Words are laid out so that the two
// halves of a masked word are the two elements of a packed pair (vllm_kivi/format.py).
//
// Scales of bfloat16 models become fp16 by integer arithmetic on exponents: an add that saturates at 0 and a shift for
// two of them. They are taken relative to a power of two (Reference), so that neither large nor small ones leave
// the range of fp16.
#pragma once

#include "ptx.cuh"

namespace kivi::cuda {

template <int BITS>
constexpr int kPairs = 16 / BITS;  // of a word

// Bit of pair `index` within the low byte of its half-word.
template <int BITS>
__host__ __device__ constexpr int position(int index) {
  return index * BITS % 8;
}

// pairs[i]: code * 2^(position(i) - 24) of half-word slot i, in both halves.
template <int BITS>
__device__ inline void unpack(uint32_t word, uint32_t (&pairs)[kPairs<BITS>]) {
  constexpr uint32_t kMask = ((1u << BITS) - 1) * 0x00010001u;
  const uint32_t high = word >> 8;
#pragma unroll
  for (int i = 0; i < kPairs<BITS>; ++i) pairs[i] = (i * BITS < 8 ? word : high) & (kMask << position<BITS>(i));
}

__device__ inline float power_of_two(int exponent) {
  return __int_as_float((min(max(exponent, -126), 127) + 127) << 23);
}

template <class T>
__device__ inline uint32_t pack(float low, float high);

template <>
__device__ inline uint32_t pack<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

template <>
__device__ inline uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

template <class T>
__device__ inline float2 unpack_pair(uint32_t pair);

template <>
__device__ inline float2 unpack_pair<__half>(uint32_t pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

template <>
__device__ inline float2 unpack_pair<__nv_bfloat16>(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u)};
}

// Scales and zeros are held relative to a power of two, given by its biased exponent in T: numbers with this exponent
// become fp16 numbers in [2^top, 2^(top + 1)). It only grows, and what was accumulated with the old one is then
// rescaled.
template <class T>
struct Relative;

template <>
struct Relative<__nv_bfloat16> {
  static constexpr int kBias = 127, kExponentShift = 7, kLowest = 40;

  // Takes exponent, top and a further division by 2^position to what to_half needs: what is added to exponents, twice.
  __device__ static uint32_t shift(int exponent, int top, int position = 0) {
    return (uint32_t((15 + top - position - exponent) << 7) & 0xFFFF) * 0x00010001u;
  }

  // Magnitudes; 4 times those of negative numbers.
  __device__ static uint32_t four_times_negative(uint32_t numbers) {
    return (numbers & 0x7FFF7FFF) + ((numbers & 0x80008000) >> (15 - kExponentShift - 1));
  }

  // Numbers 2^(15 + top) times smaller than the power of two become 0.
  __device__ static uint32_t to_half(uint32_t magnitudes, uint32_t shift) {
    return __viaddmax_s16x2(magnitudes, shift, 0) << 3;
  }
};

template <>
struct Relative<__half> {
  static constexpr int kBias = 15, kExponentShift = 10, kLowest = 15;

  __device__ static uint32_t shift(int exponent, int top, int position = 0) {
    const __half2 factor = __float2half2_rn(power_of_two(15 + top - position - exponent));
    return reinterpret_cast<const uint32_t&>(factor);
  }

  // Not by exponents: a subnormal number has none.
  __device__ static uint32_t four_times_negative(uint32_t numbers) {
    return multiply(numbers & 0x7FFF7FFF, 0x3C003C00 + ((numbers & 0x80008000) >> (15 - kExponentShift - 1)));
  }

  __device__ static uint32_t to_half(uint32_t magnitudes, uint32_t shift) { return multiply(magnitudes, shift); }
};

// The largest number, twice, that needs no larger exponent.
template <class T>
__device__ inline uint32_t largest_of(int exponent) {
  constexpr int kShift = Relative<T>::kExponentShift;
  return (uint32_t(exponent) << kShift | ((1u << kShift) - 1)) * 0x00010001u;
}

// Boosted channels of a tile of D, one in FRACTION, 0 for none: which one is where in the products of a warp.
template <int D, int FRACTION>
struct Boosted {
  static constexpr int kChannels = FRACTION == 0 ? 0 : D / (FRACTION + (FRACTION == 0));
  static constexpr int kPairs = kChannels / 8;             // of a lane with t = lane % 4: pairs t * kPairs ... of all
  static constexpr int kLoaded = kPairs < 4 ? kPairs : 4;  // pairs of a lane that are gathered at once
  static constexpr int kQueryWords = FRACTION == 0 ? 0 : 4 * D;

  // Of a block of 8 channels, pair i is channels i and i + 4. Which channel of all is row `lane` of the gathered query
  // if lanes take their pairs from `first` on: the row 8 m + 2 t + e is channel e of the pair first + m of lanes t.
  static __device__ int channel_of_row(int first, int lane) {
    const int pair = lane % 8 / 2 * kPairs + first + lane / 8 % kLoaded;
    return pair / 4 * 8 + pair % 4 + lane % 2 * 4;
  }
};

// A 2 x 2 exchange: (a0, a1), (b0, b1) -> (a0, b0), (a1, b1).
__device__ inline void interleave(uint32_t& a, uint32_t& b) {
  const uint32_t low = __byte_perm(a, b, 0x5410);
  b = __byte_perm(a, b, 0x7632);
  a = low;
}

}  // namespace kivi::cuda
