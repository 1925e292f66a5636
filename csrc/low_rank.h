// The thin products of LoRA's factors with tall activations, and the dropout of LoRA's input.
#pragma once
#include <cstdint>

#include "cpu/simd.h"

namespace peftk {

// out = scale * x @ m, with few columns.
struct ShrinkParams {
  const float* x;  // (rows, depth)
  const float* m;  // (depth, padded(rank)), zero from column `rank` on
  float* out;      // (rows, rank)
  int64_t rows, depth, rank;
  float scale;
};

// out = scale * x.T @ h: the gradient of a factor.
struct OuterParams {
  const float* x;  // (rows, features)
  const float* h;  // (rows, padded(rank)), zero from column `rank` on
  float* out;      // element (i, j) of (features, rank) at out[i * row + j * col]
  int64_t rows, features, rank;
  int64_t row, col;
  float scale;
};

// Columns of x whose gradients are summed together, in the first-level cache.
constexpr int64_t kOuterColumns = 128;

// Rows begin to end.
void shrink_cpu(const ShrinkParams& p, int64_t begin, int64_t end);
// Groups of kOuterColumns columns of x, begin to end; every group sums over all rows in their order.
void outer_cpu(const OuterParams& p, int64_t begin, int64_t end);
// Lay a (rows, cols) matrix, element (i, j) at from[i * row + j * col], out with padded rows.
void pad_columns_cpu(const float* from, int64_t row, int64_t col, int64_t rows, int64_t cols, float* to);

// Dropout by a counter: element i is decided by Philox4x32-10 of (seed, i) on every backend.
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
