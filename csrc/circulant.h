// Circular convolution by blocks, in frequency space and as a dense weight.
//
// Spectra of activations lie in planes, (rows, blocks, 2, lanes): the real and the imaginary part of each lane. Those
// of kernels have three planes (a, s, c), (out_blocks, in_blocks, 3, lanes), which multiply a lane to
//   re' = a re + s im, im' = c im - s re,
// and, in the adjoint, to re' = a re - s im, im' = c im + s re.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace peftk {

struct CirculantMixParams {
  const void* x;        // (rows, blocks of x, 2, lanes)
  const float* kernel;  // (out_blocks, in_blocks, 3, lanes)
  void* out;            // (rows, blocks of out, 2, lanes)
  int64_t rows, out_blocks, in_blocks, lanes;
  bool adjoint;  // x has out_blocks and out has in_blocks
  Dtype dtype;   // of x and out
};

struct CirculantContractParams {
  const void* grad;  // (rows, out_blocks, 2, lanes)
  const void* x;     // (rows, in_blocks, 2, lanes)
  float* partial;    // (chunks, out_blocks, in_blocks, 3, lanes): sums of the products over each chunk of rows
  int64_t rows, out_blocks, in_blocks, lanes, chunks;
  Dtype dtype;  // of grad and x
};

// out[m b + p, n b + q] = weight[m b + p, n b + q] + scale * kernel[m, n, (q - p) mod b]
struct CirculantWeightParams {
  const void* weight;   // (out_blocks * size, in_blocks * size); null for zero
  const float* kernel;  // (out_blocks, in_blocks, size)
  void* out;            // as weight
  int64_t out_blocks, in_blocks, size;
  float scale;
  Dtype dtype;  // of weight and out
};

// out[t, m b + p] = scale * sum_n sum_q kernel[m, n, (q - p) mod b] * x[t, n b + q]
struct CirculantFewParams {
  const float* x;       // (rows, in_blocks * size)
  const float* kernel;  // (out_blocks, in_blocks, size)
  float* out;           // (rows, out_blocks * size)
  int64_t rows, out_blocks, in_blocks, size;
  float scale;
};

// dkernel[m, n, l] = scale * sum_p grad[m b + p, n b + (p + l) mod b]
struct CirculantWeightBackwardParams {
  const void* grad;  // (out_blocks * size, in_blocks * size)
  float* dkernel;    // (out_blocks, in_blocks, size)
  int64_t out_blocks, in_blocks, size;
  float scale;
  Dtype dtype;  // of grad
};

// Lanes are padded to whole vectors, so that no loop has a remainder.
constexpr int64_t kCirculantLanes = 8;
// Rows that share a pass over the spectrum of the kernel; a task is a whole number of them.
constexpr int64_t kMixRows = 4;

// The range is one of groups of kMixRows rows.
void circulant_mix_cpu(const CirculantMixParams& p, int64_t begin, int64_t end);
// The range is one of chunks; `partial` is zeroed.
void circulant_contract_cpu(const CirculantContractParams& p, int64_t begin, int64_t end);
// The ranges are of rows of blocks.
void circulant_weight_cpu(const CirculantWeightParams& p, int64_t begin, int64_t end);
void circulant_weight_backward_cpu(const CirculantWeightBackwardParams& p, int64_t begin, int64_t end);

// For few rows: the sums as they are written, without spectra. The range is of rows of blocks.
void circulant_few_cpu(const CirculantFewParams& p, int64_t begin, int64_t end);

// The stream is a cudaStream_t. A launch that fails throws a std::runtime_error that names the kernel.
void circulant_mix_cuda(const CirculantMixParams& p, void* stream);
// `partial` need not be initialised; `out` (out_blocks, in_blocks, 3, lanes) is the sum of its chunks.
void circulant_contract_cuda(const CirculantContractParams& p, float* out, void* stream);
void circulant_weight_cuda(const CirculantWeightParams& p, void* stream);
void circulant_weight_backward_cuda(const CirculantWeightBackwardParams& p, void* stream);

}  // namespace peftk
