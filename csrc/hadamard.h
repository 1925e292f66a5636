// The Hadamard product of two low-rank matrices: as the factors of one low-rank product (Khatri-Rao), and added to a
// weight tile by tile; and the gradients of both.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace peftk {

struct KhatriRaoParams {
  const float *w1_a, *w1_b, *w2_a, *w2_b;  // (out, r1), (r1, features), (out, r2), (r2, features)
  void* a;                                 // (r1 * r2, features): row i * r2 + j is w1_b[i] * w2_b[j]
  void* b;                                 // (out, r1 * r2): the same of the columns of w1_a and w2_a
  int64_t out, features, r1, r2;
  Dtype dtype;  // of a and b
};

struct KhatriRaoBackwardParams {
  const void *grad_a, *grad_b;             // as a and b
  const float *w1_a, *w1_b, *w2_a, *w2_b;  // as above
  float *dw1_a, *dw1_b, *dw2_a, *dw2_b;    // like the factors; null if not wanted
  int64_t out, features, r1, r2;
  Dtype dtype;  // of the incoming gradients
};

// weight + scale * (w1_a @ w1_b) * (w2_a @ w2_b)
struct HadamardWeightParams {
  const void* weight;                      // (out, features)
  const float *w1_a, *w1_b, *w2_a, *w2_b;  // rows of w1_b and w2_b are `stride` apart
  void* result;                            // (out, features)
  int64_t out, features, r1, r2, stride;
  float scale;
  Dtype dtype;  // of weight and result
};

struct HadamardWeightBackwardParams {
  const void* grad;                        // (out, features)
  const float *w1_a, *w1_b, *w2_a, *w2_b;  // as above
  const float *t1, *t2;                    // w1_b and w2_b transposed, (features, padded(rank)); not used on CUDA
  float *dw1_a, *dw2_a;                    // (out, rank), on CUDA (tiles, out, rank); null if not wanted
  float *dw1_b, *dw2_b;                    // (chunks, rank, stride), on the CPU zeroed; null if not wanted
  int64_t out, features, r1, r2, stride;
  int64_t chunk;  // rows that are summed together, a multiple of kHadamardRows or what CUDA says
  float scale;
  Dtype dtype;  // of the incoming gradient
};

// out = scale * x @ ((w1_a @ w1_b) * (w2_a @ w2_b)).T, through hidden[t, i, j] = sum_k w1_b[i, k] w2_b[j, k] x[t, k].
struct HadamardFewParams {
  const float* x;                          // (rows, features)
  const float *w1_a, *w1_b, *w2_a, *w2_b;  // (out, r1), (r1, features), (out, r2), (r2, features)
  float* hidden;                           // (rows, r1, r2)
  float* result;                           // (rows, out)
  int64_t rows, out, features, r1, r2;
  float scale;
};

// Rows of a tile of the weight, and its columns: both products of a tile stay in the first-level cache.
constexpr int64_t kHadamardRows = 24;
constexpr int64_t kHadamardColumns = 128;

// Rows of a, and rows of b.
void khatri_rao_a_cpu(const KhatriRaoParams& p, int64_t begin, int64_t end);
void khatri_rao_b_cpu(const KhatriRaoParams& p, int64_t begin, int64_t end);
// Groups of kHadamardColumns columns of a, and rows of b.
void khatri_rao_backward_a_cpu(const KhatriRaoBackwardParams& p, int64_t begin, int64_t end);
void khatri_rao_backward_b_cpu(const KhatriRaoBackwardParams& p, int64_t begin, int64_t end);
// The range is of the rows * r1 rows of `hidden`, and of the columns of `result`.
void hadamard_few_hidden_cpu(const HadamardFewParams& p, int64_t begin, int64_t end);
void hadamard_few_cpu(const HadamardFewParams& p, int64_t begin, int64_t end);
// Groups of kHadamardRows rows.
void hadamard_weight_cpu(const HadamardWeightParams& p, int64_t begin, int64_t end);
// Chunks of rows.
void hadamard_weight_backward_cpu(const HadamardWeightBackwardParams& p, int64_t begin, int64_t end);

// The stream is a cudaStream_t. A launch that fails throws a std::runtime_error that names the kernel.
void hadamard_weight_cuda(const HadamardWeightParams& p, void* stream);

// How the gradients are summed on CUDA: in tiles of columns, and in chunks of rows.
struct HadamardParts {
  int64_t tiles, chunk, chunks;
};
HadamardParts hadamard_weight_parts_cuda(int64_t out, int64_t features);

// The gradients of the factors; null if not wanted.
struct HadamardFactors {
  float *w1_a, *w1_b, *w2_a, *w2_b;
};
// `p` has room for the parts, `out` gets their sums.
void hadamard_weight_backward_cuda(const HadamardWeightBackwardParams& p, const HadamardFactors& out, void* stream);

}  // namespace peftk
