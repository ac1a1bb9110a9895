#include "warp.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <map>

#include "copies.h"

namespace emulation {
namespace {

struct Exchange {  // between the lanes of one operation
  uint64_t slots[kLanes];
  uint32_t results[kLanes][4];
  alignas(32) float a[16][16], b[16][8], d[16][8];
};

// The lanes of a mask. While some still read the results of an operation, others may be at the next.
struct Group {
  uint32_t arrived = 0;
  int parity = 0;
  const char* operation = nullptr;
  Exchange exchanges[2];
};

struct Warp {
  Group all;
  std::map<uint32_t, Group> some;  // by mask
};
Warp warps[kMaxWarps];

// Each lane deposits, the last one completes, then each reads what this returns.
template <class Deposit, class Complete>
const Exchange& exchange(const char* operation, uint32_t mask, Deposit deposit, Complete complete) {
  const uint32_t own = 1u << lane();
  if ((mask & own) == 0) fail("%s: this lane is not in mask %08x", operation, mask);
  Warp& warp = warps[current / kLanes];
  Group& group = mask == ~0u ? warp.all : warp.some[mask];
  Exchange& exchange = group.exchanges[group.parity];
  deposit(exchange);
  if (group.arrived == 0) {
    group.operation = operation;
  } else if (strcmp(group.operation, operation) != 0) {
    fail("lanes of a warp diverge: %s and %s", group.operation, operation);
  }
  group.arrived |= own;
  if (group.arrived == mask) {
    complete(exchange);
    group.arrived = 0;
    group.parity ^= 1;
    runnable[current / kLanes] |= mask;
  } else {
    runnable[current / kLanes] &= ~own;
    leave();
  }
  return exchange;
}

}  // namespace

uint64_t shuffle(const char* operation, uint32_t mask, uint64_t value, int source) {
  if ((mask >> source & 1) == 0) fail("%s reads lane %d, which is not in mask %08x", operation, source, mask);
  return exchange(operation, mask, [=](Exchange& x) { x.slots[lane()] = value; }, [](Exchange&) {}).slots[source];
}

uint32_t reduce(const char* operation, uint32_t mask, uint32_t value, uint32_t (*function)(uint32_t, uint32_t)) {
  const auto deposit = [=](Exchange& x) { x.slots[lane()] = value; };
  const auto complete = [=](Exchange& x) {
    const int first = std::countr_zero(mask);
    uint32_t all = x.slots[first];
    for (int i = first + 1; i < kLanes; ++i) {
      if (mask >> i & 1) all = function(all, x.slots[i]);
    }
    x.results[0][0] = all;
  };
  return exchange(operation, mask, deposit, complete).results[0][0];
}

void multiply_matrices(float (&d)[4], const float (&a)[8], const float (&b)[4], int k) {
  const int g = lane() / 4, t = lane() % 4;
  const auto deposit = [&](Exchange& x) {
    for (int i = 0; i < k / 2; ++i) x.a[g + i / 2 % 2 * 8][2 * t + i / 4 * 8 + i % 2] = a[i];
    for (int i = 0; i < k / 4; ++i) x.b[2 * t + i / 2 * 8 + i % 2][g] = b[i];
  };
  const auto complete = [=](Exchange& x) {
    typedef float Row __attribute__((vector_size(32)));
    for (int m = 0; m < 16; ++m) {
      Row sum = {};
      for (int i = 0; i < k; ++i) sum += x.a[m][i] * reinterpret_cast<const Row&>(x.b[i]);
      reinterpret_cast<Row&>(x.d[m]) = sum;
    }
  };
  const Exchange& done = exchange(k == 8 ? "mma_k8" : "mma_k16", ~0u, deposit, complete);
  for (int i = 0; i < 4; ++i) d[i] += done.d[g + i / 2 * 8][2 * t + i % 2];
}

void load_matrices(uint32_t* out, int count, bool transposed, uint32_t address) {
  const auto complete = [=](Exchange& x) {
    for (int m = 0; m < count; ++m) {
      uint16_t matrix[8][8];
      for (int row = 0; row < 8; ++row) {
        const uint32_t from = x.slots[8 * m + row];
        if (from % 16 != 0) fail("ldmatrix: row %d of matrix %d is not aligned to 16 bytes", row, m);
        memcpy(matrix[row], shared_pointer(from), 16);
      }
      for (int l = 0; l < kLanes; ++l) {
        const int g = l / 4, t = l % 4 * 2;
        x.results[l][m] = transposed ? matrix[t][g] | matrix[t + 1][g] << 16 : matrix[g][t] | matrix[g][t + 1] << 16;
      }
    }
  };
  const Exchange& done = exchange("ldmatrix", ~0u, [=](Exchange& x) { x.slots[lane()] = address; }, complete);
  std::copy_n(done.results[lane()], count, out);
}

uint32_t transpose_matrix(uint32_t pair) {
  const auto complete = [](Exchange& x) {
    const auto at = [&](int row, int column) {
      return uint32_t(x.slots[4 * row + column / 2] >> column % 2 * 16 & 0xFFFF);
    };
    for (int l = 0; l < kLanes; ++l) {
      x.results[l][0] = at(l % 4 * 2, l / 4) | at(l % 4 * 2 + 1, l / 4) << 16;
    }
  };
  return exchange("movmatrix", ~0u, [=](Exchange& x) { x.slots[lane()] = pair; }, complete).results[lane()][0];
}

size_t describe_waiting(int warp, char* text, size_t size) {
  size_t length = 0;
  const auto add = [&](const Group& group) {
    if (group.arrived == 0 || length >= size) return;
    length += snprintf(text + length, size - length, ", lanes %08x in %s", group.arrived, group.operation);
  };
  add(warps[warp].all);
  for (const auto& [mask, group] : warps[warp].some) add(group);
  return std::min(length, size);
}

void forget_warps() {
  for (Warp& warp : warps) {
    warp.all.arrived = 0;
    warp.some.clear();
  }
}

}  // namespace emulation
