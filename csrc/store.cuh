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
// What may change the choice of scales (scale_search, boosted channels) or the values (rotate_values) is in
// tuned_store.cuh, a kernel of its own, so that without them nothing changes.
//
// Decoding is bound by a chain of dependent loads (rows' starts, block table, page); prefill by memory, if instructions
// stay below about 20 an element.
#pragma once

#include "page.cuh"
#include "quant_tile.cuh"
#include "rows.cuh"

namespace kivi::cuda {

constexpr int kStoreThreads = 256;

// Two elements from global memory. `aligned`: otherwise they may begin anywhere.
template <class T>
__device__ inline Pair<T> load_pair(const char* from, bool aligned) {
  Pair<T> x;
  if (aligned) {
    x = __ldg(reinterpret_cast<const Pair<T>*>(from));
  } else {
    x.x = __ldg(reinterpret_cast<const T*>(from));
    x.y = __ldg(reinterpret_cast<const T*>(from) + 1);
  }
  return finite<T>(x);
}

// Two channels of eight tokens.
template <class T>
__device__ inline void load_tokens(Pair<T> (&x)[8], const char* const* rows, int channel, bool aligned) {
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = load_pair<T>(rows[i] + channel * int(sizeof(T)), aligned);
}

// Of two channels over all tokens of a group. load(run) reads eight of them into x; the lanes that differ by 8 and 16
// have the others of a run. x keeps the last run.
template <class T, class Load>
__device__ inline void find_ranges(const Pair<T> (&x)[8], int num_runs, const Load& load, Pair<T>& low, Pair<T>& high) {
  low = largest<T>();
  high = lowest<T>();
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
}

// Keys of channels 16 * unit to 16 * unit + 15, all tokens. rows: addresses of the group's tokens.
template <class T, int BITS>
__device__ inline void quantize_keys(const Layout& layout, const char* const* rows, bool aligned, int unit, int lane,
                                     char* tile) {
  using Codes = KeyCodes<BITS>;
  constexpr int kTokens = Halves<BITS>::kTokens;
  const int channel = 16 * unit + lane % 8 * 2, num_runs = layout.group_size / 32;
  Pair<T> x[8];
  const auto load = [&](int run) { load_tokens<T>(x, rows + 32 * run + lane / 8 * 8, channel, aligned); };
  Pair<T> low, high;
  find_ranges<T>(x, num_runs, load, low, high);
  // Lanes 0-7 and 16-23 compute the first channel's scale, the others the second one's.
  const bool is_second = lane & 8;
  const float2 lows = to_floats(low), highs = to_floats(high);
  const Scale<T, BITS> own(is_second ? lows.y : lows.x, is_second ? highs.y : highs.x);
  if (lane < 16) {
    const int offset = (channel + is_second) * int(sizeof(T));
    const Pair<T> stored = Number<T>::pair(own.scale, own.zero);
    *reinterpret_cast<T*>(tile + layout.k_scale_offset + offset) = stored.x;
    *reinterpret_cast<T*>(tile + layout.k_zero_offset + offset) = stored.y;
  }
  const int first_lane = lane & ~8, second_lane = lane | 8;
  const Pair<T> terms = Number<T>::pair(own.factor, own.minus_low);
  const Quantizer<T, BITS> quantizer(from_lane(terms, first_lane), from_lane(terms, second_lane),
                                     __shfl_sync(~0u, own.divisor, first_lane),
                                     __shfl_sync(~0u, own.divisor, second_lane));
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
template <class T, int BITS>
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
#pragma unroll
  for (int width = 4; width > 0; width /= 2) {
    const bool upper = lane & width;
#pragma unroll
    for (int i = 0; i < width; ++i) {
      const Pair<T> kept = chosen(upper, range[i + width], range[i]), sent = chosen(upper, range[i], range[i + width]);
      range[i] = smaller(kept, from_lane_xor(sent, width));
    }
  }
  range[0] = smaller(range[0], from_lane_xor(range[0], 8));
  if (group_size > 32) range[0] = smaller(range[0], from_lane_xor(range[0], 16));
  const float2 limits = to_floats(range[0]);
  const Scale<T, BITS> own(limits.x, -limits.y);
  const int group = (first_channel + 2 * lane) >> (__ffs(group_size) - 1);
  if ((lane & (min(group_size / 2, 32) - 1)) < 8 && group < layout.num_value_groups) {
    const int offset = (group * group_size + 8 * octet + lane % 8) * int(sizeof(T));
    const Pair<T> stored = Number<T>::pair(own.scale, own.zero);
    *reinterpret_cast<T*>(tile + layout.v_scale_offset + offset) = stored.x;
    *reinterpret_cast<T*>(tile + layout.v_zero_offset + offset) = stored.y;
  }
  const Pair<T> own_terms = Number<T>::pair(own.factor, own.minus_low);
#pragma unroll 1
  for (int chunk = num_chunks - 1; chunk >= 0; --chunk) {
    if (chunk < num_chunks - 1) load(chunk);
    Halves<BITS> halves;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const Pair<T> terms = from_lane(own_terms, (lane & ~7) | i);
      const float divisor = __shfl_sync(~0u, own.divisor, (lane & ~7) | i);
      const Quantizer<T, BITS> quantizer(terms, terms, divisor, divisor);
      halves.add(i, quantizer.codes(x[i]));
    }
    const int channel = first_channel + 64 * chunk + 2 * lane;
    if (channel < head_dim) {
      *reinterpret_cast<typename Codes::Words*>(tile + Codes::offset(layout, octet, channel)) = Codes::words(halves);
    }
  }
}

