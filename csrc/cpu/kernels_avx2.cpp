// The kernels for one instruction set; setup.py gives this file its compiler flags. The namespace keeps the linker from
// sharing a function between files that were compiled for different machines.
#define KIVI_ISA avx2
#include "decode.h"
#include "gather.h"
#include "prefill.h"
#include "store.h"

namespace kivi::cpu {

extern const Kernels kAvx2;
const Kernels kAvx2 = {"avx2", avx2::store, avx2::decode, avx2::prefill, avx2::gather};

}  // namespace kivi::cpu
