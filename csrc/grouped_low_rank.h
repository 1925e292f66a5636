// Low-rank products of rows that are sorted by group, each group with factors of its own.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace peftk {

// hidden = x @ a[g].T and out = base + scale * (hidden * gate) @ b[g].T for the rows of every group g.
struct GroupedLowRankParams {
  const void* base;     // (rows, columns); may be `out`
  const void* x;        // (rows, depth)
  const float* a;       // (groups, rank, depth)
  const float* b;       // (groups, columns, rank)
  const int64_t* ends;  // (groups), ascending: where each group ends; rows beyond the last belong to none
  const float* gate;    // (rows, rank), or null
  void* out;            // (rows, columns)
  void* hidden;         // (rows, rank), zeros in the rows of no group
  int64_t rows, depth, columns, rank, groups;
  float scale;
  Dtype dtype;  // of base, x, out and hidden
};

struct GroupedLowRankBackwardParams {
  const void* grad;     // (rows, columns)
  const void* x;        // (rows, depth)
  const void* hidden;   // (rows, rank), before the gate
  const float* a;       // as above
  const float* b;       // as above
  const int64_t* ends;  // as above
  const float* gate;    // as above
  float* dhidden;       // (rows, rank), workspace: the gradient in `hidden`
  void* dx;             // (rows, depth), or null
  float* da;            // (groups, rank, depth), or null
  float* db;            // (groups, columns, rank), or null
  float* dgate;         // (rows, rank), or null
  int64_t rows, depth, columns, rank, groups;
  float scale;
  Dtype dtype;  // of grad, x, hidden and dx
  bool add_dx;  // whether dx holds what its gradient is added to
};

// Columns of a factor's gradient that one task sums, over all rows of a group.
constexpr int64_t kGroupedColumns = 64;
constexpr int64_t grouped_tiles(int64_t columns) { return (columns + kGroupedColumns - 1) / kGroupedColumns; }

// Rows begin to end, of whatever groups. Pieces of any size give the same bits.
void grouped_low_rank_cpu(const GroupedLowRankParams& p, int64_t begin, int64_t end);
// `dhidden`, `dx` and `dgate` of rows begin to end.
void grouped_low_rank_backward_cpu(const GroupedLowRankBackwardParams& p, int64_t begin, int64_t end);
// Then the tasks begin to end: the tiles of `db`, if wanted, and of `da` behind them, each for all groups in turn.
void grouped_low_rank_factors_cpu(const GroupedLowRankBackwardParams& p, int64_t begin, int64_t end);

}  // namespace peftk
