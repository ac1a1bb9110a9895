// Scores and values of quantized tiles with dot products of bytes (AVX-512 VNNI), for 16-bit models.
//
// As in quantized_float.h scale and zero are folded into the query and into the softmax weights, but these then become
// integers of 16 bits, in units of their largest, and are split into a high and a low byte. One instruction multiplies
// 64 codes by 64 such bytes, so 64 codes cost a shift, a mask and two dot products per row, against four shifts,
// lookups and FMAs. Sums are exact integers. Rounding to 16 bits costs 2^-16 of the largest element, a 16-bit model's
// own rounding 2^-9 of each.
//
// Of a boosted channel, whose code is 4 a + b, a is multiplied like any code, by a query with 4 times the scale. The b
// of a tile are multiplied by their channels of the query, which are moved next to each other.
#pragma once

#include "row_block.h"

#if defined(__AVX512VNNI__)

namespace kivi::cpu::KIVI_ISA {

// 255 * kLargest * kMaxHeadDim (or kBlockTokens) still fits in an int32.
constexpr float kLargest = 32600.0f;

// 64 integers of 16 bits as bytes: high * 256 + low, both signed.
struct SplitBytes {
  int8_t high[64];
  int8_t low[64];

  KIVI_INLINE void save_integers(const Ints* values) {  // four vectors of 16
    const __m512i first = _mm512_packs_epi32((__m512i)values[0], (__m512i)values[1]);
    const __m512i second = _mm512_packs_epi32((__m512i)values[2], (__m512i)values[3]);
    const __m512i byte = _mm512_set1_epi16(0xff), half = _mm512_set1_epi16(0x80);
    const __m512i low_packed = _mm512_packus_epi16(_mm512_and_si512(first, byte), _mm512_and_si512(second, byte));
    const __m512i high_packed = _mm512_packs_epi16(_mm512_srai_epi16(_mm512_add_epi16(first, half), 8),
                                                   _mm512_srai_epi16(_mm512_add_epi16(second, half), 8));
    // Packing works within 128-bit lanes: put the quads back into order.
    const Ints order = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    save(low, _mm512_permutexvar_epi32((__m512i)order, low_packed));
    save(high, _mm512_permutexvar_epi32((__m512i)order, high_packed));
  }
};

// The larger of two magnitudes.
KIVI_INLINE Floats larger(Floats a, Floats b) { return (Floats)_mm512_range_ps((__m512)a, (__m512)b, 0b1011); }

// 16 floats that are `largest` at most times `inverse` are integers of 16 bits, in units of `step`. Both are 0 where
// there is nothing to resolve.
KIVI_INLINE void units(Floats largest, Floats& inverse, Floats& step) {
  const Ints any = largest > 1e-30f;
  inverse = any ? kLargest / largest : Floats{};
  step = any ? largest * (1.0f / kLargest) : Floats{};
}

KIVI_INLINE Floats permuted(Floats v, Ints order) { return (Floats)_mm512_permutexvar_ps((__m512i)order, (__m512)v); }

KIVI_INLINE Ints dot(Ints sums, Words codes, const int8_t* quad) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, _mm512_set1_epi32(load<int32_t>(quad)));
}

// Adds codes x quad QUAD of 16 elements of each row, whose bytes are those from `from` on in the rows' SplitBytes.
template <int QUAD, int ROWS, int VECTORS>
KIVI_INLINE void add_products(const SplitBytes* rows, int from, const Words* codes, Ints (*high)[VECTORS],
                              Ints (*low)[VECTORS]) {
  for (int row = 0; row < ROWS; ++row) {
    for (int i = 0; i < VECTORS; ++i) {
      high[row][i] = dot(high[row][i], codes[i], rows[row].high + from + 4 * QUAD);
      low[row][i] = dot(low[row][i], codes[i], rows[row].low + from + 4 * QUAD);
    }
  }
}

KIVI_INLINE Ints nearest(Floats x) { return (Ints)_mm512_cvtps_epi32((__m512)x); }

KIVI_INLINE Floats total(Ints high, Ints low) { return __builtin_convertvector((high << 8) + low, Floats); }

// What a block of tiles or tokens needs besides a RowBlock.
struct alignas(64) ByteBlock {
  static constexpr int kEntries = kBlockTiles * kMaxRows;
  float folded[kEntries][kMaxHeadDim];            // [tile * rows + row][channel] query times key scale
  SplitBytes bytes[kEntries * kMaxHeadDim / 64];  // the same [tile][channel / 64][row], or weights [token / 64][row]
  Floats offset[kEntries];                        // partial sums of q . key zero or of p . value zero
  Floats largest[kEntries];
  alignas(64) float offsets[kEntries];                          // their sums
  alignas(64) float steps[kEntries];                            // what the integers count
  float query[kMaxRows][kMaxHeadDim];                           // channels in the order of the key's bytes
  float boosted[kMaxRows][kBlockTiles * kMaxBoosted + kLanes];  // [row][tile * width + i]: those that are boosted
  SplitBytes boosted_bytes[kMaxRows * kBlockTiles * kMaxBoosted / 64];  // the same [(tile * width + i) / 64][row]
};

