// Inside a tile: how elements become codes, and the order of the codes' bits. The only code of store and gather that
// knows either; where the sections of a tile lie is in the layout (vllm_kivi/format.py has the byte map).
//
// Codes, scales and zeros equal published KIVI bit for bit, so every operation rounds to the input's type T. What is
// cheaper than it looks:
// - A group whose range overflows T is computed on halved numbers. x * half - low is one fused multiply-add all the
//   same: the product is exact, or a subnormal beside a number larger than half of the range.
// - T of 16 bits: a quotient is a product with the reciprocal in float32. Where operands have 11 bits or fewer, a
//   quotient is further than 2^-23 (relative) from where rounding to T changes, and the roundings before that add up to
//   less. A step whose reciprocal is no normal number is first multiplied by a power of two, and so are the elements.
//
// A search for a narrower range (docs/FORMAT.md) compares squared errors that are integers, so that neither the order
// of a sum nor fused multiply-adds matter.
#pragma once

#include "pairs.cuh"
#include "params.h"

namespace kivi::cuda {

// -------------------------------------------------------------------------------------------------------- quantization

// Of one group.
template <class T, int BITS>
struct Scale {
  static constexpr float kLevels = (1 << BITS) - 1;
  float scale, zero;        // what is stored
  float factor, minus_low;  // x * factor + minus_low is what is divided
  float divisor;            // or, for T of 16 bits, its reciprocal

  __device__ Scale(float low, float high) {
    low += 0.0f;  // no longer -0
    high += 0.0f;
    const float half = rounded<T>(__fsub_rn(high, low)) > Number<T>::kMax ? 0.5f : 1.0f;
    const float low_half = rounded<T>(low * half);
    const float step = rounded<T>(__fdiv_rn(rounded<T>(__fsub_rn(rounded<T>(high * half), low_half)), kLevels));
    scale = half < 1.0f ? step * 2.0f : step;
    zero = low;
    float unit = 1.0f;
    if constexpr (sizeof(T) == 2) {
      if (step > 0x1p100f) unit = 0x1p-100f;
      if (step < 0x1p-100f) unit = 0x1p100f;
    }
    factor = step == 0.0f ? 0.0f : half * unit;  // 0: all codes are 0
    minus_low = step == 0.0f ? 0.0f : -low_half * unit;
    divisor = step == 0.0f ? 1.0f : step * unit;
    if constexpr (sizeof(T) == 2) divisor = __frcp_rn(divisor);
  }

  __device__ Pair<T> terms() const { return Number<T>::pair(factor, minus_low); }

  // If `cut` is taken off both ends of a range of length `span`, one that a search may narrow.
  __device__ Scale(float low, float span, float cut) {
    zero = rounded<T>(__fadd_rn(low, cut)) + 0.0f;
    scale = rounded<T>(__fdiv_rn(__fsub_rn(span, 2.0f * cut), kLevels));
    factor = 1.0f;
    minus_low = -zero;
    divisor = sizeof(T) == 2 ? __frcp_rn(scale) : scale;
  }
};

// Of two elements, of a group each. NARROW: they may lie outside of its range.
template <class T, int BITS, bool NARROW = false>
struct Quantizer {
  static constexpr float kLevels = (1 << BITS) - 1;
  Pair<T> factor, minus_low;
  float2 divisor;

  // Pairs {factor, minus_low} and the divisor of either channel.
  // SCALE: Scale or what was kept of one; of either channel.
  template <class SCALE>
  __device__ Quantizer(const SCALE& first, const SCALE& second)
      : Quantizer(first.terms(), second.terms(), first.divisor, second.divisor) {}

  __device__ Quantizer(Pair<T> first, Pair<T> second, float first_divisor, float second_divisor)
      : factor(firsts(first, second)), minus_low(seconds(first, second)), divisor{first_divisor, second_divisor} {}

