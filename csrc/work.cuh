// What decode does where: the line of units that is cut into equal parts, and the parameters of the kernel.
#pragma once

#include "page.cuh"

namespace kivi::cuda {

constexpr int kColumns = 8;
constexpr int kLogRunTokens = 3, kRunTokens = 1 << kLogRunTokens;  // of a unit in full precision
constexpr int kHalfTokens = 32;                                    // tokens of a tile that one step of products takes
constexpr int kStartUnits = 2;  // so many units take as long as to begin with an item
constexpr int kMaxWarps = 4;
constexpr int kBlocksPerMultiprocessor = 2;  // by registers

// Halves that are attended at once, by registers.
__host__ __device__ constexpr int halves_at_once(int head_dim, int k_bits) {
  return head_dim <= 128 && k_bits < 8 ? 2 : 1;
}

// 32-bit words of shared memory of a warp besides its stages: scales and zeros of a step as half2, the query as
// operands, and four for each lane.
__host__ __device__ constexpr int scale_words(int head_dim) { return 3 * head_dim / 2; }  // of a half
__host__ __device__ constexpr int warp_words(int head_dim, int k_bits) {
  return halves_at_once(head_dim, k_bits) * scale_words(head_dim) + kColumns * head_dim / 2 + 32 * 4;
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
  int32_t log_unit_tiles;  // tiles of a unit
  int32_t first_plain;     // unit of tiles without sinks
  int32_t min_units;       // of a warp's part
  int32_t num_stages;
  int32_t stage_bytes;
  int32_t unit_bytes;    // of tiles
  float4* first_sums;    // [blocks][warps][head_dim * 2] in the order of accumulators: of a warp's first segment
  float4* partials;      // [blocks][head_dim * 2] likewise, of the item that goes on in the next block
  float2* extremes;      // [blocks][8] maximum and sum of its columns
  int32_t* num_partial;  // [blocks] how many blocks have written their part of the item that ends in this one; 0
                         // between launches
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
    window = max(layout.full_precision ? 0 : first, num_sinks);
    shared_boundary = first;
    first_tile = num_sinks >> params.log_group_size;
    num_tiles = layout.full_precision ? 0 : max((last >> params.log_group_size) - first_tile, 0);
    num_tile_units = (num_tiles + (1 << params.log_unit_tiles) - 1) >> params.log_unit_tiles;
    num_units = num_tile_units + num_sink_units + unsigned(num_tokens - window + kRunTokens - 1) / kRunTokens;
    num_items = layout.num_kv_heads * (unsigned(num_rows * params.ratio.value + kColumns - 1) / kColumns);
    if (num_rows == 0) num_units = num_items = 0;
  }

  // Of the line: an item's units, and what a warp does before them.
  __device__ int item_units() const { return num_units > 0 ? num_units + kStartUnits : 0; }
  __device__ int line() const { return item_units() * num_items; }
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
  int line;        // where the request begins
  int begin, end;  // the warp's part of the line
  int from, to;    // the part of the item
};

// Of the line: what a block has.
struct Part {
  int size;  // of a warp's part
  int begin, end;
  int request, line;  // the one that it begins in, and where that begins
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

// Sums over all threads of the block; `scratch` is [kMaxWarps]. Ends with a barrier on entry of the next call.
__device__ inline int block_scan(int value, int* scratch, int& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  int sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int below = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += below;
  }
  __syncthreads();
  if (lane == 31) scratch[warp] = sum;
  __syncthreads();
  int before = 0;
  total = 0;
#pragma unroll 1
  for (int i = 0; i < num_warps; ++i) {
    before += i < warp ? scratch[i] : 0;
    total += scratch[i];
  }
  return before + sum - value;
}

// Cuts the line into equal parts, all threads at once. False if nothing is left for this block.
__device__ inline bool find_part(const DecodeParams& params, int* scratch, Part& part) {
  const int thread = threadIdx.x, num_requests = params.attention.batch.num_reqs;
  int length = 0, units = 0, before = 0;
#pragma unroll 1
  for (int first = 0; first < num_requests; first += blockDim.x) {
    int total;
    units = first + thread < num_requests ? Request(params, first + thread).line() : 0;
    before = length + block_scan(units, scratch, total);
    length += total;
  }
  const int num_warps = blockDim.x / 32, num_parts = gridDim.x * num_warps;
  const int size = max((length + num_parts - 1) / num_parts, params.min_units), begin = blockIdx.x * size * num_warps;
  if (begin >= length) return false;
  const int end = min(begin + size * num_warps, length);
  int first = 0;
  if (num_requests > blockDim.x) {  // find the chunk of requests again
    length = 0;
#pragma unroll 1
    for (;; first += blockDim.x) {
      int total;
      units = first + thread < num_requests ? Request(params, first + thread).line() : 0;
      before = length + block_scan(units, scratch, total);
      length += total;
      if (begin < length) break;
    }
  }
  if (before <= begin && begin < before + units) part = {size, begin, end, first + thread, before};
  __syncthreads();
  return true;
}

}  // namespace kivi::cuda
