// The kernels for one instruction set; setup.py gives this file its compiler flags. The namespace keeps the linker from
// sharing a function between files that were compiled for different machines.
#define KIVI_ISA portable
#include "decode.h"
#include "gather.h"
#include "prefill.h"
#include "store.h"

namespace kivi::cpu {

extern const Kernels kPortable;
const Kernels kPortable = {"portable", portable::store, portable::decode, portable::prefill, portable::gather};

}  // namespace kivi::cpu
