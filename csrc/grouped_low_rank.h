// Low-rank products of rows that are sorted by group, each group with factors of its own.
#pragma once
#include <atomic>
#include <cstdint>
#include <vector>

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
  void* dx;             // (rows, depth), or null
  float* da;            // (groups, rank, depth), or null
  float* db;            // (groups, columns, rank), or null
  float* dgate;         // (rows, rank), or null
  int64_t rows, depth, columns, rank, groups;
  float scale;
  Dtype dtype;  // of grad, x, hidden and dx
  bool add_dx;  // whether dx holds what its gradient is added to
};

// Columns that are summed together where they are copied before.
constexpr int64_t kGroupedColumns = 64;
// Rows of one group that a task of the backward pass takes at most.
constexpr int64_t kGroupedRows = 256;

// Rows of one group, or of none where `group` is the number of groups. `partial` takes the sums of a group that has
// several parts, (rank, depth + columns), and is null for one that has a single part.
struct GroupedPart {
  int64_t group, first, last;
  float* partial;
};

// The parts of all groups, in their order, empty groups included, and then those of the rows of none.
inline std::vector<GroupedPart> grouped_parts(const int64_t* ends, int64_t groups, int64_t rows) {
  std::vector<GroupedPart> parts;
  for (int64_t group = 0, start = 0; group <= groups; ++group) {
    const int64_t end = group < groups ? ends[group] : rows;
    do {
      const int64_t last = end - start < kGroupedRows ? end : start + kGroupedRows;
      parts.push_back({group, start, last, nullptr});
      start = last;
    } while (start < end);
  }
  return parts;
}

// Rows begin to end, of whatever groups. Pieces of any size give the same bits.
void grouped_low_rank_cpu(const GroupedLowRankParams& p, int64_t begin, int64_t end);
// The gradients of the parts that nobody has taken yet, whose numbers `next` gives out; those of a factor where its
// group has a single part, and else sums.
void grouped_low_rank_backward_cpu(const GroupedLowRankBackwardParams& p, const GroupedPart* parts, int64_t count,
                                   std::atomic<int64_t>& next);
// Then the gradients of the factors of one group, from the sums of all its parts.
void grouped_low_rank_sums_cpu(const GroupedLowRankBackwardParams& p, const GroupedPart* parts, int64_t count);

}  // namespace peftk