  // Rounded to an integer this is the code.
  __device__ Pair<T> quotient(Pair<T> x, Pair<T> levels) const {
    x = multiply_add(x, factor, minus_low);
    const float2 offset = to_floats(x);
    if constexpr (sizeof(T) == 2) {
      x = Number<T>::pair(__fmul_rn(offset.x, divisor.x), __fmul_rn(offset.y, divisor.y));
    } else {
      x = {__fdiv_rn(offset.x, divisor.x), __fdiv_rn(offset.y, divisor.y)};
    }
    x = smaller(x, levels);
    return NARROW ? larger(x, Number<T>::pair(0.0f, 0.0f)) : x;
  }

  // Adding a number whose unit is 1 rounds half to even and leaves the integer in the low bits. 8-bit codes need
  // float32 for it where T is bfloat16.
  static constexpr bool kIsHalf = Number<T>::kMax < 1e5f;
  static constexpr bool kRoundsPairs = sizeof(T) == 2 && (kIsHalf || BITS < 8);
  static constexpr float kUnitIsOne = kIsHalf ? 1536.0f : 192.0f;
  static constexpr float kUnitIsOneInFloat = 12582912.0f;

  static __device__ Pair<T> all_levels() { return Number<T>::pair(kLevels, kLevels); }

  // The codes, in the low bits of a half-word each.
  __device__ uint32_t codes(Pair<T> x) const { return codes(x, all_levels()); }

  // Where groups have fewer levels than BITS give.
  __device__ uint32_t codes(Pair<T> x, Pair<T> levels) const {
    constexpr uint32_t kMask = ((1u << BITS) - 1) * 0x00010001u;
    x = quotient(x, levels);
    if constexpr (kRoundsPairs) {
      return bits_of(__hadd2_rn(x, Number<T>::pair(kUnitIsOne, kUnitIsOne))) & kMask;
    } else {
      const float2 code = to_floats(x);
      const uint32_t first = __float_as_uint(__fadd_rn(code.x, kUnitIsOneInFloat));
      const uint32_t second = __float_as_uint(__fadd_rn(code.y, kUnitIsOneInFloat));
      return __byte_perm(first, second, 0x5410) & kMask;
    }
  }

  // Of groups whose loss means something; `scale` is what is stored.
  __device__ uint2 squared_errors(Pair<T> x, float2 scale, float2 units) const {
    float2 code;
    if constexpr (kRoundsPairs) {
      const Pair<T> biased = __hadd2_rn(quotient(x, all_levels()), Number<T>::pair(kUnitIsOne, kUnitIsOne));
      code = to_floats(__hadd2_rn(biased, Number<T>::pair(-kUnitIsOne, -kUnitIsOne)));
    } else {
      code = to_floats(quotient(x, all_levels()));
      code.x = __fadd_rn(__fadd_rn(code.x, kUnitIsOneInFloat), -kUnitIsOneInFloat);
      code.y = __fadd_rn(__fadd_rn(code.y, kUnitIsOneInFloat), -kUnitIsOneInFloat);
    }
    const float2 element = to_floats(x), minus_zero = to_floats(minus_low);
    return {squared_error(__fadd_rn(element.x, minus_zero.x), code.x, scale.x, units.x),
            squared_error(__fadd_rn(element.y, minus_zero.y), code.y, scale.y, units.y)};
  }

 private:
  static __device__ uint32_t squared_error(float offset, float code, float scale, float units) {
    scale = __uint_as_float(__float_as_uint(scale) & ~0xffu);  // its products with codes are exact
    float error = __fmaf_rn(-code, scale, offset);
    error = __fadd_rn(__fmaf_rn(error, units, kUnitIsOneInFloat), -kUnitIsOneInFloat);
    return __float_as_uint(__fmaf_rn(error, error, kUnitIsOneInFloat)) & 0x003fffffu;
  }
};

// -------------------------------------------------------------------------------------------------------- order of
// bits

// What a lane has before codes become words: of eight tokens and two channels, first channel in the low half-words,
// kTokens tokens to a half-word, first token lowest.
template <int BITS>
struct Halves {
  static constexpr int kTokens = 16 / BITS;
  uint32_t words[8 / kTokens] = {};

