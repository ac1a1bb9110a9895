#include "../decode_kernels.cuh"

namespace kivi::cuda {
KIVI_DECODE_KERNELS(__nv_bfloat16, 128)
}  // namespace kivi::cuda
