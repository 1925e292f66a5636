// The low-rank product of LoRA and its gradients, each in one pass over the activations, and the dropout of its input.
#pragma once
#include <cstdint>

#include "cpu/simd.h"

namespace peftk {

// hidden = x @ a.T and out += scale * (hidden * gate) @ b.T, with few columns in `hidden`.
struct LowRankParams {
  const float* x;     // (rows, depth)
  const float* a;     // (depth, padded(rank)), zero from column `rank` on
  const float* b;     // strips of (rank, kStripColumns) times the scale, see `pack_strips_cpu`
  const float* gate;  // (rank), or (rows, rank), or null
  float* out;         // (rows, columns), or null for `hidden` alone
  float* hidden;      // (rows, rank)
  int64_t rows, depth, columns, rank;
  int64_t gate_row;  // numbers from one row's gate to the next: 0 or rank
};

// The gradients. Every sum over rows is one task's, so that the number of threads changes no bit.
struct LowRankBackwardParams {
  const float* grad;    // (rows, columns)
  const float* x;       // (rows, depth)
  const float* hidden;  // (rows, rank), before the gate
  const float* a;       // strips of (rank, kStripColumns)
  const float* b;       // (columns, padded(rank)), zero from column `rank` on
  const float* gate;    // as above
  float* dhidden;       // (rows, rank), the gradient in the gated product
  float* dx;            // (rows, depth), to which the gradient is added, or null
  float* da;            // (rank, depth), or null
  float* db;            // (columns, rank), or null
  float* dgate;         // (rows, rank), or null
  int64_t rows, depth, columns, rank;
  int64_t gate_row;
  float scale;
};

// Columns that a row of factors is laid out for: all that a product of six rows has registers for, or a few of those.
constexpr int64_t kStripColumns = 8 * kLanes;
// Numbers of a (rank, columns) factor in strips.
constexpr int64_t strips_size(int64_t rank, int64_t columns, int64_t strip = kStripColumns) {
  return (columns + strip - 1) / strip * strip * rank;
}

// Columns of a factor's gradient that one task sums.
constexpr int64_t kFactorColumns = 64;
constexpr int64_t low_rank_tiles(int64_t columns) { return (columns + kFactorColumns - 1) / kFactorColumns; }

// Rows begin to end.
void low_rank_cpu(const LowRankParams& p, int64_t begin, int64_t end);
// `dhidden`, `dx` and `dgate` of rows begin to end.
void low_rank_backward_cpu(const LowRankBackwardParams& p, int64_t begin, int64_t end);
// Then the tiles begin to end of `db`, if wanted, and of `da` behind them.
void low_rank_factors_cpu(const LowRankBackwardParams& p, int64_t begin, int64_t end);
// Lay a (rank, columns) matrix, element (i, j) at from[i * row + j * col], out in strips of columns, times `scale`;
// the last one is padded with zeros.
void pack_strips_cpu(const float* from, int64_t row, int64_t col, int64_t rank, int64_t columns, float scale, float* to,
                     int64_t strip = kStripColumns);
// Lay a (rows, cols) matrix, element (i, j) at from[i * row + j * col], out with padded rows.
void pad_columns_cpu(const float* from, int64_t row, int64_t col, int64_t rows, int64_t cols, float* to);

// hidden = x @ a.T, and out = gain * (out + hidden @ b.T) + bias, for few rows, from the factors as they lie in memory:
// laying them out anew, as for many rows, would take longer than all else.
struct LowRankFewParams {
  const void* x;      // (rows, depth)
  const float* a;     // (rank, depth)
  const float* b;     // (columns, rank)
  const float* gain;  // (columns), or null
  const void* bias;   // (columns), or null, as it is without a gain
  float* hidden;      // (rows, rank)
  void* out;          // (rows, columns)
  int64_t rows, depth, columns, rank;
  Dtype dtype;  // of x, bias and out
};

// Columns begin to end of `hidden`.
void low_rank_few_hidden_cpu(const LowRankFewParams& p, int64_t begin, int64_t end);
// Columns begin to end of `out`.
void low_rank_few_cpu(const LowRankFewParams& p, int64_t begin, int64_t end);

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
