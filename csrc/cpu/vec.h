// Vectors as wide as the machine's registers: 16 lanes with AVX-512, 8 with AVX2, else 4. Written with the vector
// extensions of GCC and Clang; intrinsics only where they save instructions.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define KIVI_INLINE inline __attribute__((always_inline))

namespace kivi::cpu::KIVI_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504088896340736f;
// Adding 1.5 * 2^23 leaves no room for a fraction, so the FPU rounds half to even; the integer is in the low bits.
constexpr float kRoundingBias = 12582912.0f;

KIVI_INLINE Floats splat(float x) { return x - Floats{}; }

template <class V>
KIVI_INLINE V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
KIVI_INLINE void save(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

using Lanes = std::make_integer_sequence<int, kLanes>;

template <int... LANE>
KIVI_INLINE Ints indices(std::integer_sequence<int, LANE...>) {
  return Ints{LANE...};
}
KIVI_INLINE Ints lane_index() { return indices(Lanes{}); }

// Lane i of the result is lane Source::of(i) of a and b, b's lanes counting from kLanes.
template <class Source, class V, int... LANE>
KIVI_INLINE V shuffled(V a, V b, std::integer_sequence<int, LANE...>) {
  return __builtin_shufflevector(a, b, Source::of(LANE)...);
}

// Both let a NaN in `a` through, so that it is seen and not replaced by a limit.
KIVI_INLINE Floats max_or_nan(Floats a, Floats b) { return a < b ? b : a; }
KIVI_INLINE Floats min_or_nan(Floats a, Floats b) { return a > b ? b : a; }

KIVI_INLINE Floats magnitude(Floats x) { return (Floats)((Words)x & 0x7fffffffu); }

// ------------------------------------------------------------------------------------------------------- reductions

struct Add {
  template <class V>
  static KIVI_INLINE V of(V a, V b) {
    return a + b;
  }
};
struct Max {
  static KIVI_INLINE Floats of(Floats a, Floats b) { return max_or_nan(a, b); }
};
struct Min {
  static KIVI_INLINE Floats of(Floats a, Floats b) { return min_or_nan(a, b); }
};

template <int WIDTH>
struct Swapped {
  static constexpr int of(int lane) { return lane ^ WIDTH; }
};

// Lane i of the result is lane i ^ WIDTH of v.
template <int WIDTH, class V>
KIVI_INLINE V swap(V v) {
  return shuffled<Swapped<WIDTH>>(v, v, Lanes{});
}

template <class Op, int WIDTH = kLanes / 2, class V>
KIVI_INLINE auto reduce(V v) {
  if constexpr (WIDTH == 0) {
    return v[0];
  } else {
    return reduce<Op, WIDTH / 2>(Op::of(v, swap<WIDTH>(v)));
  }
}

template <int WIDTH, class Op>
KIVI_INLINE void reduce_pairs(Floats* v) {
  const Ints upper = (lane_index() & WIDTH) != 0;
  for (int i = 0; i < WIDTH; ++i) {
    const Floats a = v[i], b = v[i + WIDTH];
    v[i] = Op::of(upper ? b : a, swap<WIDTH>(upper ? a : b));
  }
}

// Lane i of the result is the reduction of v[i], of kLanes vectors: 15 steps for 16 of them instead of 64. Overwrites
// v.
template <class Op, int WIDTH = kLanes / 2>
KIVI_INLINE Floats reduce_each(Floats* v) {
  if constexpr (WIDTH > 0) {
    reduce_pairs<WIDTH, Op>(v);
    reduce_each<Op, WIDTH / 2>(v);
  }
  return v[0];
}

struct InterleavedLow {
  static constexpr int of(int lane) { return lane / 2 + lane % 2 * kLanes; }
};
struct InterleavedHigh {
  static constexpr int of(int lane) { return kLanes / 2 + InterleavedLow::of(lane); }
};
struct Even {
  static constexpr int of(int lane) { return 2 * lane; }
};
struct Odd {
  static constexpr int of(int lane) { return 2 * lane + 1; }
};

// a0 b0 a1 b1 ...: the first and the second half of the lanes.
template <class V>
KIVI_INLINE V interleave_low(V a, V b) {
  return shuffled<InterleavedLow>(a, b, Lanes{});
}
template <class V>
KIVI_INLINE V interleave_high(V a, V b) {
  return shuffled<InterleavedHigh>(a, b, Lanes{});
}
// Every other lane of a, then of b.
template <class V>
KIVI_INLINE V even_lanes(V a, V b) {
  return shuffled<Even>(a, b, Lanes{});
}
template <class V>
KIVI_INLINE V odd_lanes(V a, V b) {
  return shuffled<Odd>(a, b, Lanes{});
}

template <int WIDTH>
KIVI_INLINE void transpose_step(Floats* v) {
  const Ints upper = (lane_index() & WIDTH) != 0;
  for (int i = 0; i < kLanes; ++i) {
    if (i & WIDTH) continue;
    const Floats a = v[i], b = v[i + WIDTH];
    v[i] = upper ? swap<WIDTH>(b) : a;
    v[i + WIDTH] = upper ? b : swap<WIDTH>(a);
  }
}

// v[i][j] <-> v[j][i]
template <int WIDTH = kLanes / 2>
KIVI_INLINE void transpose(Floats* v) {
  if constexpr (WIDTH > 0) {
    transpose_step<WIDTH>(v);
    transpose<WIDTH / 2>(v);
  }
}

// Writes the lanes of v that `kept` has, next to each other, and returns how many. What follows them in kLanes elements
// from `out` on is 0 or as it was.
template <class V>
KIVI_INLINE int compact(void* out, V v, Ints kept) {
#if defined(__AVX512F__)
  const __mmask16 mask = _mm512_movepi32_mask((__m512i)kept);
  save(out, (V)_mm512_maskz_compress_epi32(mask, (__m512i)v));
  return __builtin_popcount(mask);
#else
  int count = 0;
  for (int i = 0; i < kLanes; ++i) {  // without branches: a lane that is not kept is overwritten
    save(static_cast<char*>(out) + 4 * count, v[i]);
    count -= kept[i];
  }
  return count;
#endif
}

// --------------------------------------------------------------------------------------------------------- data types

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float kMax = 3.40282346638528859812e+38f;
};
template <>
struct Limits<BFloat16> {
  static constexpr float kMax = 3.38953138925153547590e+38f;
};
template <>
struct Limits<Float16> {
  static constexpr float kMax = 65504.0f;
};

