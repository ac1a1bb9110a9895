// What decode does where: the line of units that is cut into equal parts, and the parameters of the kernel.
#pragma once

#include "page.cuh"

namespace kivi::cuda {

constexpr int kColumns = 8;
constexpr int kLogRunTokens = 3, kRunTokens = 1 << kLogRunTokens;  // of a unit in full precision
constexpr int kHalfTokens = 32;                                    // tokens of a tile that one step of products takes
// Of the line: what takes as long as a unit in full precision.
constexpr int kTileCost = 2;   // a unit of tiles
constexpr int kStartCost = 4;  // to begin with an item
constexpr int kMinCost = 4;    // of a part: less is not worth a merge
constexpr int kMaxWarps = 4;
constexpr int kMaxStages = 2;                // 3 or 4 take 2 % more time
constexpr int kBlocksPerMultiprocessor = 2;  // by registers

// Halves that are attended at once, by registers.
__host__ __device__ constexpr int halves_at_once(int head_dim, int k_bits) {
  return head_dim <= 128 && k_bits < 8 ? 2 : 1;
}

// 32-bit words of shared memory of a warp besides its stages: scales and zeros of a step as half2, the query as
// operands, four for each lane, and where there are boosted channels the query once more and a list of them.
__host__ __device__ constexpr int scale_words(int head_dim) { return 3 * head_dim / 2; }  // of a half
__host__ __device__ constexpr int warp_words(int head_dim, int k_bits, int boosted_channels) {
  const int halves = halves_at_once(head_dim, k_bits);
  const int boost = boosted_channels == 0 ? 0 : kColumns * head_dim / 2 + halves * boosted_channels;
  return halves * scale_words(head_dim) + kColumns * head_dim / 2 + 32 * 4 + boost;
}

// What P is multiplied by, and by how much a score may exceed the maximum, as exponents of 2. With the tops of
// Relative: P * value scale < 2^(6 + 3 + 6) and Q * key scale < 2^(6 + 9), within fp16.
constexpr int kProbabilityExponent = 6, kHeadroom = 3, kQueryExponent = 6;
constexpr int kKeyScaleTop = 8, kValueScaleTop = 5, kValueZeroTop = 13;

// n / value by a multiplication, for n * value < 2^32.
struct Divisor {
  uint32_t value, reciprocal;

  Divisor() = default;
  explicit Divisor(uint32_t value)
      : value(value), reciprocal(value == 1 ? 0 : uint32_t((uint64_t(1) << 32) / value) + 1) {}
  __device__ int divide(int n) const { return reciprocal == 0 ? n : __umulhi(n, reciprocal); }
  __device__ int modulo(int n) const { return n - divide(n) * value; }
};

struct DecodeParams {
  AttentionParams attention;
  Divisor page_tiles, full_page_tokens, ratio;
  float scale;             // of scores as exponents of 2
  float cap, cap_inverse;  // of such scores, 0 is off; 2 log2(e) / cap
  int32_t log_group_size;
  int32_t log_unit_tiles;  // 0 or 1: tiles of a unit are 2^this
  int32_t first_plain;     // unit of tiles without sinks

  int32_t num_stages;
  int32_t stage_bytes;
  int32_t unit_bytes;    // of tiles
  float4* first_sums;    // [blocks][warps][head_dim * 2] in the order of accumulators: of a warp's first segment
  float4* partials;      // [blocks][head_dim * 2] likewise, of the item that goes on in the next block
  float2* extremes;      // [blocks][8] maximum and sum of its columns
  int32_t* num_partial;  // [blocks], 0 between launches: how many wrote their part of the item that ends in this one
};

// How the line is cut: into parts of `size`, one a warp. An item takes `start` more of it than it costs, rounded up to
// a multiple: to whole parts, so that items share no part, where that leaves few warps without work.
struct Cut {
  int size, start, multiple;
};

// Rows of a request in the units of this kernel.
struct Request {
  int first_row, num_rows, num_tokens;  // of this step; tokens of all
  int first_tile, num_tiles, num_tile_units;
  int num_sinks, num_sink_units;
  int window;           // first token of the window
  int shared_boundary;  // below it, all rows read tiles
  int num_units, num_items;

  Request() = default;
  __device__ Request(const DecodeParams& params, int index) {
    const Layout& layout = params.attention.layout;
    const Batch& batch = params.attention.batch;
    first_row = batch.query_start_loc[index];
    num_rows = batch.query_start_loc[index + 1] - first_row;
    num_tokens = batch.seq_lens[index];
    if (num_rows <= 0 || num_tokens < num_rows) num_rows = num_tokens = 0;
    const int last = boundary(layout, num_tokens), first = boundary(layout, num_tokens - max(num_rows - 1, 0));
    num_sinks = min(layout.sink_tokens, num_tokens);
    num_sink_units = unsigned(num_sinks + kRunTokens - 1) / kRunTokens;
    window = max(layout.is_bypass() ? 0 : first, num_sinks);
    shared_boundary = first;
    first_tile = num_sinks >> params.log_group_size;
    num_tiles = layout.is_bypass() ? 0 : max((last >> params.log_group_size) - first_tile, 0);
    num_tile_units = (num_tiles + (1 << params.log_unit_tiles) - 1) >> params.log_unit_tiles;
    num_units = num_tile_units + num_sink_units + unsigned(num_tokens - window + kRunTokens - 1) / kRunTokens;
    num_items = layout.num_kv_heads * (unsigned(num_rows * params.ratio.value + kColumns - 1) / kColumns);
    if (num_rows == 0) num_units = num_items = 0;
  }

