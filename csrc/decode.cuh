// decode: attention of a few query rows a request over quantized tiles and full-precision tokens, in one launch.
//
// Work. A unit is a tile, or 8 tokens in full precision. An item is a request, a KV head and up to 8 of its columns: a
// column is a query row and a query head that shares the KV head. The units of all items lie on one line, which is cut
// into equal parts, one a warp, whatever the lengths are. A warp is on its own: its units arrive by bulk copies in a
// ring of stages that it alone waits for. At the end the warps of a block merge the items that they share, and an item
// that lies in several blocks is merged by the one that finishes last, always in the same order.
//
// A tile. Tokens are the rows of S = K Q^T, columns the 8 columns, so codes are unpacked once for all query heads and
// are the A operand as they are (operands.cuh). Key scales are folded into Q, once a tile; key zeros are one more row
// product, the value with which S starts. The transpose of P takes one instruction per 8 tokens, and value scales are
// folded into it, once per value group; value zeros again are a product of their own. So there is no arithmetic per
// code but its mask.
//
// Exponents. P is kept relative to a maximum that is only raised when a score exceeds it by kHeadroom, scales relative
// to a power of two; so the rescaling of sums is rare, and decided by one vote.
//
// Bound by memory: 96 bytes per token and KV head at 2 bits, head size 128 and groups of 32. Instructions are about 350
// per tile and warp, a third of what an H100 can issue in the time that memory needs.
#pragma once

#include "operands.cuh"
#include "page.cuh"

namespace kivi::cuda {

constexpr int kColumns = 8;
constexpr int kUnitTokens = 8;  // of a full-precision unit
constexpr int kMaxWarps = 4;
template <int HEAD_DIM>
constexpr int kBlocksPerMultiprocessor = HEAD_DIM <= 128 ? 3 : 2;  // by registers
constexpr int kSubTile = 32;  // tokens of a tile that are attended at once

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
  int32_t log_group_size;
  int32_t min_units;  // of a warp's part
  int32_t num_stages;
  int32_t stage_bytes;
  float* first_sums;  // [blocks][warps][head_dim * 8] in the order of accumulators: of a warp's first segment
  float* partials;    // [2 * blocks][head_dim * 8] likewise, of the items that a block does not hold whole
  float2* extremes;   // [2 * blocks][8] maximum and sum of their columns
  int32_t* finished;  // [blocks], 0 between launches
};

// Rows of a request in the units of this kernel.
struct Request {
  int num_rows, num_tokens;  // of this step; of all
  int first_tile, num_tiles;
  int num_sinks, num_sink_units;
  int window;           // first token of the window
  int shared_boundary;  // below it, all rows read tiles
  int num_units, num_items;

  Request() = default;
  __device__ Request(const AttentionParams& params, int index, int ratio) {
    const Layout& layout = params.layout;
    num_rows = params.batch.query_start_loc[index + 1] - params.batch.query_start_loc[index];
    num_tokens = params.batch.seq_lens[index];
    if (num_rows <= 0 || num_tokens < num_rows) num_rows = num_tokens = 0;
    const int last = boundary(layout, num_tokens), first = boundary(layout, num_tokens - max(num_rows - 1, 0));
    num_sinks = min(layout.sink_tokens, num_tokens);
    num_sink_units = unsigned(num_sinks + kUnitTokens - 1) / kUnitTokens;
    window = max(layout.full_precision ? 0 : first, num_sinks);
    shared_boundary = first;
    const int log_group = 31 - __clz(layout.group_size);
    first_tile = num_sinks >> log_group;
    num_tiles = layout.full_precision ? 0 : max((last >> log_group) - first_tile, 0);
    num_units = num_tiles + num_sink_units + unsigned(num_tokens - window + kUnitTokens - 1) / kUnitTokens;
    num_items = layout.num_kv_heads * (unsigned(num_rows * ratio + kColumns - 1) / kColumns);
    if (num_rows == 0) num_units = num_items = 0;
  }

  __device__ int line() const { return num_units * num_items; }
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
  int line;      // where the request begins
  int from, to;  // the part of the item
};

struct Tokens {
  int first, end;
  bool sink;
};

