// The Kronecker product of LoKr. The large factor w2 is multiplied by torch's library; here is what the small one does
// to every token, and the weight with the product added.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace peftk {

// out[t, i, k] = scale * sum_j sum_n w1[i, j] w2[k, n] x[t, j, n]
struct KroneckerFewParams {
  const float* x;        // (tokens, m, n)
  const float *w1, *w2;  // (l, m), (k, n)
  float* out;            // (tokens, l, k)
  int64_t tokens, l, m, k, n;
  float scale;
};

// mixed_left[t] (+)= w1 @ right[t]; mixed_right[t] (+)= w1.T @ left[t]; partial = sum over t of left[t] @ right[t].T
struct KroneckerMixParams {
  const void* left;   // (tokens, left_size, columns); null if nothing asks for it
  const void* right;  // (tokens, right_size, columns); null if nothing asks for it
  const float* w1;    // (left_size, right_size), the scale multiplied in
  void* mixed_left;   // like left; null if not wanted
  void* mixed_right;  // like right; null if not wanted
  float* partial;     // (chunks, left_size, right_size); null if not wanted
  int64_t tokens, left_size, right_size, columns, chunks;
  bool add_left, add_right;  // onto what mixed_left and mixed_right hold
  Dtype dtype;
};

// Chunks of the tokens, begin to end; every chunk sums over its tokens in their order.
void kronecker_mix_cpu(const KroneckerMixParams& p, int64_t begin, int64_t end);

// out = weight + scale * kron(w1, w2)
struct KroneckerWeightParams {
  const void* weight;  // (left * rows, middle * columns)
  const float* w1;     // (left, middle)
  const float* w2;     // (rows, columns)
  void* out;           // like weight
  int64_t left, middle, rows, columns;
  float scale;
  Dtype dtype;
};

// Rows of the weight, begin to end.
void kronecker_weight_cpu(const KroneckerWeightParams& p, int64_t begin, int64_t end);

// The gradients from that of the weight: dw1[l, m] = scale * sum w2[k, n] g[l, k, m, n], and
// dw2[k, n] = scale * sum w1[l, m] g[l, k, m, n].
struct KroneckerWeightBackwardParams {
  const void* grad;  // (left * rows, middle * columns)
  const float* w1;   // (left, middle)
  const float* w2;   // (rows, columns)
  float* partial;    // (chunks, left, middle), without the scale; null if not wanted
  float* dw2;        // (rows, columns); null if not wanted
  int64_t left, middle, rows, columns;
  int64_t chunks;  // the rows of w2 are cut into this many pieces
  float scale;
  Dtype dtype;
};

// Chunks of the rows of w2, begin to end.
void kronecker_weight_backward_cpu(const KroneckerWeightBackwardParams& p, int64_t begin, int64_t end);

// Most rows of w2 that the CUDA kernels of the gradients take.
constexpr int64_t kMostCudaRows = 65535;

// The stream is a cudaStream_t. A launch that fails throws a std::runtime_error that names the kernel.
void kronecker_weight_cuda(const KroneckerWeightParams& p, void* stream);
// Pieces that the rows of w2 are best cut into, from the shape alone.
int64_t kronecker_weight_chunks_cuda(int64_t entries, int64_t rows);
// `dw1` (left, middle) is the sum of the partials; null if not wanted.
void kronecker_weight_backward_cuda(const KroneckerWeightBackwardParams& p, float* dw1, void* stream);

// For few tokens. The range is of rows of w2.
void kronecker_few_cpu(const KroneckerFewParams& p, int64_t begin, int64_t end);

}  // namespace peftk
