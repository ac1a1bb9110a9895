#include <algorithm>

#include "../cuda_kernels.h"
#include "../store.cuh"
#include "../tuned_store.cuh"
#include "../variants.cuh"

namespace kivi::cuda {

const char* store(const StoreParams& params, int max_new_tokens, Stream stream) {
  const Layout& layout = params.layout;
  const int num_heads = layout.num_kv_heads;
  if (max_new_tokens == 0 || params.batch.num_reqs == 0) return nullptr;
  return with_variant(layout, params.dtype, [&]<class T, int K_BITS, int V_BITS>() {
    const bool aligned = are_aligned(params.key, sizeof(T)) && are_aligned(params.value, sizeof(T));
    if (!layout.full_precision() && (layout.scale_search || layout.rotate_values || layout.boosted_channels > 0)) {
      const int runs = (max_new_tokens - 1) / kRunRows + 1;
      const int items = std::min(max_new_tokens, kRunRows) * num_heads * (1 + layout.group_size / kOctet);
      const int blocks_per_run = std::min(std::max(512 / runs, 8), items);
      tuned_store_kernel<T, K_BITS, V_BITS>
          <<<runs * blocks_per_run, kTunedThreads, 0, stream>>>(params, max_new_tokens, blocks_per_run, aligned);
    } else {
      // Few rows are spread over many blocks, many rows make no more blocks than keep the GPU busy.
      int rows_per_block = 1;
      while (rows_per_block < 32 && int64_t(max_new_tokens) * num_heads >= 2048 * rows_per_block) rows_per_block *= 2;
      const unsigned blocks = ((max_new_tokens - 1) / rows_per_block + 1) * num_heads;
      store_kernel<T, K_BITS, V_BITS>
          <<<blocks, kStoreThreads, 0, stream>>>(params, max_new_tokens, rows_per_block, aligned);
    }
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  });
}

}  // namespace kivi::cuda