__device__ inline Tokens tokens_of_unit(const Request& request, int unit) {
  int first = kUnitTokens * (unit - request.num_tiles);
  if (unit < request.num_tiles + request.num_sink_units) {
    return {first, min(first + kUnitTokens, request.num_sinks), true};
  }
  first += request.window - kUnitTokens * request.num_sink_units;
  return {first, min(first + kUnitTokens, request.num_tokens), false};
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

template <class T, int D, int K_BITS, int V_BITS>
struct Decoder {
  static constexpr int kRowBytes = 2 * D;                  // of a key or value in full precision
  static constexpr int kTokenStride = 2 * kRowBytes + 16;  // in a stage: the padding avoids bank conflicts
  static constexpr int kPrepareBytes = 6 * D;
  static constexpr int kKeyWords = D * K_BITS / 128;  // of a lane, per token
  static constexpr int kBlocks = D / 16;              // row blocks of the output
  static constexpr float kLog2E = 1.4426950408889634f;

  const DecodeParams& params;
  const Layout& layout;
  const int lane, g, t;
  char* stages;       // this warp's
  uint32_t barriers;  // this warp's, one a stage
  uint32_t phases;    // a bit for each stage
  char* prepared;     // this warp's scales as half2
  const Place& place;

  int first_key_scales, first_value_scales, key_zeros_at, key_codes, value_codes;  // of this lane in a tile

  const char* source;  // of the copies of unit sources_from and later ones
  int sources_from;
  int value_distance;  // from a key in full precision to its value

  uint32_t query_codes[D / 8];  // fp16, for products with codes
  uint32_t query[D / 8];        // as given, for all else
  int query_exponent[2];        // of the power of two that query_codes were divided by, of columns 2t and 2t + 1
  int row[2];                   // of columns 2t and 2t + 1

  // Sums. Lanes hold columns 2t and 2t + 1.
  float output[kBlocks][4];  // block 2b + x: rows g and g + 8 are channels 32 b + 4 g + 2 x and + 1
  float zeros[2][4];         // rows are value groups: g of the first, g + 8 of the second
  float maximum[2], sum[2];
  int key_exponent, value_exponent, zero_exponent;
  uint32_t key_limit, value_limit, zero_limit;   // largest_of them
  uint32_t key_shift, value_shift[2], zero_shift;
  float factor[2];  // from sums of products of query_codes and codes to scores as exponents of 2

  __device__ Decoder(const DecodeParams& params, const Place& place, char* stages, uint32_t barriers, char* prepared)
      : params(params),
        layout(params.attention.layout),
        lane(threadIdx.x % 32),
        g(threadIdx.x % 32 / 4),
        t(threadIdx.x % 4),
        stages(stages),
        barriers(opaque(barriers)),
        phases(0),
        prepared(prepared),
        place(place),
        first_key_scales(opaque(key_scales_at(0))),
        first_value_scales(opaque(value_scales_at(0))),
        key_zeros_at(opaque(layout.k_zero_offset + lane / 16 * 16)),
        key_codes(opaque(layout.k_codes_offset + 4 * (t * layout.group_size + 4 * g))),
        value_codes(opaque(layout.v_codes_offset + t * (D * V_BITS) + g * (4 * V_BITS))) {}

  // ------------------------------------------------------------------------------------------------------- copies

  // Finds where units from this one on are copied from, all lanes at once: 32 tiles, or 4 units of tokens.
  __device__ void find_sources(int unit) {
    const AttentionParams& attention = params.attention;
    const Request& request = place.request;
    sources_from = unit;
    if (unit < request.num_tiles) {
      const int tile = request.first_tile + min(unit + lane, request.num_tiles - 1), page = params.page_tiles.divide(tile);
      const int block = block_of(attention.quantized, place.segment.request, page);
      source = page_of(attention.quantized, block, place.head) + (tile - page * params.page_tiles.value) * layout.tile_bytes;
      return;
    }
    const Tokens tokens = tokens_of_unit(request, min(unit + lane / kUnitTokens, request.num_units - 1));
    const int token = min(tokens.first + lane % kUnitTokens, tokens.end - 1);
    // With the full_precision bypass, tiles hold tokens as they are.
    if (layout.full_precision && token >= request.num_sinks && token < request.shared_boundary) {
      const int tile = token >> params.log_group_size, page = params.page_tiles.divide(tile);
      const int block = block_of(attention.quantized, place.segment.request, page);
      source = page_of(attention.quantized, block, place.head) +
               (tile - page * params.page_tiles.value) * layout.tile_bytes + (token & (layout.group_size - 1)) * kRowBytes;
      value_distance = layout.v_codes_offset;
    } else {
      const int page = params.full_page_tokens.divide(token);
      const int block = block_of(attention.full, place.segment.request, page);
      source = full_token_at(layout, attention.full, block, place.head, token - page * params.full_page_tokens.value,
                             sizeof(T));
      value_distance = kRowBytes;
    }
  }

  __device__ void start_copy(int unit, int stage) {
    constexpr int kLanesOfUnit = kUnitTokens;
    const uint32_t to = shared_address(stages) + stage * params.stage_bytes, barrier = barriers + 8 * stage;
    int index = unit - sources_from;
    if (unit < place.request.num_tiles) {
      if (index == 32) {
        find_sources(unit);
        index = 0;
      }
      if constexpr (kBulkCopies) {
        if (lane == index) {
          expect_bytes(barrier, layout.tile_bytes);
          bulk_copy(to, source, layout.tile_bytes, barrier);
        }
      } else {
        const char* tile = shuffle(source, index);
        for (int i = 16 * lane; i < layout.tile_bytes; i += 512) copy16(to + i, tile + i);
      }
    } else {
      if (index == 32 / kLanesOfUnit || unit == place.request.num_tiles) {
        find_sources(unit);
        index = 0;
      }
      if constexpr (kBulkCopies) {
        if (lane == index * kLanesOfUnit) expect_bytes(barrier, 2 * kUnitTokens * kRowBytes);
        __syncwarp();
        if (lane / kLanesOfUnit == index) {
          const uint32_t row_to = to + lane % kLanesOfUnit * kTokenStride;
          if (layout.full_precision) {
            bulk_copy(row_to, source, kRowBytes, barrier);
            bulk_copy(row_to + kRowBytes, source + value_distance, kRowBytes, barrier);
          } else {
            bulk_copy(row_to, source, 2 * kRowBytes, barrier);
          }
        }
      } else {  // 4 lanes a token
        const int from_lane = index * kLanesOfUnit + lane % kLanesOfUnit;
        const char* key = shuffle(source, from_lane);
        const char* value = key + __shfl_sync(~0u, value_distance, from_lane);
        const uint32_t row_to = to + lane % kLanesOfUnit * kTokenStride;
        for (int i = 16 * (lane / kLanesOfUnit); i < kRowBytes; i += 64) {
          copy16(row_to + i, key + i);
          copy16(row_to + kRowBytes + i, value + i);
        }
      }
    }
    end_copies(barrier);
  }

  __device__ const char* wait(int stage) {
    mbarrier_wait(barriers + 8 * stage, phases >> stage & 1);
    phases ^= 1u << stage;
    return stages + stage * params.stage_bytes;
  }

  // ------------------------------------------------------------------------------------------------------ segment

  __device__ void begin_segment(int ratio) {
    const AttentionParams& attention = params.attention;
    const int first_row = attention.batch.query_start_loc[place.segment.request];
    const int first_column = place.segment.item / layout.num_kv_heads * kColumns, num_columns = place.request.num_rows * ratio;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      row[i] = min(params.ratio.divide(first_column + 2 * t + i), place.request.num_rows - 1);
    }

    const int column = first_column + g, column_row = params.ratio.divide(column);
    const T* source = static_cast<const T*>(attention.query.data) +
                      (first_row + column_row) * attention.query.token_stride +
                      (place.head * ratio + params.ratio.modulo(column)) * attention.query.head_stride;
    const bool valid = column < num_columns;
#pragma unroll
    for (int i = 0; i < D / 8; ++i) query[i] = valid ? *reinterpret_cast<const uint32_t*>(source + 8 * i + 2 * t) : 0;

    // query_codes[i * kPairs + e]: channels e and e + kPairs of word t + 4 i.
    constexpr int kPairsOfWord = kPairs<K_BITS>;
    float2 pairs[D / 8];
    float largest = 0;
#pragma unroll
    for (int i = 0; i < kKeyWords; ++i) {
      const T* word = source + (t + 4 * i) * 2 * kPairsOfWord;
#pragma unroll
      for (int e = 0; e < kPairsOfWord; e += 2) {
        uint32_t low = valid ? *reinterpret_cast<const uint32_t*>(word + e) : 0;
        uint32_t high = valid ? *reinterpret_cast<const uint32_t*>(word + e + kPairsOfWord) : 0;
        interleave(low, high);
        const float2 a = unpack_pair<T>(low), b = unpack_pair<T>(high);
        pairs[i * kPairsOfWord + e] = a;
        pairs[i * kPairsOfWord + e + 1] = b;
        largest = fmaxf(fmaxf(largest, fmaxf(fabsf(a.x), fabsf(a.y))), fmaxf(fabsf(b.x), fabsf(b.y)));
      }
    }
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    // largest < 2^exponent; what is not finite is left to the products.
    const int exponent = min(max((__float_as_int(largest) >> 23) - 126, -60), 100);
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      const float factor = power_of_two(kQueryExponent - exponent - position<K_BITS>(i % kPairsOfWord));
      query_codes[i] = pack<__half>(pairs[i].x * factor, pairs[i].y * factor);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) query_exponent[i] = __shfl_sync(~0u, exponent, 4 * (2 * t + i)) - kQueryExponent;

#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) output[block][i] = 0;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) zeros[0][i] = zeros[1][i] = 0;
    maximum[0] = maximum[1] = -1e30f;
    sum[0] = sum[1] = 0;
    key_exponent = value_exponent = zero_exponent = Relative<T>::kLowest;
    set_scales();
  }

  __device__ void set_scales() {
    key_limit = largest_of<T>(key_exponent);
    value_limit = largest_of<T>(value_exponent);
    zero_limit = largest_of<T>(zero_exponent);
    key_shift = Relative<T>::shift(key_exponent, kKeyScaleTop);
    zero_shift = Relative<T>::shift(zero_exponent, kValueZeroTop);
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // of tokens 2 (lane % 2) + i of four: the positions of their codes
      const int at = lane % 2 == 0 ? position<V_BITS>(i) : position<V_BITS>(2 + i);
      value_shift[i] = Relative<T>::shift(value_exponent, kValueScaleTop, at);
      factor[i] = power_of_two(query_exponent[i] + 24 - kKeyScaleTop + key_exponent - Relative<T>::kBias) *
                  (params.attention.scale * kLog2E);
    }
  }

  __device__ void rescale(float even, float odd) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      output[block][0] *= even;
      output[block][1] *= odd;
      output[block][2] *= even;
      output[block][3] *= odd;
    }
  }

  // Of columns 2t and 2t + 1.
  __device__ void rescale_zeros(float even, float odd) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      zeros[0][i] *= i % 2 == 0 ? even : odd;
      zeros[1][i] *= i % 2 == 0 ? even : odd;
    }
  }

  // Turns N products of columns 2t and 2t + 1, of tokens of which other lanes hold others, into elements of P. Scores,
  // as exponents of 2, are product * factor + start.
  template <int N>
  __device__ void take_softmax(float (&products)[N][2], float (&factor)[2], float (&start)[2]) {
    if (params.attention.logits_soft_cap > 0) cap(products, factor, start);
    float relative[N][2], highest[2];
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const float offset = start[column] + (kProbabilityExponent - maximum[column]);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        relative[i][column] = fmaf(products[i][column], factor[column], offset);
        highest[column] = i == 0 ? relative[i][column] : fmaxf(highest[column], relative[i][column]);
      }
    }
    if (__any_sync(~0u, fmaxf(highest[0], highest[1]) > kProbabilityExponent + kHeadroom)) {
      float lowered[2];
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        float high = maximum[column];
#pragma unroll
        for (int i = 0; i < N; ++i) high = fmaxf(high, fmaf(products[i][column], factor[column], start[column]));
#pragma unroll
        for (int step = 4; step < 32; step *= 2) high = fmaxf(high, __shfl_xor_sync(~0u, high, step));
        lowered[column] = exp2_approx(maximum[column] - high);
        maximum[column] = high;
        sum[column] *= lowered[column];
#pragma unroll
        for (int i = 0; i < N; ++i) {
          // Of huge scores the maximum is rounded, and this is not.
          relative[i][column] =
              fminf(fmaf(products[i][column], factor[column], start[column] + (kProbabilityExponent - high)),
                    kProbabilityExponent + kHeadroom);
        }
      }
      rescale(lowered[0], lowered[1]);
      rescale_zeros(lowered[0], lowered[1]);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        products[i][column] = exp2_approx(relative[i][column]);
        sum[column] += products[i][column];
      }
    }
  }

  // Caps scores; afterwards they are the products. tanh(x) = 1 - 2 / (exp(2 x) + 1).
  template <int N>
  __device__ void cap(float (&products)[N][2], float (&factor)[2], float (&start)[2]) const {
    const float limit = params.attention.logits_soft_cap * kLog2E;
#pragma unroll
    for (int column = 0; column < 2; ++column) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float score = fmaf(products[i][column], factor[column], start[column]);
        const float power = exp2_approx(score * (2 * kLog2E / limit));
        products[i][column] = score == -INFINITY ? score : limit - __fdividef(2 * limit, power + 1);
      }
      factor[column] = 1;
      start[column] = 0;
    }
  }

  __device__ bool visible(int token, int column, bool from_tile, bool sink) const {
    const int position = place.request.num_tokens - place.request.num_rows + row[column];
    if (sink) return token <= position;
    if (layout.full_precision) return token <= position;
    const int limit = boundary(layout, position + 1);
    return from_tile ? token >= layout.sink_tokens && token < limit : token >= limit && token <= position;
  }

  // --------------------------------------------------------------------------------------------------------- tile

  // Reads pairs of scales or zeros that are `distance` elements apart.
  __device__ static uint2 load_pairs(const char* from, int distance) {
    uint2 pairs = {*reinterpret_cast<const uint32_t*>(from),
                   *reinterpret_cast<const uint32_t*>(from + distance * sizeof(T))};
    interleave(pairs.x, pairs.y);
    return pairs;
  }

  // The larger exponent of all lanes' numbers, if it exceeds this one.
  __device__ static int larger_exponent(uint32_t magnitudes, int exponent) {
    const int high = max(magnitudes >> 16, magnitudes & 0xFFFF) >> Relative<T>::kExponentShift;
    return __reduce_max_sync(~0u, max(high, exponent));
  }

  static constexpr int kRounds = (D / 4 + 31) / 32;

  // Of this lane, from the begin of a tile.
  __device__ int key_scales_at(int round) const {
    constexpr int kHalfWord = kPairs<K_BITS>;                 // channels
    const int channel = 2 * min(lane + 32 * round, D / 4 - 1);  // slots: 2 channels and those half a word later
    return layout.k_scale_offset + sizeof(T) * (channel / kHalfWord * (2 * kHalfWord) + channel % kHalfWord);
  }

  __device__ int value_scales_at(int round) const {
    const int slot = min(lane + 32 * round, 8 * layout.num_value_groups - 1);  // slots: 2 tokens and those 4 later
    return layout.v_scale_offset +
           sizeof(T) * ((slot / 8 << params.log_group_size) + slot % 8 / 2 * 8 + slot % 2 * 2);
  }

  struct Prepared {
    uint2 keys[kRounds], scales[kRounds], zeros[kRounds];
    uint32_t largest_key, largest_scale, largest_zero;
  };

  __device__ Prepared load_scales(const char* tile, int first_token) const {
    Prepared p;
    p.largest_key = p.largest_scale = p.largest_zero = 0;
    const char* value_scales = tile + first_token * sizeof(T);
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int value_at = i == 0 ? first_value_scales : value_scales_at(i);
      p.keys[i] = load_pairs(tile + (i == 0 ? first_key_scales : key_scales_at(i)), kPairs<K_BITS>);
      p.scales[i] = load_pairs(value_scales + value_at, 4);
      p.zeros[i] = load_pairs(value_scales + value_at + (layout.v_zero_offset - layout.v_scale_offset), 4);
      p.largest_key = __vmaxu2(p.largest_key, __vmaxu2(p.keys[i].x, p.keys[i].y));
      p.largest_scale = __vmaxu2(p.largest_scale, __vmaxu2(p.scales[i].x, p.scales[i].y));
      p.largest_zero = __vmaxu2(p.largest_zero, __vmaxu2(p.zeros[i].x & 0x7FFF7FFF, p.zeros[i].y & 0x7FFF7FFF));
    }
    return p;
  }

  __device__ void store_scales(const Prepared& p) const {
    uint2* out = reinterpret_cast<uint2*>(prepared) + lane;
    const auto signed_half = [&](uint32_t pair) {
      return Relative<T>::to_half(pair & 0x7FFF7FFF, zero_shift) | (pair & 0x80008000);
    };
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      if (D % 128 != 0 && lane >= D / 4) break;
      out[32 * i] = {Relative<T>::to_half(p.keys[i].x, key_shift), Relative<T>::to_half(p.keys[i].y, key_shift)};
      out[32 * i + D / 4] = {Relative<T>::to_half(p.scales[i].x, value_shift[0]),
                             Relative<T>::to_half(p.scales[i].y, value_shift[1])};
      // Pairs 0, 2, 1, 3: see multiply_values.
      uint32_t* zeros_out = reinterpret_cast<uint32_t*>(prepared) + D + (lane + 32 * i) / 2 * 4 + lane % 2;
      zeros_out[0] = signed_half(p.zeros[i].x);
      zeros_out[2] = signed_half(p.zeros[i].y);
    }
  }

  // Writes scales and zeros of 32 tokens as half2, in the order in which products read them. Lanes that have nothing
  // to do repeat the last one's work. `meanwhile` is done while the loads are under way.
  template <class Meanwhile>
  __device__ void prepare(const char* tile, int first_token, Meanwhile meanwhile) {
    const Prepared p = load_scales(tile, first_token);
    meanwhile();
    const bool larger = __vmaxu2(p.largest_key, key_limit) != key_limit ||
                        __vmaxu2(p.largest_scale, value_limit) != value_limit ||
                        __vmaxu2(p.largest_zero, zero_limit) != zero_limit;
    store_scales(p);
    if (__any_sync(~0u, larger)) {
      const int value_before = value_exponent, zero_before = zero_exponent;
      key_exponent = larger_exponent(p.largest_key, key_exponent);
      value_exponent = larger_exponent(p.largest_scale, value_exponent);
      zero_exponent = larger_exponent(p.largest_zero, zero_exponent);
      set_scales();
      const float factor = power_of_two(value_before - value_exponent);
      rescale(factor, factor);
      const float zero_factor = power_of_two(zero_before - zero_exponent);
      rescale_zeros(zero_factor, zero_factor);
      store_scales(load_scales(tile, first_token));
    }
    __syncwarp();
  }

  __device__ void attend_tile(const char* tile, int unit) {
    const int first = (place.request.first_tile + unit) << params.log_group_size;
    // Warp-uniform: a tile that not every column reads whole.
    const bool edge = first < layout.sink_tokens || first >= place.request.shared_boundary;
#pragma unroll 1
    for (int first_token = 0; first_token < layout.group_size; first_token += kSubTile) {
      float key_zeros[2][4] = {}, scores[2][4] = {};  // block m: rows g and g + 8 are tokens 4 g + 2 m and + 1
      prepare(tile, first_token, [&] {
        const uint32_t zero_row = shared_address(tile) + key_zeros_at;
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
          uint32_t a[4];
          ldmatrix(a, zero_row + 32 * i);  // every row of A is the same
          mma_k16<T>(key_zeros[i % 2], a[0], a[1], a[2], a[3], query[2 * i], query[2 * i + 1]);
        }
      });
      multiply_keys(tile, first_token, scores);

      float probability[4][2];  // of tokens 4 g + ...
#pragma unroll
      for (int i = 0; i < 8; ++i) probability[i / 2][i % 2] = scores[i / 4][i % 4];
      float factors[2] = {factor[0], factor[1]}, start[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) start[i] = (key_zeros[0][i] + key_zeros[1][i]) * (params.attention.scale * kLog2E);
      if (edge) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int column = 0; column < 2; ++column) {
            if (!visible(first + first_token + 4 * g + i, column, true, false)) probability[i][column] = -INFINITY;
          }
        }
      }
      take_softmax(probability, factors, start);
      uint32_t weights[4];  // of tokens 8 t + i and 8 t + i + 4, column g
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[i] = movmatrix(pack<__half>(probability[i][0], probability[i][1]));
      multiply_values(tile, first_token, weights);
      __syncwarp();
    }
  }

  __device__ void multiply_keys(const char* tile, int first_token, float (&scores)[2][4]) const {
    constexpr int kPairsOfWord = kPairs<K_BITS>;
    const char* codes = tile + key_codes + 4 * first_token;
    const uint32_t* scale = reinterpret_cast<const uint32_t*>(prepared);
#pragma unroll
    for (int i = 0; i < kKeyWords; ++i) {
      const int word = t + 4 * i;
      const uint4 words = *reinterpret_cast<const uint4*>(codes + i * (16 * layout.group_size));
      uint32_t folded[kPairsOfWord];
      if constexpr (kPairsOfWord == 2) {
        const uint2 scales = reinterpret_cast<const uint2*>(scale)[word];
        folded[0] = scales.x;
        folded[1] = scales.y;
      } else {
#pragma unroll
        for (int e = 0; e < kPairsOfWord; e += 4) {
          reinterpret_cast<uint4&>(folded[e]) = reinterpret_cast<const uint4*>(scale)[(word * kPairsOfWord + e) / 4];
        }
      }
#pragma unroll
      for (int e = 0; e < kPairsOfWord; ++e) folded[e] = multiply(folded[e], query_codes[i * kPairsOfWord + e]);
      uint32_t a[4][kPairsOfWord];
      unpack<K_BITS>(words.x, a[0]);
      unpack<K_BITS>(words.y, a[1]);
      unpack<K_BITS>(words.z, a[2]);
      unpack<K_BITS>(words.w, a[3]);
#pragma unroll
      for (int e = 0; e < kPairsOfWord; e += 2) {
        mma_k16<__half>(scores[0], a[0][e], a[1][e], a[0][e + 1], a[1][e + 1], folded[e], folded[e + 1]);
        mma_k16<__half>(scores[1], a[2][e], a[3][e], a[2][e + 1], a[3][e + 1], folded[e], folded[e + 1]);
      }
    }
  }

  __device__ void multiply_values(const char* tile, int first_token, const uint32_t (&weights)[4]) {
    const uint4* scales = reinterpret_cast<const uint4*>(prepared + 2 * D) + t;
    // One A serves both halves of the tokens: the sums of the first in rows g, of the second in rows g + 8. Rows that
    // are no value group are never read.
    const uint4 zero = reinterpret_cast<const uint4*>(prepared + 4 * D)[lane % (D / 8)];
    mma_k16<__half>(zeros[0], zero.x, zero.y, zero.z, zero.w, weights[0], weights[1]);
    mma_k16<__half>(zeros[1], zero.x, zero.y, zero.z, zero.w, weights[2], weights[3]);
    // Words of tokens 8 t ... 8 t + 7 and channels 4 g ... 4 g + 3 of each 32.
    const char* codes = tile + value_codes + first_token / 8 * (D * V_BITS);
#pragma unroll
    for (int b = 0; b < D / 32; ++b) {
      const uint4 scale = scales[4 * (32 * b >> params.log_group_size)];
      const uint32_t folded[4] = {multiply(weights[0], scale.x), multiply(weights[1], scale.y),
                                  multiply(weights[2], scale.z), multiply(weights[3], scale.w)};
      uint32_t words[V_BITS];
      if constexpr (V_BITS == 2) {
        reinterpret_cast<uint2&>(words) = *reinterpret_cast<const uint2*>(codes + b * 32 * V_BITS);
      } else {
#pragma unroll
        for (int i = 0; i < V_BITS; i += 4) {
          reinterpret_cast<uint4&>(words[i]) = *reinterpret_cast<const uint4*>(codes + b * 32 * V_BITS + 4 * i);
        }
      }
      uint32_t a[4][4];  // [channel][pair of tokens]
#pragma unroll
      for (int i = 0; i < V_BITS; ++i) {
        uint32_t pairs[kPairs<V_BITS>];
        unpack<V_BITS>(words[i], pairs);
#pragma unroll
        for (int e = 0; e < kPairs<V_BITS>; ++e) {
          a[(i * kPairs<V_BITS> + e) / 4][(i * kPairs<V_BITS> + e) % 4] = pairs[e];
        }
      }
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        mma_k16<__half>(output[2 * b + x], a[2 * x][0], a[2 * x + 1][0], a[2 * x][1], a[2 * x + 1][1], folded[0],
                        folded[1]);
        mma_k16<__half>(output[2 * b + x], a[2 * x][2], a[2 * x + 1][2], a[2 * x][3], a[2 * x + 1][3], folded[2],
                        folded[3]);
      }
    }
  }

  // After the last tile: sums in the units of P and values, zeros added.
  __device__ void end_tiles() {
    const float unit = power_of_two(24 - kValueScaleTop + value_exponent - Relative<T>::kBias);
    const float zero_unit = power_of_two(zero_exponent - Relative<T>::kBias - kValueZeroTop);
    rescale(unit, unit);
#pragma unroll
    for (int b = 0; b < D / 32; ++b) {
      const int from = (32 * b >> params.log_group_size) * 4 + t;
      const float even = __shfl_sync(~0u, zeros[0][0] + zeros[1][2], from) * zero_unit;
      const float odd = __shfl_sync(~0u, zeros[0][1] + zeros[1][3], from) * zero_unit;
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        output[2 * b + x][0] += even;
        output[2 * b + x][1] += odd;
        output[2 * b + x][2] += even;
        output[2 * b + x][3] += odd;
      }
    }
  }

  // The column's sums over all lanes.
  __device__ void finish_sums() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], step);
    }
  }

  // ------------------------------------------------------------------------------------------------ full precision

  __device__ void attend_tokens(const char* stage, int unit) {
    const Tokens tokens = tokens_of_unit(place.request, unit);
    float scores[4] = {};  // rows g are tokens; rows g + 8 are not used
    const uint32_t key = shared_address(stage) + lane % 8 * kTokenStride + lane / 8 * 16;
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
      uint32_t a[4];
      ldmatrix(a, key + 64 * i);
      mma_k16<T>(scores, a[0], 0, a[1], 0, query[4 * i], query[4 * i + 1]);
      mma_k16<T>(scores, a[2], 0, a[3], 0, query[4 * i + 2], query[4 * i + 3]);
    }
    float probability[1][2] = {{scores[0], scores[1]}};
    const float scale = params.attention.scale * kLog2E;
    float factors[2] = {scale, scale}, start[2] = {};
    const int token = tokens.first + g;
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      if (token >= tokens.end || !visible(token, column, false, tokens.sink)) probability[0][column] = -INFINITY;
    }
    take_softmax(probability, factors, start);
    const uint32_t weights = movmatrix(pack<T>(probability[0][0], probability[0][1]));  // tokens 2 t, 2 t + 1, column g
    const char* value = stage + kRowBytes + 2 * t * kTokenStride + 8 * g;
