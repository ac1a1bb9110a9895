// The CPU kernels as their callers see them: one table per instruction set, picked once at run time.
#pragma once

#include <string>

#include "../params.h"

namespace kivi::cpu {

// The host's thread pool. run() calls body(context, begin, end) over parts of [0, count), in parallel.
struct Threads {
  int count;
  void (*run)(int64_t count, void (*body)(void* context, int64_t begin, int64_t end), void* context);
};

struct Kernels {
  const char* isa;
  void (*store)(const StoreParams&, const Threads&);
  void (*decode)(const AttentionParams&, const Threads&);
  void (*prefill)(const AttentionParams&, const Threads&);
  void (*gather)(const GatherParams&, const Threads&);
};

// Each is one of kernels_*.cpp: the same source under other compiler flags.
extern const Kernels kAvx512;
extern const Kernels kAvx2;
extern const Kernels kPortable;

const Kernels& kernels();               // the ones in use: the best for this CPU unless set_isa chose others
bool set_isa(const std::string& name);  // false if the name is unknown or this CPU cannot run it
std::string available_isas();           // comma separated, best first

}  // namespace kivi::cpu
