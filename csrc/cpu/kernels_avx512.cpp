// The kernels for one instruction set; setup.py gives this file its compiler flags. The namespace keeps the linker from
// sharing a function between files that were compiled for different machines.
#define KIVI_ISA avx512
#include "decode.h"
#include "gather.h"
#include "prefill.h"
#include "store.h"

namespace kivi::cpu {

extern const Kernels kAvx512;
const Kernels kAvx512 = {"avx512", avx512::store, avx512::decode, avx512::prefill, avx512::gather};

}  // namespace kivi::cpu
