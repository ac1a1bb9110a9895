// decode: attention of a few query rows a request over quantized tiles and full-precision tokens, in one launch.
//
// Work. A unit is 64 tokens of tiles, or 8 tokens in full precision. An item is a request, a KV head and up to 8 of its
// columns: a column is a query row and a query head that shares the KV head. All items lie on one line, where a unit
// takes room as it takes time, and the line is cut into equal parts, one a warp: between items where few warps stay
// idle for it, else anywhere. A warp finds its place from the lengths on the device (work.cuh) and is on its own from
// there: its units arrive by bulk copies in a ring of stages that it alone waits for. At the end the warps of a block
// merge the items that they share. The block in which an item ends waits for earlier ones that have parts of it, and
// merges those too: blocks start in order, so whoever is waited for runs.
//
// A step. Tokens are the rows of S = K Q^T, columns the 8 columns, so codes are unpacked once for all query heads and
// are the A operand as they are (operands.cuh). Key scales are folded into Q, once a tile; key zeros are one more row
// product, the value with which S starts. The transpose of P takes one instruction per 8 tokens, and value scales are
// folded into it, once per value group; value zeros again are a product of their own. So there is no arithmetic per
// code but its mask. Two halves of 32 tokens go through a step side by side: 8 warps a multiprocessor need that much
// independent work to hide the latencies of their instructions.
//
// Exponents. P is kept relative to a maximum that is only raised when a score exceeds it by kHeadroom, scales relative
// to a power of two; so the rescaling of sums is rare, and decided by one vote.
//
// Bound: at 2 bits, head size 128 and groups of 32 a token takes 96 bytes of a KV head and 13 warp instructions. Beyond
// a fixed cost of 15 us, tokens take what memory needs for them (2.9 TB/s on an H100).
#pragma once

#include "attend.cuh"

namespace kivi::cuda {

__device__ inline void add_scaled(float4& sums, float4 x, const float (&factor)[2]) {
  sums.x += x.x * factor[0];
  sums.y += x.y * factor[1];
  sums.z += x.z * factor[0];
  sums.w += x.w * factor[1];
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
    T* out = static_cast<T*>(attention.output.data) +
             (first_row + params.ratio.divide(column)) * attention.output.token_stride +
             head * attention.output.head_stride + channel;
    const float inverse = __fdividef(1.0f, sum[c]);
    *reinterpret_cast<uint32_t*>(out) =
        c == 0 ? pack<T>(merged.x * inverse, merged.z * inverse) : pack<T>(merged.y * inverse, merged.w * inverse);
  }
}

