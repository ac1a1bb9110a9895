// Scores and values of quantized tiles in float32: for float32 models, and where there are no dot products of bytes.
//
// * keys: scale and zero are per channel, so q * scale is folded once per tile and q . zero is added at the end. The
//   loop over codes is shift + table lookup for a vector of tokens and one FMA per row; there is no reduction, as lanes
//   are tokens.
// * values: scale and zero are per token, so they are folded into the softmax weights; lanes are channels.
// Bound by instructions: a shift, a lookup and a FMA per row for a vector of codes. So that folding costs no accuracy,
// codes are taken from their middle (terms of either sign and half the size), and sums of at most 32 terms are added
// up. Boosted channels are done in two parts, as in quantized_bytes.h.
#pragma once

#include "row_block.h"

namespace kivi::cpu::KIVI_ISA {

constexpr int kTokenVectors = 2;  // accumulators of a row, to hide the latency of the FMA

// What a block of tokens needs besides a RowBlock.
struct alignas(64) FloatBlock {
  float query[kMaxRows][kMaxHeadDim];    // times the key scale of a tile
  float boosted[kMaxRows][kMaxBoosted];  // times the scale of the tile's boosted channels
  float offset[kMaxRows];                // q . key zero of a tile, or p . value zero of a block
};

template <class T, int BITS, int ROWS>
void fold_key_scale(const Layout& layout, const char* tile, const RowBlock& block, FloatBlock& folded) {
  const T* scales = reinterpret_cast<const T*>(tile + layout.k_scale_offset);
  const T* zeros = reinterpret_cast<const T*>(tile + layout.k_zero_offset);
  Floats offset[ROWS] = {};
  for (int channel = 0; channel < layout.head_dim; channel += kLanes) {
    const Floats stored = to_floats(scales + channel), zero = to_floats(zeros + channel);
    const Floats scale = BITS == 2 ? code_step(stored) : stored;
    Floats middle = zero + scale * kMiddle<BITS>;
    if (BITS == 2) middle = is_boosted(stored) ? zero + scale * (kMiddle<4> / 4) : middle;
    for (int row = 0; row < ROWS; ++row) {
      const Floats q = load<Floats>(block.query[row] + channel);
      save(folded.query[row] + channel, q * scale);
      offset[row] += q * middle;
    }
  }
  for (int row = 0; row < ROWS; ++row) folded.offset[row] = reduce<Add>(offset[row]);
  if (BITS != 2 || layout.boosted_channels == 0) return;
  int32_t channels[kMaxHeadDim + kLanes];
  find_boosted<T>(layout, tile, channels);
  for (int row = 0; row < ROWS; ++row) {
    for (int i = 0; i < layout.boosted_channels; ++i) {
      folded.boosted[row][i] = folded.query[row][channels[i]] * 0.25f;
    }
  }
}

// Adds the low bits of boosted channels of 2 * kLanes tokens.
template <int ROWS>
KIVI_INLINE void add_boost(const Layout& layout, const char* tile, int token, const FloatBlock& folded,
                           Floats (*sums)[kTokenVectors]) {
  static_assert(kTokenVectors == 2);
  Floats even[ROWS] = {}, odd[ROWS] = {};
  for (int first = 0; first < layout.boosted_channels; first += 8) {
    const Words words = BoostCodes::words(tile, layout, first, token);
    unrolled<8>([&]<int INDEX>() __attribute__((always_inline)) {
      const Floats a = BoostCodes::code<INDEX, 0>(words, kMiddle<2>);
      const Floats b = BoostCodes::code<INDEX, 1>(words, kMiddle<2>);
      for (int row = 0; row < ROWS; ++row) {
        const Floats q = splat(folded.boosted[row][first + INDEX]);
        even[row] += a * q;
        odd[row] += b * q;
      }
    });
  }
  for (int row = 0; row < ROWS; ++row) {
    sums[row][0] += interleave_low(even[row], odd[row]);
    sums[row][1] += interleave_high(even[row], odd[row]);
  }
}

// scores[row][first ... first + G - 1] of one tile.
template <int BITS, int ROWS>
void tile_scores(const Layout& layout, const char* tile, int index, const FloatBlock& folded, RowBlock& block,
                 const Prefetcher& ahead) {
  using Codes = KeyCodes<BITS>;
  for (int token = 0; token < layout.group_size; token += kTokenVectors * kLanes) {
    Floats sums[ROWS][kTokenVectors] = {};
    for (int channel = 0; channel < layout.head_dim; channel += Codes::kChannels) {
      if (channel % 16 == 0 && token % 32 == 0) {
        ahead.step(index, token / 32 * (layout.head_dim / 16) + channel / 16);
      }
      Words words[kTokenVectors];
      for (int i = 0; i < kTokenVectors; ++i) words[i] = Codes::words(tile, layout, channel, token + i * kLanes);
      Floats part[ROWS][kTokenVectors] = {};
      unrolled<Codes::kChannels>([&]<int INDEX>() __attribute__((always_inline)) {
        Floats codes[kTokenVectors];
        for (int i = 0; i < kTokenVectors; ++i) codes[i] = Codes::template code<INDEX>(words[i], kMiddle<BITS>);
        for (int row = 0; row < ROWS; ++row) {
          const Floats q = splat(folded.query[row][channel + INDEX]);
          for (int i = 0; i < kTokenVectors; ++i) part[row][i] += codes[i] * q;
        }
      });
      for (int row = 0; row < ROWS; ++row) {
        for (int i = 0; i < kTokenVectors; ++i) sums[row][i] += part[row][i];
      }
    }
    if (BITS == 2 && layout.boosted_channels > 0) add_boost<ROWS>(layout, tile, token, folded, sums);
    for (int row = 0; row < ROWS; ++row) {
      for (int i = 0; i < kTokenVectors; ++i) {
        save(block.scores[row] + index * layout.group_size + token + i * kLanes, sums[row][i] + folded.offset[row]);
      }
    }
  }
}

// Folds the scale of one value group into the weights of all tokens; offset = p . zero. A weight of 0 may be a token
// that is not there, so its scale is not looked at.
template <class T, int BITS, int ROWS>
void fold_value_scale(const Layout& layout, const char* const* tiles, int num_tiles, int group, FloatBlock& folded,
                      RowBlock& block) {
  Floats offset[ROWS] = {};
  for (int i = 0; i < num_tiles; ++i) {
    if (tiles[i] == nullptr) continue;
    const T* scales = reinterpret_cast<const T*>(tiles[i] + layout.v_scale_offset) + group * layout.group_size;
    const T* zeros = reinterpret_cast<const T*>(tiles[i] + layout.v_zero_offset) + group * layout.group_size;
    for (int token = 0; token < layout.group_size; token += kLanes) {
      const Floats scale = to_floats(scales + token), middle = to_floats(zeros + token) + scale * kMiddle<BITS>;
      for (int row = 0; row < ROWS; ++row) {
        const int index = i * layout.group_size + token;
        const Floats weight = load<Floats>(block.scores[row] + index);
        save(block.weights[row] + index, weight == 0.0f ? Floats{} : weight * scale);
        offset[row] = weight == 0.0f ? offset[row] : offset[row] + weight * middle;
      }
    }
  }
  for (int row = 0; row < ROWS; ++row) folded.offset[row] = reduce<Add>(offset[row]);
}

// Adds weights . codes of a unit of channels to the sums; channels past head_dim land in the padding of `sums`.
template <int BITS, int ROWS>
void unit_values(const Layout& layout, const char* const* tiles, int num_tiles, int channel, const FloatBlock& folded,
                 RowBlock& block, const Prefetcher& ahead) {
  Floats sums[ROWS][2];
  for (int row = 0; row < ROWS; ++row) sums[row][0] = sums[row][1] = splat(folded.offset[row]);
  Floats part[ROWS][2];
  for (int i = 0; i < num_tiles; ++i) {
    if (tiles[i] == nullptr) continue;
    for (int octet = 0; octet < layout.group_size / 8; ++octet) {
      for (int byte = channel; octet % 4 == 0 && byte < channel + kUnitChannels; byte += 16) {
        ahead.step(i, Prefetcher::steps_per_tile(layout) / 2 + byte / 16 * (layout.group_size / 32) + octet / 4);
      }
      if (octet % 4 == 0) {
        for (int row = 0; row < ROWS; ++row) part[row][0] = part[row][1] = Floats{};
      }
      const ValueCodes<BITS> codes(tiles[i], layout, octet, channel);
      const int first = i * layout.group_size + 8 * octet;
      unrolled<8>([&]<int TOKEN>() __attribute__((always_inline)) {
        const Floats a = codes.template code<TOKEN, 0>(kMiddle<BITS>);
        const Floats b = codes.template code<TOKEN, 1>(kMiddle<BITS>);
        for (int row = 0; row < ROWS; ++row) {
          const Floats weight = splat(block.weights[row][first + TOKEN]);
          part[row][0] += a * weight;
          part[row][1] += b * weight;
        }
      });
      if (octet % 4 == 3) {
        for (int row = 0; row < ROWS; ++row) {
          for (int half = 0; half < 2; ++half) sums[row][half] += part[row][half];
        }
      }
    }
  }
  for (int row = 0; row < ROWS; ++row) {
    ValueCodes<BITS>::in_channel_order(sums[row][0], sums[row][1]);
    float* out = block.sums[row] + channel;
    save(out, load<Floats>(out) + sums[row][0]);
    save(out + kLanes, load<Floats>(out + kLanes) + sums[row][1]);
  }
}

// The tiles of one block.
template <class T, int ROWS>
struct FloatTiles {
  FloatBlock folded;

