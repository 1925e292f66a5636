#include "../hadamard.h"

#include "launch.h"
#include "pieces.h"
#include "sums.h"

namespace peftk {
namespace {

// A tile of the weight: a warp lies along its columns, and every thread has four rows and four columns of it.
constexpr int kLohaThreads = 256, kLohaWarp = 32, kLohaShare = 4;
constexpr int kLohaRows = kLohaThreads / kLohaWarp * kLohaShare, kLohaColumns = kLohaWarp * kLohaShare;
// Ranks that are staged together.
constexpr int kLohaDepth = 16;
// Groups of rows whose gradients are summed apart, at most.
constexpr int64_t kLohaChunks = 16;

using LohaLeft = float[kLohaRows][kLohaDepth + 1];
using LohaRight = float[kLohaDepth][kLohaColumns];
// Both products of a thread's part of the tile.
using LohaProducts = float[2][kLohaShare][kLohaShare];

template <typename P>
__device__ __forceinline__ void multiply_tile(const P& p, int64_t first_row, int64_t first_column, LohaLeft& left,
                                              LohaRight& right, LohaProducts& products) {
  const int lane = threadIdx.x % kLohaWarp, group = threadIdx.x / kLohaWarp;
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    const float* a = pair == 0 ? p.w1_a : p.w2_a;
    const float* b = pair == 0 ? p.w1_b : p.w2_b;
    const int64_t rank = pair == 0 ? p.r1 : p.r2;
#pragma unroll
    for (int i = 0; i < kLohaShare; ++i)
#pragma unroll
      for (int j = 0; j < kLohaShare; ++j) products[pair][i][j] = 0.0f;
    for (int64_t start = 0; start < rank; start += kLohaDepth) {
      // What the stage before has read may now be written.
      __syncthreads();
      for (int at = threadIdx.x; at < kLohaRows * kLohaDepth; at += kLohaThreads) {
        const int64_t row = first_row + at / kLohaDepth, k = start + at % kLohaDepth;
        left[at / kLohaDepth][at % kLohaDepth] = row < p.out && k < rank ? a[row * rank + k] : 0.0f;
      }
      for (int at = threadIdx.x; at < kLohaDepth * kLohaColumns; at += kLohaThreads) {
        const int64_t k = start + at / kLohaColumns, column = first_column + at % kLohaColumns;
        right[at / kLohaColumns][at % kLohaColumns] = k < rank && column < p.features ? b[k * p.stride + column] : 0.0f;
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kLohaDepth; ++k)
#pragma unroll
        for (int i = 0; i < kLohaShare; ++i)
#pragma unroll
          for (int j = 0; j < kLohaShare; ++j)
            products[pair][i][j] =
                fmaf(left[group * kLohaShare + i][k], right[k][lane + j * kLohaWarp], products[pair][i][j]);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kLohaThreads) hadamard_weight_kernel(HadamardWeightParams p) {
  PEFTK_SHARED(float, left, [kLohaRows][kLohaDepth + 1]);
  PEFTK_SHARED(float, right, [kLohaDepth][kLohaColumns]);
  const int lane = threadIdx.x % kLohaWarp, group = threadIdx.x / kLohaWarp;
  const int64_t tiles = (p.features + kLohaColumns - 1) / kLohaColumns;
  const int64_t first_row = blockIdx.x / tiles * kLohaRows, first_column = blockIdx.x % tiles * kLohaColumns;
  LohaProducts products;
  multiply_tile(p, first_row, first_column, left, right, products);
  const T* weight = static_cast<const T*>(p.weight);
  T* result = static_cast<T*>(p.result);
#pragma unroll
  for (int i = 0; i < kLohaShare; ++i)
#pragma unroll
    for (int j = 0; j < kLohaShare; ++j) {
      const int64_t row = first_row + group * kLohaShare + i, column = first_column + lane + j * kLohaWarp;
      if (row >= p.out || column >= p.features) continue;
      const float base = to_float(weight[row * p.features + column]);
      const float delta = products[0][i][j] * products[1][i][j] * p.scale;
      // -0.0 + 0.0 is +0.0: where nothing is added, every bit of the weight stays.
      from_float(delta == 0.0f ? base : base + delta, result[row * p.features + column]);
    }
}

// One tile of columns, and the rows of one chunk after another: the gradients that they alone give the factors. Each
// sum belongs to one thread, which adds in a fixed order.
template <typename T>
__global__ void __launch_bounds__(kLohaThreads) hadamard_weight_backward_kernel(HadamardWeightBackwardParams p) {
  PEFTK_SHARED(float, left, [kLohaRows][kLohaDepth + 1]);
  PEFTK_SHARED(float, right, [kLohaDepth][kLohaColumns]);
  PEFTK_SHARED(float, tile, [kLohaRows][kLohaColumns + 1]);
  const int lane = threadIdx.x % kLohaWarp, group = threadIdx.x / kLohaWarp;
  const int64_t tiles = (p.features + kLohaColumns - 1) / kLohaColumns;
  const int64_t chunk = blockIdx.x / tiles, columns_before = blockIdx.x % tiles,
                first_column = columns_before * kLohaColumns;
  const int64_t first = chunk * p.chunk, last = first + p.chunk < p.out ? first + p.chunk : p.out;
  const int columns =
      static_cast<int>(p.features - first_column < kLohaColumns ? p.features - first_column : kLohaColumns);
  for (int64_t first_row = first; first_row < last; first_row += kLohaRows) {
    const int rows = static_cast<int>(last - first_row < kLohaRows ? last - first_row : kLohaRows);
    LohaProducts products;
    multiply_tile(p, first_row, first_column, left, right, products);
    float grad[kLohaShare][kLohaShare];
#pragma unroll
    for (int i = 0; i < kLohaShare; ++i)
#pragma unroll
      for (int j = 0; j < kLohaShare; ++j) {
        const int row = group * kLohaShare + i, column = lane + j * kLohaWarp;
        const int64_t at = (first_row + row) * p.features + first_column + column;
        grad[i][j] = row < rows && column < columns ? to_float(static_cast<const T*>(p.grad)[at]) * p.scale : 0.0f;
      }
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      float* const da = pair == 0 ? p.dw1_a : p.dw2_a;
      float* const db = pair == 0 ? p.dw1_b : p.dw2_b;
      if (da == nullptr && db == nullptr) continue;
      const float* a = pair == 0 ? p.w1_a : p.w2_a;
      const float* b = pair == 0 ? p.w1_b : p.w2_b;
      const int64_t rank = pair == 0 ? p.r1 : p.r2;
      // What the pair before has read may now be written.
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kLohaShare; ++i)
#pragma unroll
        for (int j = 0; j < kLohaShare; ++j)
          tile[group * kLohaShare + i][lane + j * kLohaWarp] = grad[i][j] * products[1 - pair][i][j];
      __syncthreads();
      for (int64_t at = threadIdx.x; da != nullptr && at < kLohaRows * rank; at += kLohaThreads) {
        const int row = static_cast<int>(at % kLohaRows);
        const int64_t k = at / kLohaRows;
        if (row >= rows) continue;
        float sum = 0.0f;
        for (int column = 0; column < columns; ++column)
          sum = fmaf(tile[row][column], b[k * p.stride + first_column + column], sum);
        da[(columns_before * p.out + first_row + row) * rank + k] = sum;
      }
      for (int64_t at = threadIdx.x; db != nullptr && at < kLohaColumns * rank; at += kLohaThreads) {
        const int column = static_cast<int>(at % kLohaColumns);
        const int64_t k = at / kLohaColumns;
        if (column >= columns) continue;
        float* const place = db + (chunk * rank + k) * p.stride + first_column + column;
        float sum = first_row == first ? 0.0f : *place;
        for (int row = 0; row < rows; ++row) sum = fmaf(a[(first_row + row) * rank + k], tile[row][column], sum);
        *place = sum;
      }
    }
  }
}

}  // namespace