  __device__ int cost() const { return num_units + (kTileCost - 1) * num_tile_units; }  // of an item

  // Of an item, and of all.
  __device__ int item_line(const Cut& cut) const {
    return unsigned(cost() + cut.start + cut.multiple - 1) / cut.multiple * cut.multiple;
  }
  __device__ int line(const Cut& cut) const { return num_items == 0 ? 0 : item_line(cut) * num_items; }

  // The first unit of an item that does not begin before this place of it.
  __device__ int unit_at(const Cut& cut, int place) const {
    const int cost = max(place - cut.start, 0);
    return cost < kTileCost * num_tile_units ? unsigned(cost + kTileCost - 1) / kTileCost
                                             : min(cost - (kTileCost - 1) * num_tile_units, num_units);
  }
};

// A part of an item that a warp attended.
struct Segment {
  int request, item;         // index of the item within its request
  int item_begin, item_end;  // on the line
};

// What a warp is at, in shared memory to save registers.
struct Place {
  Request request;
  Segment segment;
  int head;
  int line;  // where the request begins
  Cut cut;
  int begin, end, block_begin, block_end;  // the warp's part of the line, and the block's
  int from, to;                            // the part of the item
};

struct Tokens {
  int first, end;
  bool sink;
};

__device__ inline Tokens tokens_of_unit(const Request& request, int unit) {
  int first = kRunTokens * (unit - request.num_tile_units);
  if (unit < request.num_tile_units + request.num_sink_units) {
    return {first, min(first + kRunTokens, request.num_sinks), true};
  }
  first += request.window - kRunTokens * request.num_sink_units;
  return {first, min(first + kRunTokens, request.num_tokens), false};
}

constexpr int kCuts = 4;  // that are tried

// Cuts the line and finds where this warp begins. Each warp does so on its own, without a barrier. False if nothing is
// left for the block.
__device__ inline bool find_place(const DecodeParams& params, Place& place) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  const int num_parts = gridDim.x * num_warps, num_requests = params.attention.batch.num_reqs;
  const int requests_of_lane = unsigned(num_requests + 31) / 32;
  const int first = lane * requests_of_lane, stop = min(first + requests_of_lane, num_requests);
  const Request own(params, min(first, num_requests - 1));
  const auto sum = [&](auto function) {  // over this lane's requests
    int value = first < stop ? function(own) : 0;
#pragma unroll 1
    for (int i = first + 1; i < stop; ++i) value += function(Request(params, i));
    return value;
  };
  const auto share = [&](int length) { return max(unsigned(length + num_parts - 1) / num_parts, kMinCost); };

  const int least =
      share(__reduce_add_sync(~0u, sum([](const Request& request) { return request.cost() * request.num_items; })));
  Cut cut = {0, kStartCost, 1};
#pragma unroll 1
  for (int i = 0; i < kCuts; ++i) {
    const unsigned size = least + i * max(least / 32, 1);
    const int parts =
        sum([&](const Request& request) { return (request.cost() + size - 1) / size * request.num_items; });
    if (__reduce_add_sync(~0u, parts) <= num_parts) {
      cut = {int(size), 0, int(size)};
      break;
    }
  }
  const int length = sum([&](const Request& request) { return request.line(cut); });
  int line = length;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int below = __shfl_up_sync(~0u, line, step);
    if (lane >= step) line += below;
  }
  const int end = __shfl_sync(~0u, line, 31);
  line -= length;
  if (cut.size == 0) cut.size = share(end);

  const int block_begin = blockIdx.x * cut.size * num_warps, begin = block_begin + warp * cut.size;
  if (block_begin >= end) return false;
  if (line <= begin && begin < line + length) {
    place.request = own;
    place.segment.request = first;
    while (begin >= line + place.request.line(cut)) {
      line += place.request.line(cut);
      place.request = Request(params, ++place.segment.request);
    }
    place.line = line;
  }
  if (lane == 0) {
    place.cut = cut;
    place.begin = place.to = begin;
    place.end = min(begin + cut.size, end);
    place.block_begin = block_begin;
    place.block_end = min(block_begin + cut.size * num_warps, end);
  }
  __syncwarp();
  return true;
}

}  // namespace kivi::cuda
