// store: writes new tokens to full-precision pages and quantizes the groups that they complete.
//
// One task is one group of one request, all KV heads: it copies the new tokens among its positions and, when the last
// of them is new, quantizes the group. Tokens of the group that are older than the batch come from the full-precision
// pages, which hold everything that is not yet quantized. Tasks share nothing, so their order does not matter.
//
// Codes, scales and zeros equal published KIVI bit for bit, so the arithmetic rounds to the input's type T after every
// operation (rounded<T>) and divides for real. Contraction to fused multiply-adds cannot change a bit: the only
// products that are added to are exact, or by 0.5, where a subnormal that this could round is beside a number larger
// than half the range.
//
// With scale_search each group of values is quantized eight times, for its range and for narrower ones, and the codes
// that lose least are kept. Where a format has boosted channels, all keys are quantized with 2 bits and the worst
// channels again with 4.
#pragma once

#include "page.h"
#include "rotate.h"
#include "threads.h"

namespace kivi::cpu::KIVI_ISA {

template <class T>
struct GroupRows {
  const T* key[kMaxGroup];
  const T* value[kMaxGroup];
};

// What groups quantize, one group to a lane.
template <class T, int BITS>
struct Quantizer {
  static constexpr float kLevels = (1 << BITS) - 1;
  Floats low = splat(Limits<T>::kMax);
  Floats high = splat(-Limits<T>::kMax);
  Floats half, low_half, step;

  // NaN counts as 0, infinities as the largest finite number, -0 as 0.
  static KIVI_INLINE Floats finite(Floats x) {
    x = x == x ? x : Floats{};
    x = min_or_nan(max_or_nan(x, splat(-Limits<T>::kMax)), splat(Limits<T>::kMax));
    return x + 0.0f;
  }

  KIVI_INLINE void see(Floats x) {
    low = min_or_nan(low, x);
    high = max_or_nan(high, x);
  }

  // A range that overflows T is handled on halved numbers.
  KIVI_INLINE void seen_all() {
    half = rounded<T>(high - low) > Limits<T>::kMax ? splat(0.5f) : splat(1.0f);
    low_half = rounded<T>(low * half);
    step = rounded<T>(rounded<T>(rounded<T>(high * half) - low_half) / kLevels);
  }

  KIVI_INLINE Floats scale() const { return rounded<T>(step / half); }
  KIVI_INLINE Floats zero() const { return low; }

  // The code plus kRoundingBias.
  KIVI_INLINE Floats biased_code(Floats x) const {
    const Floats offset = rounded<T>(rounded<T>(x * half) - low_half);
    Floats code = rounded<T>(offset / (step == 0.0f ? splat(1.0f) : step));
    code = step == 0.0f ? Floats{} : min_or_nan(max_or_nan(code, Floats{}), splat(kLevels));
    return code + kRoundingBias;
  }

  KIVI_INLINE Words code(Floats x) const { return (Words)biased_code(x) & ((1u << BITS) - 1); }

  // What follows is for losses: docs/FORMAT.md has every operation.
  KIVI_INLINE Floats span() const { return high - low; }
  static KIVI_INLINE Ints measurable(Floats span) { return (span >= 0x1p-14f) & (span <= 0x1p15f); }
  static KIVI_INLINE Floats units(Floats span) {
    return (Floats)(((127u + 127u + 11u) << 23) - ((Words)span & 0x7f800000u));
  }

  // Takes the narrower range that loses least, if one does. loss_of(quantizer, units) is the sum of squared_error over
  // a group. Sums of integers do not depend on their order.
  template <class F>
  KIVI_INLINE void search(const F& loss_of) {
    const Floats span = this->span(), part = span / 40.0f, units = this->units(span);
    const Ints measurable = this->measurable(span);
    Quantizer best = *this, narrow = *this;
    const Words loss = loss_of(*this, units);
    Words least = loss - (loss >> 6);
    Floats cut = {};
    for (int i = 0; i < 7; ++i) {
      cut += part;
      narrow.low = narrow.low_half = rounded<T>(low + cut) + 0.0f;
      narrow.step = rounded<T>((span - 2.0f * cut) / kLevels);
      const Words narrow_loss = loss_of(narrow, units);
      const Ints better = measurable & (narrow_loss < least);
      least = better ? narrow_loss : least;
      best.low = better ? narrow.low : best.low;
      best.low_half = better ? narrow.low_half : best.low_half;
      best.step = better ? narrow.step : best.step;
    }
    *this = best;
  }

  // A loss as one number that compares with that of other ranges.
  static KIVI_INLINE Floats error(Floats span, Words loss) {
    const Floats unit = (Floats)(((Words)span & 0x7f800000u) - (11u << 23));
    const Floats exact = __builtin_convertvector((Ints)loss, Floats) * unit * unit;
    return measurable(span) ? exact : span > 1.0f ? splat(kInfinity) : Floats{};
  }

