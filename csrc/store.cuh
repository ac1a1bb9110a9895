// store: writes new tokens to full-precision pages and quantizes the groups that they complete.
//
// A block has a run of rows of one head. Each of its warps finds out, a lane a row, which request and position a row
// is; the warps share out the rows to copy, and then all work on each group whose last token is among the rows. So one
// launch, whose grid depends on nothing but the number of rows, serves any batch, and decoding (one row a block) has a
// whole block for a group.
//
// A group's tokens are rows of `key` and `value`, or, older than the batch, in full-precision pages; shared memory has
// their addresses. A warp holds 16 channels of 32 tokens of keys, or 64 channels of 8 tokens of values: two channels of
// eight tokens a lane either way. It reads a larger group a second time for the codes. Nothing else is shared:
// - keys: a channel's tokens are in four lanes; a word of codes is put together by a transpose over 16 / bits lanes;
// - values: a token's group of channels is in 16 or 32 lanes, which find all eight minima at once, halving what each
//   lane has at each step; a lane has all codes of its words.
//
// With scale_search each group is quantized for eight ranges, from registers where it has 32 elements: about 100
// instructions an element. A kernel of its own, so that without the search nothing changes.
//
// Decoding is bound by a chain of dependent loads (rows' starts, block table, page); prefill by memory, if instructions
// stay below about 20 an element.
#pragma once

#include "page.cuh"
#include "quant_tile.cuh"
#include "rows.cuh"

namespace kivi::cuda {

constexpr int kStoreThreads = 256;

// Two channels of eight tokens. `aligned`: otherwise rows may begin anywhere.
template <class T>
__device__ inline void load_tokens(Pair<T> (&x)[8], const char* const* rows, int channel, bool aligned) {
  const int offset = channel * int(sizeof(T));
  if (aligned) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = __ldg(reinterpret_cast<const Pair<T>*>(rows[i] + offset));
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const T* elements = reinterpret_cast<const T*>(rows[i] + offset);
      x[i].x = __ldg(elements);
      x[i].y = __ldg(elements + 1);
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = finite<T>(x[i]);
}

// Of a lane's group. error_of: see Scale::best.
template <bool SEARCH, class T, int BITS, class F>
__device__ inline Scale<T, BITS> scale_of(float low, float high, const F& error_of) {
  if constexpr (SEARCH) {
    return Scale<T, BITS>::best(low + 0.0f, high + 0.0f, error_of);
  } else {
    return Scale<T, BITS>(low, high);
  }
}

// Keys of channels 16 * unit to 16 * unit + 15, all tokens. rows: addresses of the group's tokens.
template <class T, int BITS, bool SEARCH>
__device__ inline void quantize_keys(const Layout& layout, const char* const* rows, bool aligned, int unit, int lane,
                                     char* tile) {
  using Codes = KeyCodes<BITS>;
  constexpr int kTokens = Halves<BITS>::kTokens;
  const int channel = 16 * unit + lane % 8 * 2, num_runs = layout.group_size / 32;
  Pair<T> x[8];
  const auto load = [&](int run) { load_tokens<T>(x, rows + 32 * run + lane / 8 * 8, channel, aligned); };
  Pair<T> low = largest<T>(), high = lowest<T>();
#pragma unroll 1
  for (int run = 0; run < num_runs; ++run) {
    load(run);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      low = smaller(low, x[i]);
      high = larger(high, x[i]);
    }
  }
#pragma unroll
  for (int width = 8; width < 32; width *= 2) {
    low = smaller(low, from_lane_xor(low, width));
    high = larger(high, from_lane_xor(high, width));
  }
  // Lanes 0-7 and 16-23 compute the first channel's scale, the others the second one's.
  const bool is_second = lane & 8;
  const int first_lane = lane & ~8, second_lane = lane | 8;
  const auto of_channels = [&](float x) -> float2 {
    return {__shfl_sync(~0u, x, first_lane), __shfl_sync(~0u, x, second_lane)};
  };
  const auto quantizer_of = [&](const Scale<T, BITS>& scale) {
    const Pair<T> terms = Number<T>::pair(scale.factor, scale.minus_low);
    const float2 divisors = of_channels(scale.divisor);
    return Quantizer<T, BITS, SEARCH>(from_lane(terms, first_lane), from_lane(terms, second_lane), divisors.x,
                                      divisors.y);
  };
  const auto error_of = [&](const Scale<T, BITS>& scale, float unit) {
    const Quantizer<T, BITS, SEARCH> quantizer = quantizer_of(scale);
    const float2 scales = of_channels(scale.scale), units = of_channels(unit);
    uint32_t first = 0, second = 0;
#pragma unroll 1
    for (int run = 0; run < num_runs; ++run) {
      if (num_runs > 1) load(run);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint2 errors = quantizer.squared_errors(x[i], scales, units);
        first += errors.x;
        second += errors.y;
      }
    }
    const uint32_t sum = (is_second ? second : first) + __shfl_xor_sync(~0u, is_second ? first : second, 8);
    return sum + __shfl_xor_sync(~0u, sum, 16);
  };
  const float2 lows = to_floats(low), highs = to_floats(high);
  const Scale<T, BITS> own =
      scale_of<SEARCH, T, BITS>(is_second ? lows.y : lows.x, is_second ? highs.y : highs.x, error_of);
  if (lane < 16) {
    const int offset = (channel + is_second) * int(sizeof(T));
    const Pair<T> stored = Number<T>::pair(own.scale, own.zero);
    *reinterpret_cast<T*>(tile + layout.k_scale_offset + offset) = stored.x;
    *reinterpret_cast<T*>(tile + layout.k_zero_offset + offset) = stored.y;
  }
  const Quantizer<T, BITS, SEARCH> quantizer = quantizer_of(own);
