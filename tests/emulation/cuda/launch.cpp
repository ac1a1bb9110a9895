// The runtime's calls, and what device.py calls through ctypes.
#include <cstdio>
#include <cstring>

#include "copies.h"
#include "cuda_kernels.h"
#include "cuda_runtime.h"
#include "work.cuh"

dim3 blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

constexpr size_t kMaxShared = 256 << 10, kGuardBytes = 4096;
constexpr unsigned char kNan = 0xFF, kGuard = 0xA5;

constexpr int kMultiprocessors = 4;  // few, so that requests are cut and warps have several
constexpr int kMultiprocessorShared = 228 << 10, kMaxBlockShared = 227 << 10;

size_t shared_limit = 48 << 10;
const char* error;  // of the last launch, or null
char launch_error[200];

}  // namespace

alignas(4096) char dynamic_shared[kMaxShared + kGuardBytes];

void launch(dim3 blocks, dim3 threads, size_t shared_bytes, const std::function<void()>& kernel) {
  error = nullptr;
  if (shared_bytes > shared_limit || shared_bytes > kMaxShared || threads.x > kMaxThreads || threads.x % kLanes != 0) {
    snprintf(launch_error, sizeof launch_error, "emulation: cannot launch %u threads with %zu bytes of shared memory",
             threads.x, shared_bytes);
    error = launch_error;
    return;
  }
  gridDim = blocks;
  blockDim = threads;
  set_shared_bytes(shared_bytes);
  for (unsigned i = 0; i < blocks.x * blocks.y; ++i) {
    blockIdx = dim3(i % blocks.x, i / blocks.x);
    forget_copies();
    memset(dynamic_shared, kNan, shared_bytes);
    memset(dynamic_shared + shared_bytes, kGuard, kGuardBytes);
    const auto body = [](void* context) { (*static_cast<const std::function<void()>*>(context))(); };
    if (!run_block(threads.x, body, const_cast<std::function<void()>*>(&kernel))) {
      error = failure();
      return;
    }
    for (size_t at = 0; at < kGuardBytes; ++at) {
      if (static_cast<unsigned char>(dynamic_shared[shared_bytes + at]) == kGuard) continue;
      snprintf(launch_error, sizeof launch_error, "emulation: block (%u, %u) writes %zu bytes behind its shared memory",
               blockIdx.x, blockIdx.y, at);
      error = launch_error;
      return;
    }
  }
}

}  // namespace emulation

cudaError_t cudaGetDevice(int* id) {
  *id = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = emulation::kMultiprocessors;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = emulation::kMultiprocessorShared;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emulation::kMaxBlockShared;
      break;
  }
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  emulation::shared_limit = value;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return emulation::error == nullptr ? cudaSuccess : cudaErrorLaunchFailure; }
const char* cudaGetErrorString(cudaError_t) { return emulation::error; }

cudaError_t cudaLaunchKernel(const void* kernel, dim3 blocks, dim3 threads, void** arguments, size_t shared_bytes,
                             cudaStream_t) {
  using kivi::cuda::DecodeParams;
  const auto function = reinterpret_cast<void (*)(DecodeParams)>(const_cast<void*>(kernel));
  const DecodeParams& params = *static_cast<const DecodeParams*>(arguments[0]);
  emulation::launch(blocks, threads, shared_bytes, [&] { function(params); });
  return cudaGetLastError();
}

// A build may leave out kernels.
namespace kivi::cuda {
__attribute__((weak)) const char* store(const StoreParams&, int, Stream);
__attribute__((weak)) const char* gather(const GatherParams&, int, Stream);
}  // namespace kivi::cuda

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void emulation_set_last_first(bool last_first) { emulation::set_last_first(last_first); }

EXPORT const char* emulation_store(const kivi::StoreParams* params, int num_rows) {
  if (kivi::cuda::store == nullptr) return "emulation: this build has no store";
  return kivi::cuda::store(*params, num_rows, nullptr);
}
EXPORT const char* emulation_gather(const kivi::GatherParams* params, int num_rows) {
  if (kivi::cuda::gather == nullptr) return "emulation: this build has no gather";
  return kivi::cuda::gather(*params, num_rows, nullptr);
}
EXPORT const char* emulation_decode(const kivi::AttentionParams* params) {
  return kivi::cuda::decode(*params, nullptr);
}
EXPORT size_t emulation_decode_workspace_bytes(const kivi::Layout* layout) {
  return kivi::cuda::decode_workspace_bytes(*layout);
}

// Whether the structs that device.py fills are these.
EXPORT size_t emulation_bytes_of_params() {
  return sizeof(kivi::StoreParams) << 20 | sizeof(kivi::GatherParams) << 10 | sizeof(kivi::AttentionParams);
}
