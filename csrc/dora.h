// The norms of a weight with a low-rank update, and the output of a layer that is rescaled together with such an
// update.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace peftk {

// The norms of the rows, or of the columns, of weight + left @ right, none of which is stored.
struct DoraNormParams {
  const void* weight;  // (rows, cols)
  const float* left;   // (rows, rank): element (i, k) at left[i * left_row + k * left_col]
  const float* right;  // (rank, cols), in strips: see `pack_strips_cpu`
  float* out;          // (cols) where `columns`, else (rows)
  int64_t rows, cols, rank;
  int64_t left_row, left_col;
  bool columns;
  Dtype dtype;
};

// out = gain * base + shift + hidden @ factor, row by row.
struct DoraComposeParams {
  const void *base, *hidden;  // (rows, cols), (rows, rank)
  const float* factor;        // (rank, cols), in strips: see `pack_strips_cpu`
  const float *gain, *shift;  // (cols); the shift may be null
  void* out;                  // (rows, cols)
  int64_t rows, cols, rank;
  Dtype dtype;
};

// Columns of a tile, and of a strip of factors: two vectors, one line of the cache.
constexpr int64_t kDoraStrip = 16;
// Columns of a weight whose norms are summed together: whole strips.
constexpr int64_t kDoraColumns = 128;

// Rows begin to end.
void dora_row_norms_cpu(const DoraNormParams& p, int64_t begin, int64_t end);
// Groups of kDoraColumns columns, begin to end; every group sums over all rows in their order.
void dora_column_norms_cpu(const DoraNormParams& p, int64_t begin, int64_t end);
// Rows begin to end.
void dora_compose_cpu(const DoraComposeParams& p, int64_t begin, int64_t end);

}  // namespace peftk