#pragma unroll
    for (int b = 0; b < D / 32; ++b) {
      uint2 even = *reinterpret_cast<const uint2*>(value + 64 * b);
      uint2 odd = *reinterpret_cast<const uint2*>(value + kTokenStride + 64 * b);
      interleave(even.x, odd.x);
      interleave(even.y, odd.y);
      mma_k8<T>(output[2 * b], even.x, odd.x, weights);
      mma_k8<T>(output[2 * b + 1], even.y, odd.y, weights);
    }
  }
};

// A column's maximum and sum, of 2 t and 2 t + 1.
struct Extremes {
  float maximum[2] = {-1e30f, -1e30f}, sum[2] = {};

  __device__ void raise(int column, float2 other) { maximum[column] = fmaxf(maximum[column], other.x); }
  __device__ void add(int column, float2 other) { sum[column] += other.y * exp2f(other.x - maximum[column]); }
};

__device__ inline void add_scaled(float4& sums, float4 x, float even, float odd) {
  sums.x += x.x * even;
  sums.y += x.y * odd;
  sums.z += x.z * even;
  sums.w += x.w * odd;
}

// Writes the output of an item. Element i holds channels 2 i' and 2 i' + 1 of columns 2 t (x, z) and 2 t + 1 (y, w).
template <class T>
__device__ inline void write_output(const DecodeParams& params, const Segment& segment, int element, float4 merged,
                                    const float (&sum)[2]) {
  const AttentionParams& attention = params.attention;
  const int ratio = params.ratio.value;
  const int first_row = attention.batch.query_start_loc[segment.request];
  const int num_rows = attention.batch.query_start_loc[segment.request + 1] - first_row;
  const int channel = element / 64 * 32 + element % 32 / 4 * 4 + element / 32 % 2 * 2;
  const int first_column = segment.item / attention.layout.num_kv_heads * kColumns + 2 * (element % 4);
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int column = first_column + c;
    if (column >= num_rows * ratio) continue;
    const int head = segment.item % attention.layout.num_kv_heads * ratio + params.ratio.modulo(column);
    T* out = static_cast<T*>(attention.output.data) + (first_row + params.ratio.divide(column)) * attention.output.token_stride +
             head * attention.output.head_stride + channel;
    const float inverse = 1.0f / sum[c];
    *reinterpret_cast<uint32_t*>(out) =
        c == 0 ? pack<T>(merged.x * inverse, merged.z * inverse) : pack<T>(merged.y * inverse, merged.w * inverse);
  }
}