  FloatTiles(const Layout&, const RowBlock&) {}

  void scores(const Layout& layout, const char* const* tiles, int num_tiles, RowBlock& block, const Prefetcher& ahead) {
    with_bits(layout.k_bits, [&]<int BITS>() {
      for (int i = 0; i < num_tiles; ++i) {
        if (tiles[i] == nullptr) continue;
        fold_key_scale<T, BITS, ROWS>(layout, tiles[i], block, folded);
        tile_scores<BITS, ROWS>(layout, tiles[i], i, folded, block, ahead);
      }
    });
  }

  void values(const Layout& layout, const char* const* tiles, int num_tiles, RowBlock& block, const Prefetcher& ahead) {
    with_bits(layout.v_bits, [&]<int BITS>() {
      for (int group = 0; group < layout.num_value_groups; ++group) {
        fold_value_scale<T, BITS, ROWS>(layout, tiles, num_tiles, group, folded, block);
        const int end = at_most((group + 1) * layout.group_size, layout.head_dim);
        for (int channel = group * layout.group_size; channel < end; channel += kUnitChannels) {
          unit_values<BITS, ROWS>(layout, tiles, num_tiles, channel, folded, block, ahead);
        }
      }
    });
  }
};

}  // namespace kivi::cpu::KIVI_ISA
