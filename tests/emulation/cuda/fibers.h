// Threads of a block as fibers of one thread of the CPU. A fiber runs until it needs what others have not done yet,
// then hands over to the next one that can go on: so there is one order, the same on every run, and waiting for what
// nobody does is an error instead of a hang.
#pragma once

#include <cstdint>

namespace emulation {

constexpr int kLanes = 32, kMaxThreads = 512, kMaxWarps = kMaxThreads / kLanes;

extern int current;                   // thread of the block that runs
extern uint32_t runnable[kMaxWarps];  // lanes that wait for nothing

// What went wrong, with the block and thread that it went wrong in; ends the launch.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void leave();                                // runs others until this thread is runnable again
void yield();                                // runs others; for loops that wait for memory
void wait_for_block(const char* operation);  // until all threads of the block do the same
int any_of_block(int value);                 // the same; whether one of them has a value that is not 0

// Runs `body` in all threads of a block. False if it failed.
bool run_block(int num_threads, void (*body)(void*), void* context);
const char* failure();

// Last lane and last warp first, instead of the first: other mistakes show.
void set_last_first(bool last_first);

}  // namespace emulation