template <class T, int D, int K_BITS, int V_BITS, int BOOST, bool ONE_TILE>
__global__ void __launch_bounds__(32 * kMaxWarps, kBlocksPerMultiprocessor)
    decode_kernel(const __grid_constant__ DecodeParams params) {
  using Kernel = Decoder<T, D, K_BITS, V_BITS, BOOST, ONE_TILE>;
  constexpr int kElements = 32 * Kernel::kBlocks;  // float4 of an item's sums
  extern __shared__ __align__(128) char shared[];
  __shared__ __align__(8) uint64_t barriers[kMaxWarps][kMaxStages];
  __shared__ float2 extremes[kMaxWarps][2][kColumns];  // of a warp's first and last segment
  __shared__ Segment segments[kMaxWarps][2];
  __shared__ Place places[kMaxWarps];

  const AttentionParams& attention = params.attention;
  const Layout& layout = attention.layout;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, num_warps = blockDim.x / 32;
  const int ratio = params.ratio.value, num_stages = params.num_stages;
  const int warp_bytes = num_stages * params.stage_bytes;
  char* stages = shared + warp * warp_bytes;
  uint32_t* words = reinterpret_cast<uint32_t*>(shared + num_warps * warp_bytes) +
                    warp * warp_words(D, K_BITS, Kernel::Boost::kChannels);
  if (lane < num_stages) mbarrier_init(shared_address(&barriers[warp][lane]));
  fence_before_copies();

  Place& place = places[warp];
  if (!find_place(params, place)) return;

  if (place.begin < place.end) {
    Kernel kernel(params, place, stages, shared_address(barriers[warp]), words);
    bool is_last;  // not what `place` says: lane 0 may be at its next segment already
    do {
      if (lane == 0) {
        place.from = place.to;
        while (place.from >= place.line + place.request.line(place.cut)) {
          place.line += place.request.line(place.cut);
          place.request = Request(params, ++place.segment.request);
        }
        const int item_line = place.request.item_line(place.cut);
        place.segment.item = (place.from - place.line) / item_line;
        place.segment.item_begin = place.line + place.segment.item * item_line;
        place.segment.item_end = place.segment.item_begin + item_line;
        place.to = min(place.segment.item_end, place.end);
        place.head = place.segment.item % layout.num_kv_heads;
      }
      __syncwarp();

      int unit = place.request.unit_at(place.cut, place.from - place.segment.item_begin);
      const int last = place.request.unit_at(place.cut, place.to - place.segment.item_begin);
      uint32_t codes[D / 8];
      kernel.begin_request();
      fence_before_copies();
      kernel.find_sources(unit);
      for (int i = 0; i < num_stages && unit + i < last; ++i) kernel.start_copy(unit + i, i);
      kernel.load_query(ratio, codes);
      kernel.begin_segment(codes);
      const bool has_tiles = unit < kernel.num_tile_units;
      int stage = 0;
#pragma unroll 1
      for (bool tokens = false;; tokens = true) {
        const int stop = tokens ? last : min(last, kernel.num_tile_units);
#pragma unroll 1
        for (; unit < stop; ++unit) {
          const char* data = kernel.wait(stage);
          if (tokens) {
            kernel.attend_tokens(data, unit);
          } else {
            kernel.attend_tiles(data, unit);
          }
          __syncwarp();
          if (unit + num_stages < last) kernel.start_copy(unit + num_stages, stage);
          stage = stage + 1 == num_stages ? 0 : stage + 1;
        }
        if (tokens) break;
        if (has_tiles) kernel.end_tiles();
      }
      kernel.finish_sums();

      is_last = place.to == place.end;
      const bool is_whole = place.segment.item_begin >= place.begin && place.segment.item_end <= place.end;
      // All stages are free.
      float4* sums = is_last || is_whole ? reinterpret_cast<float4*>(stages)
                                         : params.first_sums + (blockIdx.x * num_warps + warp) * kElements;
#pragma unroll
      for (int i = 0; i < Kernel::kBlocks; ++i) {
        sums[32 * i + lane] = {kernel.output[i][0], kernel.output[i][1], kernel.output[i][2], kernel.output[i][3]};
      }
      if (is_whole) {  // a lane reads what it wrote
#pragma unroll 1
        for (int i = lane; i < kElements; i += 32) write_output<T>(params, place.segment, i, sums[i], kernel.sum);
      }
      if (lane < 4 && !is_whole) {
        extremes[warp][is_last][2 * lane] = {kernel.maximum[0], kernel.sum[0]};
        extremes[warp][is_last][2 * lane + 1] = {kernel.maximum[1], kernel.sum[1]};
      }
      if (lane == 0) {
        if (place.from == place.begin) segments[warp][0] = place.segment;
        segments[warp][1] = place.segment;
      }
      __syncwarp();
    } while (!is_last);
  }
  __syncthreads();

  // Items that no warp had whole: the one that the block begins in, and those that begin in warp w and go on after it.
  // The first one comes last, since it may have to wait for blocks before this one; nobody waits for a later block.
  const int column = 2 * (lane % 4), size = place.cut.size, block_begin = place.block_begin,
            block_end = place.block_end;
#pragma unroll 1
  for (int candidate = num_warps; candidate >= 0; --candidate) {
    const int w = max(candidate - 1, 0), warp_begin = block_begin + w * size,
              warp_end = min(warp_begin + size, block_end);
    if (warp_begin >= block_end) continue;
    const Segment segment = segments[w][candidate > 0];
    if (candidate > 0 && segment.item_begin < warp_begin + (w == 0)) continue;       // of an earlier candidate
    if (segment.item_begin >= warp_begin && segment.item_end <= warp_end) continue;  // written
    const bool begins_here = segment.item_begin >= block_begin, ends_here = segment.item_end <= block_end;

    const float4* from[kMaxWarps];  // null of warps that have no part
    float maximum[2] = {-1e30f, -1e30f}, sum[2] = {}, factor[kMaxWarps][2];
    float2 extreme[kMaxWarps][2];
#pragma unroll
    for (int v = 0; v < kMaxWarps; ++v) {
      from[v] = nullptr;
      const int begin_v = block_begin + v * size;
      if (v < w || begin_v >= min(segment.item_end, block_end)) continue;
      const bool is_last = segment.item_end >= min(begin_v + size, block_end);
      from[v] = is_last ? reinterpret_cast<const float4*>(shared + v * warp_bytes)
                        : params.first_sums + (blockIdx.x * num_warps + v) * kElements;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        extreme[v][c] = extremes[v][is_last][column + c];
        maximum[c] = fmaxf(maximum[c], extreme[v][c].x);
      }
    }
#pragma unroll
    for (int v = 0; v < kMaxWarps; ++v) {
      if (from[v] == nullptr) continue;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        factor[v][c] = exp2_approx(extreme[v][c].x - maximum[c]);
        sum[c] += extreme[v][c].y * factor[v][c];
      }
    }

    const int first_block = begins_here ? blockIdx.x : segment.item_begin / (size * num_warps);
    if (ends_here && !begins_here) {
      if (thread == 0) {
        while (load_acquire(&params.num_partial[blockIdx.x]) < int(blockIdx.x) - first_block) {
        }
        params.num_partial[blockIdx.x] = 0;
      }
      __syncthreads();
    }
