#include "../hadamard.h"

#include "launch.h"
#include "pieces.h"

namespace peftk {
namespace {

// A tile of the weight: a warp lies along its columns, and every thread has four rows and four columns of it.
constexpr int kLohaThreads = 256, kLohaWarp = 32, kLohaShare = 4;
constexpr int kLohaRows = kLohaThreads / kLohaWarp * kLohaShare, kLohaColumns = kLohaWarp * kLohaShare;
// Ranks that are staged together.
constexpr int kLohaDepth = 16;

template <typename T>
__global__ void __launch_bounds__(kLohaThreads) hadamard_weight_kernel(HadamardWeightParams p) {
  PEFTK_SHARED(float, left, [kLohaRows][kLohaDepth + 1]);
  PEFTK_SHARED(float, right, [kLohaDepth][kLohaColumns]);
  const int lane = threadIdx.x % kLohaWarp, group = threadIdx.x / kLohaWarp;
  const int64_t tiles = (p.features + kLohaColumns - 1) / kLohaColumns;
  const int64_t first_row = blockIdx.x / tiles * kLohaRows, first_column = blockIdx.x % tiles * kLohaColumns;
  float products[2][kLohaShare][kLohaShare] = {};
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    const float* a = pair == 0 ? p.w1_a : p.w2_a;
    const float* b = pair == 0 ? p.w1_b : p.w2_b;
    const int64_t rank = pair == 0 ? p.r1 : p.r2;
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

}  // namespace

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
