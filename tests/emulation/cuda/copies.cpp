#include "copies.h"

#include <cstring>
#include <vector>

#include "cuda_runtime.h"

namespace emulation {
namespace {

struct Barrier {
  int arrivals, pending;  // that complete a phase, and that are left of them
  uint32_t parity = 0;
  uint64_t expected = 0, started = 0;  // bytes
  std::vector<Copy> copies;
};
std::vector<Barrier> barriers;
std::vector<Copy> copies_of_lanes[kMaxThreads];
size_t shared_bytes;

// What shared memory holds in place of a barrier, plus its index: what was not initialized is no barrier.
constexpr uint64_t kFirstBarrier = 0xBA00000000000000;

Barrier& barrier_at(uint32_t address) {
  uint64_t held;
  memcpy(&held, shared_pointer(address), sizeof held);
  if (address % 8 != 0 || held - kFirstBarrier >= barriers.size()) fail("no mbarrier at shared address %x", address);
  return barriers[held - kFirstBarrier];
}

void check(const Copy& copy) {
  if ((reinterpret_cast<uintptr_t>(copy.to) | reinterpret_cast<uintptr_t>(copy.from) | copy.bytes) % 16 != 0) {
    fail("a copy of %u bytes from %p to %p is not aligned to 16", copy.bytes, copy.from, copy.to);
  }
  if (copy.to < dynamic_shared || copy.to + copy.bytes > dynamic_shared + shared_bytes) {
    fail("a copy does not end in dynamic shared memory");
  }
}

}  // namespace

char* shared_pointer(uint32_t address) {
  const uintptr_t base = reinterpret_cast<uintptr_t>(dynamic_shared);
  return reinterpret_cast<char*>(base + int32_t(address - uint32_t(base)));
}

uint32_t shared_address(const void* pointer) {
  const uint32_t address = uint32_t(reinterpret_cast<uintptr_t>(pointer));
  if (shared_pointer(address) != pointer) fail("the shared address of what is not in shared memory");
  return address;
}

void init_barrier(uint32_t barrier, int arrivals) {
  const uint64_t held = kFirstBarrier + barriers.size();
  memcpy(shared_pointer(barrier), &held, sizeof held);
  barriers.push_back({.arrivals = arrivals, .pending = arrivals});
}

void arrive(uint32_t barrier) {
  if (--barrier_at(barrier).pending < 0) fail("an mbarrier has more arrivals than it waits for");
}

void expect_bytes(uint32_t barrier, uint32_t bytes) {
  barrier_at(barrier).expected += bytes;
  arrive(barrier);
}

void copy_to_barrier(Copy copy, uint32_t barrier) {
  check(copy);
  Barrier& found = barrier_at(barrier);
  found.started += copy.bytes;
  found.copies.push_back(copy);
}

void copy_of_lane(Copy copy) {
  check(copy);
  copies_of_lanes[current].push_back(copy);
}

void copies_of_lane_arrive(uint32_t barrier) {
  std::vector<Copy>&all = barrier_at(barrier).copies, &own = copies_of_lanes[current];
  all.insert(all.end(), own.begin(), own.end());
  own.clear();
}

void wait(uint32_t barrier, uint32_t parity) {
  while (true) {
    Barrier& found = barrier_at(barrier);
    if (found.pending == 0 && found.started == found.expected) {
      for (const Copy& copy : found.copies) memcpy(copy.to, copy.from, copy.bytes);
      found.copies.clear();
      found.parity ^= 1;
      found.pending = found.arrivals;
      found.expected = found.started = 0;
    }
    if (found.parity != parity % 2) return;
    yield();
  }
}

void forget_copies() {
  barriers.clear();
  for (std::vector<Copy>& copies : copies_of_lanes) copies.clear();
}

void set_shared_bytes(size_t bytes) { shared_bytes = bytes; }

}  // namespace emulation