#pragma unroll 1
  for (int run = num_runs - 1; run >= 0; --run) {
    if (run < num_runs - 1) load(run);
    Halves<BITS> halves;
#pragma unroll
    for (int i = 0; i < 8; ++i) halves.add(i, quantizer.codes(x[i]));
#pragma unroll
    for (int i = 0; i < 8; i += kTokens) {
      const int token = 32 * run + lane / 8 * 8 + i + lane % kTokens;
      *reinterpret_cast<uint32_t*>(tile + Codes::offset(layout, channel, token)) =
          Codes::word(halves.words[i / kTokens], lane);
    }
  }
}

// Values of tokens 8 * octet to 8 * octet + 7 and `span` channels: whole groups, one or two times 64 channels.
template <class T, int BITS, bool SEARCH>
__device__ inline void quantize_values(const Layout& layout, const char* const* rows, bool aligned, int octet,
                                       int first_channel, int span, int lane, char* tile) {
  using Codes = ValueCodes<BITS>;
  const int head_dim = layout.head_dim, group_size = layout.group_size;
  const int num_chunks = (min(span, head_dim - first_channel) + 63) / 64;
  Pair<T> x[8];
  const auto load = [&](int chunk) {
    // Lanes past the last channel repeat it, which changes neither minimum nor maximum of its group.
    const int channel = min(first_channel + 64 * chunk + 2 * lane, head_dim - 2);
    load_tokens<T>(x, rows + 8 * octet, channel, aligned);
  };
  Pair<T> range[8];  // of each token: {minimum, -maximum}
#pragma unroll
  for (int i = 0; i < 8; ++i) range[i] = largest<T>();
#pragma unroll 1
  for (int chunk = 0; chunk < num_chunks; ++chunk) {
    load(chunk);
#pragma unroll
    for (int i = 0; i < 8; ++i) range[i] = smaller(range[i], range_of(x[i]));
  }
  // Each step exchanges half of the tokens; what is left at the end is token lane % 8.
  const auto of_token = [&](auto(&each)[8], const auto& combined) {
#pragma unroll
    for (int width = 4; width > 0; width /= 2) {
      const bool upper = lane & width;
#pragma unroll
      for (int i = 0; i < width; ++i) {
        const auto kept = chosen(upper, each[i + width], each[i]), sent = chosen(upper, each[i], each[i + width]);
        each[i] = combined(kept, from_lane_xor(sent, width));
      }
    }
    each[0] = combined(each[0], from_lane_xor(each[0], 8));
    return group_size > 32 ? combined(each[0], from_lane_xor(each[0], 16)) : each[0];
  };
  const auto quantizer_of = [&](const Scale<T, BITS>& scale, int token) {
    const Pair<T> terms = from_lane(Number<T>::pair(scale.factor, scale.minus_low), (lane & ~7) | token);
    const float divisor = __shfl_sync(~0u, scale.divisor, (lane & ~7) | token);
    return Quantizer<T, BITS, SEARCH>(terms, terms, divisor, divisor);
  };
  const auto error_of = [&](const Scale<T, BITS>& scale, float unit) {
    uint32_t sums[8] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < num_chunks; ++chunk) {
      if (num_chunks > 1) load(chunk);
      const bool is_channel = first_channel + 64 * chunk + 2 * lane < head_dim;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float own_scale = __shfl_sync(~0u, scale.scale, (lane & ~7) | i);
        const float own_unit = __shfl_sync(~0u, unit, (lane & ~7) | i);
        const uint2 errors = quantizer_of(scale, i).squared_errors(x[i], {own_scale, own_scale}, {own_unit, own_unit});
        sums[i] += is_channel ? errors.x + errors.y : 0;
      }
    }
    return of_token(sums, [](uint32_t a, uint32_t b) { return a + b; });
  };
  const float2 limits = to_floats(of_token(range, [](Pair<T> a, Pair<T> b) { return smaller(a, b); }));
  const Scale<T, BITS> own = scale_of<SEARCH, T, BITS>(limits.x, -limits.y, error_of);
  const int group = (first_channel + 2 * lane) >> (__ffs(group_size) - 1);
  if ((lane & (min(group_size / 2, 32) - 1)) < 8 && group < layout.num_value_groups) {
    const int offset = (group * group_size + 8 * octet + lane % 8) * int(sizeof(T));
    const Pair<T> stored = Number<T>::pair(own.scale, own.zero);
    *reinterpret_cast<T*>(tile + layout.v_scale_offset + offset) = stored.x;
    *reinterpret_cast<T*>(tile + layout.v_zero_offset + offset) = stored.y;
  }
