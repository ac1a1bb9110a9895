// Where a token lies, and the order of bits in a tile: the only CPU code that knows either. The byte map itself is in
// vllm_kivi/format.py.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace kivi::cpu::KIVI_ISA {

constexpr int kMaxHeadDim = 256;
constexpr int kMaxGroup = 128;
constexpr int kMaxBoosted = kMaxHeadDim / 4;
// Value codes are unpacked two vectors of channels at a time, which never cross a value group.
constexpr int kUnitChannels = 2 * kLanes;

KIVI_INLINE int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }
KIVI_INLINE int at_least(int a, int b) { return a > b ? a : b; }
KIVI_INLINE int at_most(int a, int b) { return a < b ? a : b; }

// Tokens below it are read from quantized pages when a request has num_tokens tokens (sinks apart).
KIVI_INLINE int boundary(const Layout& layout, int num_tokens) {
  return at_least(num_tokens - layout.residual_length, 0) / layout.group_size * layout.group_size;
}

// The page of a request that holds `position`; null where its block is the null block.
KIVI_INLINE char* page_of(const Pages& pages, int request, int head, int position, int page_tokens) {
  const int32_t block = pages.table[request * pages.table_stride + position / page_tokens];
  return block == 0 ? nullptr : pages.data + block * pages.block_stride + head * pages.head_stride;
}

// The tile that starts at `position`, a multiple of the group size; null where it has no page.
KIVI_INLINE char* tile_of(const Layout& layout, const Pages& pages, int request, int head, int position) {
  char* page = page_of(pages, request, head, position, layout.page_tokens);
  if (page == nullptr) return nullptr;
  return page + int64_t(position % layout.page_tokens / layout.group_size) * layout.tile_bytes;
}

// The key of a token in a full-precision page, its value head_dim elements later; null where it has no page.
template <class T>
KIVI_INLINE T* full_token_of(const Layout& layout, const Pages& pages, int request, int head, int position) {
  char* page = page_of(pages, request, head, position, layout.full_page_tokens);
  if (page == nullptr) return nullptr;
  return reinterpret_cast<T*>(page) + int64_t(position % layout.full_page_tokens) * 2 * layout.head_dim;
}

// Keys or values of 16 bits: those of a tile's token `token`; `offset` is that of their codes.
template <class T>
KIVI_INLINE const T* element_row(const Layout& layout, const char* tile, int32_t offset, int token) {
  return reinterpret_cast<const T*>(tile + offset) + int64_t(token) * layout.head_dim;
}

// The lowest BITS bits of each byte.
template <int BITS>
constexpr uint32_t kByteMask = ((1u << BITS) - 1) * 0x01010101u;

// Key codes: a word is the BITS-bit codes of one token's 32 / BITS consecutive channels, first channel lowest; word
// [channel / (32 / BITS)][token]. So consecutive words are the same channels of consecutive tokens.
template <int BITS>
struct KeyCodes {
  static constexpr int kChannels = 32 / BITS;  // of a word

  static KIVI_INLINE Words words(const char* tile, const Layout& layout, int channel, int token) {
    const char* codes = tile + layout.k_codes_offset;
    return load<Words>(codes + 4 * (int64_t(channel / kChannels) * layout.group_size + token));
  }

  // Codes of channel INDEX of the word, as floats, less `from`.
  template <int INDEX>
  static KIVI_INLINE Floats code(Words words, float from = 0.0f) {
    return low_bits<BITS>(words >> (INDEX * BITS), from);
  }

  // For dot products of bytes, 16 channels are taken as four quads, each the channels of one lane's four bytes after
  // one shift. byte_order()[4 * QUAD + byte] is the channel.
  static constexpr int kQuads = 8 / BITS;  // of a word

  static KIVI_INLINE Ints byte_order() {
    const Ints i = lane_index();
    return i / (4 * kQuads) * kChannels + i % 4 * kQuads + i / 4 % kQuads;
  }

  template <int QUAD>
  static KIVI_INLINE Words code_bytes(Words words) {
    return (words >> (QUAD % kQuads * BITS)) & kByteMask<BITS>;
  }
};