#if !defined(__F16C__)
inline float half_to_float(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  float value;
  if (magnitude < 0x400u) {
    value = magnitude * 0x1p-24f;
  } else {
    const uint32_t bits =
        magnitude >= 0x7c00u ? 0x7f800000u | (magnitude & 0x3ffu) << 13 : (magnitude + 0x1c000u) << 13;
    std::memcpy(&value, &bits, sizeof value);
  }
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits |= sign;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;
  if (bits >= 0x477ff000u) return sign | 0x7c00u;  // from halfway past the largest half: infinity
  if (bits < 0x38800000u) {                        // subnormal: let an addition round at the half's last bit
    std::memcpy(&value, &bits, sizeof value);
    value += 0.5f;
    std::memcpy(&bits, &value, sizeof bits);
    return sign | (bits - 0x3f000000u);
  }
  return sign | ((bits - 0x38000000u + 0xfffu + (bits >> 13 & 1)) >> 13);
}
#endif

KIVI_INLINE Floats to_floats(const float* p) { return load<Floats>(p); }

KIVI_INLINE Floats to_floats(const BFloat16* p) {
#if defined(__AVX512F__)
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(p)), 16);
#elif defined(__AVX2__)
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(p)), 16);
#else
  return (Floats)(__builtin_convertvector(load<Halves>(p), Words) << 16);
#endif
}

KIVI_INLINE Floats to_floats(const Float16* p) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(load<__m256i>(p));
#elif defined(__F16C__)
  return (Floats)_mm256_cvtph_ps(load<__m128i>(p));
#else
  Floats v;
  for (int i = 0; i < kLanes; ++i) v[i] = half_to_float(p[i].bits);
  return v;
#endif
}

// Round half to even; NaN stays NaN.
KIVI_INLINE void from_floats(float* p, Floats v) { save(p, v); }

KIVI_INLINE Words rounded_bfloat16_bits(Floats v) {
  const Words bits = (Words)v;
  const Words rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return v == v ? rounded : (bits >> 16 | 0x40u);
}

KIVI_INLINE void from_floats(BFloat16* p, Floats v) {
  save(p, __builtin_convertvector(rounded_bfloat16_bits(v), Halves));
}

