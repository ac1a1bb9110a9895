#include "kernels.h"

namespace kivi::cpu {
namespace {

#if defined(__x86_64__)
constexpr const Kernels* kBestFirst[] = {&kAvx512, &kAvx2, &kPortable};

bool supported(const Kernels* kernels) {
  if (kernels == &kAvx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
  }
  if (kernels == &kAvx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
  return true;
}
#else
constexpr const Kernels* kBestFirst[] = {&kPortable};

bool supported(const Kernels*) { return true; }
#endif

const Kernels* best() {
  for (const Kernels* candidate : kBestFirst) {
    if (supported(candidate)) return candidate;
  }
  return &kPortable;
}

const Kernels* in_use = best();

}  // namespace

const Kernels& kernels() { return *in_use; }

bool set_isa(const std::string& name) {
  for (const Kernels* candidate : kBestFirst) {
    if (name == candidate->isa && supported(candidate)) {
      in_use = candidate;
      return true;
    }
  }
  return false;
}

std::string available_isas() {
  std::string names;
  for (const Kernels* candidate : kBestFirst) {
    if (supported(candidate)) names += (names.empty() ? "" : ", ") + std::string(candidate->isa);
  }
  return names;
}

}  // namespace kivi::cpu