// The sign of a key's scale marks a boosted channel: its code is that of the other channels times 4 and then the two
// bits of BoostCodes.
KIVI_INLINE Ints is_boosted(Floats scale) { return (Ints)scale < 0; }
// What a two-bit code counts.
KIVI_INLINE Floats code_step(Floats scale) { return is_boosted(scale) ? scale * -4.0f : scale; }

// The boosted channels of a tile, layout.boosted_channels of them; `channels` has room for kMaxHeadDim + kLanes.
template <class T>
KIVI_INLINE void find_boosted(const Layout& layout, const char* tile, int32_t* channels) {
  const T* scales = reinterpret_cast<const T*>(tile + layout.k_scale_offset);
  // A page that was never written has any signs, and few of them must not leave indices unset.
  for (int i = 0; i < layout.boosted_channels; i += kLanes) save(channels + i, Ints{});
  int count = 0;
  for (int channel = 0; channel < layout.head_dim; channel += kLanes) {
    count += compact(channels + count, lane_index() + channel, is_boosted(to_floats(scales + channel)));
  }
}

// The low bits of boosted channels: a word is eight of these channels (an octet) of two tokens, channels 0-3 in the low
// half-word and 4-7 in the high one; in each the even token first.
struct BoostCodes {
  // Of 2 * kLanes tokens; `first` is the first channel of the octet among the boosted ones.
  static KIVI_INLINE Words words(const char* tile, const Layout& layout, int first, int token) {
    const char* codes = tile + layout.k_boost_offset;
    return load<Words>(codes + 4 * (int64_t(first / 8) * (layout.group_size / 2) + token / 2));
  }

  // Codes of channel INDEX of the octet for the even (PARITY 0) or the odd tokens, as floats, less `from`.
  template <int INDEX, int PARITY>
  static KIVI_INLINE Floats code(Words words, float from = 0.0f) {
    return low_bits<2>(words >> (INDEX / 4 * 16 + 8 * PARITY + 2 * (INDEX % 4)), from);
  }
};

// The low bits of 16 boosted channels of 32 tokens as four quads of channels, for dot products of bytes. Where there
// are only eight more channels the others are read from what follows in the tile, to be multiplied by 0.
struct BoostBytes {
  Words words[2];  // of even and of odd tokens

  KIVI_INLINE BoostBytes(const char* tile, const Layout& layout, int first, int token) {
    const Words a = BoostCodes::words(tile, layout, first, token);
    const Words b = BoostCodes::words(tile, layout, first + 8, token);
    words[0] = (a & 0x00ff00ffu) | (b << 8 & 0xff00ff00u);
    words[1] = (a >> 8 & 0x00ff00ffu) | (b & 0xff00ff00u);
  }

  // byte_order()[4 * QUAD + byte] is the channel among the 16.
  static KIVI_INLINE Ints byte_order() {
    const Ints i = lane_index();
    return i / 4 + i % 2 * 8 + i % 4 / 2 * 4;
  }

  template <int QUAD, int PARITY>
  KIVI_INLINE Words code_bytes() const {
    return (words[PARITY] >> (2 * QUAD)) & kByteMask<2>;
  }
};

// Value codes: eight tokens (an octet) of a unit of channels. Slot 4 * channel + token % 4 of BITS bits, 16 / BITS
// slots to a half-word; the low half-words hold tokens 0-3, the high ones tokens 4-7.
template <int BITS>
struct ValueCodes {
  static constexpr int kVectors = BITS / 2;  // of words
  Words words[kVectors];

  // Where head_dim is no multiple of the unit the last one of the last octet reads past the codes: into the scales of
  // the same tile, which are not empty. The channels beyond head_dim are never used.
  KIVI_INLINE ValueCodes(const char* tile, const Layout& layout, int octet, int channel) {
    const char* codes = tile + layout.v_codes_offset + int64_t(octet) * layout.head_dim * BITS;
    for (int i = 0; i < kVectors; ++i) words[i] = load<Words>(codes + channel * BITS + i * sizeof(Words));
    if constexpr (BITS == 8) {  // even words hold tokens 0, 1, 4, 5 and odd ones 2, 3, 6, 7: part them
      for (int i = 0; i < kVectors; i += 2) {
        const Words a = words[i], b = words[i + 1];
        words[i] = even_lanes(a, b);
        words[i + 1] = odd_lanes(a, b);
      }
    }
  }