  __device__ void add(int token, uint32_t codes) { words[token / kTokens] |= codes << (token % kTokens * BITS); }
};

// Key codes: a word is one token's 32 / BITS consecutive channels, first channel lowest; word [channel / (32 / BITS)]
// [token].
template <int BITS>
struct KeyCodes {
  static constexpr int kChannels = 32 / BITS;  // of a word

  // The word of a token that holds `channel`; the next token's follows.
  static __device__ int offset(const Layout& layout, int channel, int token) {
    return layout.k_codes_offset + 4 * (channel / kChannels * layout.group_size + token);
  }

  // Its lowest bit in the word.
  static __device__ constexpr int bit_of(int channel) { return channel % kChannels * BITS; }

  // Lanes that are neighbours in a multiple of kChannels / 2 hold the channels of a word, and give one of Halves'
  // words. Returns the word of its token number lane % (kChannels / 2).
  static __device__ uint32_t word(uint32_t half, int lane) {
    // Exchanges bits of the lane with bits of the token's place: then a half-word is every other channel of one token.
#pragma unroll
    for (int shift = 8; shift >= BITS; shift /= 2) {
      const uint32_t lower = ~0u / ((1u << shift) + 1);  // the lower one of every two runs of `shift` bits
      const bool upper = lane & (shift / BITS);
      const uint32_t other = __shfl_xor_sync(~0u, half, shift / BITS);
      const uint32_t kept = upper ? ~lower : lower;
      half = (half & kept) | ((upper ? other >> shift : other << shift) & ~kept);
    }
    // Interleaves the two half-words.
#pragma unroll
    for (int shift = 8; shift >= BITS; shift /= 2) {
      const uint32_t middle = shift == 8 ? 0x0000FF00u : shift == 4 ? 0x00F000F0u : 0x0C0C0C0Cu;
      const uint32_t changed = (half ^ (half >> shift)) & middle;
      half ^= changed ^ (changed << shift);
    }
    return half;
  }
};

// Low bits of boosted channels, which are numbered in ascending order: a word holds eight of them of two tokens.
struct BoostCodes {
  static constexpr int kChannels = 8, kTokenBits = 8;

  // The word of a block's channels and a token; that of the next two tokens follows.
  static __device__ int offset(const Layout& layout, int block, int token) {
    return layout.k_boost_offset + 4 * (block * (layout.group_size / 2) + token / 2);
  }

  // Of a channel of the block and an even token.
  static __device__ int bit_of(int index) { return index / 4 * 16 + index % 4 * 2; }
};

// Value codes: eight tokens (an octet) of an even channel and the next lie in BITS / 2 words. Token j of four has slot
// 4 * channel + j of 16 / BITS slots to a half-word; the low half-words hold tokens 0-3, the high ones 4-7.
template <int BITS>
struct ValueCodes {
  static constexpr int kSlots = 16 / BITS;
  struct alignas(2 * BITS) Words {
    uint32_t word[BITS / 2];
  };

  // The first word of an even channel; those of the next two channels follow.
  static __device__ int offset(const Layout& layout, int octet, int channel) {
    return layout.v_codes_offset + (octet * layout.head_dim + channel) * BITS;
  }

  static __device__ Words words(const Halves<BITS>& halves) {
    Words words;
    if constexpr (BITS == 2) {
      words.word[0] = __byte_perm(halves.words[0], 0, 0x3120);
    } else {
      constexpr int kCount = BITS / 4;  // words of a channel
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        words.word[i] = __byte_perm(halves.words[i], halves.words[kCount + i], 0x5410);
        words.word[kCount + i] = __byte_perm(halves.words[i], halves.words[kCount + i], 0x7632);
      }
    }
    return words;
  }

  // Which word, counted from that of an even channel, has a token of the octet and a channel, and from which bit on.
  static __device__ constexpr int word_of(int token, int channel) { return (4 * channel + token % 4) / kSlots; }
  static __device__ constexpr int bit_of(int token, int channel) {
    return 16 * (token / 4) + BITS * ((4 * channel + token % 4) % kSlots);
  }
};

}  // namespace kivi::cuda
