// Dropout of LoRA's input, by a counter: element i is decided by Philox4x32-10 of (seed, i) on every backend.
#pragma once
#include <cstdint>

#include "cpu/simd.h"

namespace peftk {

struct DropoutParams {
  const void* x;  // (count)
  void* out;      // (count), may be x itself
  int64_t count;
  uint64_t seed;
  uint32_t threshold;  // of 2^24: an element is dropped if its 24 random bits are below
  float scale;         // of what is kept
  Dtype dtype;
};

// Four elements share one Philox block; begin and end count blocks.
void dropout_cpu(const DropoutParams& p, int64_t begin, int64_t end);

}  // namespace peftk