  // Codes of token TOKEN for 16 of the 32 channels: with 2 bits the even (HALF 0) or the odd ones, else the first or
  // the last 16.
  template <int TOKEN, int HALF>
  KIVI_INLINE Floats code(float from = 0.0f) const {
    constexpr int kHalfWord = TOKEN / 4 * 16, kSlot = TOKEN % 4;
    if constexpr (BITS == 2) {
      return low_bits<2>(words[0] >> (kHalfWord + 8 * HALF + 2 * kSlot), from);
    } else if constexpr (BITS == 4) {
      return low_bits<4>(words[HALF] >> (kHalfWord + 4 * kSlot), from);
    } else {
      return low_bits<8>(words[2 * HALF + kSlot / 2] >> (kHalfWord + 8 * (kSlot % 2)), from);
    }
  }

  // Puts what was computed from HALF 0 and HALF 1 into the order of the channels.
  static KIVI_INLINE void in_channel_order(Floats& first, Floats& second) {
    if constexpr (BITS == 2) {
      const Floats even = first, odd = second;
      first = interleave_low(even, odd);
      second = interleave_high(even, odd);
    }
  }
};

// Value codes for dot products of bytes: 16 tokens of 32 channels as four quads of tokens.
template <int BITS>
struct ValueBytes {
  Words words[2][2];  // [octet][half of the channels]; with 8 bits these are tokens 0, 1, 4, 5 of the octet
  Words others[2][2];

  KIVI_INLINE ValueBytes(const char* tile, const Layout& layout, int token, int channel) {
    const ValueCodes<BITS> a(tile, layout, token / 8, channel), b(tile, layout, token / 8 + 1, channel);
    if constexpr (BITS == 2) {
      // Bytes 0 and 2 are an even channel, 1 and 3 an odd one: gather those of one channel from both octets.
      words[0][0] = (a.words[0] & 0x00ff00ffu) | (b.words[0] << 8 & 0xff00ff00u);
      words[0][1] = (a.words[0] >> 8 & 0x00ff00ffu) | (b.words[0] & 0xff00ff00u);
    } else {
      for (int half = 0; half < 2; ++half) {
        words[0][half] = a.words[half * BITS / 4];
        words[1][half] = b.words[half * BITS / 4];
        if constexpr (BITS == 8) {
          others[0][half] = a.words[2 * half + 1];
          others[1][half] = b.words[2 * half + 1];
        }
      }
    }
  }

  // byte_order()[4 * QUAD + byte] is the token.
  static KIVI_INLINE Ints byte_order() {
    const Ints i = lane_index();
    if constexpr (BITS == 2) return i / 4 + i % 2 * 8 + i % 4 / 2 * 4;
    if constexpr (BITS == 4) return (i & 8) + i % 4 * 2 + i / 4 % 2;
    return (i & 8) + i % 2 + i % 4 / 2 * 4 + i / 4 % 2 * 2;
  }

  template <int QUAD, int HALF>
  KIVI_INLINE Words code_bytes() const {
    if constexpr (BITS == 2) return (words[0][HALF] >> (2 * QUAD)) & kByteMask<2>;
    if constexpr (BITS == 4) return (words[QUAD / 2][HALF] >> (QUAD % 2 * 4)) & kByteMask<4>;
    return QUAD % 2 == 0 ? words[QUAD / 2][HALF] : others[QUAD / 2][HALF];
  }
};

// Calls f<0>() ... f<COUNT - 1>(): a loop whose counter is a constant.
template <int COUNT, int FIRST = 0, class F>
KIVI_INLINE void unrolled(const F& f) {
  if constexpr (FIRST < COUNT) {
    f.template operator()<FIRST>();
    unrolled<COUNT, FIRST + 1>(f);
  }
}

// Calls f<bits>(), for codes: 2, 4 or 8.
template <class F>
KIVI_INLINE void with_bits(int bits, const F& f) {
  switch (bits) {
    case 2:
      return f.template operator()<2>();
    case 4:
      return f.template operator()<4>();
    default:
      return f.template operator()<8>();
  }
}

}  // namespace kivi::cpu::KIVI_ISA
