#include "../cuda_kernels.h"
#include "../gather.cuh"
#include "../variants.cuh"

namespace kivi::cuda {

const char* gather(const GatherParams& params, int num_tokens, Stream stream) {
  if (num_tokens == 0 || params.num_reqs == 0) return nullptr;
  return with_variant(params.layout, params.dtype, [&]<class T, int K_BITS, int V_BITS>() {
    const unsigned blocks = ((num_tokens - 1) / kGatherRows + 1) * params.layout.num_kv_heads;
    const bool aligned = are_aligned(params.key, sizeof(T)) && are_aligned(params.value, sizeof(T));
    auto kernel = gather_kernel<T, K_BITS, V_BITS, false>;
    if constexpr (K_BITS == 2) {
      if (params.layout.boosted_channels > 0) kernel = gather_kernel<T, K_BITS, V_BITS, true>;
    }
    kernel<<<blocks, kGatherThreads, 0, stream>>>(params, num_tokens, aligned);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  });
}

}  // namespace kivi::cuda