// What a tile takes of ByteBlock::boosted: its boosted channels, whole vectors of them.
KIVI_INLINE int boosted_width(const Layout& layout) { return round_up(layout.boosted_channels, kLanes); }

// Reduces offset and largest of `count` entries; `inverses` are those of their steps.
KIVI_INLINE void reduce_entries(ByteBlock& bytes, int count, float* inverses) {
  for (int i = 0; i < count; i += kLanes) {
    save(bytes.offsets + i, reduce_each<Add>(bytes.offset + i));
    Floats inverse, step;
    units(reduce_each<Max>(bytes.largest + i), inverse, step);
    save(inverses + i, inverse);
    save(bytes.steps + i, step);
  }
}

// q * scale of all tiles as bytes, and q . zero. All tiles at once, so that they share the latency of reductions and
// divisions.
template <class T, int BITS, int ROWS>
void fold_key_bytes(const Layout& layout, const char* const* tiles, int num_tiles, const RowBlock& block,
                    ByteBlock& bytes) {
  const int width = BITS == 2 ? boosted_width(layout) : 0;
  const Ints order = KeyCodes<BITS>::byte_order();
  const int head_dim = layout.head_dim, num_parts = (head_dim + 63) / 64;
  for (int i = 0; i < num_tiles; ++i) {
    if (tiles[i] == nullptr) continue;
    const T* scales = reinterpret_cast<const T*>(tiles[i] + layout.k_scale_offset);
    const T* zeros = reinterpret_cast<const T*>(tiles[i] + layout.k_zero_offset);
    Floats offset[ROWS] = {}, largest[ROWS] = {};
    int boosted = i * width;
    for (int channel = 0; channel < head_dim; channel += kLanes) {
      Floats scale = to_floats(scales + channel);
      if (width > 0) {
        int count = 0;
        for (int row = 0; row < ROWS; ++row) {
          count = compact(bytes.boosted[row] + boosted, load<Floats>(block.query[row] + channel) * magnitude(scale),
                          is_boosted(scale));
        }
        boosted = at_most(boosted + count, i * width + layout.boosted_channels);
        scale = code_step(scale);
      }
      scale = permuted(scale, order);
      const Floats zero = permuted(to_floats(zeros + channel), order);
      for (int row = 0; row < ROWS; ++row) {
        const Floats q = load<Floats>(bytes.query[row] + channel), folded = q * scale;
        save(bytes.folded[i * ROWS + row] + channel, folded);
        largest[row] = larger(largest[row], folded);
        offset[row] += q * zero;
      }
    }
    for (int row = 0; row < ROWS; ++row) {
      bytes.offset[i * ROWS + row] = offset[row];
      bytes.largest[i * ROWS + row] = largest[row];
      if (width > 0) save(bytes.boosted[row] + boosted, Floats{});
    }
  }
  alignas(64) float inverses[ByteBlock::kEntries];
  reduce_entries(bytes, num_tiles * ROWS, inverses);
  for (int i = 0; i < num_tiles; ++i) {
    for (int row = 0; row < ROWS; ++row) {
      const int entry = i * ROWS + row;
      for (int part = 0; part < num_parts; ++part) {
        Ints values[4] = {};
        for (int j = 0; j < 4 && part * 64 + j * kLanes < head_dim; ++j) {
          values[j] = nearest(load<Floats>(bytes.folded[entry] + part * 64 + j * kLanes) * inverses[entry]);
        }
        bytes.bytes[(i * num_parts + part) * ROWS + row].save_integers(values);
      }
      for (int j = 0; j < width; j += kLanes) {  // in place, to be packed below
        float* at = bytes.boosted[row] + i * width + j;
        save(at, nearest(permuted(load<Floats>(at), BoostBytes::byte_order()) * inverses[entry]));
      }
    }
  }
  for (int row = 0; row < ROWS; ++row) {
    for (int first = 0; first < num_tiles * width; first += 64) {
      Ints values[4];  // of a few tiles, or of some that are not there
      for (int j = 0; j < 4; ++j) values[j] = load<Ints>(bytes.boosted[row] + first + j * kLanes);
      bytes.boosted_bytes[first / 64 * ROWS + row].save_integers(values);
    }
  }
}

