// How decode is launched: shared memory, blocks, workspace.
#include <algorithm>
#include <bit>

#include "../cuda_kernels.h"
#include "../decode.cuh"
#include "../variants.cuh"

namespace kivi::cuda {

template <class T, int HEAD_DIM>
const void* decode_kernel_for(const Layout& layout);  // in the other files of this folder

namespace {

constexpr int kReserved = 2560;  // of shared memory: what the kernel and the driver take per block

struct Device {
  int num_multiprocessors = 0, shared_bytes = 0, max_block_shared_bytes = 0;
};

cudaError_t find_device(Device& device) {
  int id;
  if (cudaError_t error = cudaGetDevice(&id)) return error;
  static Device known[64];
  if (id < 64 && known[id].num_multiprocessors > 0) {
    device = known[id];
    return cudaSuccess;
  }
  if (cudaError_t error = cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, id))
    return error;
  if (cudaError_t error =
          cudaDeviceGetAttribute(&device.max_block_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, id))
    return error;
  if (cudaError_t error = cudaDeviceGetAttribute(&device.num_multiprocessors, cudaDevAttrMultiProcessorCount, id))
    return error;
  if (id < 64) known[id] = device;
  return cudaSuccess;
}

struct Plan {
  int blocks_per_multiprocessor, num_warps, num_stages, stage_bytes, shared_bytes;
};

int log_unit_tiles(const Layout& layout) {
  const int tokens = kHalfTokens * halves_at_once(layout.head_dim, layout.k_bits);
  return std::countr_zero(static_cast<unsigned>(std::max(tokens / layout.group_size, 1)));
}

// Enough bytes in flight for the memory: many warps first, then stages.
Plan make_plan(const Layout& layout, int unit_bytes, const Device& device) {
  constexpr struct {
    int blocks, warps, stages;
  } kWishes[] = {{2, 4, 2}, {1, 4, 2}, {1, 2, 2}, {1, 1, 1}};
  const int words_bytes = 4 * warp_words(layout.head_dim, layout.k_bits, layout.boosted_channels);
  const int stage_bytes = std::max(unit_bytes, kRunTokens * (4 * layout.head_dim + 16));
  for (const auto& wish : kWishes) {
    const int available = std::min(device.shared_bytes / wish.blocks, device.max_block_shared_bytes) - kReserved;
    const int stages = std::min((available / wish.warps - words_bytes) / stage_bytes, kMaxStages);
    if (stages >= wish.stages) {
      return {wish.blocks, wish.warps, stages, stage_bytes, wish.warps * (stages * stage_bytes + words_bytes)};
    }
  }
  return {};
}

int64_t sums_bytes(const Layout& layout) { return kColumns * layout.head_dim * sizeof(float); }

const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

#define LIST_DTYPE(DTYPE, T) " " #T
#define LIST_DIM(HEAD_DIM, ...) " " #HEAD_DIM
#define LIST_BITS(K_BITS, V_BITS, ...) " " #K_BITS "/" #V_BITS
#define LIST_BOOSTED(K_BITS, V_BITS, BOOST, ...) " " #K_BITS "/" #V_BITS "/" #BOOST
// clang-format off
constexpr const char* kCompiled =
    "decode is not compiled for this combination; head sizes:" KIVI_CUDA_HEAD_DIMS(LIST_DIM, )
    "; dtypes:" KIVI_CUDA_DTYPES(LIST_DTYPE) "; key and value bits:" KIVI_CUDA_BITS(LIST_BITS, )
    "; and one in how many key channels boosted:" KIVI_CUDA_BOOSTED(LIST_BOOSTED, );
// clang-format on

const void* find_kernel(const Layout& layout, Dtype dtype) {
#define FIND_DIM(HEAD_DIM, T) \
  if (layout.head_dim == HEAD_DIM) return decode_kernel_for<T, HEAD_DIM>(layout);
#define FIND(DTYPE, T)               \
  if (dtype == Dtype::DTYPE) {       \
    KIVI_CUDA_HEAD_DIMS(FIND_DIM, T) \
  }
  KIVI_CUDA_DTYPES(FIND)
#undef FIND
#undef FIND_DIM
  return nullptr;
}

}  // namespace

size_t decode_workspace_bytes(const Layout& layout) {
  Device device;
  if (find_device(device) != cudaSuccess) return 0;
  const int blocks = kBlocksPerMultiprocessor * device.num_multiprocessors;
  return blocks * ((kMaxWarps + 1) * sums_bytes(layout) + kColumns * sizeof(float2) + sizeof(int32_t));
}

const char* decode(const AttentionParams& attention, Stream stream) {
  if (attention.batch.num_reqs == 0) return nullptr;
  const Layout layout = with_kernel_bits(attention.layout);
  const void* kernel = find_kernel(layout, attention.dtype);
  if (kernel == nullptr) return kCompiled;
  Device device;
  if (cudaError_t error = find_device(device)) return message(error);
  const int unit_bytes = layout.tile_bytes << log_unit_tiles(layout);
  const Plan plan = make_plan(layout, attention.layout.full_precision() ? 0 : unit_bytes, device);
  if (plan.num_warps == 0) return "a tile does not fit this GPU's shared memory; use a smaller group_size";
  const int blocks = plan.blocks_per_multiprocessor * device.num_multiprocessors;
  DecodeParams params{};
  params.attention = attention;
  params.page_tiles = Divisor(layout.page_tokens / layout.group_size);
  params.full_page_tokens = Divisor(layout.full_page_tokens);
  params.ratio = Divisor(attention.num_heads / layout.num_kv_heads);
  params.log_group_size = std::countr_zero(static_cast<unsigned>(layout.group_size));
  constexpr float kLog2E = 1.4426950408889634f;
  params.scale = attention.scale * kLog2E;
  if (attention.logits_soft_cap > 0) {
    params.cap = attention.logits_soft_cap * kLog2E;
    params.cap_inverse = 2 * kLog2E / params.cap;
  }
  params.log_unit_tiles = log_unit_tiles(layout);
  params.first_plain = layout.sink_tokens % layout.group_size != 0;
  params.num_stages = plan.num_stages;
  params.stage_bytes = plan.stage_bytes;
  params.unit_bytes = unit_bytes;
  char* workspace = static_cast<char*>(attention.workspace);
  params.first_sums = reinterpret_cast<float4*>(workspace);
  params.partials = reinterpret_cast<float4*>(workspace + blocks * kMaxWarps * sums_bytes(layout));
  params.extremes = reinterpret_cast<float2*>(workspace + blocks * (kMaxWarps + 1) * sums_bytes(layout));
  params.num_partial = reinterpret_cast<int32_t*>(params.extremes + blocks * kColumns);
  if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes))
    return message(error);
  void* arguments[] = {&params};
  return message(
      cudaLaunchKernel(kernel, dim3(blocks), dim3(32 * plan.num_warps), arguments, plan.shared_bytes, stream));
}

}  // namespace kivi::cuda