HadamardParts hadamard_weight_parts_cuda(int64_t out, int64_t features) {
  const int64_t rows = (out + kLohaRows - 1) / kLohaRows;
  const int64_t chunk = (rows + kLohaChunks - 1) / kLohaChunks * kLohaRows;
  return {(features + kLohaColumns - 1) / kLohaColumns, chunk, chunk == 0 ? 0 : (out + chunk - 1) / chunk};
}

void hadamard_weight_backward_cuda(const HadamardWeightBackwardParams& p, const HadamardFactors& out, void* stream) {
  const HadamardParts parts = hadamard_weight_parts_cuda(p.out, p.features);
  const dim3 grid(static_cast<unsigned>(parts.tiles * parts.chunks));
  const auto queue = static_cast<cudaStream_t>(stream);
  // Of no elements nothing is launched, and the sums are zero.
  if (grid.x > 0) switch (p.dtype) {
      case Dtype::float32:
        PEFTK_LAUNCH((hadamard_weight_backward_kernel<float>), grid, dim3(kLohaThreads), 0, queue, p);
        break;
      case Dtype::bfloat16:
        PEFTK_LAUNCH((hadamard_weight_backward_kernel<__nv_bfloat16>), grid, dim3(kLohaThreads), 0, queue, p);
        break;
      case Dtype::float16:
        PEFTK_LAUNCH((hadamard_weight_backward_kernel<__half>), grid, dim3(kLohaThreads), 0, queue, p);
        break;
    }
  sum_parts(p.dw1_a, parts.tiles, p.out * p.r1, 1.0f, out.w1_a, queue);
  sum_parts(p.dw1_b, parts.chunks, p.r1 * p.features, 1.0f, out.w1_b, queue);
  sum_parts(p.dw2_a, parts.tiles, p.out * p.r2, 1.0f, out.w2_a, queue);
  sum_parts(p.dw2_b, parts.chunks, p.r2 * p.features, 1.0f, out.w2_b, queue);
}

void hadamard_weight_cuda(const HadamardWeightParams& p, void* stream) {
  const int64_t rows = (p.out + kLohaRows - 1) / kLohaRows, columns = (p.features + kLohaColumns - 1) / kLohaColumns;
  if (rows * columns == 0) return;
  const dim3 grid(static_cast<unsigned>(rows * columns));
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case Dtype::float32: PEFTK_LAUNCH((hadamard_weight_kernel<float>), grid, dim3(kLohaThreads), 0, queue, p); break;
    case Dtype::bfloat16:
      PEFTK_LAUNCH((hadamard_weight_kernel<__nv_bfloat16>), grid, dim3(kLohaThreads), 0, queue, p);
      break;
    case Dtype::float16: PEFTK_LAUNCH((hadamard_weight_kernel<__half>), grid, dim3(kLohaThreads), 0, queue, p); break;
  }
}

}  // namespace peftk