// Adds the low bits of boosted channels of 32 tokens of tile `index` to sums that nothing else was added to.
template <int ROWS>
KIVI_INLINE void add_boost(const Layout& layout, const char* tile, int index, int token, const ByteBlock& bytes,
                           Ints (*high)[2], Ints (*low)[2]) {
  const int width = boosted_width(layout);
  for (int first = 0; first < width; first += kLanes) {
    const int from = index * width + first;
    const SplitBytes* rows = bytes.boosted_bytes + from / 64 * ROWS;
    const BoostBytes boost(tile, layout, first, token);
    unrolled<4>([&]<int QUAD>() __attribute__((always_inline)) {
      const Words codes[2] = {boost.code_bytes<QUAD, 0>(), boost.code_bytes<QUAD, 1>()};
      add_products<QUAD, ROWS>(rows, from % 64, codes, high, low);
    });
  }
  for (int row = 0; row < ROWS; ++row) {
    for (Ints* sums : {high[row], low[row]}) {
      const Ints even = sums[0], odd = sums[1];
      sums[0] = interleave_low(even, odd);
      sums[1] = interleave_high(even, odd);
    }
  }
}

template <int BITS, int ROWS>
void block_scores(const Layout& layout, const char* const* tiles, int num_tiles, const ByteBlock& bytes,
                  RowBlock& block, const Prefetcher& ahead) {
  using Codes = KeyCodes<BITS>;
  const int head_dim = layout.head_dim, group_size = layout.group_size, num_parts = (head_dim + 63) / 64;
  for (int i = 0; i < num_tiles; ++i) {
    if (tiles[i] == nullptr) continue;
    for (int token = 0; token < group_size; token += 2 * kLanes) {
      Ints high[ROWS][2] = {}, low[ROWS][2] = {};
      if (BITS == 2 && layout.boosted_channels > 0) {
        add_boost<ROWS>(layout, tiles[i], i, token, bytes, high, low);
      }
      for (int channel = 0; channel < head_dim; channel += kLanes) {
        const SplitBytes* rows = bytes.bytes + (i * num_parts + channel / 64) * ROWS;
        const int from = channel % 64;
        ahead.step(i, (token / 32) * (head_dim / kLanes) + channel / kLanes);
        unrolled<4>([&]<int QUAD>() __attribute__((always_inline)) {
          const int word_channel = channel + QUAD / Codes::kQuads * Codes::kChannels;
          Words codes[2];
          for (int j = 0; j < 2; ++j) {
            codes[j] =
                Codes::template code_bytes<QUAD>(Codes::words(tiles[i], layout, word_channel, token + j * kLanes));
          }
          add_products<QUAD, ROWS>(rows, from, codes, high, low);
        });
      }
      for (int row = 0; row < ROWS; ++row) {
        const int entry = i * ROWS + row;
        for (int j = 0; j < 2; ++j) {
          save(block.scores[row] + i * group_size + token + j * kLanes,
               total(high[row][j], low[row][j]) * bytes.steps[entry] + bytes.offsets[entry]);
        }
      }
    }
  }
}

// Weights times the scale of one value group as bytes, with one unit for the block, and p . zero. A
// weight of 0 may be a token that is not there, so its scale is not looked at. Weights are rounded up or down by a
// pattern of thresholds: many equal ones below half a unit, together worth something, would otherwise all become 0.
template <class T, int BITS, int ROWS>
void fold_value_bytes(const Layout& layout, const char* const* tiles, int num_tiles, int group, ByteBlock& bytes,
                      RowBlock& block) {
  const Ints order = ValueBytes<BITS>::byte_order();
  const int count = num_tiles * layout.group_size;
  Floats offset[ROWS] = {}, largest[ROWS] = {};
  for (int i = 0; i < num_tiles; ++i) {
    if (tiles[i] == nullptr) {
      for (int row = 0; row < ROWS; ++row) {
        std::memset(block.weights[row] + i * layout.group_size, 0, layout.group_size * sizeof(float));
      }
      continue;
    }
    const T* scales = reinterpret_cast<const T*>(tiles[i] + layout.v_scale_offset) + group * layout.group_size;
    const T* zeros = reinterpret_cast<const T*>(tiles[i] + layout.v_zero_offset) + group * layout.group_size;
    for (int token = 0; token < layout.group_size; token += kLanes) {
      const Floats scale = permuted(to_floats(scales + token), order), zero = permuted(to_floats(zeros + token), order);
      for (int row = 0; row < ROWS; ++row) {
        const int index = i * layout.group_size + token;
        const Floats weight = permuted(load<Floats>(block.scores[row] + index), order);
        const Floats scaled = weight == 0.0f ? Floats{} : weight * scale;
        save(block.weights[row] + index, scaled);
        largest[row] = larger(largest[row], scaled);
        offset[row] = weight == 0.0f ? offset[row] : offset[row] + weight * zero;
      }
    }
  }
  for (int row = 0; row < ROWS; ++row) {
    bytes.offset[row] = offset[row];
    bytes.largest[row] = largest[row];
  }
  alignas(64) float inverses[kLanes];
  reduce_entries(bytes, ROWS, inverses);
  // Multiples of the golden ratio, modulo 1: evenly spread, whichever few lanes hold the weights.
  const Floats thresholds = {0.500f, 0.118f, 0.736f, 0.354f, 0.972f, 0.590f, 0.208f, 0.826f,
                             0.444f, 0.062f, 0.680f, 0.298f, 0.916f, 0.534f, 0.152f, 0.770f};
  for (int row = 0; row < ROWS; ++row) {
    for (int token = 0; token < count; token += 4 * kLanes) {
      Ints values[4] = {};
      for (int i = 0; i < 4 && token + i * kLanes < count; ++i) {
        const Floats weight = load<Floats>(block.weights[row] + token + i * kLanes);
        values[i] = __builtin_convertvector(weight * inverses[row] + thresholds, Ints);
      }
      bytes.bytes[token / 64 * ROWS + row].save_integers(values);
    }
  }
}

