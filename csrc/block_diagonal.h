// Block rotation: y[t, n*b + j] = sum_k x[t, n*b + k] * blocks[n, k, j].
#pragma once
#include <cstdint>

#include "dtype.h"

namespace peftk {

struct BlockRotateParams {
  const void* x;        // (rows, count * size)
  const float* blocks;  // (count, size, size)
  void* y;              // (rows, count * size)
  int64_t rows, count, size;
  bool transpose;  // multiply by the transposed blocks
  Dtype dtype;     // of x and y
};

struct BlockRotateBackwardParams {
  const void* grad;     // (rows, count * size)
  const void* x;        // (rows, count * size)
  const float* blocks;  // (count, size, size)
  void* dx;             // (rows, count * size), may be grad itself; null if not wanted
  float* partial;       // workspace of the sums; null if the gradient of the blocks is not wanted
  int64_t rows, count, size;
  int64_t chunks;  // CPU only: the rows are cut into this many pieces, which sum apart
  bool transpose;
  Dtype dtype;
};

// Largest block of the CPU kernels. torch's products are faster above, and every chunk of the rows sums in a matrix of
// this size.
constexpr int64_t kCpuRotateSize = 256;

// Rows of a tile: x, y and the block stay in the first-level cache together. A multiple of the six of a strip.
constexpr int64_t kRotateRows = 48;

// The rotation of few rows, in floats and with the blocks as they lie in memory: laying them out takes longer.
struct BlockRotateFewParams {
  const void* x;        // (rows, count * size)
  const float* blocks;  // (count, size, size), or (1, size, size) if shared
  float* y;             // (rows, count * size)
  int64_t rows, count, size;
  bool shared;
  Dtype dtype;  // of x
};

// Blocks begin to end of every row.
void block_rotate_few_cpu(const BlockRotateFewParams& p, int64_t begin, int64_t end);
// `partial` is (chunks, count, size, padded(size)) and zeroed.
void block_rotate_cpu(const BlockRotateParams& p, const float* packed, int64_t begin, int64_t end);
void block_rotate_backward_cpu(const BlockRotateBackwardParams& p, const float* packed, int64_t begin, int64_t end);
// Whether a vector of features holds whole blocks, which are then taken together.
constexpr bool fit_a_vector(int64_t count, int64_t size) {
  return (size == 2 || size == 4 || size == 8) && count * size % 8 == 0;
}
// Lay blocks begin to end out as the kernels read them, transposed where asked: with padded rows, (count, size,
// padded(size)), or where they fit a vector, (groups, size, 8) with the k-th rows of all blocks of a group in one.
void pack_blocks_cpu(const float* blocks, int64_t count, int64_t size, bool transpose, float* packed, int64_t begin,
                     int64_t end);
// Largest block of the CUDA kernels; matrix instructions are faster above.
constexpr int64_t kCudaRotateSize = 16;

// The stream is a cudaStream_t. A launch that fails throws a std::runtime_error that names the kernel.
void block_rotate_cuda(const BlockRotateParams& p, void* stream);
// `dblocks` (count, size, size) is null if not wanted; without rows it becomes zero.
void block_rotate_backward_cuda(const BlockRotateBackwardParams& p, float* dblocks, void* stream);
// How many floats `partial` must hold; they need not be initialised.
int64_t block_rotate_partials_cuda(const BlockRotateBackwardParams& p);

}  // namespace peftk
