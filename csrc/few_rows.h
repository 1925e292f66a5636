// A frozen linear layer on few rows of input. One pass over the weight makes the base product, what an adapter adds to
// it and how it scales the sum, and says whether the weight is still the one that the scale was computed from.
#pragma once
#include <atomic>
#include <cstdint>

#include "dtype.h"

namespace peftk {

// Words of the checksum of one row of a weight.
constexpr int64_t kSumWords = 16;

// out = gain * (x @ weight.T + hidden @ b.T + added) + bias.
struct FewRowsParams {
  const void* weight;    // (columns, depth)
  const float* x;        // (rows, depth), as `few_rows_input_cpu` lays it out
  const void* bias;      // (columns), or null
  const float* hidden;   // (rows, rank)
  const float* b;        // (columns, rank)
  const float* added;    // (rows, columns), or null
  const float* gain;     // (columns), or null
  const uint32_t* sums;  // (columns, kSumWords), what `row_sums_cpu` gave for the weight; or null
  void* out;             // (rows, columns)
  int64_t rows, depth, columns, rank;
  Dtype dtype;  // of the weight, the bias and out
};

// Lay rows out as floats in the order in which `few_rows_cpu` reads a weight in bfloat16; for one in float32 they lie
// in it as they are.
void few_rows_input_cpu(const void* x, Dtype dtype, int64_t rows, int64_t depth, float* to);
// Columns begin to end of `out`; `changed` becomes true where a row of the weight has another checksum.
void few_rows_cpu(const FewRowsParams& p, int64_t begin, int64_t end, std::atomic<bool>& changed);
// The checksums of the rows begin to end of a weight, (rows, depth).
void row_sums_cpu(const void* weight, int64_t depth, Dtype dtype, uint32_t* sums, int64_t begin, int64_t end);

}  // namespace peftk