#pragma unroll 1
  for (int chunk = num_chunks - 1; chunk >= 0; --chunk) {
    if (chunk < num_chunks - 1) load(chunk);
    Halves<BITS> halves;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      halves.add(i, quantizer_of(own, i).codes(x[i]));
    }
    const int channel = first_channel + 64 * chunk + 2 * lane;
    if (channel < head_dim) {
      *reinterpret_cast<typename Codes::Words*>(tile + Codes::offset(layout, octet, channel)) = Codes::words(halves);
    }
  }
}

struct NewToken {
  int request = -1;   // -1: the row is padding
  int first_row = 0;  // of the request
  int position = 0;
};

__device__ inline NewToken locate(const Batch& batch, int row) {
  // A step of decoding has one row a request, so the first guess is right and its loads do not wait for each other.
  NewToken token;
  int request = min(row, batch.num_reqs - 1);
  int first = __ldg(batch.query_start_loc + request), end = __ldg(batch.query_start_loc + request + 1);
  int num_tokens = __ldg(batch.seq_lens + request);
  if (row < first || row >= end) {
    request = request_of(batch.query_start_loc, batch.num_reqs, row);
    if (request < 0) return token;
    first = __ldg(batch.query_start_loc + request);
    end = __ldg(batch.query_start_loc + request + 1);
    num_tokens = __ldg(batch.seq_lens + request);
  }
  return {request, first, num_tokens - (end - row)};
}

// Of a multiprocessor: as many as have the registers they need.
template <class T, bool SEARCH>
constexpr int kStoreBlocks = sizeof(T) == 4 ? 2 : (SEARCH ? 3 : 4);

