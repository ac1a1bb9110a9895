// Dynamic scheduling over the host's thread pool.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace kivi::cpu::KIVI_ISA {

// Calls worker(next) once per thread, where next() hands out 0 ... count - 1 and then a negative number. Which thread
// gets which number never shows in a result.
template <class Worker>
inline void parallel(const Threads& threads, int64_t count, const Worker& worker) {
  struct Context {
    const Worker& worker;
    const int64_t count;
    int64_t taken;
  } context{worker, count, 0};
  threads.run(
      count < threads.count ? count : threads.count,
      [](void* opaque, int64_t, int64_t) {
        auto* context = static_cast<Context*>(opaque);
        context->worker([context] {
          const int64_t index = __atomic_fetch_add(&context->taken, 1, __ATOMIC_RELAXED);
          return index < context->count ? index : -1;
        });
      },
      &context);
}

}  // namespace kivi::cpu::KIVI_ISA