// Adds the totals of 32 channels, as they lie in the codes, to a row's sums; those past head_dim land in its padding.
template <int BITS>
KIVI_INLINE void add_unit(Floats first, Floats second, const ByteBlock& bytes, RowBlock& block, int row, int channel) {
  first = first * bytes.steps[row] + bytes.offsets[row];
  second = second * bytes.steps[row] + bytes.offsets[row];
  ValueCodes<BITS>::in_channel_order(first, second);
  float* out = block.sums[row] + channel;
  save(out, load<Floats>(out) + first);
  save(out + kLanes, load<Floats>(out + kLanes) + second);
}

// Adds weights . codes of 32 channels to the sums.
template <int BITS, int ROWS>
void unit_values(const Layout& layout, const char* const* tiles, int num_tiles, int channel, const ByteBlock& bytes,
                 RowBlock& block, const Prefetcher& ahead) {
  const int group_size = layout.group_size;
  const int first_step = Prefetcher::steps_per_tile(layout) / 2 + channel / kUnitChannels * (group_size / kLanes);
  Ints high[ROWS][2] = {}, low[ROWS][2] = {};
  for (int i = 0; i < num_tiles; ++i) {
    if (tiles[i] == nullptr) continue;
    for (int token = 0; token < group_size; token += kLanes) {
      const SplitBytes* rows = bytes.bytes + (i * group_size + token) / 64 * ROWS;
      const int from = (i * group_size + token) % 64;
      ahead.step(i, first_step + token / kLanes);
      const ValueBytes<BITS> value(tiles[i], layout, token, channel);
      unrolled<4>([&]<int QUAD>() __attribute__((always_inline)) {
        const Words codes[2] = {value.template code_bytes<QUAD, 0>(), value.template code_bytes<QUAD, 1>()};
        add_products<QUAD, ROWS>(rows, from, codes, high, low);
      });
    }
  }
  for (int row = 0; row < ROWS; ++row) {
    add_unit<BITS>(total(high[row][0], low[row][0]), total(high[row][1], low[row][1]), bytes, block, row, channel);
  }
}

// The tiles of one block, for 16-bit models.
template <class T, int ROWS>
struct ByteTiles {
  ByteBlock bytes;

  ByteTiles(const Layout& layout, const RowBlock& block) {
    if (layout.k_bits == 16) return;
    with_bits(layout.k_bits, [&]<int BITS>() {
      for (int row = 0; row < ROWS; ++row) {
        for (int channel = 0; channel < layout.head_dim; channel += kLanes) {
          save(bytes.query[row] + channel,
               permuted(load<Floats>(block.query[row] + channel), KeyCodes<BITS>::byte_order()));
        }
      }
    });
  }

  void scores(const Layout& layout, const char* const* tiles, int num_tiles, RowBlock& block, const Prefetcher& ahead) {
    with_bits(layout.k_bits, [&]<int BITS>() {
      fold_key_bytes<T, BITS, ROWS>(layout, tiles, num_tiles, block, bytes);
      block_scores<BITS, ROWS>(layout, tiles, num_tiles, bytes, block, ahead);
    });
  }

  void values(const Layout& layout, const char* const* tiles, int num_tiles, RowBlock& block, const Prefetcher& ahead) {
    with_bits(layout.v_bits, [&]<int BITS>() {
      for (int group = 0; group < layout.num_value_groups; ++group) {
        fold_value_bytes<T, BITS, ROWS>(layout, tiles, num_tiles, group, bytes, block);
        const int end = at_most((group + 1) * layout.group_size, layout.head_dim);
        for (int channel = group * layout.group_size; channel < end; channel += kUnitChannels) {
          unit_values<BITS, ROWS>(layout, tiles, num_tiles, channel, bytes, block, ahead);
        }
      }
    });
  }
};

}  // namespace kivi::cpu::KIVI_ISA

#endif
