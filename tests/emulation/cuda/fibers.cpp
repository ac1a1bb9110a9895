#include "fibers.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "cuda_runtime.h"

namespace emulation {

int current;
uint32_t runnable[kMaxWarps];

namespace {

// Stacks do not begin in the same sets of a cache.
constexpr size_t kStackBytes = (128 << 10) + 64 * 33;
constexpr long kMaxIdle = 200000;  // yields without progress

// Fibers are made by makecontext, once, and switch by _setjmp, which makes no system call as swapcontext does.
jmp_buf fibers[kMaxThreads], launcher;
int num_fibers;
char* stacks;
void (*body)(void*);
void* context;

uint32_t alive[kMaxWarps];
int num_warps, num_alive, num_at_barrier;
const char* barrier_operation;
int any_values[2], any_parity;
long idle;
bool failed, last_first;
char message[1024];

__attribute__((noinline)) void switch_to(int thread) {
  const int self = current;
  if (thread == self) return;
  current = thread;
  if (_setjmp(fibers[self]) == 0) _longjmp(fibers[thread], 1);
}

void return_to_launcher() {
  if (_setjmp(fibers[current]) == 0) _longjmp(launcher, 1);
}

void open_barrier() {
  num_at_barrier = 0;
  any_parity ^= 1;
  any_values[any_parity] = 0;
  memcpy(runnable, alive, sizeof runnable);
}

// Runs block after block.
void fiber_main() {
  return_to_launcher();
  while (true) {
    body(context);
    const uint32_t lane = 1u << current % kLanes;
    runnable[current / kLanes] &= ~lane;
    alive[current / kLanes] &= ~lane;
    if (--num_alive == 0) {
      return_to_launcher();
    } else {
      if (num_at_barrier == num_alive) open_barrier();
      leave();
    }
  }
}

void make_fibers(int count) {
  if (stacks == nullptr) {
    void* memory = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    stacks = static_cast<char*>(memory);
  }
  for (; num_fibers < count; ++num_fibers) {
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = stacks + num_fibers * kStackBytes;
    start.uc_stack.ss_size = kStackBytes;
    makecontext(&start, fiber_main, 0);
    current = num_fibers;
    if (_setjmp(launcher) == 0) setcontext(&start);
  }
}

int next_thread() {
  for (int i = 0; i < num_warps; ++i) {
    const int warp = (current / kLanes + (last_first ? num_warps - i : i)) % num_warps;
    if (const uint32_t lanes = runnable[warp]) {
      return warp * kLanes + (last_first ? kLanes - 1 - __builtin_clz(lanes) : __builtin_ctz(lanes));
    }
  }
  return -1;
}

[[noreturn]] void fail_in_deadlock() {
  char waiting[700] = "";
  size_t length = 0;
  for (int warp = 0; warp < num_warps; ++warp) {
    length += snprintf(waiting + length, sizeof waiting - length, "; warp %d, alive %08x", warp, alive[warp]);
    length += describe_waiting(warp, waiting + length, sizeof waiting - length);
    if (length > sizeof waiting - 100) break;
  }
  fail("deadlock: %d of %d threads in %s%s", num_at_barrier, num_alive,
       num_at_barrier > 0 ? barrier_operation : "no barrier", waiting);
}

void fail_in_signal(int, siginfo_t* info, void*) { fail("memory at %p is not there", info->si_addr); }

// A wild pointer of a kernel fails its launch, not this process.
class CatchSegmentationFault {
 public:
  CatchSegmentationFault() {
    static char memory[64 << 10];
    stack_t stack{};
    stack.ss_sp = memory;
    stack.ss_size = sizeof memory;
    sigaltstack(&stack, &old_stack_);
    struct sigaction action{};
    action.sa_sigaction = fail_in_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // the handler does not return
    sigaction(SIGSEGV, &action, &old_action_);
  }
  ~CatchSegmentationFault() {
    sigaction(SIGSEGV, &old_action_, nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  stack_t old_stack_;
  struct sigaction old_action_;
};

}  // namespace

void fail(const char* format, ...) {
  char text[900];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  snprintf(message, sizeof message, "emulation: block (%u, %u), warp %d, lane %d: %s", blockIdx.x, blockIdx.y,
           current / kLanes, current % kLanes, text);
  failed = true;
  num_fibers = 0;  // they are made anew: these are in the middle of something
  _longjmp(launcher, 1);
}

void leave() {
  const int next = next_thread();
  if (next < 0) fail_in_deadlock();
  idle = 0;
  switch_to(next);
}

void yield() {
  if (++idle > kMaxIdle) fail("waits for what nobody does");
  const int num_threads = num_warps * kLanes;
  for (int i = 1; i < num_threads; ++i) {
    const int next = (current + i) % num_threads;
    if (runnable[next / kLanes] >> next % kLanes & 1) return switch_to(next);
  }
}

void wait_for_block(const char* operation) {
  if (num_at_barrier == 0) {
    barrier_operation = operation;
  } else if (strcmp(barrier_operation, operation) != 0) {
    fail("threads of a block diverge: %s and %s", barrier_operation, operation);
  }
  if (++num_at_barrier == num_alive) return open_barrier();
  runnable[current / kLanes] &= ~(1u << current % kLanes);
  leave();
}

int any_of_block(int value) {
  int& any = any_values[any_parity];
  any |= value;
  wait_for_block("__syncthreads_or");
  return any;
}

bool run_block(int num_threads, void (*new_body)(void*), void* new_context) {
  const CatchSegmentationFault guard;
  body = new_body;
  context = new_context;
  make_fibers(num_threads);
  num_warps = num_threads / kLanes;
  num_alive = num_threads;
  num_at_barrier = 0;
  idle = 0;
  failed = false;
  any_values[any_parity] = 0;
  for (int warp = 0; warp < num_warps; ++warp) runnable[warp] = alive[warp] = ~0u;
  forget_warps();
  current = last_first ? num_threads - 1 : 0;
  if (_setjmp(launcher) == 0) _longjmp(fibers[current], 1);
  return !failed;
}

const char* failure() { return message; }
void set_last_first(bool value) { last_first = value; }

}  // namespace emulation
