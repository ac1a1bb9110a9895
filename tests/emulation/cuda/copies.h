// Asynchronous copies to shared memory and the mbarriers on which they complete. A copy happens as late as it may, when
// a lane waits for it: whoever reads before finds what was there, and whoever overwrites its source too early is seen.
#pragma once

#include <cstdint>

namespace emulation {

struct Copy {
  char* to;
  const char* from;
  uint32_t bytes;
};

// Of a pointer into shared memory: its low half, which is also what csrc computes with.
uint32_t shared_address(const void* pointer);
char* shared_pointer(uint32_t address);

void init_barrier(uint32_t barrier, int arrivals);
void arrive(uint32_t barrier);
void expect_bytes(uint32_t barrier, uint32_t bytes);  // and arrives
void copy_to_barrier(Copy copy, uint32_t barrier);
void copy_of_lane(Copy copy);                  // belongs to no barrier
void copies_of_lane_arrive(uint32_t barrier);  // until this
void wait(uint32_t barrier, uint32_t parity);

void forget_copies();  // at the begin of a block
void set_shared_bytes(size_t bytes);

}  // namespace emulation