template <class T, int D, int K_BITS, int V_BITS>
__global__ void __launch_bounds__(32 * kMaxWarps, kBlocksPerMultiprocessor<D>)
    decode_kernel(const __grid_constant__ DecodeParams params) {
  using Kernel = Decoder<T, D, K_BITS, V_BITS>;
  constexpr int kElements = 32 * Kernel::kBlocks;  // float4 of an item's sums
  extern __shared__ __align__(128) char shared[];
  __shared__ __align__(8) uint64_t barriers[kMaxWarps][4];
  __shared__ float2 extremes[kMaxWarps][2][kColumns];  // of a warp's first and last segment
  __shared__ Segment segments[kMaxWarps][2];
  __shared__ Place places[kMaxWarps];
  __shared__ int scratch[kMaxWarps + 2];

  const AttentionParams& attention = params.attention;
  const Layout& layout = attention.layout;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, num_warps = blockDim.x / 32;
  const int ratio = params.ratio.value, num_stages = params.num_stages;
  const int warp_bytes = num_stages * params.stage_bytes;
  char* stages = shared + warp * warp_bytes;
  char* prepared = shared + num_warps * warp_bytes + warp * Kernel::kPrepareBytes;
  if (lane < num_stages) mbarrier_init(shared_address(&barriers[warp][lane]));
  fence_before_copies();

  // The line: its length, this block's and this warp's part, and the request that the part begins in.
  const int num_requests = attention.batch.num_reqs;
  int length = 0, units = 0, before = 0;
#pragma unroll 1
  for (int first = 0; first < num_requests; first += blockDim.x) {
    int total;
    units = first + thread < num_requests ? Request(attention, first + thread, ratio).line() : 0;
    before = length + block_scan(units, scratch, total);
    length += total;
  }
  const int num_parts = gridDim.x * num_warps;
  const int part = max((length + num_parts - 1) / num_parts, params.min_units);
  const int block_part = part * num_warps, block_begin = blockIdx.x * block_part;
  const int block_end = min(block_begin + block_part, length);
  if (block_begin >= block_end) return;
  if (num_requests > blockDim.x) {  // find the chunk of requests again
    int so_far = 0;
#pragma unroll 1
    for (int first = 0; first < num_requests; first += blockDim.x) {
      int total;
      units = first + thread < num_requests ? Request(attention, first + thread, ratio).line() : 0;
      before = so_far + block_scan(units, scratch, total);
      so_far += total;
      if (before <= block_begin && block_begin < before + units) {
        scratch[kMaxWarps] = first + thread;
        scratch[kMaxWarps + 1] = before;
      }
    }
  } else if (before <= block_begin && block_begin < before + units) {
    scratch[kMaxWarps] = thread;
    scratch[kMaxWarps + 1] = before;
  }
  __syncthreads();
  const int begin = block_begin + warp * part, end = min(begin + part, block_end);

  if (begin < end) {
    Place& place = places[warp];
    Kernel kernel(params, place, stages, shared_address(barriers[warp]), prepared);
    if (lane == 0) {
      place.request = Request(attention, scratch[kMaxWarps], ratio);
      place.segment.request = scratch[kMaxWarps];
      place.line = scratch[kMaxWarps + 1];
      place.to = begin;
    }
    do {
      if (lane == 0) {
        place.from = place.to;
        while (place.from >= place.line + place.request.line()) {
          place.line += place.request.line();
          place.request = Request(attention, ++place.segment.request, ratio);
        }
        place.segment.item = (place.from - place.line) / place.request.num_units;
        place.segment.item_begin = place.line + place.segment.item * place.request.num_units;
        place.segment.item_end = place.segment.item_begin + place.request.num_units;
        place.to = min(place.segment.item_end, end);
        place.head = place.segment.item % layout.num_kv_heads;
      }
      __syncwarp();

      int unit = place.from - place.segment.item_begin, next = unit;
      const int last = place.to - place.segment.item_begin;
      kernel.find_sources(unit);
      for (int stage = 0; stage < num_stages && next < last; ++stage) kernel.start_copy(next++, stage);
      kernel.begin_segment(ratio);
      int stage = 0;
      const int end_of_tiles = min(last, place.request.num_tiles);
      for (; unit < end_of_tiles; ++unit) {
        kernel.attend_tile(kernel.wait(stage), unit);
        if (next < last) kernel.start_copy(next++, stage);
        stage = stage + 1 == num_stages ? 0 : stage + 1;
      }
      kernel.end_tiles();
      for (; unit < last; ++unit) {
        kernel.attend_tokens(kernel.wait(stage), unit);
        __syncwarp();
        if (next < last) kernel.start_copy(next++, stage);
        stage = stage + 1 == num_stages ? 0 : stage + 1;
      }
      kernel.finish_sums();

      const bool is_last = place.to == end;
      const bool is_whole = place.segment.item_begin >= begin && place.segment.item_end <= end;
      // All stages are free.
      float4* sums = is_last || is_whole
                         ? reinterpret_cast<float4*>(stages)
                         : reinterpret_cast<float4*>(params.first_sums) + (blockIdx.x * num_warps + warp) * kElements;
#pragma unroll
      for (int i = 0; i < Kernel::kBlocks; ++i) {
        sums[32 * i + lane] = {kernel.output[i][0], kernel.output[i][1], kernel.output[i][2], kernel.output[i][3]};
      }
      if (is_whole) {  // a lane reads what it wrote
#pragma unroll 1
        for (int i = lane; i < kElements; i += 32) write_output<T>(params, place.segment, i, sums[i], kernel.sum);
        fence_before_copies();
      }
      if (lane < 4 && !is_whole) {
        extremes[warp][is_last][2 * lane] = {kernel.maximum[0], kernel.sum[0]};
        extremes[warp][is_last][2 * lane + 1] = {kernel.maximum[1], kernel.sum[1]};
      }
      if (lane == 0) {
        if (place.from == begin) segments[warp][0] = place.segment;
        segments[warp][1] = place.segment;
      }
      __syncwarp();
    } while (place.to < end);
  }
  __syncthreads();

  // Items that no warp had whole. Only the first and the last segment of a warp can belong to one.
  const int column = 2 * (lane % 4);
  for (int w = 0; w < num_warps && block_begin + w * part < block_end; ++w) {
    const int warp_begin = block_begin + w * part, warp_end = min(warp_begin + part, block_end);
    for (int which = 0; which < 2; ++which) {
      const Segment segment = segments[w][which];
      if (which == 1 && segment.item_begin <= warp_begin) continue;  // the first segment is the last, too
      if (segment.item_begin >= warp_begin && segment.item_end <= warp_end) continue;       // written
      if (segment.item_begin < warp_begin && w > 0) continue;  // merged with an earlier warp
      const int last_warp = (min(segment.item_end, block_end) - 1 - block_begin) / part;
      const auto extreme = [&](int v, int c) {
        const bool is_last = segment.item_end >= min(block_begin + (v + 1) * part, block_end);
        return extremes[v][is_last][column + c];
      };
      Extremes merged;
#pragma unroll 1
      for (int v = w; v <= last_warp; ++v) {
        for (int c = 0; c < 2; ++c) merged.raise(c, extreme(v, c));
      }
#pragma unroll 1
      for (int v = w; v <= last_warp; ++v) {
        for (int c = 0; c < 2; ++c) merged.add(c, extreme(v, c));
      }
      const auto merge = [&](int i) {
        float4 sums = {};
#pragma unroll 1
        for (int v = w; v <= last_warp; ++v) {
          const bool is_last = segment.item_end >= min(block_begin + (v + 1) * part, block_end);
          const float4* from =
              is_last ? reinterpret_cast<const float4*>(shared + v * warp_bytes)
                      : reinterpret_cast<const float4*>(params.first_sums) + (blockIdx.x * num_warps + v) * kElements;
          add_scaled(sums, from[i], exp2f(extreme(v, 0).x - merged.maximum[0]),
                     exp2f(extreme(v, 1).x - merged.maximum[1]));
        }
        return sums;
      };
      const int first_block = segment.item_begin / block_part, last_block = (segment.item_end - 1) / block_part;
      if (first_block == last_block) {
#pragma unroll 1
        for (int i = thread; i < kElements; i += blockDim.x) {
          write_output<T>(params, segment, i, merge(i), merged.sum);
        }
        continue;
      }
      // A block has at most two items that it does not hold whole: the one it begins in and the one it ends in.
      const auto slot_of = [&](int b) { return 2 * b + (b * block_part < segment.item_begin); };
      const int slot = slot_of(blockIdx.x);
      float4* partials = reinterpret_cast<float4*>(params.partials);
#pragma unroll 1
      for (int i = thread; i < kElements; i += blockDim.x) partials[slot * kElements + i] = merge(i);
      if (thread < 4) {
        params.extremes[slot * kColumns + column] = {merged.maximum[0], merged.sum[0]};
        params.extremes[slot * kColumns + column + 1] = {merged.maximum[1], merged.sum[1]};
      }
      __threadfence();
      __syncthreads();
      if (thread == 0) scratch[0] = atomicAdd(&params.finished[first_block], 1) == last_block - first_block;
      __syncthreads();
      if (scratch[0]) {
        __threadfence();
        const auto part_extreme = [&](int b, int c) {
          return __ldcg(&params.extremes[slot_of(b) * kColumns + column + c]);
        };
        Extremes all;
#pragma unroll 8
        for (int b = first_block; b <= last_block; ++b) {
          for (int c = 0; c < 2; ++c) all.raise(c, part_extreme(b, c));
        }
#pragma unroll 8
        for (int b = first_block; b <= last_block; ++b) {
          for (int c = 0; c < 2; ++c) all.add(c, part_extreme(b, c));
        }
#pragma unroll 1
        for (int i = thread; i < kElements; i += blockDim.x) {
          float4 sums = {};
#pragma unroll 8
          for (int b = first_block; b <= last_block; ++b) {
            add_scaled(sums, __ldcg(&partials[slot_of(b) * kElements + i]),
                       exp2f(part_extreme(b, 0).x - all.maximum[0]), exp2f(part_extreme(b, 1).x - all.maximum[1]));
          }
          write_output<T>(params, segment, i, sums, all.sum);
        }
        if (thread == 0) params.finished[first_block] = 0;
      }
      __syncthreads();
    }
  }
}

}  // namespace kivi::cuda
