#include "../decode_kernels.cuh"

namespace kivi::cuda {
KIVI_DECODE_KERNELS(__nv_bfloat16, 256)
}  // namespace kivi::cuda