KIVI_INLINE void from_floats(Float16* p, Floats v) {
#if defined(__AVX512F__)
  save(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  save(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i].bits = float_to_half(v[i]);
#endif
}

// The value as T would hold it.
template <class T>
KIVI_INLINE Floats rounded(Floats v) {
  if constexpr (sizeof(T) == sizeof(float)) return v;
  T narrow[kLanes];
  from_floats(narrow, v);
  return to_floats(narrow);
}

template <>
KIVI_INLINE Floats rounded<BFloat16>(Floats v) {
  return (Floats)(rounded_bfloat16_bits(v) << 16);
}

// -------------------------------------------------------------------------------------------------------------- codes

// The middle of the codes.
template <int BITS>
constexpr float kMiddle = ((1 << BITS) - 1) * 0.5f;

// The low BITS bits of each lane as a float, less `from`. A table in a register is a mask, a conversion and a
// subtraction in one instruction.
template <int BITS>
KIVI_INLINE Floats low_bits(Words w, float from = 0.0f) {
#if defined(__AVX512F__)
  if constexpr (BITS == 2) {
    const Floats table = Floats{0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3} - from;
    return (Floats)_mm512_permutevar_ps((__m512)table, (__m512i)w);
  } else if constexpr (BITS == 4) {
    const Floats table = Floats{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} - from;
    return (Floats)_mm512_permutexvar_ps((__m512i)w, (__m512)table);
  }
#elif defined(__AVX2__)
  if constexpr (BITS == 2) {
    const Floats table = Floats{0, 1, 2, 3, 0, 1, 2, 3} - from;
    return (Floats)_mm256_permutevar_ps((__m256)table, (__m256i)w);
  }
#endif
  return __builtin_convertvector((Ints)(w & ((1u << BITS) - 1)), Floats) - from;
}

// --------------------------------------------------------------------------------------------------------------- math

// 2^x for x <= 0, to 1 ulp; 0 where it would be subnormal or less; NaN for NaN.
KIVI_INLINE Floats exp2_nonpositive(Floats x) {
#if defined(__AVX512DQ__)
  x = x < -126.0f ? splat(-kInfinity) : x;
  const Floats fraction = (Floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);  // in [0, 1), 0 for -inf
  Floats y = splat(2.161291504e-4f);
  y = y * fraction + 1.246784642e-3f;
  y = y * fraction + 9.675451571e-3f;
  y = y * fraction + 5.548528062e-2f;
  y = y * fraction + 2.402293056e-1f;
  y = y * fraction + 6.931470444e-1f;
  y = y * fraction + 1.0f;
  return (Floats)_mm512_scalef_ps((__m512)y, (__m512)x);  // y * 2^floor(x)
#else
  const Floats bounded = x < -126.0f ? splat(-126.0f) : x;
  const Floats shifted = bounded + kRoundingBias;
  const Floats fraction = bounded - (shifted - kRoundingBias);  // in [-0.5, 0.5]
  Floats y = splat(1.535336188319500e-4f);
  y = y * fraction + 1.339887440266574e-3f;
  y = y * fraction + 9.618437357674640e-3f;
  y = y * fraction + 5.550332471162809e-2f;
  y = y * fraction + 2.402264791363012e-1f;
  y = y * fraction + 6.931472028550421e-1f;
  y = y * fraction + 1.0f;
  const Floats scaled = (Floats)((Words)y + ((Words)shifted << 23));
  return x < -126.0f ? Floats{} : scaled;
#endif
}

KIVI_INLINE Floats tanh_of(Floats x) {
  const Floats size = magnitude(x);
  const Floats square = x * x;
  Floats y = splat(-5.70498872745e-3f);  // Cephes' tanhf, for |x| < 0.625
  y = y * square + 2.06390887954e-2f;
  y = y * square + -5.37397155531e-2f;
  y = y * square + 1.33314422036e-1f;
  y = y * square + -3.33332819422e-1f;
  y = y * square * x + x;
  const Floats decay = exp2_nonpositive(size * (-2.0f * kLog2E));
  const Floats large = (1.0f - decay) / (1.0f + decay);
  const Floats signed_large = (Floats)((Words)large | ((Words)x & 0x80000000u));
  return size < 0.625f ? y : signed_large;
}

}  // namespace kivi::cpu::KIVI_ISA