// A row of the batch, and where it belongs.
struct NewRow {
  int request = -1;   // -1: the row is padding
  int first_row = 0;  // of the request
  int position = 0;
  int full_block = 0, quantized_block = 0;  // the latter only where the token completes a group
};

__device__ inline NewRow find_row(const StoreParams& params, int row, bool exists) {
  const Batch& batch = params.batch;
  NewRow found;
  if (!exists) return found;
  // A step of decoding has one row a request, so the first guess is right and its loads do not wait for each other.
  int request = min(row, batch.num_reqs - 1);
  int first = __ldg(batch.query_start_loc + request), end = __ldg(batch.query_start_loc + request + 1);
  int num_tokens = __ldg(batch.seq_lens + request);
  if (row < first || row >= end) {
    request = request_of(batch.query_start_loc, batch.num_reqs, row);
    if (request < 0) return found;
    first = __ldg(batch.query_start_loc + request);
    end = __ldg(batch.query_start_loc + request + 1);
    num_tokens = __ldg(batch.seq_lens + request);
  }
  const int position = num_tokens - (end - row);
  found = {request, first, position, block_of(params.full, request, position / params.layout.full_page_tokens)};
  if (((position + 1) & (params.layout.group_size - 1)) == 0) {
    found.quantized_block = block_of(params.quantized, request, position / params.layout.page_tokens);
  }
  return found;
}

// By a block: the tile of the group that the row of lane `source` completes, and in shared memory the addresses of its
// keys and values. Null if a token of it is gone: without it the group cannot be what it should.
template <class T>
__device__ inline char* find_group(const StoreParams& params, const NewRow& own, int source, int row, int head,
                                   const char** keys, const char** values) {
  const Layout& layout = params.layout;
  const int request = __shfl_sync(~0u, own.request, source), first_new_row = __shfl_sync(~0u, own.first_row, source);
  const int first = __shfl_sync(~0u, own.position, source) + 1 - layout.group_size;
  bool gone = false;
  if (threadIdx.x < layout.group_size) {
    const int t = threadIdx.x, token_row = row + 1 - layout.group_size + t;
    if (token_row >= first_new_row) {
      keys[t] = row_of<T>(params.key, token_row, head);
      values[t] = row_of<T>(params.value, token_row, head);
    } else {
      const int block = block_of(params.full, request, (first + t) / layout.full_page_tokens);
      keys[t] = full_token_of(layout, params.full, block, head, first + t, sizeof(T));
      values[t] = keys[t] + layout.head_dim * sizeof(T);
      gone = block == 0;
    }
  }
  char* tile = tile_of(layout, params.quantized, __shfl_sync(~0u, own.quantized_block, source), head, first);
  return __syncthreads_or(gone) ? nullptr : tile;
}

template <class T, int K_BITS, int V_BITS>
__global__ void __launch_bounds__(kStoreThreads, sizeof(T) == 4 ? 2 : 4)
    store_kernel(const __grid_constant__ StoreParams params, int num_rows, int rows_per_block, bool aligned) {
  constexpr int kWarps = kStoreThreads / 32;
  const Layout& layout = params.layout;
  const int head = blockIdx.x % layout.num_kv_heads, first_row = blockIdx.x / layout.num_kv_heads * rows_per_block;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int head_dim = layout.head_dim, group_size = layout.group_size, row_bytes = head_dim * int(sizeof(T));

  const NewRow token = find_row(params, first_row + lane, lane < rows_per_block && first_row + lane < num_rows);

  // Keys and values apart, so that neither waits for the other; the last warps, as the first ones find a group's
  // tokens.
  for (int i = kWarps - 1 - warp; i < 2 * rows_per_block; i += kWarps) {
    const int block = __shfl_sync(~0u, token.full_block, i / 2), position = __shfl_sync(~0u, token.position, i / 2);
    if (block == 0) continue;
    char* to = full_token_of(layout, params.full, block, head, position, sizeof(T)) + i % 2 * row_bytes;
    const Rows& rows = i % 2 == 0 ? params.key : params.value;
    copy_row<T>(to, row_of<T>(rows, first_row + i / 2, head), head_dim, aligned, lane);
  }

  __shared__ const char* keys[kMaxGroup];
  __shared__ const char* values[kMaxGroup];
  for (unsigned complete = __ballot_sync(~0u, token.quantized_block != 0); complete != 0; complete &= complete - 1) {
    const int i = __ffs(complete) - 1;
    __syncthreads();  // nobody reads the addresses of the group before
    char* tile = find_group<T>(params, token, i, first_row + i, head, keys, values);
    if (tile == nullptr) continue;

    if (layout.is_bypass()) {
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
        quantize_keys<T, K_BITS>(layout, keys, aligned, unit, lane, tile);
      } else {
        const int octet = value_unit & (octets - 1), first_channel = (value_unit >> (__ffs(octets) - 1)) * span;
        quantize_values<T, V_BITS>(layout, values, aligned, octet, first_channel, span, lane, tile);
      }
    }
  }
}

}  // namespace kivi::cuda
