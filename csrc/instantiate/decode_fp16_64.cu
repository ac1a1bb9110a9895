#include "../decode_kernels.cuh"

namespace kivi::cuda {
KIVI_DECODE_KERNELS(__half, 64)
}  // namespace kivi::cuda