  // Of a group with a measurable range, so that `half` is 1.
  KIVI_INLINE Words squared_error(Floats x, Floats units) const {
    const Floats short_step = (Floats)((Words)step & ~0xffu);  // its products with codes are exact
    const Floats error = (x - low) - (biased_code(x) - kRoundingBias) * short_step;
    const Floats whole = (error * units + kRoundingBias) - kRoundingBias;
    return (Words)(whole * whole + kRoundingBias) & 0x003fffffu;
  }
};

// Keys: a group is one channel of the G tokens, so the channels of a vector are so many groups.
template <class T, int BITS>
struct KeyGroups {
  Floats x[kMaxGroup];
  Quantizer<T, BITS> quantizer;
  Floats error;  // of boosted formats

  // floats_of(token) are the elements.
  template <class F>
  KeyGroups(const Layout& layout, const F& floats_of) {
    const int group_size = layout.group_size;
    for (int token = 0; token < group_size; ++token) {
      x[token] = quantizer.finite(floats_of(token));
      quantizer.see(x[token]);
    }
    quantizer.seen_all();
    if (BITS == 2 && layout.boosted_channels > 0) {
      const Floats span = quantizer.span(), units = quantizer.units(span);
      Words loss = {};
      for (int token = 0; token < group_size; ++token) loss += quantizer.squared_error(x[token], units);
      error = quantizer.error(span, loss);
    }
  }

