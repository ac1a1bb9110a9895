#include "../decode_kernels.cuh"

namespace kivi::cuda {
KIVI_DECODE_KERNELS(__half, 256)
}  // namespace kivi::cuda