template <class T, int K_BITS, int V_BITS, bool SEARCH>
__global__ void __launch_bounds__(kStoreThreads, kStoreBlocks<T, SEARCH>)
    store_kernel(const __grid_constant__ StoreParams params, int num_rows, int rows_per_block, bool aligned) {
  constexpr int kWarps = kStoreThreads / 32;
  constexpr bool kSearchKeys = SEARCH && (K_BITS < 8), kSearchValues = SEARCH && (V_BITS < 8);
  const Layout& layout = params.layout;
  const int head = blockIdx.x % layout.num_kv_heads, first_row = blockIdx.x / layout.num_kv_heads * rows_per_block;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int head_dim = layout.head_dim, group_size = layout.group_size, row_bytes = head_dim * sizeof(T);

  NewToken token;
  if (lane < rows_per_block && first_row + lane < num_rows) token = locate(params.batch, first_row + lane);
  int full_block = 0, quantized_block = 0;  // the latter only where the token completes a group
  if (token.request >= 0) {
    full_block = block_of(params.full, token.request, token.position / layout.full_page_tokens);
    if (((token.position + 1) & (group_size - 1)) == 0) {
      quantized_block = block_of(params.quantized, token.request, token.position / layout.page_tokens);
    }
  }

  // Keys and values apart, so that neither waits for the other; the last warps, as the first ones find a group's
  // tokens.
  for (int i = kWarps - 1 - warp; i < 2 * rows_per_block; i += kWarps) {
    const int block = __shfl_sync(~0u, full_block, i / 2), position = __shfl_sync(~0u, token.position, i / 2);
    if (block == 0) continue;
    char* to = full_token_of(layout, params.full, block, head, position, sizeof(T)) + i % 2 * row_bytes;
    const Rows& rows = i % 2 == 0 ? params.key : params.value;
    copy_row<T>(to, row_of<T>(rows, first_row + i / 2, head), head_dim, aligned, lane);
  }

  __shared__ const char* keys[kMaxGroup];
  __shared__ const char* values[kMaxGroup];
  for (unsigned complete = __ballot_sync(~0u, quantized_block != 0); complete != 0; complete &= complete - 1) {
    const int i = __ffs(complete) - 1;
    const int request = __shfl_sync(~0u, token.request, i), first_new_row = __shfl_sync(~0u, token.first_row, i);
    const int first = __shfl_sync(~0u, token.position, i) + 1 - group_size;
    char* tile = tile_of(layout, params.quantized, __shfl_sync(~0u, quantized_block, i), head, first);
    __syncthreads();  // nobody reads the addresses of the group before
    bool gone = false;
    if (threadIdx.x < group_size) {
      const int t = threadIdx.x, row = first_row + i + 1 - group_size + t;
      if (row >= first_new_row) {
        keys[t] = row_of<T>(params.key, row, head);
        values[t] = row_of<T>(params.value, row, head);
      } else {
        const int block = block_of(params.full, request, (first + t) / layout.full_page_tokens);
        keys[t] = full_token_of(layout, params.full, block, head, first + t, sizeof(T));
        values[t] = keys[t] + row_bytes;
        gone = block == 0;
      }
    }
    if (__syncthreads_or(gone)) continue;  // without its tokens the group cannot be what it should

    if (layout.full_precision) {
      for (int t = warp; t < group_size; t += kWarps) {
        copy_row<T>(tile + layout.k_codes_offset + t * row_bytes, keys[t], head_dim, aligned, lane);
        copy_row<T>(tile + layout.v_codes_offset + t * row_bytes, values[t], head_dim, aligned, lane);
      }
      continue;
    }
    const int key_units = head_dim / 16, octets = group_size / 8;
    const int span = max(group_size, 64), spans = (head_dim + span - 1) >> (__ffs(span) - 1);
    for (int unit = warp; unit < key_units + octets * spans; unit += kWarps) {
      const int value_unit = unit - key_units;
      if (value_unit < 0) {
        quantize_keys<T, K_BITS, kSearchKeys>(layout, keys, aligned, unit, lane, tile);
      } else {
        const int octet = value_unit & (octets - 1), first_channel = (value_unit >> (__ffs(octets) - 1)) * span;
        quantize_values<T, V_BITS, kSearchValues>(layout, values, aligned, octet, first_channel, span, lane, tile);
      }
    }
  }
}

}  // namespace kivi::cuda