#pragma unroll 1
    for (int i = thread; i < kElements; i += blockDim.x) {
      float4 sums = {};
#pragma unroll
      for (int v = 0; v < kMaxWarps; ++v) {
        if (from[v] != nullptr) add_scaled(sums, from[v][i], factor[v]);
      }
      if (!ends_here) {
        params.partials[blockIdx.x * kElements + i] = sums;
        continue;
      }
      float all_maximum[2] = {maximum[0], maximum[1]}, all_sum[2] = {sum[0], sum[1]};
#pragma unroll 4
      for (int b = first_block; b < blockIdx.x; ++b) {  // loads do not wait for what was merged before
        const float2 other[2] = {__ldcg(&params.extremes[b * kColumns + column]),
                                 __ldcg(&params.extremes[b * kColumns + column + 1])};
        const float4 x = __ldcg(&params.partials[b * kElements + i]);
        float kept[2], added[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float high = fmaxf(all_maximum[c], other[c].x);
          kept[c] = exp2_approx(all_maximum[c] - high);
          added[c] = exp2_approx(other[c].x - high);
          all_maximum[c] = high;
          all_sum[c] = all_sum[c] * kept[c] + other[c].y * added[c];
        }
        sums = {sums.x * kept[0], sums.y * kept[1], sums.z * kept[0], sums.w * kept[1]};
        add_scaled(sums, x, added);
      }
      write_output<T>(params, segment, i, sums, all_sum);
    }
    if (!ends_here) {
      if (thread < 4) {
        params.extremes[blockIdx.x * kColumns + column] = {maximum[0], sum[0]};
        params.extremes[blockIdx.x * kColumns + column + 1] = {maximum[1], sum[1]};
      }
      __syncthreads();
      if (thread == 0) {
        __threadfence();
        atomicAdd(&params.num_partial[(segment.item_end - 1) / (size * num_warps)], 1);
      }
    }
  }
}

}  // namespace kivi::cuda