  // codes[channel], each of the tokens from `token` on.
  KIVI_INLINE void codes_of(int token, Floats* codes) const {
    for (int i = 0; i < kLanes; ++i) codes[i] = (Floats)quantizer.code(x[token + i]);
    transpose(codes);
  }
};

// Stores the layout.boosted_channels channels of the largest errors, among equal ones the first, again with 4 bits.
template <class T>
void boost_keys(const Layout& layout, const GroupRows<T>& rows, const float* errors, char* tile) {
  const int num_boosted = layout.boosted_channels, group_size = layout.group_size;
  T* scales = reinterpret_cast<T*>(tile + layout.k_scale_offset);
  T* zeros = reinterpret_cast<T*>(tile + layout.k_zero_offset);
  int32_t channels[kMaxHeadDim + kLanes];
  int count = 0;
  for (int channel = 0; channel < layout.head_dim; channel += kLanes) {
    const Ints index = lane_index() + channel;
    const Floats error = load<Floats>(errors + channel);
    Ints rank = {};
    for (int other = 0; other < layout.head_dim; ++other) {
      const Floats theirs = splat(errors[other]);
      rank -= (theirs > error) | ((theirs == error) & (other < index));
    }
    count += compact(channels + count, index, rank < num_boosted);
  }
  save(channels + count, Ints{});  // lanes past the last one quantize channel 0 for nothing
  for (int first = 0; first < num_boosted; first += kLanes) {
    const KeyGroups<T, 4> groups(layout, [&](int token) {
      T lanes[kLanes];
      for (int i = 0; i < kLanes; ++i) lanes[i] = rows.key[token][channels[first + i]];
      return to_floats(lanes);
    });
    const int num_lanes = at_most(num_boosted - first, kLanes);
    T scale[kLanes], zero[kLanes];
    from_floats(scale, (Floats)((Words)groups.quantizer.scale() | 0x80000000u));
    from_floats(zero, groups.quantizer.zero());
    for (int i = 0; i < num_lanes; ++i) {
      scales[channels[first + i]] = scale[i];
      zeros[channels[first + i]] = zero[i];
    }
    for (int token = 0; token < group_size; token += kLanes) {
      Floats codes[kLanes];
      groups.codes_of(token, codes);
      constexpr int kPart = kLanes < 8 ? kLanes : 8;  // of an octet of channels
      for (int part = 0; part < num_lanes; part += kPart) {
        const int octet = (first + part) / 8, half = (first + part) % 8 / 4;
        Words low = {};
        for (int i = 0; i < kPart; ++i) {
          const int channel = channels[first + part + i], shift = 2 * (channel % KeyCodes<2>::kChannels);
          const Words code = (Words)codes[part + i];
          low |= (code & 3u) << (16 * (half + i / 4) + 2 * (i % 4));
          char* out =
              tile + layout.k_codes_offset + 4 * (int64_t(channel / KeyCodes<2>::kChannels) * group_size + token);
          save(out, (load<Words>(out) & ~(3u << shift)) | (code >> 2) << shift);
        }
        // Two tokens share a word.
        low <<= (Words)(lane_index() & 1) * 8u;
        const Words pairs = low | swap<1>(low);
        Words packed = even_lanes(pairs, pairs);
        char* out = tile + layout.k_boost_offset + 4 * (int64_t(octet) * (group_size / 2) + token / 2);
        if (half == 1) packed |= load<Words>(out);
        std::memcpy(out, &packed, sizeof packed / 2);
      }
    }
  }
}

template <class T, int BITS>
void quantize_keys(const Layout& layout, const GroupRows<T>& rows, char* tile) {
  constexpr int kChannels = KeyCodes<BITS>::kChannels;
  const int group_size = layout.group_size;
  T* scales = reinterpret_cast<T*>(tile + layout.k_scale_offset);
  T* zeros = reinterpret_cast<T*>(tile + layout.k_zero_offset);
  float errors[kMaxHeadDim];
  for (int channel = 0; channel < layout.head_dim; channel += kLanes) {
    const KeyGroups<T, BITS> groups(layout, [&](int token) { return to_floats(rows.key[token] + channel); });
    save(errors + channel, groups.error);
    from_floats(scales + channel, groups.quantizer.scale());
    from_floats(zeros + channel, groups.quantizer.zero());
    for (int token = 0; token < group_size; token += kLanes) {
      Floats codes[kLanes];
      groups.codes_of(token, codes);
      // A vector of channels is part of a word or some words.
      constexpr int kPart = kChannels < kLanes ? kChannels : kLanes;
      for (int first = 0; first < kLanes; first += kPart) {
        const int field = (channel + first) % kChannels;
        char* out = tile + layout.k_codes_offset + 4 * (int64_t((channel + first) / kChannels) * group_size + token);
        Words word = field == 0 ? Words{} : load<Words>(out);
        for (int i = 0; i < kPart; ++i) word |= (Words)codes[first + i] << (BITS * (field + i));
        save(out, word);
      }
    }
  }
  if (BITS == 2 && layout.boosted_channels > 0) boost_keys<T>(layout, rows, errors, tile);
}

// Values: a group is up to G channels of one token; the lanes of the quantizer are equal.
template <class T, int BITS>
void quantize_values(const Layout& layout, const GroupRows<T>& rows, char* tile) {
  const int head_dim = layout.head_dim, group_size = layout.group_size;
  T* scales = reinterpret_cast<T*>(tile + layout.v_scale_offset);
  T* zeros = reinterpret_cast<T*>(tile + layout.v_zero_offset);
  for (int octet = 0; octet < group_size / 8; ++octet) {
    // Fields of a channel in place in its word; with 8 bits a channel has two words.
    Words fields[2][kMaxHeadDim / kLanes] = {};
    for (int i = 0; i < 8; ++i) {
      const int token = 8 * octet + i, half_word = i / 4 * 16, slot = i % 4;
      float value[kMaxHeadDim];
      for (int channel = 0; channel < head_dim; channel += kLanes) {
        save(value + channel, Quantizer<T, BITS>::finite(to_floats(rows.value[token] + channel)));
      }
      if (layout.rotate_values) {
        rotate(value, head_dim);
        for (int channel = 0; channel < head_dim; channel += kLanes) {
          save(value + channel, Quantizer<T, BITS>::finite(rounded<T>(load<Floats>(value + channel))));
        }
      }
      for (int group = 0; group < layout.num_value_groups; ++group) {
        const int first = group * group_size, end = at_most(first + group_size, head_dim);
        Quantizer<T, BITS> quantizer;
        Floats x[kMaxGroup / kLanes];
        for (int channel = first; channel < end; channel += kLanes) {
          x[(channel - first) / kLanes] = load<Floats>(value + channel);
          quantizer.see(x[(channel - first) / kLanes]);
        }
        quantizer.low = splat(reduce<Min>(quantizer.low));
        quantizer.high = splat(reduce<Max>(quantizer.high));
        quantizer.seen_all();
        if (BITS < 8 && layout.scale_search) {
          quantizer.search([&](const auto& candidate, Floats units) {
            Words sum = {};
            for (int i = 0; i < (end - first) / kLanes; ++i) sum += candidate.squared_error(x[i], units);
            return reduce<Add>(sum) - Words{};
          });
        }
        T lanes[kLanes];
        from_floats(lanes, quantizer.scale());
        scales[group * group_size + token] = lanes[0];
        from_floats(lanes, quantizer.zero());
        zeros[group * group_size + token] = lanes[0];
        for (int channel = first; channel < end; channel += kLanes) {
          const Words code = quantizer.code(x[(channel - first) / kLanes]);
          if constexpr (BITS == 2) {
            fields[0][channel / kLanes] |= code << ((Words)(lane_index() & 1) * 8u + (half_word + 2 * slot));
          } else if constexpr (BITS == 4) {
            fields[0][channel / kLanes] |= code << (half_word + 4 * slot);
          } else {
            fields[slot / 2][channel / kLanes] |= code << (half_word + 8 * (slot % 2));
          }
        }
      }
    }
    char* words = tile + layout.v_codes_offset + int64_t(octet) * head_dim * BITS;
    for (int i = 0; i < head_dim / kLanes; ++i) {
      char* out = words + i * kLanes * BITS;
      if constexpr (BITS == 2) {  // two channels share a word
        const Words pairs = fields[0][i] | swap<1>(fields[0][i]);
        const Words packed = even_lanes(pairs, pairs);
        std::memcpy(out, &packed, sizeof packed / 2);
      } else if constexpr (BITS == 4) {
        save(out, fields[0][i]);
      } else {
        save(out, interleave_low(fields[0][i], fields[1][i]));
        save(out + sizeof(Words), interleave_high(fields[0][i], fields[1][i]));
      }
    }
  }
}

// Keys or values of 16 bits: [G][D] elements.
template <class T>
void copy_rows(const Layout& layout, const T* const* rows, char* to) {
  const int64_t row_bytes = layout.head_dim * sizeof(T);
  for (int token = 0; token < layout.group_size; ++token) std::memcpy(to + token * row_bytes, rows[token], row_bytes);
}

template <class T>
void store_group(const StoreParams& params, int request, int head, int group) {
  const Layout& layout = params.layout;
  const int first_row = params.batch.query_start_loc[request];
  const int num_new = params.batch.query_start_loc[request + 1] - first_row;
  const int num_tokens = params.batch.seq_lens[request], num_old = num_tokens - num_new;
  const int first = group * layout.group_size, end = first + layout.group_size;
  const auto row = [&](const Rows& rows, int position) {
    return static_cast<const T*>(rows.data) + (first_row + position - num_old) * rows.token_stride +
           head * rows.head_stride;
  };
  const int64_t row_bytes = layout.head_dim * sizeof(T);
  for (int position = at_least(first, num_old); position < at_most(end, num_tokens); ++position) {
    T* token = full_token_of<T>(layout, params.full, request, head, position);
    if (token == nullptr) continue;
    std::memcpy(token, row(params.key, position), row_bytes);
    std::memcpy(token + layout.head_dim, row(params.value, position), row_bytes);
  }
  if (end > num_tokens) return;
  char* tile = tile_of(layout, params.quantized, request, head, first);
  if (tile == nullptr) return;
  GroupRows<T> rows;
  for (int i = 0; i < layout.group_size; ++i) {
    if (first + i >= num_old) {
      rows.key[i] = row(params.key, first + i);
      rows.value[i] = row(params.value, first + i);
    } else {
      const T* token = full_token_of<T>(layout, params.full, request, head, first + i);
      if (token == nullptr) return;  // its tokens are gone, so the group cannot be what it should
      rows.key[i] = token;
      rows.value[i] = token + layout.head_dim;
    }
  }
  if (layout.k_bits == 16) {
    copy_rows<T>(layout, rows.key, tile + layout.k_codes_offset);
  } else {
    with_bits(layout.k_bits, [&]<int BITS>() { quantize_keys<T, BITS>(layout, rows, tile); });
  }
  if (layout.v_bits == 16) {
    copy_rows<T>(layout, rows.value, tile + layout.v_codes_offset);
  } else {
    with_bits(layout.v_bits, [&]<int BITS>() { quantize_values<T, BITS>(layout, rows, tile); });
  }
}

template <class T>
void store_batch(const StoreParams& params, const Threads& threads) {
  const Batch& batch = params.batch;
  const int group_size = params.layout.group_size;
  const auto first_group = [&](int request) {
    return (batch.seq_lens[request] - batch.query_start_loc[request + 1] + batch.query_start_loc[request]) / group_size;
  };
  const auto num_groups = [&](int request) {
    if (batch.query_start_loc[request + 1] == batch.query_start_loc[request]) return 0;
    return (batch.seq_lens[request] - 1) / group_size + 1 - first_group(request);
  };
  int64_t count = 0;
  for (int request = 0; request < batch.num_reqs; ++request) count += num_groups(request);
  parallel(threads, count, [&](auto next) {
    int request = 0;
    int64_t first = 0;  // task of the request
    for (int64_t task = next(); task >= 0; task = next()) {
      while (task >= first + num_groups(request)) first += num_groups(request++);
      for (int head = 0; head < params.layout.num_kv_heads; ++head) {
        store_group<T>(params, request, head, first_group(request) + int(task - first));
      }
    }
  });
}

inline void store(const StoreParams& params, const Threads& threads) {
  switch (params.dtype) {
    case Dtype::kFloat32:
      return store_batch<float>(params, threads);
    case Dtype::kBFloat16:
      return store_batch<BFloat16>(params, threads);
    case Dtype::kFloat16:
      return store_batch<Float16>(params, threads);
  }
}

}  // namespace kivi::cpu::KIVI_ISA
